"""Decoding and prefill in float32, against transformers in the same process.

Command: python experiments/bench_decode.py --out experiments/results/bench_decode/cpu.json
Hardware: 2 cores and 6 GB; no accelerator. Leave the machine alone while it runs.
Minutes: 6
Expected: at batch 1 stories260K 14.4, babyllama-1M-tok105 8.5, tiny 5.7 (wanted: 15); at batch 32
  3.1, 1.8 and 1.5 (wanted: 2 to 4); prefill 0.8 to 0.9 (wanted: 1.2); the 135M shape 1.14
  (wanted: 1.2), 0.73 of the bandwidth (wanted: 0.7); first token 3.1 s (wanted: at most 5), import
  0.33 s (wanted: at most 0.3)

Both sides do the whole of a request: read 8 tokens, then draw 200, greedily, with no stop token.
They take turns, and a figure is the median of the pairs' ratios (above 1: jaxlm is faster). On the
trained models both must draw the same tokens. `decode_b1_ceiling` is the ratio at which reading the
weights from memory once a token would take all the time; what fits a cache may pass it.
docs/performance.md says what bounds each figure.
The trained models are the bundled one and, from DATA/models, stories260K and babyllama-1M-tok105,
converted from llama2.c checkpoints (docs/experiments.md, Data); one that is absent is `left_out`.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _harness

MODELS = ("stories260K", "babyllama-1M-tok105")
PROMPT, REPEATS = 8, 5
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; a smoke run takes one model, few tokens and small random shapes."""
    import jax

    if jax.default_backend() != "cpu":
        raise SystemExit("this script compares on the CPU; set JAX_PLATFORMS=cpu")
    import torch
    import transformers

    from jaxlm.core.tree import nbytes

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    metrics: dict[str, Any] = {"cores": os.cpu_count(), "new_tokens": 20 if args.smoke else 200}
    folders, metrics["left_out"] = model_folders(args)
    folders = folders[: 1 if args.smoke else None]
    for name in ("decode_b1_ratio", "decode_b32_ratio", "prefill_ratio", "decode_b1_ceiling"):
        metrics[name] = {}
    for folder in folders:
        pair = Pair(folder, args.seed)
        for batch in (1, 32):
            metrics[f"decode_b{batch}_ratio"][folder.name] = pair.decode(
                batch, metrics["new_tokens"], same=True, repeats=1 if args.smoke else REPEATS
            )
        metrics["prefill_ratio"][folder.name] = pair.prefill(8, 32 if args.smoke else 256)
        metrics["decode_b1_ceiling"][folder.name] = nbytes(pair.params)
    metrics.update(random_135m(args))
    for name, size in metrics["decode_b1_ceiling"].items():  # every token reads every weight once
        least_s = metrics["new_tokens"] * size / (metrics["bandwidth_gb_per_s"] * 1e9)
        metrics["decode_b1_ceiling"][name] = metrics["decode_b1_ratio"][name]["slow_s"] / least_s
    repeats = 1 if args.smoke else REPEATS
    metrics["import_s"] = import_seconds("import jaxlm", repeats)
    metrics["import_and_names_s"] = import_seconds(
        "import jaxlm; jaxlm.load; jaxlm.generate", repeats)
    metrics["first_token_s"] = first_token_seconds(folders[-1], 1 if args.smoke else REPEATS)
    return metrics


