"""Errors that say what was wrong, what came, what was expected, and what to do."""

import math
from typing import Any

import numpy as np


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


class DataError(JaxlmError):
    """A data file that cannot be read; the message names the file and the line."""


class NumericsError(JaxlmError):
    """A NaN or an infinity where a number was expected."""


def whole(name: str, value: Any, low: int = 1, high: int = 2**31 - 1) -> int:
    """`value` as an int; numpy's integers count, booleans and floats do not.

    Raises: ConfigError outside [low, high]; the default bound is what an int32 index can reach.

    >>> whole("batch", np.int64(8))
    8
    """
    fine = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not fine or not low <= value <= high:
        plain = high == 2**31 - 1 and not (fine and value > high)
        limits = f"of at least {low}" if plain else f"from {low} to {high}"
        raise ConfigError(f"{name} is {value!r}; expected a whole number {limits}")
    return int(value)


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """ConfigError unless `value` is finite and in [low, high]; booleans are no numbers."""
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not math.isfinite(value) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ConfigError(f"{name} is {value!r}; expected a number {limits}")


def flag(name: str, value: Any) -> None:
    """ConfigError unless `value` is True or False: any text would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected True or False")


def unicode(name: str, text: str, error: type[JaxlmError] = ConfigError) -> None:
    """`error` for a text that no file and no tokenizer can hold: one with half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as found:
        raise error(f"{name} holds {text[found.start]!r} at character {found.start}, which is no "
                    "character; expected valid Unicode, such as bytes decoded as UTF-8") from found


def share(name: str, value: Any) -> None:
    """ConfigError unless `value` is in [0, 1)."""
    number(name, value)
    if value >= 1:
        raise ConfigError(f"{name} is {value!r}; expected a share in [0, 1)")
