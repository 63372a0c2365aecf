"""What of the 2-bit cache only an accelerator can tell: parts of device_suite.py and kv_speed.py.

On a CPU they run small, so that they are known to run.
"""

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments._harness import median_seconds, seconds
from jaxlm.cache.base import CacheKind, init_caches
from jaxlm.cache.dense import Dense
from jaxlm.cache.squat import Squat
from jaxlm.core.tree import nbytes
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import DecodeState, decode, prefill
from jaxlm.models.attention import Mask, attention
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.presets import preset
from pallas_kernels.quant import PackedKV, QuantFormat, init_packed
from pallas_kernels.quant_decode_attention import quant_decode_attention

INNER = 16  # calls in one timing, so that starting a kernel does not count
PROMPT, OUTPUT, HELD = 160, 338, 80e9  # the paper's lengths, and the memory both caches may take
RESERVE = 10e9  # of it, for what is neither weights nor cache
ROWS = 512  # the largest batch that is tried
READ = 8  # prompts read at once: what a layer works with is not small


def copy_rate(megabytes: int, repeats: int) -> float:
    """Bytes read plus bytes written by elementwise passes over one array, a second."""
    x = jnp.ones((megabytes << 18,), jnp.float32)
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, INNER, lambda _, x: x * 1.0001, x))
    return 2 * x.nbytes * INNER / median_seconds(passes, x, repeats=repeats)


