"""Whether jaxlm gives on an accelerator what it gives on a CPU, and how fast: parts of
device_suite.py.

Each part compares values with a stated tolerance and says `within`; on a CPU the parts that need
the accelerator say so instead.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kv_device import better_of_two, generation, together
from jaxlm.cache.parse import parse_cache
from jaxlm.core.tree import nbytes
from jaxlm.decode.generate import generate
from jaxlm.decode.score import score
from jaxlm.eval.recall import sample
from jaxlm.hf.bundle import Bundle, load
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.presets import preset
from pallas_kernels import quant, squat
from pallas_kernels.dispatch import preferred
from pallas_kernels.quant import PackedKV
from pallas_kernels.quant_decode_attention import quant_decode_attention
from pallas_kernels.quant_decode_attention.specs import MODELS, Spec
from pallas_kernels.quant_flush import quant_flush

SKIPPED = {"skipped": "no accelerator"}
LOGIT_TOLERANCE = 1e-3  # of the largest logit: float32 products in full, on both devices
KERNEL_TOLERANCE = 2e-2  # of the largest output: kernels may multiply in bfloat16
CODE_TOLERANCE = 1e-3  # share of codes that fall on the other side of a rounding
SPECS = ("llama3-8b", "llama3.2-1b", "gemma-2b", "phi3-mini", "llama3-8b-k2v4", "llama3-8b-4bit",
         "llama3-8b-8bit", "llama3-8b-group64", "llama3-8b-int8")
KINDS = ("dense", "squat2", "kivi2", "squat4", "squat2:rope=before", "squat2:scales=int8",
         "turboquant2")


def on_cpu() -> bool:
    """Whether there is nothing to compare a CPU with."""
    return jax.default_backend() == "cpu"


def library(args: argparse.Namespace) -> dict[str, Any]:
    """The bundled model: greedy sums through three caches, a score, logits against a CPU's."""
    bundle = load("tiny", dtype=jnp.float32)
    sums = [(12 + 7 * i % 40, 9 + 5 * i % 30) for i in range(4 if args.smoke else 16)]
    found: dict[str, Any] = {"right": {}, "of": len(sums)}
    prompts = [f"Q:{a}+{b}=\n" for a, b in sums]
    texts = together({name: partial(generate, bundle, prompts, max_new_tokens=24,
                                    cache=parse_cache(name))
                      for name in ("dense", "squat4", "squat2")})
    for name, answers in texts.items():
        if isinstance(answers, Exception):
            raise answers
        found["right"][name] = sum(answer.text.endswith(f"A:{a + b}\n")
                                   for answer, (a, b) in zip(answers, sums, strict=True))
    text = f"Q:12+30=\n12+30=42\nA:42\n{sample(np.random.default_rng(0), 200, 20, 'test').text}"
    found["score"] = score(bundle, text).perplexity
    found["answers_within"] = found["right"]["dense"] >= 0.9 * len(sums)
    return found | {"logits": SKIPPED if on_cpu() else logits_against_cpu(bundle, text)}


def logits_against_cpu(bundle: Bundle, text: str) -> dict[str, Any]:
    """Largest difference over the largest logit, with products in full and as the device does."""
    tokens = np.asarray([bundle.tokenizer.encode(text)], np.int32)
    forward = jax.jit(lambda params, tokens: bundle.lm.apply(params, tokens).logits)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        want = np.asarray(forward(jax.device_put(bundle.params, cpu), tokens))
    largest = float(np.abs(want).max())
    error = lambda: float(np.abs(np.asarray(forward(bundle.params, tokens)) - want).max()) / largest
    found = {"largest_logit": largest, "tolerance": LOGIT_TOLERANCE, "error_as_is": error()}
    with jax.default_matmul_precision("highest"):
        found["error"] = error()
    return found | {"within": found["error"] <= LOGIT_TOLERANCE}


def packed_inputs(spec: Spec, seed: int) -> tuple[jax.Array, PackedKV, list[jax.Array]]:
    """A query, coded random keys and values, and a tail of the spec's shapes."""
    lead, keys = (spec.batch, spec.kv_heads), jax.random.split(jax.random.key(seed), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)

    @jax.jit
    def coded():
        k, v = (normal(key, *lead, spec.capacity, spec.head_dim) + 0.5 for key in keys[:2])
        center = None
        if spec.fmt.scales == "int8":
            center = quant.key_center(k, jnp.ones((spec.batch, spec.capacity), bool))
        return quant.pack(quant.quantise_keys(k, spec.fmt, center),
                          quant.quantise_values(v, spec.fmt), spec.capacity, spec.fmt, center)

    dtype = jnp.dtype(spec.dtype)
    tails = [normal(key, *lead, spec.window, spec.head_dim).astype(dtype) for key in keys[2:4]]
    return normal(keys[4], spec.batch, spec.heads, spec.head_dim).astype(dtype), coded(), tails


