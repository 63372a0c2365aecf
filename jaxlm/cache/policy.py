"""A cache kind for each layer, in a file that names the model it was found for."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.parse import cache_name, parse_cache
from jaxlm.core.errors import ConfigError
from jaxlm.core.hosts import readable
from jaxlm.core.tree import Params
from jaxlm.models.config import ModelConfig

SIZES = ("family", "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
         "ffn_dim")
WEIGHTS = 8  # of a kernel, as numbers and not as a hash: dtypes round them


def write_policy(
    path: str | os.PathLike, config: ModelConfig, kinds: tuple[CacheKind, ...],
    found: dict[str, Any] | None = None, name: str | None = None, params: Params | None = None,
) -> None:
    """Write one kind a layer as JSON.

    Args:
      found: what was measured, for the reader; not read back.
      name: of the model, for the reader.
      params: the model's; a few of its weights let `read_policy` tell it from its equals in size.
    """
    layers = [cache_name(kind) for kind in kinds]
    policy = {"name": name, "model": _sizes(config), "weights": few_weights(params or {}),
              "layers": layers, "found": found or {}}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(policy, indent=1) + "\n")
    part.replace(path)


def read_policy(path: str | os.PathLike, config: ModelConfig,
                params: Params | None = None) -> tuple[CacheKind, ...]:
    """One kind a layer.

    Args:
      config: the model that the kinds are for; its family and sizes must be the file's.
      params: its parameters; where the file holds weights, and these can be looked at here and
        now, they must be the same. None: they are not compared.
    Raises: ConfigError for a file that cannot be read, or is for another model.
    """
    try:
        policy = json.loads(Path(path).read_text())
        model, names = policy["model"], policy["layers"]
        weights = {place: np.asarray(numbers, np.float64)
                   for place, numbers in policy.get("weights", {}).items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError,
            ValueError) as error:
        raise ConfigError(f"{path} is no cache policy ({error!r}); write one with "
                          "`jaxlm tune-cache`") from error
    if model != _sizes(config):
        differ = {name: (model.get(name) if isinstance(model, dict) else model, value)
                  for name, value in _sizes(config).items()
                  if not isinstance(model, dict) or model.get(name) != value}
        raise ConfigError(f"{path} is for another model: (file's, model's) {differ}; write one for "
                          "this model with `jaxlm tune-cache`")
    for place, numbers in few_weights(params or {}).items():
        if place in weights and not _alike(weights[place], np.asarray(numbers)):
            whose = policy.get("name") or "another model"
            raise ConfigError(
                f"{path} was measured on {whose} of the same sizes, but with other weights: "
                f"{place} begins with {weights[place].tolist()}, the model's with {numbers}; write "
                "one for this model with `jaxlm tune-cache`")
    if (not isinstance(names, list) or len(names) != config.num_layers
            or not all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{path} lists {names!r}; expected {config.num_layers} names of kinds")
    return tuple(parse_cache(name) for name in names)


def few_weights(params: Params) -> dict[str, list[float]]:
    """Numbers that tell checkpoints of equal sizes apart: the first weights of the projections of
    keys, in the first layer and the last. Empty where they cannot be looked at here and now."""
    layers = sorted((name for name in params if re.fullmatch(r"layers_\d+", name)),
                    key=lambda name: int(name.removeprefix("layers_")))
    kernels = {name: params[name].get("attn", {}).get("k", {}).get("kernel")
               for name in (*layers[:1], *layers[-1:])}
    return {f"{name}/attn/k/kernel": np.asarray(kernel[0].reshape(-1)[:WEIGHTS],
                                                np.float64).tolist()
            for name, kernel in kernels.items()
            if isinstance(kernel, jax.Array | np.ndarray) and readable(kernel)}


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether weights are the same up to the dtypes that they were loaded in."""
    return one.shape == other.shape and np.allclose(one, other, rtol=2.0**-7, atol=1e-6)


def open_cache(text: str, config: ModelConfig,
               params: Params | None = None) -> CacheKind | tuple[CacheKind, ...]:
    """A kind by name, or the kinds of a policy file, which ends in .json; see `read_policy`."""
    return read_policy(text, config, params) if text.endswith(".json") else parse_cache(text)


def read_kinds(cache: Any, config: ModelConfig, params: Params | None = None) -> Any:
    """A kind, or one a layer, checked; each may be given by name, or all by a policy file.

    Args: params: the model's, which a policy file must have been measured on; see `read_policy`.

    Raises: ConfigError for what is no kind, a class of kinds for one.
    """
    if isinstance(cache, list | tuple):
        return tuple(None if one is None else read_kinds(one, config, params) for one in cache)
    if isinstance(cache, str):
        return open_cache(cache, config, params)
    if isinstance(cache, type) or not hasattr(cache, "flush_every"):
        shown = f"the class {cache.__name__}" if isinstance(cache, type) else repr(cache)
        raise ConfigError(f"cache is {shown}; expected a kind, such as jaxlm.Dense(), or its name, "
                          "such as 'kivi2', or one a layer")
    return cache


def _sizes(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: values[name] for name in SIZES}
