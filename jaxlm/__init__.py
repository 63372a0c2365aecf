"""JAX language models from Hugging Face checkpoints, as pure functions over plain pytrees."""

__all__ = ["__version__"]
__version__ = "0.1.0"