def model_folders(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The trained models there are, and the names of those that are not."""
    from jaxlm.hf.bundle import BUNDLED

    wanted = [args.data / "models" / name for name in MODELS] + [BUNDLED["tiny"]]
    found = [folder for folder in wanted if (folder / "config.json").exists()]
    left_out = [folder.name for folder in wanted if folder not in found]
    if left_out:
        print(f"left out, for want of a folder under {args.data}/models: {', '.join(left_out)}. "
              "get_data.py does not fetch them: they are converted from llama2.c checkpoints, as "
              "docs/experiments.md says", file=sys.stderr)
    return found, left_out


class Pair:
    """One checkpoint on both sides."""

    def __init__(self, folder: Path, seed: int):
        """Load it twice, in float32."""
        import jax.numpy as jnp
        import torch
        import transformers

        from jaxlm.hf.config import from_hf, read_json
        from jaxlm.hf.families import family_of
        from jaxlm.hf.weights import load_params
        from jaxlm.models.lm import LM

        config = from_hf(read_json(folder / "config.json"))
        self.lm, self.random = LM(config), np.random.default_rng(seed)
        shapes = self.lm.shapes(jnp.float32)
        self.params = load_params(folder, shapes, family_of(config.family), jnp.float32)
        self.torch = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.torch.eval().generation_config.eos_token_id = None  # always draw to the end

    def prompts(self, batch: int, length: int) -> np.ndarray:
        """Random ids, int32 (batch, length)."""
        return self.random.integers(3, self.lm.config.vocab_size, (batch, length), dtype=np.int32)

    def ours(self, tokens: np.ndarray, new: int, room: int = 0) -> Callable[[], Any]:
        """Prefill and decode by jaxlm, as `jaxlm.generate` calls them; `room`: for more tokens."""
        import jax
        import jax.numpy as jnp

        from jaxlm.cache.dense import Dense
        from jaxlm.decode.generate import BUCKET, decode_jit, prefill_jit, round_up
        from jaxlm.decode.samplers import Greedy

        batch, length = tokens.shape
        slots = round_up(length + max(new, room), BUCKET)
        keys, ids = jax.random.split(jax.random.key(0), batch), jnp.asarray(tokens)
        lengths = jnp.full(batch, length, jnp.int32)

        def run():
            state = prefill_jit(
                self.lm, self.params, Greedy(), ids, lengths, Dense(), slots, keys
            )
            if not new:
                return state.logits_BV
            state = decode_jit(self.lm, self.params, Greedy(), state, max_new=new)
            return state.tokens_BS[:, : length + new]

        return run

    def theirs(self, tokens: np.ndarray, new: int, **options: Any) -> Callable[[], Any]:
        """`generate` by transformers, or one forward with the last logits when new is 0."""
        import torch

        ids = torch.tensor(tokens, dtype=torch.long)

        def run():
            with torch.inference_mode():
                if not new:
                    return self.torch(ids, use_cache=True, logits_to_keep=1).logits.numpy()[:, 0]
                return self.torch.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                    **options,
                ).numpy()

        return run

    def decode(self, batch: int, new: int, same: bool, repeats: int, **options: Any) -> dict:
        """Greedy decoding on both sides. same: the tokens must agree, all of them."""
        tokens = self.prompts(batch, PROMPT)
        theirs, ours = self.theirs(tokens, new, **options), self.ours(tokens, new)
        expect, got = theirs(), np.asarray(ours())
        if expect.shape != got.shape or (same and not np.array_equal(expect, got)):
            raise SystemExit(f"the two sides draw different texts at batch {batch}: no comparison")
        return _harness.paired_ratio(theirs, ours, repeats)

    def prefill(self, batch: int, length: int) -> dict:
        """One forward over the prompts, the last logits only, on both sides."""
        tokens = self.prompts(batch, length)
        theirs, ours = self.theirs(tokens, 0), self.ours(tokens, 0)
        np.testing.assert_allclose(np.asarray(ours()), theirs(), atol=1e-3)
        return _harness.paired_ratio(theirs, ours, 2 * REPEATS)


def random_135m(args: argparse.Namespace) -> dict[str, Any]:
    """SmolLM2-135M's shape with random weights (a smoke run: two of its layers), batch 1."""
    import torch
    import transformers

    shape = SMOLLM2_135M | ({"num_hidden_layers": 2} if args.smoke else {})
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**shape)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        pair = Pair(Path(folder), args.seed)
    new, repeats = (4, 1) if args.smoke else (32, REPEATS)
    tokens = pair.prompts(1, PROMPT)
    share = bandwidth(pair, tokens, new, repeats)
    if not args.smoke:  # compiling takes most of a minute
        pair.torch.forward = torch.compile(pair.torch.forward)
    ratio = pair.decode(1, new, False, repeats, cache_implementation="static")
    result = {**share, "decode_135m_ratio": ratio}
    del pair
    gc.collect()
    return result


def bandwidth(pair: Pair, tokens: np.ndarray, new: int, repeats: int) -> dict[str, float]:
    """Bytes of weights over the time of a token, as a share of what a plain read reaches.

    A token's time is the difference between drawing `new` and drawing 1, over `new - 1`, so that
    prefill is out of it. The plain read is torch's sum of 1 GiB on all cores, more than any cache
    here, just before and just after. A tied table is counted once: it is read once, by the head.
    """
    import torch

    from jaxlm.core.tree import nbytes

    buffer = torch.ones(1 << 28)  # 1 GiB

    def read() -> float:
        return buffer.numel() * 4 / min(_harness.seconds(buffer.sum) for _ in range(2))

    long, short = pair.ours(tokens, new), pair.ours(tokens, 1, new)
    _harness.seconds(long), _harness.seconds(short), read()
    shares, speeds, step = [], [], []
    for _ in range(repeats):
        before = read()
        a_token = (_harness.seconds(long) - _harness.seconds(short)) / (new - 1)
        speeds.append((before + read()) / 2)
        step.append(a_token)
        shares.append(nbytes(pair.params) / a_token / speeds[-1])
    return {
        "bandwidth_fraction": statistics.median(shares),
        "bandwidth_gb_per_s": statistics.median(speeds) / 1e9,
        "token_135m_s": statistics.median(step),
    }


def import_seconds(statement: str, repeats: int) -> float:
    """A statement's time in a process that has imported jax; names are imported on first use."""
    code = ("import jax, time; t = time.perf_counter(); "
            f"{statement}; print(time.perf_counter() - t)")
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env=environment())
        for _ in range(repeats)
    ]
    return statistics.median(float(process.stdout) for process in done)


def first_token_seconds(folder: Path, repeats: int) -> float:
    """From the start of `jaxlm generate` to its first character, compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        env = environment() | {"JAXLM_CACHE": cache}
        times = [first_byte(folder, env) for _ in range(1 + repeats)]
    return statistics.median(times[1:])


def first_byte(folder: Path, env: dict[str, str]) -> float:
    """Start the command and wait for its first byte."""
    command = [sys.executable, "-m", "jaxlm", "generate", str(folder), "Once upon a time"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as it:
        assert it.stdout is not None
        first = it.stdout.read(1)
        spent = time.perf_counter() - start
        _, errors = it.communicate()
    if not first or it.returncode:
        raise SystemExit(f"jaxlm generate failed: {errors.decode()[-500:]}")
    return spent


def environment() -> dict[str, str]:
    """This process's, with the checkout on the path."""
    return {**os.environ, "PYTHONPATH": str(_harness.ROOT)}


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure)
