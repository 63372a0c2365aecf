"""config.json to ModelConfig and back."""

import json
import pathlib
from typing import Any

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.hf.families import family_of
from jaxlm.hf.fields import Fields
from jaxlm.models.config import ModelConfig


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from disk; CheckpointError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; expected a Hugging Face model folder") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # damaged text, a number too long, deep nesting
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json's content as a ModelConfig.

    Raises:
      ConfigError: names the field: an unknown model_type, a missing or malformed value, or a
        field that would change the maths and is not expressed here.
    """
    fields = Fields(raw)
    config = family_of(fields.take("model_type", None)).read(fields)
    fields.finish()
    return config


def to_hf(config: ModelConfig, **extra: Any) -> dict[str, Any]:
    """A ModelConfig as a config.json's content; `extra` fields (token ids, dtype) are added.

    Raises: ConfigError when the family's config.json cannot express the model.
    """
    family = family_of(config.family)
    raw = {"architectures": [family.architecture], "model_type": config.family,
           **family.write(config), **extra}
    if (back := from_hf(raw)) != config:
        wrong = [name for name in vars(config) if getattr(back, name) != getattr(config, name)]
        raise ConfigError(
            f"a {config.family!r} config.json cannot express {', '.join(wrong)} = "
            f"{[getattr(config, name) for name in wrong]}; choose a family that can"
        )
    return raw