def attention_row(spec: Spec, backend: str, seed: int = 0,
                  interpret: bool = False) -> dict[str, Any]:
    """A kernel of decode attention against XLA: values, log-sum-exp."""
    q, packed, tails = packed_inputs(spec, seed)
    rows = jnp.arange(spec.batch)
    lengths = spec.capacity - 37 * rows  # one row full, the others ragged
    tail_lengths = (spec.window - rows) % (spec.window + 1)

    @partial(jax.jit, static_argnames=("name",))
    def attend(q, packed, lengths, k_tail, v_tail, tail_lengths, name):
        return quant_decode_attention(q, packed, lengths, spec.fmt, k_tail, v_tail, tail_lengths,
                                      implementation=name, interpret=interpret)

    inputs = (packed, lengths, *tails, tail_lengths)
    got = attend(q, *inputs, backend)
    with jax.default_matmul_precision("highest"):
        want = attend(q, *inputs, "xla")
    apart = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
    found: dict[str, Any] = {"spec": spec.name, "error": apart(got[0], want[0]),
                             "lse_error": apart(got[1], want[1])}
    return found | {"within": max(found["error"], found["lse_error"]) <= KERNEL_TOLERANCE}


def flush_row(spec: Spec, backend: str, seed: int = 0, interpret: bool = False) -> dict[str, Any]:
    """A kernel of the flush, with SQuat's compensation, against XLA: share of other codes."""
    _, packed, _ = packed_inputs(spec, seed)
    lead, group = (spec.batch, spec.kv_heads), spec.fmt.group
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    k, v = (jax.random.normal(key, (*lead, group, spec.head_dim)) for key in keys[:2])
    seen = jax.random.normal(keys[2], (spec.batch, 64, spec.heads, spec.head_dim))
    comp = squat.compensation(squat.query_gram(seen, spec.kv_heads), 16)
    lengths = jnp.full(spec.batch, group)
    ready = jnp.arange(spec.batch) != 1

    @partial(jax.jit, static_argnames=("name",))
    def flush(packed, k, v, lengths, ready, comp, name):
        return quant_flush(packed, k, v, lengths, ready, spec.fmt, comp, implementation=name,
                           interpret=interpret)

    got, want = (flush(packed, k, v, lengths, ready, comp, name) for name in (backend, "xla"))
    codes = lambda p: np.concatenate([
        np.asarray(quant.unpack_words(words, bits, group)).ravel()
        for words, bits in ((p.k_words, spec.fmt.k_bits), (p.v_words, spec.fmt.v_bits))])
    other = float((codes(got) != codes(want)).mean()) * spec.capacity / group  # of what is new
    return {"spec": spec.name, "other_codes": other, "within": other <= CODE_TOLERANCE,
            "written": bool((codes(want) != codes(packed)).any())}


def kernels(args: argparse.Namespace, row: Any, name: str | None) -> dict[str, Any]:
    """`row` for each of SPECS; one that fails costs no other."""
    if on_cpu():
        return SKIPPED
    if name is None:
        return {"skipped": f"no Pallas kernel of this operation for {jax.devices()[0].device_kind}"}
    rows = together({spec.name: partial(row, spec, name, args.seed)
                     for spec in MODELS if spec.name in SPECS})
    failed = {spec: f"{type(error).__name__}: {error}"[:300]
              for spec, error in rows.items() if isinstance(error, Exception)}
    good = [found for spec, found in rows.items() if spec not in failed]
    return {"backend": name, "rows": good, "failed": failed,
            "within": bool(good) and not failed and all(found["within"] for found in good)}


def attention_kernel(args: argparse.Namespace) -> dict[str, Any]:
    """Decode attention: the device's Pallas kernel against XLA."""
    backend = preferred()[0]
    return kernels(args, attention_row, None if backend == "xla" else backend)


def flush_kernel(args: argparse.Namespace) -> dict[str, Any]:
    """The flush: the device's Pallas kernel against XLA; TPUs have one."""
    return kernels(args, flush_row, "tpu" if preferred()[0] == "tpu" else None)


def decode_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each cache kind: the shape of Llama-3.2-1B, random, 32 rows, 64 new."""
    small = args.smoke or on_cpu()
    config = ModelConfig(vocab_size=128, dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
                         head_dim=16, ffn_dim=128, max_len=512) if small else preset("llama-3.2-1b")
    rows, output = (2, 8) if small else (32, 64)
    lm = LM(config)
    params = jax.jit(lambda key: lm.init(key, jnp.bfloat16))(jax.random.key(args.seed))
    found: dict[str, Any] = {"rows": [], "batch": rows, "new": output, "weights": nbytes(params)}
    runs = together({name: partial(generation, lm, params, parse_cache(name), rows, output)
                     for name in (KINDS[:2] if small else KINDS)})
    for name, run in runs.items():
        try:
            wall = better_of_two(run)
            found["rows"].append({"kind": name, "tokens_per_s": rows * output / wall})
        except Exception as error:  # one kind must not cost the others
            found["rows"].append({"kind": name, "failed": f"{type(error).__name__}: {error}"[:300]})
    return found
