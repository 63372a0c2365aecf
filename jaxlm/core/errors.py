"""Errors that say what was wrong, what came, what was expected, and what to do."""


class JaxlmError(ValueError):
    """Base of every error that jaxlm raises on bad input."""


class ConfigError(JaxlmError):
    """A configuration that cannot be honoured; the message names the field."""


class ShapeError(JaxlmError):
    """An array or prompt of the wrong size."""


class CheckpointError(JaxlmError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class TokenizerError(JaxlmError):
    """Text or token ids that the tokenizer or the model does not know."""


class DeviceError(JaxlmError):
    """A device or a mesh that is not there."""


class NumericsError(JaxlmError):
    """A NaN or an infinity where a number was expected."""
