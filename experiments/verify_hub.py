"""Compare published checkpoints with transformers: max |logit difference|, KL, top-k agreement.

Fetches each checkpoint (HF_TOKEN for gated ones, HF_HOME for the cache), loads it in jaxlm and in
transformers in float32, and compares on a few short texts, and on one longer than the window of
a model that has one. Memory: 4 bytes a parameter, twice.
`--checkpoints` names others, local folders included. Each result says `passed`, or why not; a
checkpoint that cannot be had is reported with its error. The exit code is 1 when one did not pass
or none was compared. A run that was
stopped goes on where it was (OUT.parts). A smoke run fetches tiny random checkpoints from a hub on
this machine (experiments/loopback_hub.py).

Command: python experiments/verify_hub.py --out experiments/results/verify_hub/cpu.json
Hardware: a network, torch, and 64 GB of memory for the 7B and 8B models (--max-billion 2: 16 GB)
Minutes: 60, mostly download
Expected: each passes `jaxlm.eval.verify.BOUNDS` of float32 (not yet measured by us)
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import twins
from experiments._harness import Resumable, run
from experiments.loopback_hub import Hub
from jaxlm.core.errors import JaxlmError
from jaxlm.eval.verify import TEXTS, verify
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset

# preset: hub id
CHECKPOINTS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-27b": "google/gemma-2-27b",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "granite-3.1-2b": "ibm-granite/granite-3.1-2b-base",
    "granite-3.1-8b": "ibm-granite/granite-3.1-8b-base",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoints, and how long the texts."""
    parser.add_argument("--checkpoints", nargs="*", help="hub ids or folders; default the list")
    parser.add_argument("--max-billion", type=float, default=10.0, help="skip larger presets")
    parser.add_argument("--revision", help="of every checkpoint")
    parser.add_argument("--tolerance", type=float, help="of logits; default as BOUNDS")


def chosen(args: argparse.Namespace) -> list[str]:
    """The checkpoints to compare."""
    if args.checkpoints:
        return args.checkpoints
    limit = args.max_billion * 1e9
    return [hub for name, hub in CHECKPOINTS.items() if count_params(LM(preset(name))) <= limit]


def compare(
    source: str, texts: tuple[str, ...], revision: str | None, tolerance: float | None = None
) -> dict[str, Any]:
    """The figures of one checkpoint and whether they pass, or why there are none."""
    try:
        return vars(verify(source, texts, revision=revision, tolerance=tolerance))
    except (JaxlmError, OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def smoke() -> dict[str, Any]:
    """Tiny random checkpoints through a hub on loopback: one open, one gated, one absent."""
    if "huggingface_hub" in sys.modules:
        raise SystemExit("huggingface_hub has read its settings already; run this as a script")
    names = ("llama", "gemma2")
    with tempfile.TemporaryDirectory() as name:
        made = {f"twins/{twin}": {"main": twins.write(twins.config_of(twin), Path(name) / twin)}
                for twin in names}
        with Hub(made, {"twins/gemma2": "secret"}) as hub:
            os.environ |= hub.environment(Path(name) / "home", HF_TOKEN="secret")
            found = {repo: compare(repo, ("w5 w9 w7 w30",), None) for repo in (*made, "twins/none")}
    absent = found.pop("twins/none")
    if "error" not in absent or any("error" in figures for figures in found.values()):
        raise SystemExit(f"expected figures of {list(found)} alone, got {found}, {absent}")
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures and verdicts depend on."""
    return {"revision": args.revision, "tolerance": args.tolerance}


def failed(found: dict[str, dict[str, Any]]) -> list[str]:
    """The checkpoints that were compared and did not pass, with what is wrong."""
    return [f"{name}: {'; '.join(figures['faults'])}" for name, figures in found.items()
            if not figures.get("passed", True)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every chosen checkpoint."""
    if args.smoke:
        return {"checkpoints": smoke()}
    path = (args.out or Path("report/verify_hub")).with_suffix(".parts")
    kept, found = Resumable(path, settings(args)), {}
    for name in chosen(args):
        found[name] = kept.parts.get(name) or compare(name, TEXTS, **settings(args))
        if "error" not in found[name]:
            kept(name, lambda name=name: found[name])
        print(name, found[name], flush=True)
    if all("error" in figures for figures in found.values()):
        raise SystemExit("no checkpoint could be compared; is there a network? see above")
    kept.done()
    return {"checkpoints": found}


if __name__ == "__main__":
    made = run(__file__, __doc__, measure, add_arguments)
    if wrong := failed(made["metrics"]["checkpoints"]):
        raise SystemExit("\n".join(["did not pass:", *wrong]))
