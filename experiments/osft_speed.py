"""A step of orthogonal subspace fine-tuning on a CPU: ours in three forms, full, and two peers.

Width 512, 6 layers, u = 0.5, 16,384 tokens, float32, AdamW with clipping. All contenders take one
step in turn, so that a busy machine hits each; a ratio is the median over rounds of two steps of
one round. The peers run in processes of their own, by another Python (--peer-python) whose
environment has peft 0.21.2, rhai-innovation-mini-trainer 0.9.0, torch 2.13.0 and transformers; one
that is absent is listed under `left_out`.

Command: python experiments/osft_speed.py --peer-python PYTHON
    --out experiments/results/osft_speed/cpu.json
Hardware: a quiet CPU
Minutes: 25 on 2 cores
Expected: step_ratio_full update 1.10, coordinates 1.05; trainer_overhead 1.03; step_ratio_peft and
    step_ratio_mini_trainer 0.5
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments import _harness

WIDTH, LAYERS, HEADS, FFN, VOCAB, ROUNDS = 512, 6, 8, 1408, 1024, 5
ROWS, TOKENS = 16, 1024
FORMS = ("update", "coordinates", "factored")
PEERS = ("peft", "mini_trainer")
Step = Callable[[], Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The script's own arguments."""
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every contender in turn."""
    shape = {"rows": 2, "tokens": 64, "width": 64, "layers": 2} if args.smoke else {
        "rows": ROWS, "tokens": TOKENS, "width": WIDTH, "layers": LAYERS}
    if args.worker:
        return serve(args.worker, shape)
    steps, memory = ours(shape)
    workers, left_out = {}, {}
    for name in PEERS:
        try:
            workers[name] = Worker(name, args)
        except RuntimeError as error:
            left_out[name] = str(error)
    everyone = {**steps, **{name: worker.step for name, worker in workers.items()}}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    try:
        for number in range(1 + (1 if args.smoke else ROUNDS)):
            for name, step in everyone.items():
                took = step()
                if number:  # the first compiles
                    times[name].append(took)
                print(f"{name} {took:.3f} s", file=sys.stderr, flush=True)
        memory |= {name: worker.memory() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()
    return summary(times, memory, shape) | {"left_out": left_out, "load": os.getloadavg()[0]}


def summary(times: dict[str, list[float]], memory: dict[str, int], shape: Any) -> dict[str, Any]:
    """Medians, and medians of ratios within a round."""
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    tokens = shape["rows"] * shape["tokens"]
    return {
        "shape": shape, "rounds": len(times["full"]),
        "step_s": {name: statistics.median(found) for name, found in times.items()},
        "tokens_per_s": {n: tokens / statistics.median(found) for n, found in times.items()},
        "all_s": times, "memory_bytes": memory, "trainer_overhead": ratio("full", "bare"),
        "step_ratio_full": {form: ratio(form, "full") for form in FORMS},
        **{f"step_ratio_{name}": {form: ratio(form, name) for form in FORMS}
           for name in PEERS if name in times},
    }


def ours(shape: dict[str, int]) -> tuple[dict[str, Step], dict[str, int]]:
    """Steps of jax, and the bytes of arguments and temporaries that each is compiled with."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.models.config import ModelConfig
    from jaxlm.models.lm import LM
    from jaxlm.train.osft import Osft
    from jaxlm.train.step import TrainState, init_state, lm_objective, train_step, tuned_step
    from jaxlm.train.tuning import Full

    width = shape["width"]
    lm = LM(ModelConfig(VOCAB, width, shape["layers"], HEADS, HEADS, width // HEADS,
                        width * FFN // WIDTH, max_len=shape["tokens"]))
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (shape["rows"], shape["tokens"] + 1), 0, VOCAB)
    batch = {"tokens": tokens}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}

    def add(name: str, function: Any, state: Any, *rest: Any) -> None:
        compiled = jax.jit(function, donate_argnums=0).lower(state, *rest).compile()
        found, box = compiled.memory_analysis(), [state]
        memory[name] = found.argument_size_in_bytes + found.temp_size_in_bytes

        def step() -> float:
            start = time.perf_counter()
            box[0], metrics = compiled(box[0], *rest)
            jax.block_until_ready((box[0], metrics))
            return time.perf_counter() - start

        steps[name] = step

    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    add("bare", lambda state, batch: train_step(lm_objective(lm), chain, state, batch, None),
        init_state(copy(params), chain), batch)
    for name, tuning in (("full", Full()), *((form, Osft(form, 0.5)) for form in FORMS)):
        trained, frozen = tuning.start(lm, params, jax.random.key(2))
        trained = copy(trained)
        state = TrainState(trained, tuning.wrap(chain).init(trained), jnp.zeros((), jnp.int32))
        add(name, lambda state, frozen, batch, tuning=tuning: tuned_step(
            lm_objective(lm), tuning, chain, state, frozen, batch), state, frozen, batch)
    return steps, memory


class Worker:
    """A peer in a process of its own, which takes a step when it is told to."""

    def __init__(self, name: str, args: argparse.Namespace):
        """Start it and wait until its model stands. Raises: RuntimeError where it cannot."""
        command = [args.peer_python, __file__, "--worker", name]
        environment = {**os.environ, "PYTHONPATH": str(_harness.ROOT)}
        self.process = subprocess.Popen(
            command + (["--smoke"] if args.smoke else []), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        if self.ask("") != "ready":
            _, said = self.process.communicate()
            raise RuntimeError((said.strip().splitlines() or ["no message"])[-1][-200:])

    def ask(self, word: str) -> str:
        """The line that answers a word; lines of the peer's own are passed over."""
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
    step = {"peft": peft_step, "mini_trainer": mini_trainer_step}[name](shape)
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
    import tempfile

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
