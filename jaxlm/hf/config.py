"""config.json to ModelConfig and back."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.hf.families import family_of
from jaxlm.hf.fields import Fields
from jaxlm.models.config import ModelConfig

CLASSIFIERS = ("SequenceClassification", "TokenClassification")
REWARDS = ("RewardModel", "ProcessRewardModel")  # Qwen's: 1 label a text, 2 labels a token


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


def from_hf(raw: dict[str, Any], ignore: Sequence[str] = ()) -> ModelConfig:
    """A config.json's content as a ModelConfig.

    Args: ignore: unknown fields that the caller knows not to change the maths.

    Raises:
      ConfigError: names the field: an unknown model_type, a missing or malformed value, or a
        field that would change the maths and is not expressed here.
    """
    if isinstance(ignore, str):
        raise ConfigError(f"ignore_fields is {ignore!r}; expected a list of names")
    fields = Fields(raw)
    config = family_of(fields.take("model_type", None)).read(fields)
    for name in ("num_labels", "token_classification_bias"):  # read by `labels_from_hf`
        fields.take(name, None)
    fields.finish(ignore)
    return config


def labels_from_hf(raw: dict[str, Any]) -> tuple[int | None, bool]:
    """How many labels a checkpoint has, None for a language model, and whether it labels tokens.

    Raises: ConfigError for an `architectures` that is neither, and for unclear labels.
    """
    given = raw.get("architectures") or ["ForCausalLM"]
    names = given if isinstance(given, list) else [given]
    kind = str(names[0]).rpartition("For")[2]
    if len(names) != 1 or kind not in ("CausalLM", *CLASSIFIERS, *REWARDS):
        raise ConfigError(
            f"config.json: field 'architectures' is {given!r}; supported: one name that ends in "
            "ForCausalLM, ForSequenceClassification or ForTokenClassification, or Qwen's in "
            "ForRewardModel or ForProcessRewardModel"
        )
    if kind == "CausalLM":
        return None, False
    if kind in REWARDS:  # the number is the class's own, whatever the file says
        return 1 + REWARDS.index(kind), kind == REWARDS[1]
    fields = Fields(raw)
    named = len(fields.take("id2label", {}, dict)) or None
    labels = fields.count("num_labels", named or 2)  # transformers leaves out a count of 2
    if named is not None and named != labels:
        raise ConfigError(
            f"config.json: num_labels is {labels} but id2label has {named}; remove the wrong one"
        )
    if kind == CLASSIFIERS[1]:
        fields.expect("token_classification_bias", True)
    return labels, kind == CLASSIFIERS[1]


def has_deep_head(raw: dict[str, Any]) -> bool:
    """Whether a checkpoint's labels stand behind a hidden layer, as in Qwen's reward models.

    >>> has_deep_head({"architectures": ["Qwen2ForProcessRewardModel"]})
    True
    """
    given = raw.get("architectures") or [""]
    name = given[0] if isinstance(given, list) else given
    return str(name).rpartition("For")[2] in REWARDS


def to_hf(
    config: ModelConfig, labels: int | None = None, per_token: bool = False,
    deep_head: bool = False, **extra: Any,
) -> dict[str, Any]:
    """A ModelConfig as a config.json's content; `extra` fields (token ids, dtype) are added.

    Raises:
      ConfigError: the family's config.json cannot express the model, or transformers has no such
        classifier.
    """
    family = family_of(config.family)
    name: str | None = family.architecture
    if labels is not None:
        name = family.token if per_token else family.sequence
        if deep_head:  # of code that comes with Qwen's checkpoints; transformers has none
            if config.family != "qwen2" or labels != 1 + per_token:
                raise ConfigError(
                    f"only Qwen 2's reward models have a head with a hidden layer, of 1 label a "
                    f"text or 2 a token; this is {config.family!r} with {labels}"
                )
            name = f"Qwen2For{REWARDS[per_token]}"
        if name is None:
            raise ConfigError(
                f"transformers has no {CLASSIFIERS[per_token]} for family {config.family!r}; "
                "save the parameters without their label head, or choose another family"
            )
        if len(extra.get("id2label") or {}) != labels:
            extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            extra["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    raw = {"architectures": [name], "model_type": config.family, **family.write(config), **extra}
    if (back := from_hf(raw)) != config:
        wrong = [name for name in vars(config) if getattr(back, name) != getattr(config, name)]
        raise ConfigError(
            f"a {config.family!r} config.json cannot express {', '.join(wrong)} = "
            f"{[getattr(config, name) for name in wrong]}; choose a family that can"
        )
    return raw
