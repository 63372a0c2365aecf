"""Decode attention over 2-bit codes on a CPU against float32 dense attention, and what was tried.

8 rows of 4,096 tokens, 8 query and 4 kv heads of 64: attention alone, no projections. Dense is the
faster of the two cache orders, (B, K, S, H). `formulations` are those not taken, against dense too:
scales folded into q and p (many small products) and other chunk sizes.

Command: python experiments/quant_decode_cpu.py --out experiments/results/quant_decode_cpu/cpu.json
Hardware: 2 CPU cores, idle (a busy machine hurts the codes more: they are arithmetic, dense is not)
Minutes: 1
Expected: cpu_attention_vs_dense 1.0 (wanted: at most 1.5)
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._harness import paired_ratio, run
from pallas_kernels import quant
from pallas_kernels.quant import PackedKV, QuantFormat, decode_scales, unpack_words
from pallas_kernels.quant_decode_attention import quant_decode_attention, xla

FORMAT = QuantFormat(shrinks=(1.0,))


@jax.jit
def dense(q, k, v, lengths):
    """softmax(q k) v over (B, K, S, H)."""
    batch, kv_heads, size, head_dim = k.shape
    grouped = q.reshape(batch, kv_heads, -1, head_dim) / head_dim**0.5
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, k)
    keep = (jnp.arange(size) < lengths[:, None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(keep, logits, -1e30), -1)
    return jnp.einsum("bkgs,bksh->bkgh", weights, v).reshape(q.shape)


@jax.jit
def packed_attention(q, packed: PackedKV, lengths):
    """The implementation that is shipped."""
    return quant_decode_attention(q, packed, lengths, FORMAT, implementation="xla")[0]


@jax.jit
def folded(q, packed: PackedKV, lengths):
    """Scales folded into q and p, codes multiplied as they are; all tokens at once."""
    batch, kv_heads, _, head_dim = packed.k_words.shape
    group, parts = FORMAT.group, packed.v_scale.shape[2]
    q = q.reshape(batch, kv_heads, -1, head_dim) / head_dim**0.5
    words = (packed.k_words, packed.v_words)
    codes = [unpack_words(w, 2, group).astype(jnp.float32) for w in words]
    size = codes[0].shape[2]
    scale, low = decode_scales(packed.k_scale, packed.k_min)
    grouped = codes[0].reshape(batch, kv_heads, size // group, group, head_dim)
    logits = jnp.einsum("bkngh,bknsh->bkgns", q[:, :, None] * scale[:, :, :, None], grouped)
    logits = logits + jnp.einsum("bknh,bkgh->bkgn", low, q)[..., None]
    keep = (jnp.arange(size) < lengths[:, None])[:, None, None]
    logits = jnp.where(keep, logits.reshape(batch, kv_heads, -1, size), -1e30)
    weights = jax.nn.softmax(logits, -1)
    scale, low = decode_scales(packed.v_scale, packed.v_min)
    values = codes[1].reshape(batch, kv_heads, size, parts, head_dim // parts)
    out = jnp.einsum("bkgcs,bkscw->bkgcw", weights[:, :, :, None] * scale[:, :, None], values)
    out = out + jnp.einsum("bkgs,bkcs->bkgc", weights, low)[..., None]
    return out.reshape(batch, -1, head_dim)


def chunked(size: int):
    """The shipped arithmetic with another chunk."""

    @jax.jit
    def run_chunked(q, packed, lengths):
        def body(i, total):
            keys, values = xla.read_chunk(packed, i, size, FORMAT)
            grouped = q.reshape(*keys.shape[:2], -1, keys.shape[3])
            return total + jnp.einsum("bkgs,bksh->bkgh", jnp.einsum(
                "bkgh,bksh->bkgs", grouped, keys), values)

        count = packed.v_scale.shape[3] // size
        batch, kv_heads, _, head_dim = packed.k_words.shape
        start = jnp.zeros((batch, kv_heads, q.shape[1] // kv_heads, head_dim))
        return jax.lax.fori_loop(0, count, body, start)

    return run_chunked


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Paired ratios over dense, and that the answers agree."""
    batch, size = (2, 1024) if args.smoke else (8, 4096)
    heads, kv_heads, head_dim = 8, 4, 64
    rng = np.random.default_rng(args.seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q = normal(batch, heads, head_dim)
    lengths = jnp.full((batch,), size - 5, jnp.int32)
    keys = quant.quantise_keys(normal(batch, kv_heads, size, head_dim), FORMAT)
    values = quant.quantise_values(normal(batch, kv_heads, size, head_dim), FORMAT)
    packed = quant.pack(keys, values, size, FORMAT)
    want = dense(q, keys.value, values.value, lengths)
    repeats = 5 if args.smoke else 21
    base = lambda: dense(q, keys.value, values.value, lengths)
    against = lambda f: paired_ratio(lambda: f(q, packed, lengths), base, repeats)
    ours = against(packed_attention)
    tried = {"scales folded, whole cache": against(folded)["ratio"]}
    for chunk in (512, 1024, 2048, 4096):
        if chunk <= size:
            tried[f"chunk {chunk}, softmax left out"] = against(chunked(chunk))["ratio"]
    return {"cpu_attention_vs_dense": ours["ratio"], "paired": ours, "formulations": tried,
            "max_error": jnp.abs(packed_attention(q, packed, lengths) - want).max()}


if __name__ == "__main__":
    run(__file__, __doc__, measure)
