"""How much arithmetic a token of training is, and how much a chip could do."""

import jax

from jaxlm.core.targets import target_like
from jaxlm.models.config import ModelConfig

# Dense bf16 FLOPs a second of one device (a T4: fp16), from the vendors' data sheets; of tpu7x,
# whose chip of 2307e12 is two devices, half a chip.
PEAK = {
    "v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 1153.5e12,
    "h100": 989e12, "h200": 989e12, "a100": 312e12, "a100-80g": 312e12, "t4": 65e12,
}


def flops_per_token(config: ModelConfig, context: int) -> float:
    """`6 N + 6 L T N_heads H`: forward and backward of the matrices and of causal attention.

    Rematerialised work does not count. Source: 2204.02311, appendix B, with half of its attention
    since half is masked.

    Example:
      >>> flops_per_token(ModelConfig(16, 8, 1, 2, 1, 4, 16), context=10)
      4704.0
    """
    c = config
    heads = c.dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    matrices = c.num_layers * (heads + 3 * c.dim * c.ffn_dim) + c.vocab_size * c.dim
    return 6.0 * matrices + 6.0 * c.num_layers * context * c.num_heads * c.head_dim


def peak_flops() -> float | None:
    """Of all devices together; None for what is not in `PEAK`, such as a CPU."""
    found = target_like(jax.devices()[0].device_kind)
    peak = PEAK.get(found.partition(":")[0]) if found else None
    return None if peak is None else peak * jax.device_count()
