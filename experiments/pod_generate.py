"""One model over all the hosts of a pod slice: load, generate, score, and save it again.

Command: python experiments/pod_generate.py --model MODEL --tensor 4 --save FOLDER --out FILE
Hardware: a TPU pod slice, the same command on every host (docs/pods.md); or several processes on
    one machine, each told --coordinator, --processes and --process.
Minutes: 1 for the smoke run, two processes of two CPU devices each; otherwise as the model is.
Expected: the smoke run's `same_text`, `same_files` and `same_scores` are true: two processes give
    what one gives, and the files that they export are the same to the bit.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments import _harness

PROMPTS = ["Q: Ann has 3 pens and buys 4 more.", "Q: 12+30=", "key a7 is 41. key", "The"]
TIMEOUT_S = 170


def arguments(parser: argparse.ArgumentParser) -> None:
    """The script's own arguments."""
    parser.add_argument("--model", default="tiny", help="a folder that every host sees, or hub id")
    parser.add_argument("--save", type=Path, help="folder on a disk of the first process")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt")
    parser.add_argument("--cache", default="dense", help="dense, squat2, kivi4, ...")
    parser.add_argument("--stop", nargs="*", default=[], help="strings that end a text")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--coordinator", help="host:port of process 0; a TPU pod finds it itself")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--heartbeat", type=int, default=100, metavar="SECONDS",
                        help="after so long without a sign of life a process counts as dead")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What one process measures; all but the first end here, without a result."""
    if args.smoke:
        return smoke()
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(args.coordinator, args.processes, args.process,
                               heartbeat_timeout_seconds=args.heartbeat)
    metrics = job(args)
    if jax.process_index():
        raise SystemExit(0)
    return metrics


def job(args: argparse.Namespace) -> dict[str, Any]:
    """Load onto a mesh of all devices, generate, score, save: the same calls in every process."""
    import jax

    from jaxlm.cache.parse import parse_cache
    from jaxlm.core.mesh import make_mesh
    from jaxlm.decode.generate import generate
    from jaxlm.decode.samplers import Temperature
    from jaxlm.decode.score import score
    from jaxlm.hf.bundle import load, save

    times = Times()
    data = jax.device_count() // (args.fsdp * args.tensor)
    bundle = load(args.model, mesh=make_mesh(data, args.fsdp, args.tensor))
    shards = [x.addressable_shards for x in jax.tree.leaves(bundle.params)]
    times("loaded")
    answers = generate(bundle, PROMPTS, max_new_tokens=args.tokens, sampler=Temperature(0.8),
                       cache=parse_cache(args.cache), key=jax.random.key(args.seed),
                       stop=args.stop)
    times("generated")
    scores = score(bundle, [p + a.text for p, a in zip(PROMPTS, answers, strict=True)])
    times("scored")
    if args.save:
        save(bundle, args.save)
        times("saved")
    return {
        "processes": jax.process_count(), "devices": jax.device_count(),
        "mesh": dict(bundle.mesh.shape), "seconds": times.found,
        "bytes_of_this_process": sum(s.data.nbytes for leaf in shards for s in leaf),
        "texts": [answer.text for answer in answers],
        "logprobs": [float(s.logprobs.sum()) for s in scores],
    }


class Times:
    """Says when each part ended, and keeps how long it took."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.found[part], self.last = now - self.last, now
        print(f"{part} after {self.found[part]:.1f} s", file=sys.stderr, flush=True)


def start(processes: int, devices: int, *more: str) -> list[subprocess.Popen]:
    """This script in several processes of some CPU devices each, on this machine.

    `{process}` in an argument becomes the process's number.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(_harness.ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--coordinator", f"127.0.0.1:{port}", "--processes",
             str(processes), "--process", str(process),
             *(argument.format(process=process) for argument in more)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(processes)
    ]


def ended(running: list[subprocess.Popen], timeout: float) -> tuple[list[int], list[str]]:
    """Exit codes and messages of all, within the time; none is left behind."""
    end = time.monotonic() + timeout
    try:
        said = [p.communicate(timeout=max(end - time.monotonic(), 1))[1] for p in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said


def finish(running: list[subprocess.Popen], timeout: float = TIMEOUT_S) -> list[str]:
    """Wait for every process; its messages, and an error if one failed or none came to an end."""
    codes, said = ended(running, timeout)
    for code, text in zip(codes, said, strict=True):
        if code:
            raise RuntimeError(f"a process ended with {code}: {text[-3000:]}")
    return said


def smoke() -> dict[str, Any]:
    """Two processes of two devices each, and one process of four, compared."""
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for processes in (2, 1):
            folder = Path(name, str(processes))
            finish(start(processes, 4 // processes, "--fsdp", "2", "--tensor", "2", "--tokens", "8",
                         "--save", f"{folder}/model", "--out", f"{folder}.json"))
            metrics = json.loads(Path(f"{folder}.json").read_text())["metrics"]
            files = {p.name: p.read_bytes() for p in sorted((folder / "model").iterdir())}
            found[processes] = metrics, files
    (two, files), (one, expected) = found[2], found[1]
    return {
        "two": two, "one": one, "same_text": two["texts"] == one["texts"],
        "same_files": files == expected,
        "same_scores": all(abs(a - b) <= 1e-3 for a, b in
                           zip(two["logprobs"], one["logprobs"], strict=True)),
    }


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, arguments)
