"""Make the reference numbers under tests/data, so that little is skipped on a plain clone.

Command: python scripts/make_goldens.py --goldens FOLDER --data FOLDER
Needs torch and transformers.

- squat_keys.npz, squat_attention.npz: the smallest cases of the SQuat reference's vectors.
- random_llama/: a Llama with random weights as a Hugging Face folder, and in expected.npz what
  transformers computes with it in float32: logits of ragged prompts, greedy continuations.
- models.json: greedy continuations and losses of the small real checkpoints (weights not included).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "tests" / "data"
CASES = {"squat_keys.npz": ("c08/", "demo/"), "squat_attention.npz": ("e_short_pre/",)}
PROMPT = "Once upon a time"
NEW_TOKENS = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96,
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "float32",
}  # fmt: skip


def subset(source: Path, name: str) -> None:
    """Copy the chosen cases of a file of reference vectors."""
    with np.load(source / name) as full:
        chosen = {key: full[key] for key in full.files if key.startswith(CASES[name])}
    np.savez_compressed(OUT / name, **chosen)


def random_llama() -> None:
    """Random weights from numpy, so that the folder does not depend on torch's generator."""
    import torch
    from safetensors.numpy import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = OUT / "random_llama"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval().float()
    rng = np.random.default_rng(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = rng.standard_normal(tuple(tensor.shape))
        value = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise
        weights[name] = value.astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    prompts = [rng.integers(3, CONFIG["vocab_size"], length) for length in (5, 17, 40)]
    expected = {}
    for row, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            expected[f"logits_{row}"] = model(ids).logits[0].numpy()
        expected[f"prompt_{row}"] = prompt.astype(np.int32)
        expected[f"greedy_{row}"] = greedy(model, ids, 32)
    np.savez_compressed(folder / "expected.npz", **expected)


def greedy(model: Any, ids: Any, new_tokens: int) -> np.ndarray:
    """The continuation alone, to exactly new_tokens: no stop id."""
    out = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    return out[0, ids.shape[1]:].numpy().astype(np.int32)


def real_models(data: Path) -> dict[str, Any]:
    """Greedy ids after the prompt, and the mean loss of a prompt that a test can write down."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}
    for folder in sorted((data / "models").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[1, *text]])
        answer = greedy(model, ids, NEW_TOKENS)
        whole = torch.cat([ids, torch.from_numpy(answer).long()[None]], dim=1)
        with torch.no_grad():
            loss = float(model(whole, labels=whole).loss)
        found[folder.name] = {
            "prompt": PROMPT, "prompt_ids": ids[0].tolist(), "greedy_ids": answer.tolist(),
            "greedy_text": tokenizer.decode(answer.tolist()), "mean_loss_of_both": loss,
        }
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--goldens", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        subset(args.goldens, name)
    random_llama()
    (OUT / "models.json").write_text(json.dumps(real_models(args.data), indent=1) + "\n")


if __name__ == "__main__":
    main()