def together(jobs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each job returns, or the error that it raised, all run at once: compiling is slow."""

    def tried(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:  # one that this device lacks must not cost the others
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(tried, jobs.values()), strict=True))


def looped(function: Callable, q: jax.Array, *args: Any) -> jax.stages.Compiled:
    """INNER calls of `function(q, *args)` that wait for one another, compiled."""

    @jax.jit
    def many(q, *args):
        again = lambda _, q: q + 1e-6 * function(q, *args).reshape(q.shape).astype(q.dtype)
        return jax.lax.fori_loop(0, INNER, again, q)

    return many.lower(q, *args).compile()


def exact_attentions(k: jax.Array, v: jax.Array) -> dict[str, tuple]:
    """name -> (function of q, k, v, lengths; k; v): one query a row over 16-bit keys (B,S,K,H)."""
    from jax.experimental.pallas.ops.gpu import decode_attention

    cudnn = lambda q, k, v, n: jax.nn.dot_product_attention(
        q[:, None], k, v, key_value_seq_lengths=n, implementation="cudnn")
    kernel = lambda q, k, v, n: decode_attention.gqa(q, k, v, kv_seq_len=n)

    def ours(q, k, v, n):
        slots = jnp.broadcast_to(jnp.arange(v.shape[2]), (len(q), v.shape[2]))
        return attention(q[:, None], k, v, Mask(), n[:, None], slots, scale=q.shape[-1] ** -0.5,
                         key_valid_BS=slots < n[:, None])[0]

    heads_first = (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    return {"cudnn": (cudnn, k, v), "pallas decode kernel": (kernel, k, v),
            "jaxlm dense": (ours, *heads_first)}


def attention_rates(args: argparse.Namespace) -> dict[str, Any]:
    """Decode attention over 2-bit codes against the fastest over bfloat16, and both against the
    copy bandwidth: 8 rows x 65,536 tokens, 32 query and 8 kv heads of 128."""
    small = args.smoke or jax.default_backend() == "cpu"
    batch, size, heads, kv_heads, width = (2, 1024, 8, 2, 128) if small else (8, 65536, 32, 8, 128)
    copy = copy_rate(16 if small else 2048, 5)
    keys = jax.random.split(jax.random.key(args.seed), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    q, lengths = normal(keys[0], batch, heads, width), jnp.full(batch, size, jnp.int32)
    k, v = (normal(key, batch, size, kv_heads, width) for key in keys[1:3])
    calls = {name: (function, (*k_v, lengths), 2 * k.nbytes)
             for name, (function, *k_v) in exact_attentions(k, v).items()}
    exact = tuple(calls)
    for bits in (2, 4):
        fmt = QuantFormat(bits, bits)
        packed = coded(keys[3:], batch, kv_heads, size, width, fmt)
        look = lambda q, packed, n, fmt=fmt: quant_decode_attention(q, packed, n, fmt)[0]
        calls[f"{bits} bits"] = (look, (packed, lengths), nbytes(packed))
    compiled = together({name: partial(looped, function, q, *inputs)
                         for name, (function, inputs, _) in calls.items()})
    found: dict[str, Any] = {"copy_bytes_per_s": copy, "exact": {}, "codes": {}, "left_out": {}}
    for name, (_, inputs, held) in calls.items():
        try:
            if isinstance(compiled[name], Exception):
                raise compiled[name]
            wall = median_seconds(compiled[name], q, *inputs, repeats=9) / INNER
        except Exception as error:  # one that this device lacks must not cost the others
            found["left_out"][name] = f"{type(error).__name__}: {error}"[:200]
            continue
        row = {"ms": 1e3 * wall, "roofline": held / wall / copy}
        found["exact" if name in exact else "codes"][name] = row
    fastest = min(found["exact"].values(), key=lambda row: row["ms"], default=None)
    two = found["codes"].get("2 bits")
    if two:
        found["roofline_fraction"] = two["roofline"]
    if two and fastest:
        found |= {"bf16_roofline": fastest["roofline"],
                  "speedup_over_bf16": fastest["ms"] / two["ms"]}
    return found


def coded(keys: jax.Array, batch: int, kv_heads: int, size: int, width: int,
          fmt: QuantFormat) -> PackedKV:
    """A full cache of arbitrary codes; the time does not depend on what they say."""
    packed = init_packed(batch, kv_heads, size, width, fmt)
    words = [jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, jnp.uint32), jnp.int32)
             for key, x in zip(keys, (packed.k_words, packed.v_words), strict=True)]
    return packed._replace(k_words=words[0], v_words=words[1],
                           k_scale=packed.k_scale + 0.1, v_scale=packed.v_scale + 0.1)


def row_bytes(config: ModelConfig, kind: CacheKind) -> int:
    """Bytes of one row's caches in the paper's lengths."""
    layers = range(config.num_layers)
    specs = tuple(config.attention(i) for i in layers)
    return nbytes(jax.eval_shape(lambda: init_caches(
        (kind,) * len(layers), specs, 1, PROMPT + OUTPUT, jnp.bfloat16)))


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a whole random Llama-2-7B at equal memory, prompt 160 and output 338,
    each cache at the largest batch that leaves RESERVE of 80 GB (never above ROWS)."""
    small = args.smoke or jax.default_backend() == "cpu"
    config = ModelConfig(vocab_size=128, dim=64, num_layers=2, num_heads=4, num_kv_heads=4,
                         head_dim=16, ffn_dim=128, max_len=512) if small else preset("llama-2-7b")
    lm = LM(config)
    shapes = lm.shapes(jnp.bfloat16)
    leaves, tree = jax.tree.flatten(shapes)
    draw = jax.jit(lambda key, like: 0.02 * jax.random.normal(key, like.shape, like.dtype),
                   static_argnums=1)
    keys = jax.random.split(jax.random.key(args.seed), len(leaves))
    params = jax.tree.unflatten(tree, [draw(key, jax.ShapeDtypeStruct(x.shape, x.dtype))
                                       for key, x in zip(keys, leaves, strict=True)])
    room = HELD - RESERVE - nbytes(params)
    kinds, output = {"bf16": Dense(), "2-bit": Squat()}, 16 if small else OUTPUT
    fits = {name: int(room // row_bytes(config, kind)) // 8 * 8 for name, kind in kinds.items()}
    rows = {name: 2 if small else min(fit, ROWS) for name, fit in fits.items()}
    runs = together({name: partial(generation, lm, params, kind, rows[name], output)
                     for name, kind in kinds.items()})
    found: dict[str, Any] = {}
    for name, run in runs.items():
        wall = better_of_two(run)
        found[name] = {"rows": rows[name], "rows_that_fit": fits[name], "seconds": wall,
                       "tokens_per_s": rows[name] * output / wall}
    ratio = found["2-bit"]["tokens_per_s"] / found["bf16"]["tokens_per_s"]
    return found | {"throughput_ratio": ratio}


def generation(lm: LM, params: Any, kind: CacheKind, rows: int, output: int) -> Callable:
    """Reading the prompts and drawing `output` tokens, compiled: called, it returns lengths."""
    at_once = math.gcd(rows, READ)
    keys = jax.random.split(jax.random.key(0), rows)
    prompts = jax.random.randint(keys[0], (rows, PROMPT), 0, lm.config.vocab_size)

    @jax.jit
    def read(params: Any, prompts: jax.Array, keys: jax.Array) -> DecodeState:
        part = lambda inputs: prefill(lm, params, Greedy(), inputs[0], jnp.full(at_once, PROMPT),
                                      kind, PROMPT + OUTPUT, inputs[1])
        cut = lambda x: x.reshape(-1, at_once, *x.shape[1:])
        states = jax.lax.map(part, (cut(prompts), cut(keys)))
        whole = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]) if x.ndim > 1 else x, states)
        return whole.replace(since_flush=whole.since_flush[0])

    reading = read.lower(params, prompts, keys).compile()
    draw = jax.jit(partial(decode, lm), donate_argnums=2)
    drawing = draw.lower(params, Greedy(), jax.eval_shape(read, params, prompts, keys),
                         max_new=output).compile()
    return lambda: drawing(params, Greedy(), reading(params, prompts, keys),
                           max_new=output).length_B


def better_of_two(run: Callable | Exception) -> float:
    """Seconds of `generation`'s calls; all is compiled before."""
    if isinstance(run, Exception):
        raise run
    return min(seconds(run) for _ in range(2))
