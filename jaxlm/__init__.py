"""JAX language models from Hugging Face checkpoints, as pure functions over plain pytrees."""

__version__ = "0.1.0"
