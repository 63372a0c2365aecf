"""The loop: a compiled step over batches made ahead; logs, checkpoints, and ways to stop."""

import dataclasses
import math
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm.core.errors import CheckpointError, NumericsError
from jaxlm.core.hosts import is_writer
from jaxlm.core.tree import Params
from jaxlm.hf.bundle import Bundle
from jaxlm.models.lm import LM
from jaxlm.models.stack import unstack
from jaxlm.train import setup
from jaxlm.train.batches import place, stream
from jaxlm.train.checkpoint import Checkpoints, Timer, everywhere, place_state
from jaxlm.train.config import Config, Optimizer, Remembering, changes, hash_of, settings
from jaxlm.train.evaluation import evaluate
from jaxlm.train.flops import flops_per_token, peak_flops
from jaxlm.train.log import Log
from jaxlm.train.optimizers import make_optimizer, rate_of
from jaxlm.train.previous import read_previous, remember
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from jaxlm.train.stopping import leave_if_asked, listening
from jaxlm.train.tuning import Tuning


@dataclass(frozen=True)
class Fitted:
    """A run, done or stopped.

    Args:
      bundle: the model as trained so far, its adapters merged.
      step: of `steps` in all. stopped: a SIGTERM ended it early; the same call goes on.
      history: a dict a step: `loss`, `grad_norm`, ...; evaluations have keys `eval/...`.
      counts: samples, and how many were cut or skipped.
      tuned: (trained, frozen), for the task that follows.
    """

    bundle: Bundle
    step: int
    steps: int
    stopped: bool
    history: list[dict[str, Any]]
    counts: dict[str, int]
    tuned: Any = field(repr=False)

    @property
    def evaluation(self) -> dict[str, float]:
        """The last evaluation: `loss`, `perplexity`, `accuracy`, `token_accuracy`, ..."""
        rows = [row for row in self.history if any(k.startswith("eval/") for k in row)]
        return {k[5:]: v for k, v in (rows[-1] if rows else {}).items() if k.startswith("eval/")}


@listening()
def fit(
    bundle: Bundle, config: Config, *, previous: Any = None, batches: Any = None,
) -> Fitted:
    """Train a model that is in memory; goes on from `config.out` where that holds checkpoints.

    Args:
      config: `config.model` is not read.
      previous: `Fitted.tuned` of the task before, for O-LoRA and EWC; default that of the folder
        `config.previous`, where one is named.
      batches: placed batches of earlier tasks, in place of `config.data.calibration`.
    Raises: ConfigError, DataError, DeviceError before any step; NumericsError where the loss
      becomes NaN, CheckpointError for a checkpoint that does not fit or could not be written;
      `jaxlm.train.stopping.Stopped` where a SIGTERM came before the first step.
    """
    return train(lambda: bundle, config, previous, batches)


def train(
    open_bundle: Callable[[], Bundle], config: Config, previous: Any = None, batches: Any = None,
    start: str | None = None,
) -> Fitted:
    """`fit` of a bundle that is not held: its weights can go once training has its own.

    Args:
      start: the name of the weights that the run begins from; default by their checksums.
    """
    mesh = setup.mesh_of(config)
    bundle = open_bundle()
    data = setup.sources(bundle, config, mesh)
    steps, out = len(data.train), pathlib.Path(config.out).expanduser()
    tuning = config.tuning
    optimizer = make_optimizer(config.optimizer, steps)
    wrapped, where = tuning.wrap(optimizer), setup.placer(tuning, mesh)
    start = setup.weights_hash(bundle.params) if start is None else start
    about = describe(bundle.lm, config, data.digest, steps, start)
    saved = Checkpoints(out, config.keep)
    try:
        if (step := saved.latest()) is not None:
            check_same_run(out, step, saved.meta(step), about, steps)
            state, frozen, meta = saved.restore(step, wrapped, where)
        else:
            if previous is None and config.previous is not None:
                previous = read_previous(bundle, config, mesh)
            trained, frozen = setup.begin(tuning, bundle, config, mesh, data, previous, batches)
            saved.save_frozen(frozen)
            state, meta = first_state(wrapped, trained, where(trained, frozen)[0]), {}
            del trained
            if jax.tree.leaves(frozen):  # what was dear to find is not found again after a kill
                saved.save(0, state, about)
        leave_if_asked()
        run = Run(config, bundle.replace(params={}), mesh, data, saved, about, state, frozen)
        del bundle, state, frozen, previous, batches  # for the whole run, else
        fitted = run(meta.get("position"))
        if isinstance(tuning, Remembering):
            remember(out, fitted.bundle.params)
        return fitted
    finally:
        saved.close()


