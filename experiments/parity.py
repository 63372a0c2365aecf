"""How far our logits are from transformers', for a tiny random twin of every family.

Every switch of a family is at work in its twin (windows shorter than the text, caps that the
scores reach, scaled rotary bands): see experiments/twins.py. Both compute in float32 on the CPU.

Command: python experiments/parity.py --out experiments/results/parity/cpu.json
Hardware: 2 CPU cores; needs torch.
Minutes: 2
Expected: max_logit_error at most 1e-4 for every family (measured: about 1e-5)
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments import twins
from experiments._harness import run
from jaxlm.decode.state import compact

PADDING = 6
HEADS = ("SequenceClassification", "TokenClassification")


def errors(name: str, folder: Path) -> dict[str, float]:
    """Largest differences of one family: plain, left-padded, cached, with labels; and the scale."""
    raw, tokens = twins.config_of(name), twins.tokens_of()
    bundle, model = jaxlm.load(twins.write(raw, folder / name)), twins.torch_model(raw)
    theirs = twins.torch_forward(model, tokens)[0]
    ours = bundle.lm.apply(bundle.params, jnp.asarray(tokens)).logits
    mask = np.ones_like(tokens)
    mask[1, :PADDING] = 0
    padded = np.where(mask, tokens, twins.PAD)
    compacted, lengths = compact(jnp.asarray(tokens), jnp.asarray(mask.astype(bool)))
    left = bundle.lm.apply(bundle.params, compacted, lengths_B=lengths).logits[1, :-PADDING]
    out = {
        "max_logit_error": gap(ours, theirs),
        "max_logit_error_left_padded": gap(
            left, twins.torch_forward(model, padded, mask)[0][1, PADDING:]
        ),
        "max_logit_error_cached": gap(last_logits(bundle, tokens), theirs[:, -1]),
        "largest_logit": float(np.abs(theirs).max()),
    }
    for head in HEADS:
        raw = twins.config_of(name, head)
        if raw["architectures"][0] is None:
            continue
        bundle = jaxlm.load(twins.write(raw, folder / f"{name}-{head}"))
        ours = bundle.lm.classify(bundle.params, jnp.asarray(tokens))
        out[f"max_error_{head}"] = gap(ours, twins.torch_forward(twins.torch_model(raw), tokens)[0])
    return out


def last_logits(bundle: jaxlm.Bundle, tokens: np.ndarray) -> jax.Array:
    """The logits after the last token, the text read into a cache one token at a time."""
    ids, one = jnp.asarray(tokens), jnp.ones(len(tokens), jnp.int32)
    state = jaxlm.prefill(bundle.lm, bundle.params, jaxlm.Greedy(), ids[:, :1], one, jaxlm.Dense(),
                          twins.TOKENS, jax.random.split(jax.random.key(0), len(tokens)))
    extend = jax.jit(jaxlm.extend, static_argnums=0)
    for at in range(1, twins.TOKENS):
        state, _ = extend(bundle.lm, bundle.params, state, ids[:, at: at + 1], one)
    return state.logits_BV


def gap(ours: Any, theirs: Any) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(ours) - theirs).max())


def measure(args: Any) -> dict[str, Any]:
    """Every family, or two of them for a smoke run."""
    names = ["llama", "gemma2"] if args.smoke else list(twins.CONFIGS)
    with tempfile.TemporaryDirectory() as folder:
        families = {name: errors(name, Path(folder)) for name in names}
    worst = max(found["max_logit_error"] for found in families.values())
    return {"max_logit_error": worst, "families": families}


if __name__ == "__main__":
    run(__file__, __doc__, measure)
