"""Named shapes shared by tests, compile checks and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quant import QuantFormat, init_packed


@dataclasses.dataclass(frozen=True)
class Spec:
    """A decode step: B rows, N query heads, K kv heads, head dim H, S packed tokens, W tail."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    window: int = 64
    fmt: QuantFormat = QuantFormat()
    dtype: str = "bfloat16"

    def shapes(self, many: int = 1):
        """Positional arguments of `quant_decode_attention` as shapes (fmt is static).

        `many` kv heads lie side by side.
        """
        lead = (self.batch, self.kv_heads)
        dtype = jnp.dtype(self.dtype)
        tail = jax.ShapeDtypeStruct((*lead, self.window, self.head_dim), dtype)
        rows = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        packed = jax.eval_shape(
            lambda: init_packed(*lead, self.capacity, self.head_dim, self.fmt, many))
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.head_dim), dtype)
        return q, packed, rows, tail, tail, rows


_B24, _B42, _B44, _B88 = (QuantFormat(*b) for b in ((2, 4), (4, 2), (4, 4), (8, 8)))

SMALL = (  # run in interpret mode
    Spec("mha-64", 2, 2, 2, 64, 1024, 64, dtype="float32"),
    Spec("gqa4-128", 2, 8, 2, 128, 1024, 64, dtype="float32"),
    Spec("gqa8-96-k2v4", 2, 8, 1, 96, 512, 32, _B24, "float32"),
    Spec("gqa3-64-k4v2", 1, 6, 2, 64, 512, 48, _B42, "float32"),
    Spec("mqa5-256-4bit", 2, 5, 1, 256, 512, 64, _B44, "float32"),
    Spec("gqa2-128-8bit", 2, 4, 2, 128, 384, 64, _B88, "float32"),
    Spec("gqa2-64-group64", 2, 4, 2, 64, 1024, 128, QuantFormat(2, 2, 64), "float32"),
    Spec("gqa6-96", 1, 6, 1, 96, 512, 32, dtype="float32"),
    Spec("gqa7-256", 1, 7, 1, 256, 512, 32, dtype="float32"),
    Spec("gqa2-96-8bit", 1, 4, 2, 96, 256, 32, _B88, "float32"),
    Spec("gqa2-128-int8", 2, 4, 2, 128, 512, 64, QuantFormat(scales="int8"), "float32"),
)

MODELS = (  # compiled for real chips
    Spec("llama3-8b", 8, 32, 8, 128, 8192),
    Spec("llama2-7b", 8, 32, 32, 128, 4096),
    Spec("qwen2.5-1.5b", 8, 12, 2, 128, 8192),
    Spec("llama3.2-1b", 8, 32, 8, 64, 8192),
    Spec("phi3-mini", 4, 32, 32, 96, 4096),
    Spec("gemma-2b", 4, 8, 1, 256, 8192),
    Spec("llama3-8b-k2v4", 8, 32, 8, 128, 8192, 64, _B24),
    Spec("llama3-8b-4bit", 8, 32, 8, 128, 8192, 64, _B44),
    Spec("llama3-8b-8bit", 8, 32, 8, 128, 8192, 64, _B88),
    Spec("llama3-8b-group64", 8, 32, 8, 128, 8192, 128, QuantFormat(2, 2, 64)),
    Spec("llama3-8b-group128", 8, 32, 8, 128, 8192, 128, QuantFormat(2, 2, 128)),
    Spec("llama3-8b-int8", 8, 32, 8, 128, 8192, 64, QuantFormat(scales="int8")),
)
