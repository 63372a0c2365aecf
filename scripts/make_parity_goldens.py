"""Make tests/data/parity: what transformers computes with a tiny random twin of every family.

Command: python scripts/make_parity_goldens.py
Needs torch and transformers. The weights are not stored: experiments/twins.py makes the same ones
on every machine.
"""

import json
from pathlib import Path

import numpy as np

from experiments import twins

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "parity"
PADDING = 6  # of the second row, on the left


def golden(name: str) -> dict[str, np.ndarray]:
    """Logits of both rows, of the second one padded, the first row's sub-modules, labels."""
    tokens, mask = twins.tokens_of(), np.ones((2, twins.TOKENS), np.int32)
    mask[1, :PADDING] = 0
    padded = np.where(mask, tokens, twins.PAD)
    raw = twins.config_of(name)
    model = twins.torch_model(raw)
    logits, parts = twins.torch_forward(model, tokens)
    out = {"config": np.array(json.dumps(raw)), "tokens": tokens, "mask": mask, "logits": logits,
           "padded_logits": twins.torch_forward(model, padded, mask)[0][1]}
    unused = ("post_feedforward_layernorm",)
    out |= {part: value[0] for part, value in parts.items() if not part.endswith(unused)}
    for head in ("SequenceClassification", "TokenClassification"):
        labelled = twins.config_of(name, head)
        if labelled["architectures"][0] is not None:
            out[head] = twins.torch_forward(twins.torch_model(labelled), padded, mask)[0]
    return out


def main() -> None:
    """One file a twin."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name in twins.CONFIGS:
        np.savez_compressed(OUT / f"{name}.npz", **golden(name))
        print(name, (OUT / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
