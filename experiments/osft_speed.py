"""A step of orthogonal subspace fine-tuning on a CPU: ours in three forms, full, and two peers.

Width 512, 6 layers, u = 0.5, 16,384 tokens, float32, AdamW with clipping. Each contender is a
process of its own; all take two steps in turn, so that a busy machine hits each. The second is
timed: in the first, memory that others have just freed comes back, at a price that depends on
whose it was. A ratio is the median over rounds of two times of one round. The peers run by another
Python (--peer-python), whose environment has peft 0.21.2, rhai-innovation-mini-trainer 0.9.0,
torch 2.13.0 and transformers; one that is absent is listed under `left_out`.

- `mfu`: model FLOPs a second (`jaxlm.train.flops`: projections do not count) over those of a
  float32 product of large square matrices in the same round, by jax or numpy, the faster of both.
- `peak_rss_bytes`: the most that each process has held, its libraries, its start (singular values)
  and compilation included: of all contenders the same, so that they may be compared.
- `trainer_overhead`: seconds a step of `fit`, by its own log, over those of bare optax steps on the
  same packed batches, which are placed before. It holds what the loop does besides: batches made
  ahead (grain, where installed), placing, reading numbers back, log.jsonl, the bar (on a terminal).
  Left out are the first step, which compiles and during which the first batches are made, and the
  checkpoint at the end. A step has 1,024 tokens: of a larger one the loop's share is smaller.
- `step_flops_ratio_8b`: FLOPs of an OSFT step (`update`) over a full one's, Llama-3.1-8B, blocks
  recomputed, by the traced program, for two sizes of a batch.

Command: python experiments/osft_speed.py --peer-python PYTHON
    --out experiments/results/osft_speed/cpu.json
Hardware: a quiet CPU; OPENBLAS_NUM_THREADS unset
Minutes: about 20 on 2 cores; stopped, it goes on after what was timed in turn
Expected: step_ratio_full update 1.01, coordinates 1.02, factored 0.97; trainer_overhead 0.96;
    step_ratio_peft 0.59 to 0.66, step_ratio_mini_trainer 1.17 to 1.34 (wanted: 0.5);
    step_flops_ratio_8b 1.010 and 1.082
"""

import argparse
import json
import os
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments import _harness

