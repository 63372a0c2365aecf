"""jaxlm: Hugging Face checkpoints in JAX, with the methods that go on top of them."""

__version__ = "0.1.0"