def first_state(optimizer: Any, trained: Any, places: Any) -> TrainState:
    """Nothing done yet; the optimiser's arrays lie with what they belong to."""
    shapes = jax.eval_shape(optimizer.init, trained)
    there = place_state(shapes, trained, places)
    opt_state = jax.jit(optimizer.init, out_shardings=there)(trained)
    return TrainState(trained, opt_state,
                      jax.device_put(jnp.zeros((), jnp.int32), everywhere(places)))


def describe(lm: LM, config: Config, digest: str, steps: int, start: str) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    flat = settings(config)
    return {"model": config.model, "model_hash": setup.model_hash(lm), "start": start,
            "settings": flat, "config_hash": hash_of(flat), "data_hash": digest, "steps": steps,
            "epochs": config.epochs, "previous": config.previous,
            "mesh": dataclasses.asdict(config.mesh), "processes": jax.process_count()}


def check_same_run(
    out: pathlib.Path, step: int, found: dict[str, Any], ours: dict[str, Any], steps: int
) -> None:
    """CheckpointError unless a checkpoint is of this model, these data and these settings."""
    at = f"{out}/checkpoints/{step}"
    advice = "choose another `out`, or put it back"
    if found["model_hash"] != ours["model_hash"]:
        raise CheckpointError(f"{at} is of another model, {found['model']!r}; this run trains "
                              f"{ours['model']!r}; {advice}")
    beside = [name for name in ("epochs", "previous") if name in found]  # older ones may not say
    theirs, mine = (one["settings"] | {name: one[name] for name in beside}
                    for one in (found, ours))
    if changed := changes(theirs, mine):
        raise CheckpointError(f"{at} was made with other settings: {changed}; {advice}")
    if found["data_hash"] != ours["data_hash"]:
        raise CheckpointError(f"{at} was made with other data: a training file has changed; "
                              f"{advice}")
    if found.get("start", ours["start"]) != ours["start"]:
        raise CheckpointError(f"{at} began from other weights of the same shape, "
                              f"{found['model']!r} as it was then; this run trains "
                              f"{ours['model']!r} as it is now; {advice}")
    if step > steps:
        raise CheckpointError(f"{at} is beyond the {steps} steps of this run; {advice}")


@lru_cache
def _step(lm: LM, tuning: Tuning, optimizer: Optimizer, parts: int, dtype: Any) -> Any:
    """The step as a function of arrays alone; the rate is in the optimiser's state."""
    chain = make_optimizer(optimizer, 0)

    def step(state, frozen, batch, key):
        rate = rate_of(state.opt_state, optimizer.schedule)
        key = jax.random.fold_in(key, state.step)
        state, metrics = tuned_step(
            lm_objective(lm), tuning, chain, state, frozen, batch, key, parts, dtype)
        return state, metrics | {"rate": rate}

    return step


@lru_cache
def _parameters(tuning: Tuning, plain: bool) -> Callable[[Any, Any], Params]:
    """The model's parameters, `plain` ones with layers that are not stacked.

    One program: operation by operation, several processes could wait for each other for ever,
    and stacked parameters would be there twice.
    """
    def parameters(trained, frozen):
        params = tuning.materialise(trained, frozen)
        return unstack(params) if plain else params

    return jax.jit(parameters)


@lru_cache
def _measures(tuning: Tuning) -> Any:
    return jax.jit(tuning.metrics)


@lru_cache
def _finite() -> Any:
    return jax.jit(lambda tree: jnp.stack([jnp.isfinite(x).all()
                                           for x in jax.tree.leaves(tree)]).all())