WIDTH, LAYERS, HEADS, FFN, VOCAB, ROUNDS = 512, 6, 8, 1408, 1024, 3
ROWS, TOKENS = 16, 1024
TRAINER_ROWS, TRAINER_STEPS = 1, 13
SIDE = 4096  # of the square matrices whose product is the machine's peak
FORMS = ("update", "coordinates", "factored")
OURS = ("full", *FORMS)
PEERS = ("peft", "mini_trainer")
Step = Callable[[], Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The script's own arguments."""
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--worker", choices=(*OURS, *PEERS), help=argparse.SUPPRESS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every contender in turn, then the trainer's loop and the FLOPs at 8B."""
    shape = {"rows": 2, "tokens": 64, "width": 64, "layers": 2} if args.smoke else {
        "rows": ROWS, "tokens": TOKENS, "width": WIDTH, "layers": LAYERS}
    if args.worker:
        return serve(args.worker, shape)
    rounds = 1 if args.smoke else ROUNDS
    parts = _harness.parts_of(args, __file__, smoke=args.smoke, peers=str(args.peer_python))
    found = parts("in turn", partial(contenders, args, shape, rounds))
    overhead = parts("trainer", lambda: trainer_overhead(
        shape, rounds, 3 if args.smoke else TRAINER_STEPS))
    flops = parts("flops", flops_ratio_8b)
    parts.done()
    return found | {"trainer_overhead": overhead, "step_flops_ratio_8b": flops}


def contenders(args: argparse.Namespace, shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """Ours and the peers in turn, each in a process of its own."""
    load = os.getloadavg()[0]
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    try:
        for name in (*OURS, *PEERS):
            try:
                workers[name] = Worker(name, args)
            except RuntimeError as error:
                if name in OURS:
                    raise
                left_out[name] = str(error)
        times, peaks = in_turn(workers, rounds, 512 if args.smoke else SIDE)
        memory = {name: worker.memory() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()
    return summary(times, peaks, shape) | {
        "peak_rss_bytes": memory, "left_out": left_out, "load": load}


def in_turn(
    workers: dict[str, "Worker"], rounds: int, side: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each one's steps, and each round's peak in FLOPs a second."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    peaks = []
    for number in range(1 + rounds):
        peak, took = peak_flops(side), dict.fromkeys(workers, 0.0)
        for name, worker in workers.items():
            worker.step()
            took[name] = worker.step() if number else 0.0  # the first round compiles
        print(f"peak {peak:.3g}, seconds {took}", file=sys.stderr, flush=True)
        if number:
            peaks.append(peak)
            for name, seconds in took.items():
                times[name].append(seconds)
    return times, peaks


def summary(times: dict[str, list[float]], peaks: list[float], shape: Any) -> dict[str, Any]:
    """Medians, and medians of ratios within a round."""
    from jaxlm.train.flops import flops_per_token

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    tokens = shape["rows"] * shape["tokens"]
    work = tokens * flops_per_token(model(shape).config, shape["tokens"])
    return {
        "shape": shape, "rounds": len(times["full"]), "all_s": times, "peak_flops": peaks,
        "step_s": {name: statistics.median(found) for name, found in times.items()},
        "tokens_per_s": {n: tokens / statistics.median(found) for n, found in times.items()},
        "mfu": {name: statistics.median(work / seconds / peak for seconds, peak in
                                        zip(found, peaks, strict=True))
                for name, found in times.items()},
        "step_ratio_full": {form: ratio(form, "full") for form in FORMS},
        **{f"step_ratio_{name}": {form: ratio(form, name) for form in FORMS}
           for name in PEERS if name in times},
    }


def peak_flops(side: int) -> float:
    """FLOPs a second of a float32 product, the best of some by jax's library and numpy's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng(0).standard_normal((side, side), np.float32)
    y, product = jnp.asarray(x), jax.jit(jnp.matmul)
    jax.block_until_ready(product(y, y))
    return 2 * side**3 / min(_harness.seconds(*call) for call in
                             2 * ((product, y, y), (np.matmul, x, x)))


def model(shape: dict[str, int]) -> Any:
    """The language model that all train."""
    from jaxlm.models.config import ModelConfig
    from jaxlm.models.lm import LM

    width = shape["width"]
    return LM(ModelConfig(VOCAB, width, shape["layers"], HEADS, HEADS, width // HEADS,
                          width * FFN // WIDTH, max_len=shape["tokens"]))


def our_step(name: str, shape: dict[str, int]) -> Step:
    """A step of ours: full, or a form of OSFT."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.train.osft import Osft
    from jaxlm.train.step import TrainState, lm_objective, tuned_step
    from jaxlm.train.tuning import Full

    lm, tuning = model(shape), Full() if name == "full" else Osft(name, 0.5)
    trained, frozen = tuning.start(lm, lm.init(jax.random.key(0)), jax.random.key(2))
    trained = jax.tree.map(jnp.copy, trained)  # donated, so it may share nothing with frozen
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    state = TrainState(trained, tuning.wrap(chain).init(trained), jnp.zeros((), jnp.int32))
    size = shape["rows"], shape["tokens"] + 1
    batch = {"tokens": jax.random.randint(jax.random.key(1), size, 0, VOCAB)}
    update = jax.jit(lambda state, frozen, batch: tuned_step(
        lm_objective(lm), tuning, chain, state, frozen, batch), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state, metrics = update(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return step


def trainer_overhead(shape: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """Full fine-tuning by `fit`, then by bare steps from the same start on the same batches.

    Raises: RuntimeError where the two do not come to the same loss.
    """
    import jax

    from jaxlm.hf.bundle import load
    from jaxlm.train import Config, Data, Optimizer, fit
    from jaxlm.train.batches import place
    from jaxlm.train.setup import sources

    lm, found = model(shape), []
    bundle = load("tiny").replace(lm=lm, params=lm.init(jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts(shape)))
        config = Config(batch=TRAINER_ROWS, steps=steps, optimizer=Optimizer(rate=1e-4),
                        data=Data((str(path),), window=shape["tokens"]))
        train = sources(bundle, config, None).train
        batches = [place(train[i], TRAINER_ROWS, None) for i in range(steps)]
        bare = bare_steps(lm, config.optimizer)
        for number in range(rounds):
            rows = fit(bundle, config.replace(out=f"{folder}/{number}")).history
            seconds, loss = bare(bundle.params, batches)
            if not abs(loss - rows[-1]["loss"]) < 1e-3 * loss:
                raise RuntimeError(f"fit ends at a loss of {rows[-1]['loss']}, bare steps at "
                                   f"{loss}: they are not the same steps")
            found.append((sum(row["seconds"] for row in rows[1:]) / (steps - 1), seconds))
    ratios = [a / b for a, b in found]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "trainer_s": statistics.median(a for a, _ in found),
            "bare_s": statistics.median(b for _, b in found),
            "tokens": TRAINER_ROWS * shape["tokens"], "steps_timed": steps - 1}


def texts(shape: dict[str, int]) -> list[str]:
    """Random letters, a sixteenth of a row to a whole one, so that rows are packed."""
    draw, tokens = random.Random(0), shape["tokens"]
    return ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(tokens // 16, tokens)))
            for _ in range(200)]


def bare_steps(lm: Any, settings: Any) -> Callable[[Any, Any], tuple[float, float]]:
    """Of parameters and batches: seconds a step after the first, and the last loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.train.step import init_state, lm_objective, train_step

    chain = optax.chain(optax.clip_by_global_norm(settings.clip), optax.adamw(
        settings.rate, settings.b1, settings.b2, weight_decay=settings.weight_decay))
    step = jax.jit(lambda state, batch: train_step(lm_objective(lm), chain, state, batch, None),
                   donate_argnums=0)

    def run(params: Any, batches: Any) -> tuple[float, float]:
        state = init_state(jax.tree.map(jnp.copy, params), chain)
        state, metrics = jax.block_until_ready(step(state, batches[0]))
        start = time.perf_counter()
        for batch in batches[1:]:
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / (len(batches) - 1), float(metrics["loss"])

    return run


def flops_ratio_8b() -> dict[str, float]:
    """By the number of tokens in a batch; nothing is compiled."""
    import jax

    from jaxlm.core.count import count
    from jaxlm.core.mesh import make_mesh
    from jaxlm.eval.fit import tuned_program
    from jaxlm.models.lm import LM
    from jaxlm.models.presets import preset
    from jaxlm.train.osft import Osft
    from jaxlm.train.tuning import Full

    lm = LM(preset("llama-3.1-8b"), remat=True, mesh=make_mesh(devices=jax.devices()[:1]))

    def flops(tuning: Any, rows: int) -> float:
        step, args, _ = tuned_program(tuning, lm, rows, 2048)
        return count(jax.jit(step).trace(*args).jaxpr, "tpu").flops

    return {f"{rows * 2048:,} tokens": flops(Osft("update", 0.5), rows) / flops(Full(), rows)
            for rows in (64, 8)}


class Worker:
    """A contender in a process of its own, which takes a step when it is told to."""

    def __init__(self, name: str, args: argparse.Namespace):
        """Start it and wait until its model stands. Raises: RuntimeError where it cannot."""
        python = sys.executable if name in OURS else args.peer_python
        command = [python, __file__, "--worker", name]
        environment = {**os.environ, "PYTHONPATH": str(_harness.ROOT)}
        self.process = subprocess.Popen(
            command + (["--smoke"] if args.smoke else []), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        if self.ask("") != "ready":
            _, said = self.process.communicate()
            raise RuntimeError((said.strip().splitlines() or ["no message"])[-1][-200:])

    def ask(self, word: str) -> str:
        """The line that answers a word; lines of its libraries' own are passed over."""
        assert self.process.stdin and self.process.stdout
        if word:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        return ""

    def step(self) -> float:
        """Seconds of one step."""
        return float(self.ask("step"))

    def memory(self) -> int:
        """The most it has held."""
        return int(self.ask("memory"))

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def serve(name: str, shape: dict[str, int]) -> dict[str, Any]:
    """The worker's side."""
    peers = {"peft": peft_step, "mini_trainer": mini_trainer_step}
    step = peers[name](shape) if name in peers else our_step(name, shape)
    print("> ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(f"> {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}", flush=True)
            continue
        start = time.perf_counter()
        step()
        print(f"> {time.perf_counter() - start}", flush=True)
    raise SystemExit(0)


def torch_model(shape: dict[str, int]) -> Any:
    """The same Llama with random weights."""
    import transformers

    width = shape["width"]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * FFN // WIDTH,
        num_hidden_layers=shape["layers"], num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=shape["tokens"])
    return transformers.LlamaForCausalLM(config)


def torch_step(model: Any, shape: dict[str, int], wrap: Any = lambda optimizer, model: optimizer):
    """Loss, gradients, clipping, AdamW."""
    import torch

    tokens = torch.randint(0, VOCAB, (shape["rows"], shape["tokens"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = wrap(torch.optim.AdamW(trained, 1e-4), model)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def peft_step(shape: dict[str, int]) -> Step:
    """peft's OSF on every projection, half of the directions kept."""
    import peft

    names = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    config = peft.OSFConfig(effective_rank=0.5, target_modules=names)
    return torch_step(peft.get_peft_model(torch_model(shape), config), shape)


def mini_trainer_step(shape: dict[str, int]) -> Step:
    """mini_trainer's OSFT, as its own trainer sets it up on one process."""
    import torch
    from mini_trainer.osft_utils import create_osft_model_class, optim_wrapper

    model = torch_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        made = create_osft_model_class(type(model)).from_pretrained(
            folder, rank_ratio=0.5, initialize_osft=True, torch_dtype=torch.float32,
            target_patterns=[f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")])
    return torch_step(made, shape, optim_wrapper)


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, arguments)
