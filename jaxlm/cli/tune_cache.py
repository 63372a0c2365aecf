"""`jaxlm tune-cache`: a cache kind for every layer, chosen on a text."""

from itertools import groupby
from typing import Annotated

import jax.numpy as jnp
import tyro

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.cache.parse import cache_name, parse_cache
from jaxlm.cache.policy import write_policy
from jaxlm.cli.options import Loading, Model, columns, note, open_model, read_text
from jaxlm.eval.tune_cache import layer_bytes, tune

File = Annotated[str, tyro.conf.arg(metavar="FILE")]


def run(
    model: Model, text: File, /, out: str = "cache_policy.json",
    candidates: tuple[str, ...] = ("squat2", "squat4v2", "squat4", "squat8", "dense"),
    budget: float = 0.3, tokens: int = 512, slots: int = 4096, points: int = 6,
    loading: Loading = Loading(), revision: str | None = None,
) -> None:
    """Measure how each layer bears each cache kind, and write the best mix within a budget.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      text: UTF-8 text of the kind the model will read; - is stdin.
      out: where the policy goes; `jaxlm generate --cache FILE.json` reads it.
      candidates: kinds that a layer may get.
      budget: bytes of the caches, as a share of full precision in 16 bits.
      tokens: of the text that are used; its first half must be long enough to be coded.
      slots: tokens a row that bytes are counted for.
      points: mixes within the budget that are measured, the dearest among them.
      revision: of a hub id.
      loading: how a model is loaded.
    """
    kinds = [parse_cache(name) for name in candidates]
    bundle = open_model(model, loading, revision)
    lm = bundle.lm
    ids = bundle.tokenizer.encode(read_text(text))[:min(tokens, lm.config.max_len)]
    found = tune(lm, bundle.params, jnp.asarray([ids], jnp.int32), kinds, slots, points, budget)
    dense = sum(layer_bytes(lm, i, Dense(), slots) for i in range(lm.config.num_layers))
    rows = [[policy.bytes / dense, policy.divergence, policy.error,
             runs(policy.kinds)] for policy in found]
    print(columns([["share of bytes", "divergence", "error", "layers"], *rows]))
    best = min(found, key=lambda policy: policy.divergence or 0.0)
    write_policy(out, lm.config, best.kinds, {
        "bytes_share": best.bytes / dense, "divergence": best.divergence, "tokens": len(ids)},
        name=model, params=bundle.params)
    note(f"wrote {out}: {best.bytes / dense:.3f} of the bytes of full precision")


def runs(kinds: tuple[CacheKind, ...]) -> str:
    """Kinds of layers in their order, equal neighbours together.

    >>> runs((Dense(), Dense(), parse_cache("kivi2")))
    'dense x 2, kivi2'
    """
    counted = [(name, len(list(run))) for name, run in groupby(map(cache_name, kinds))]
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in counted)
