"""Does a run of `jaxlm train` that is killed end as one that is not? kill -9, again and again.

A run of OSFT with a checkpoint at every step is killed twice about a save (a checkpoint's temporary
folder is seen; a random part of a step and its save later comes the kill), then once at a random
moment of its whole life (process start, compilation, steps, export), and so on. The same command
goes on each time; after five kills it ends.

- `kills`, `kills_mid_save`, `kills_before_the_first`: how many; half a checkpoint was there; none.
- `resume_bit_exact`: kills of runs whose export, last checkpoint (moments too) and losses then
  equal the uninterrupted run's to the bit.
- `checkpoints_loaded` of `checkpoints_left`: after each kill every whole checkpoint is read, and
  equals the uninterrupted run's of that step.

Command: python experiments/osft_kill.py --out experiments/results/osft_kill/cpu.json
Hardware: any; measured on a CPU
Minutes: 15 on 2 quiet cores; stopped, it goes on where it was
Expected: kills 50; resume_bit_exact 50; checkpoints_loaded equals checkpoints_left
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from safetensors.numpy import load_file
from tqdm import tqdm

import jaxlm
from experiments import _harness
from jaxlm.core.errors import CheckpointError
from jaxlm.eval.second_skill import reversals, write
from jaxlm.hf.bundle import Bundle
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.train import Config, Data, Optimizer, Osft
from jaxlm.train.checkpoint import Checkpoints, Restored
from jaxlm.train.config import to_dict
from jaxlm.train.optimizers import make_optimizer
from jaxlm.train.setup import placer

STEPS, KILLS, EACH = 12, 50, 5  # EACH: kills of one run, at most
PARTIAL = "*.orbax-checkpoint-tmp*"
PATIENCE_S = 900


@dataclass(frozen=True)
class Straight:
    """The uninterrupted run: where it is, how long it took, and one save of it."""

    config: Config
    seconds: float

    @property
    def save_s(self) -> float:
        """Roughly what a step and its save take."""
        times = sorted(p.stat().st_mtime for p in checkpoints(self.config).iterdir()
                       if p.name != "0")  # before it is compiled
        return (times[-1] - times[0]) / max(len(times) - 1, 1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs until there were enough kills; finished runs are kept beside `--out`."""
    wanted, each = (2, 2) if args.smoke else (args.kills, EACH)
    kept = (args.out or Path("osft_kill.json")).with_suffix(".parts")
    kept = Path(tempfile.mkdtemp()) / "parts" if args.smoke else kept
    parts = _harness.Resumable(kept, {"steps": STEPS, "each": each, "seed": args.seed})
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        straight = cache(lambda: uninterrupted(folder, args.seed))  # only where runs are left
        with tqdm(total=wanted, desc="kills", disable=None) as bar:
            while (done := sum(row["kills"] for row in rows)) < wanted:
                number, most = len(rows), min(each, wanted - done)
                draw = random.Random(args.seed * 1000 + number)
                rows.append(parts(str(number), lambda d=draw, m=most: killed(
                    straight(), folder / "out", d, m)))
                bar.update(rows[-1]["kills"])
    parts.done()
    return {"steps": STEPS, "runs": len(rows)} | {
        key: sum(row[key] for row in rows) for key in rows[0]}


def uninterrupted(folder: Path, seed: int) -> Straight:
    """A small model, its data, and a whole run that keeps all checkpoints."""
    tiny = jaxlm.load("tiny")
    lm = LM(ModelConfig(vocab_size=tiny.lm.config.vocab_size, dim=32, num_layers=2, num_heads=2,
                        num_kv_heads=1, head_dim=16, ffn_dim=64))
    small = Bundle(lm, lm.init(jax.random.key(seed)), tiny.tokenizer)
    model = jaxlm.save(small, folder / "model")
    train = write(folder / "train.jsonl", reversals(64, seed))
    config = Config(
        model=str(model), out=str(folder / "straight"), data=Data(train=(train,), window=64),
        tuning=Osft(), optimizer=Optimizer(rate=1e-3, weight_decay=0.1), batch=4, steps=STEPS,
        checkpoint_every=1, keep=STEPS + 1, seed=seed)  # that of step 0 too
    for _ in range(2):  # the second finds its programs compiled, as those to be killed do
        shutil.rmtree(config.out, ignore_errors=True)
        begin = time.monotonic()
        finish(config)
    return Straight(config, time.monotonic() - begin)


