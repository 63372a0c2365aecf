"""A cache kind for each layer, in a file that names the model it was found for."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jaxlm.cache.base import CacheKind
from jaxlm.cache.parse import cache_name, parse_cache
from jaxlm.core.errors import ConfigError
from jaxlm.models.config import ModelConfig

SIZES = ("family", "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
         "ffn_dim")


def write_policy(
    path: str | os.PathLike, config: ModelConfig, kinds: tuple[CacheKind, ...],
    found: dict[str, Any] | None = None,
) -> None:
    """Write one kind a layer as JSON.

    Args: found: what was measured, for the reader; not read back.
    """
    layers = [cache_name(kind) for kind in kinds]
    text = json.dumps({"model": _sizes(config), "layers": layers, "found": found or {}}, indent=1)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def read_policy(path: str | os.PathLike, config: ModelConfig) -> tuple[CacheKind, ...]:
    """One kind a layer.

    Args: config: the model that the kinds are for; its family and sizes must be the file's.
    Raises: ConfigError for a file that cannot be read, or is for another model.
    """
    try:
        policy = json.loads(Path(path).read_text())
        model, names = policy["model"], policy["layers"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no cache policy ({error!r}); write one with "
                          "`jaxlm tune-cache`") from error
    if model != _sizes(config):
        differ = {name: (model.get(name) if isinstance(model, dict) else model, value)
                  for name, value in _sizes(config).items()
                  if not isinstance(model, dict) or model.get(name) != value}
        raise ConfigError(f"{path} is for another model: (file's, model's) {differ}; write one for "
                          "this model with `jaxlm tune-cache`")
    if (not isinstance(names, list) or len(names) != config.num_layers
            or not all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{path} lists {names!r}; expected {config.num_layers} names of kinds")
    return tuple(parse_cache(name) for name in names)


def open_cache(text: str, config: ModelConfig) -> CacheKind | tuple[CacheKind, ...]:
    """A kind by name, or the kinds of a policy file, which ends in .json."""
    return read_policy(text, config) if text.endswith(".json") else parse_cache(text)


def read_kinds(cache: Any, config: ModelConfig) -> Any:
    """A kind, or one a layer, checked; each may be given by name, or all by a policy file.

    Raises: ConfigError for what is no kind, a class of kinds for one.
    """
    if isinstance(cache, list | tuple):
        return tuple(None if one is None else read_kinds(one, config) for one in cache)
    if isinstance(cache, str):
        return open_cache(cache, config)
    if isinstance(cache, type) or not hasattr(cache, "flush_every"):
        shown = f"the class {cache.__name__}" if isinstance(cache, type) else repr(cache)
        raise ConfigError(f"cache is {shown}; expected a kind, such as jaxlm.Dense(), or its name, "
                          "such as 'kivi2', or one a layer")
    return cache


def _sizes(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: values[name] for name in SIZES}
