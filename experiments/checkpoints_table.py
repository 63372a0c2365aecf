"""The table of docs/checkpoints.md: what each published checkpoint needs, by arithmetic.

Memory is that of the weights in bfloat16 plus a dense cache of one text of 8,192 tokens (or the
model's own length) in bfloat16; the chip is the smallest of the list that keeps a tenth free. For
the compiler's own count of a given job use `jaxlm.eval.fit`.
"""

from experiments.verify_hub import CHECKPOINTS
from jaxlm.core.targets import CARDS, TPU_BYTES
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset

CHIPS = {"T4": CARDS["t4"].memory_bytes, "v5e": TPU_BYTES["v5e"], "v6e": TPU_BYTES["v6e"],
         "A100 40 GB": CARDS["a100"].memory_bytes, "H100": CARDS["h100"].memory_bytes}
CONTEXT, FREE = 8192, 0.1


def row(name: str) -> str:
    """One line of the table."""
    config = preset(name)
    weights = 2 * count_params(LM(config))
    total = weights + cache_bytes(config)
    chip = next((chip for chip, size in CHIPS.items() if total <= (1 - FREE) * size), "several")
    return (f'| {name} | `jaxlm.load("{CHECKPOINTS[name]}")` | {weights / 2**30:.1f} GiB '
            f"| {total / 2**30:.1f} GiB | {chip} | no |")


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of one text in a dense cache, which keeps windowed layers whole too."""
    tokens = min(CONTEXT, config.max_len)
    return 2 * 2 * tokens * config.num_layers * config.num_kv_heads * config.head_dim


def table() -> str:
    """The whole table."""
    head = ["| checkpoint | load | weights | with one text | smallest chip | verified |",
            "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, CHECKPOINTS)])


def main() -> None:
    """Print the table."""
    print(table())