@dataclass
class Run:
    """One call's work; calling it trains to the end. The bundle is without its parameters."""

    config: Config
    bundle: Bundle
    mesh: Mesh | None
    data: setup.Sources
    saved: Checkpoints
    about: dict[str, Any]
    state: TrainState
    frozen: Any
    pending: deque = field(default_factory=deque)
    clock: float = 0.0
    timer: Timer = field(init=False)

    def __call__(self, position: dict[str, Any] | None) -> Fitted:
        """Every step that is left."""
        config, batches = self.config, self.data.train
        first, steps = int(self.state.step), len(batches)
        shared = jax.process_count() > 1
        out = pathlib.Path(config.out).expanduser()
        self.log = Log(out if is_writer(shared) else None, first, steps, config.tensorboard)
        update = self._compile(self.state)
        source = stream(batches, position)
        key = jax.random.key(config.seed)
        stopped, self.clock = False, time.perf_counter()
        self.timer = Timer(config.checkpoint_minutes, first)
        try:
            with asked_to_stop() as asked:
                for step in range(first + 1, steps + 1):
                    batch = place(next(source), config.rows, self.mesh)
                    self.state, metrics = update(self.state, self.frozen, batch, key)
                    self.pending.append((step, metrics))
                    self._flush(keep=1)
                    stopped = asked(step) and step < steps
                    self._due(step, source, stopped)
                    if stopped:
                        break
            if first == steps and not self._evaluated(steps):
                self._evaluate(steps)
        finally:
            self.log.close()
        self.saved.wait()
        return self._result(stopped)

    def _compile(self, state: TrainState) -> Any:
        settings = dataclasses.replace(self.config.optimizer, rate=0.0, warmup=0)
        lm = setup.training_lm(self.bundle, self.config, self.mesh)
        step = _step(lm, self.config.tuning, settings, self.config.accumulate,
                     jnp.dtype(self.config.dtype))
        places = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None))

    def _flush(self, keep: int = 0) -> None:
        """Log steps whose numbers the device has; the last `keep` are still being computed."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            now, self.clock = time.perf_counter(), self.clock
            seconds, self.clock = now - self.clock, now
            self._check_finite(step, values)
            read = sum(int(self.data.train.examples.lengths[i])
                       for row in self.data.train.samples(step - 1) for i in row)
            rate = read / max(seconds, 1e-9)
            speed = {"seconds": seconds, "tokens_per_s": rate}
            if peak := peak_flops():
                context = self.config.data.window
                speed["mfu"] = rate * flops_per_token(self.bundle.lm.config, context) / peak
            self.log(step, **values, **speed)

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        wrong = [name for name in ("loss", "grad_norm", "penalty")
                 if not math.isfinite(values[name])]
        if not wrong:
            return
        train = self.data.train
        lines = [train.examples.where(i) for row in train.samples(step - 1) for i in row]
        raise NumericsError(
            f"step {step}: {wrong[0]} is {values[wrong[0]]} (loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}, rate {values['rate']:.3g}) on {', '.join(lines[:4])}"
            f"{f' and {len(lines) - 4} more' if len(lines) > 4 else ''}; {self._last_good()}. "
            "Lower the rate, or look at these samples")

    def _last_good(self) -> str:
        step = self.saved.latest()
        return ("there is no checkpoint yet" if step is None else
                f"the last good checkpoint is that of step {step} in {self.saved.out}")

    def _due(self, step: int, source: Any, stopped: bool) -> None:
        """Evaluate and save where it is time to."""
        config, last = self.config, step == len(self.data.train)
        every = lambda n: bool(n) and step % n == 0
        if last or every(config.evaluate_every):
            self._flush()
            self._evaluate(step)
        if last or stopped or every(config.checkpoint_every) or self.timer.due(step):
            self._flush()
            if not bool(_finite()(self.state.params)):
                raise NumericsError(f"step {step}: the update left parameters that are not "
                                    f"numbers; {self._last_good()}. Lower the rate")
            self.saved.save(step, self.state, self.about | {"position": source.get_state()})
            self.timer.restart(step)
            self.clock = time.perf_counter()

    def _evaluate(self, step: int) -> None:
        """Held-out data, where there are any, and what the tuning measures of itself."""
        config, trained, found = self.config, self.state.params, {}
        if self.data.held_out is not None:
            params = _parameters(config.tuning, False)(trained, self.frozen)
            found = evaluate(setup.training_lm(self.bundle, config, self.mesh), params,
                             self.data.held_out, self.mesh, jnp.dtype(config.dtype))
        own = _measures(config.tuning)(trained, self.frozen)
        found |= {name: float(value) for name, value in own.items()}
        if found:
            self.log(step, **{f"eval/{name}": value for name, value in found.items()})
        self.clock = time.perf_counter()

    def _evaluated(self, step: int) -> bool:
        """Whether the log has it: the first process's, for it alone keeps one."""
        there = any(row["step"] == step and any(name.startswith("eval/") for name in row)
                    for row in self.log.rows)
        if jax.process_count() > 1:
            there = multihost_utils.broadcast_one_to_all(np.int32(there))
        return bool(there)

    def _result(self, stopped: bool) -> Fitted:
        step, trained = int(self.state.step), self.state.params
        del self.state  # so that the optimiser's arrays go before the parameters are made
        params = _parameters(self.config.tuning, self.config.stack)(trained, self.frozen)
        return Fitted(
            self.bundle.replace(params=params, mesh=self.mesh or self.bundle.mesh),
            step, len(self.data.train), stopped, self.log.rows,
            self.data.train.examples.counts, (trained, self.frozen))


@contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """A question for each step: has a SIGTERM come? All processes get the same answer."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    with listening() as asked:
        yield lambda step: asked.came