def start(config: Config) -> subprocess.Popen:
    """`jaxlm train`, in a process."""
    path = Path(f"{config.out}.yaml")
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    environment = {**os.environ, "PYTHONPATH": str(_harness.ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "jaxlm", "train", str(path)], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(config: Config) -> None:
    """To the end; RuntimeError with what it said where that is not code 0."""
    process = start(config)
    _, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"code {process.returncode}: {said[-2000:]}")


def killed(straight: Straight, out: Path, draw: random.Random, most: int) -> dict[str, int]:
    """One run, killed up to `most` times, then to its end."""
    shutil.rmtree(out, ignore_errors=True)
    config = straight.config.replace(out=str(out), keep=2)
    row = dict.fromkeys(("kills", "kills_mid_save", "kills_before_the_first", "resume_bit_exact",
                         "checkpoints_left", "checkpoints_loaded"), 0)
    for turn in range(most):
        process = start(config)
        (anywhere if turn % 3 == 2 else within_a_save)(process, straight, config, draw)
        ended = process.poll() is not None
        process.kill()
        _, said = process.communicate()
        if ended:
            if process.returncode:
                raise RuntimeError(f"code {process.returncode}: {said[-2000:]}")
            break
        row["kills"] += 1
        look(straight, config, row)
    finish(config)
    row["resume_bit_exact"] = row["kills"] * same_end(straight.config, config)
    return row


def anywhere(
    process: subprocess.Popen, straight: Straight, config: Config, draw: random.Random
) -> None:
    """Until a random moment of a whole run's time."""
    wait(process, draw.uniform(0, straight.seconds))


def within_a_save(
    process: subprocess.Popen, straight: Straight, config: Config, draw: random.Random
) -> None:
    """Until a save has begun, the first to the third from here, and a random part of one more."""
    seen: set[str] = set(names(config))
    for _ in range(draw.randint(1, 3)):
        while process.poll() is None and not (new := set(names(config)) - seen):
            time.sleep(0.002)
        seen |= new if process.poll() is None else set()
    wait(process, draw.uniform(0, straight.save_s))


def wait(process: subprocess.Popen, seconds: float) -> None:
    """So long, or until the process ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def checkpoints(config: Config) -> Path:
    """Their folder."""
    return Path(config.out) / "checkpoints"


def names(config: Config) -> list[str]:
    """Of checkpoints that are half written."""
    return [path.name for path in checkpoints(config).glob(PARTIAL)]


def look(straight: Straight, config: Config, row: dict[str, int]) -> None:
    """Count what a kill left; it is read from a copy, for reading tidies up."""
    row["kills_mid_save"] += bool(names(config))
    copy = Path(f"{config.out}.copy")
    shutil.rmtree(copy, ignore_errors=True)
    if checkpoints(config).is_dir():
        shutil.copytree(config.out, copy)
    steps = [int(path.name) for path in checkpoints(config).glob("*") if path.name.isdigit()]
    row["kills_before_the_first"] += not steps
    row["checkpoints_left"] += len(steps)
    for step in steps:
        row["checkpoints_loaded"] += same_checkpoint(
            straight.config, config.replace(out=str(copy)), step)


def same_end(one: Config, other: Config) -> bool:
    """Exported weights, last checkpoints and losses, to the bit."""
    weights = [load_file(Path(c.out) / "model" / "model.safetensors") for c in (one, other)]
    return (same(*weights) and same_checkpoint(one, other, STEPS)
            and losses(one) == losses(other))


def losses(config: Config) -> list[tuple[int, float]]:
    """Of every step in the log."""
    rows = map(json.loads, (Path(config.out) / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def same_checkpoint(one: Config, other: Config, step: int) -> bool:
    """Both can be read, and hold the same bits: what is trained, its moments, what is frozen."""
    try:
        first, second = read(one, step), read(other, step)
    except CheckpointError as error:
        tqdm.write(str(error))
        return False
    return same(first[:2], second[:2])


def read(config: Config, step: int) -> Restored:
    """A checkpoint, checksums compared."""
    saved = Checkpoints(Path(config.out), STEPS)
    try:
        chain = config.tuning.wrap(make_optimizer(config.optimizer, STEPS))
        return saved.restore(step, chain, placer(config.tuning, None))
    finally:
        saved.close()


def same(one: Any, other: Any) -> bool:
    """Two trees of arrays, to the bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    bits = lambda x: (x.dtype, x.shape, np.asarray(x).tobytes())
    return all(bits(a) == bits(b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other),
                                                  strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often to kill."""
    parser.add_argument("--kills", type=int, default=KILLS)


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
