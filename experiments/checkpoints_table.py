"""The table of docs/checkpoints.md: what each published checkpoint needs, by arithmetic.

Memory is that of the weights in bfloat16 plus a dense cache of one text of 8,192 tokens (or the
model's own length) in bfloat16; the chip is the smallest of the list that keeps a tenth free. For
the compiler's own count of a given job use `jaxlm fit`. A T4 computes in float16; Gemma, whose
activations outgrow that, in float32, at twice the memory. What no chip holds is loaded onto a mesh
of eight.
"""

from experiments.verify_hub import CHECKPOINTS
from jaxlm.core.targets import CARDS, TPU_BYTES
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset

CHIPS = {"T4": CARDS["t4"].memory_bytes, "v5e": TPU_BYTES["v5e"], "v6e": TPU_BYTES["v6e"],
         "A100 40 GB": CARDS["a100"].memory_bytes, "H100": CARDS["h100"].memory_bytes}
FOLDERS = {"gemma-3-4b": "gemma-3-4b-text"}  # presets that are no checkpoint of their own
CONTEXT, FREE = 8192, 0.1


def row(name: str) -> str:
    """One line of the table."""
    config = preset(name)
    weights = 2 * count_params(LM(config))
    total = weights + cache_bytes(config)
    dtypes = {chip: "" for chip in CHIPS} | {"T4": "float32" if "gemma" in name else "float16"}
    fits = lambda chip: total * (1 + (dtypes[chip] == "float32")) <= (1 - FREE) * CHIPS[chip]
    chip = next(filter(fits, CHIPS), "several")
    more = f', dtype="{dtypes[chip]}"' if dtypes.get(chip) else ""
    more = ", mesh=jaxlm.make_mesh(tensor=8)" if chip == "several" else more
    return (f'| {name} | `jaxlm.load("{(CHECKPOINTS | FOLDERS)[name]}"{more})` '
            f"| {weights / 2**30:.1f} GiB | {total / 2**30:.1f} GiB | {chip} | no |")


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of one text in a dense cache, which keeps windowed layers whole too."""
    tokens = min(CONTEXT, config.max_len)
    return 2 * 2 * tokens * config.num_layers * config.num_kv_heads * config.head_dim


def table() -> str:
    """The whole table."""
    head = ["| checkpoint | load | weights | with one text | smallest chip | verified |",
            "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, CHECKPOINTS | FOLDERS)])


def main() -> None:
    """Print the table."""
    print(table())
