"""The main job, end to end: a model solves held-out problems, and a report shows how it went."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind, init_caches
from jaxlm.cache.dense import Dense
from jaxlm.cache.squat import Squat
from jaxlm.core import tree
from jaxlm.core.device import report as device_report
from jaxlm.decode.generate import decode_jit, prefill_jit, prepare
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.score import score
from jaxlm.eval import arithmetic, demo_search
from jaxlm.eval.demo_search import SearchRow, compare_searches
from jaxlm.eval.second_skill import WAYS, Taught, teach
from jaxlm.eval.skills import (
    ArithmeticResult,
    Attempt,
    RecallResult,
    Share,
    Tick,
    solve_arithmetic,
    solve_recall,
)
from jaxlm.hf.bundle import Bundle

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How much is asked. `batches`: of the decoding speed; `tokens`: timed in each row.
    `searched`: problems of the comparison of searches, with `budget` answers each. `lessons`: steps
    of training in a second skill."""

    problems: int = 64
    samples: int = 4
    temperature: float = 0.8
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    documents: int = 24
    batches: tuple[int, ...] = (1, 8, 64)
    tokens: int = 64
    searched: int = 24
    budget: int = 16
    lessons: int = 40

    @property
    def parts(self) -> int:
        """Ticks in all."""
        rounds = len(arithmetic.LEVELS) * (1 + self.samples)
        rows = COMPARED_PARTS + demo_search.PARTS + len(WAYS)
        return rounds + len(self.lengths) + len(self.batches) + 1 + rows


COMPARED = "hard"  # the level that caches are compared on: of shorter texts little is coded
COMPARED_PARTS = 3  # two rounds of arithmetic and one of recall
QUICK = Plan(problems=4, samples=2, lengths=(64,), documents=4, batches=(4,), tokens=8, searched=2,
             budget=2, lessons=2)


@dataclass(frozen=True)
class Surprise:
    """Per-token log-probabilities of a problem and the model's own answer, scored anew.

    `logprobs[i]` belongs to `tokens[i]`; the answer begins at `answer_from`.
    """

    tokens: tuple[str, ...]
    logprobs: np.ndarray
    answer_from: int


@dataclass(frozen=True)
class CacheRow:
    """One kind of cache: bytes of one row at the recalled length, and the same problems' greedy
    answers through it."""

    name: str
    bytes: int
    length: int
    arithmetic: Share
    recall: Share


@dataclass(frozen=True)
class Findings:
    """What the demo measured. `speed`: (batch, tokens a second of all rows together).
    `caches`: full precision first. `searches`: greedy first."""

    card: dict[str, Any]
    plan: Plan
    seed: int
    arithmetic: list[ArithmeticResult]
    recall: list[RecallResult]
    caches: list[CacheRow]
    searches: list[SearchRow]
    speed: list[tuple[int, float]]
    surprise: Surprise
    taught: list[Taught]
    device: dict[str, Any]
    seconds: float


def measure(
    bundle: Bundle, name: str, plan: Plan = Plan(), seed: int = 0, tick: Tick = lambda: None,
    stage: Callable[[str], Any] = lambda text: None,
) -> Findings:
    """Run everything; the same seed gives the same findings, apart from times.

    Args:
      name: what the report calls the model.
      tick: called after each of `plan.parts` parts. stage: told what comes next.
    """
    with TemporaryDirectory() as folder:  # here, so that an interrupt removes it
        return _measure(bundle, name, plan, seed, tick, stage, Path(folder))


def _measure(
    bundle: Bundle, name: str, plan: Plan, seed: int, tick: Tick, stage: Callable[[str], Any],
    folder: Path,
) -> Findings:
    began = time.perf_counter()
    lesson = aside(lambda: teach(bundle, folder, plan.lessons, plan.problems, seed, tick))
    solved, recalled, speed = [], [], []
    for level in arithmetic.LEVELS:
        stage(f"arithmetic, {level}")
        solved.append(solve_arithmetic(
            bundle, level, problems=plan.problems, samples=plan.samples,
            temperature=plan.temperature, seed=seed, tick=tick,
        ))
    for length in plan.lengths:
        stage(f"recall over {length} tokens")
        recalled.append(
            solve_recall(bundle, length, documents=plan.documents, seed=seed, tick=tick)
        )
    stage("a 2-bit cache")
    caches = compare_caches(bundle, plan, seed, solved, recalled, tick)
    stage(f"searches, {plan.budget} answers")
    searches = compare_searches(bundle, plan.searched, plan.budget, plan.temperature, seed, tick)
    stage("scoring")
    surprise = surprise_of(bundle, most_telling(solved))
    tick()
    stage("a second skill")
    taught = lesson.result()
    for batch in plan.batches:  # when nothing runs beside it
        stage(f"speed at batch {batch}")
        speed.append((batch, decode_speed(bundle, batch, plan.tokens)))
        tick()
    return Findings(card(bundle, name), plan, seed, solved, recalled, caches, searches, speed,
                    surprise, taught, device_report(), time.perf_counter() - began)


def aside(work: Callable[[], T]) -> Future[T]:
    """Work in a thread of its own, since a compiler uses one core; it does not outlive main."""
    promised: Future[T] = Future()

    def run() -> None:
        try:
            promised.set_result(work())
        except BaseException as error:  # for who asks for the result
            promised.set_exception(error)

    Thread(target=run, daemon=True).start()
    return promised


def card(bundle: Bundle, name: str) -> dict[str, Any]:
    """What the model is, in numbers."""
    config = bundle.lm.config
    dtype = bundle.params["embed"]["table"].dtype
    return {
        "model": name, "family": config.family, "parameters": tree.size(bundle.params),
        "layers": config.num_layers, "query heads": config.num_heads,
        "kv heads": config.num_kv_heads, "head dim": config.head_dim,
        "context": config.max_len, "dtype": str(dtype),
        "kv bytes per token": cache_bytes(bundle, dtype),
    }


def compare_caches(
    bundle: Bundle, plan: Plan, seed: int, solved: list[ArithmeticResult],
    recalled: list[RecallResult], tick: Tick = lambda: None,
) -> list[CacheRow]:
    """Full precision, as it was just measured, beside 2 bits on the same problems."""
    exact = next(result for result in solved if result.level == COMPARED)
    length = min((r.length for r in recalled if r.length >= 512),
                 default=max(r.length for r in recalled))
    far = next(result for result in recalled if result.length == length)
    dtype, kind = bundle.params["embed"]["table"].dtype, Squat()
    rough = solve_arithmetic(bundle, COMPARED, problems=plan.problems, samples=1, seed=seed,
                             cache=kind, tick=tick)
    near = solve_recall(bundle, length, documents=plan.documents, seed=seed, cache=kind, tick=tick)
    return [
        CacheRow(f"dense, {dtype}", held_bytes(bundle, Dense(), dtype, length), length,
                 exact.greedy, far.accuracy),
        CacheRow("SQuat, 2 bits", held_bytes(bundle, kind, dtype, length), length,
                 rough.greedy, near.accuracy),
    ]


def held_bytes(bundle: Bundle, kind: CacheKind, dtype: Any, slots: int) -> int:
    """Bytes of one row's caches with room for `slots` tokens, from the states' own shapes."""
    config = bundle.lm.config
    specs = tuple(config.attention(i) for i in range(config.num_layers))
    kinds = (kind,) * config.num_layers
    return tree.nbytes(jax.eval_shape(
        lambda: init_caches(kinds, specs, 1, slots, jnp.dtype(dtype))))


def cache_bytes(bundle: Bundle, dtype: Any, slots: int = 64) -> int:
    """Bytes that one more token takes in a dense cache."""
    held = lambda size: held_bytes(bundle, Dense(), dtype, size)
    return (held(2 * slots) - held(slots)) // slots


def most_telling(solved: list[ArithmeticResult]) -> Attempt:
    """The first sound answer of the hardest level that has one, or else the first attempt."""
    for result in reversed(solved):
        for attempt in result.attempts:
            if attempt.verdict.sound:
                return attempt
    return solved[0].attempts[0]


def surprise_of(bundle: Bundle, attempt: Attempt) -> Surprise:
    """Score a problem and its answer as one text."""
    prompt = bundle.tokenizer.encode(attempt.problem.prompt)
    found = score(bundle, [*prompt, *attempt.answer.tokens])
    pieces = [bundle.tokenizer.decode([token], special=True) for token in found.tokens[1:]]
    return Surprise(tuple(pieces), found.logprobs, len(prompt) - 1)


def decode_speed(bundle: Bundle, batch: int, tokens: int, repeats: int = 3) -> float:
    """Greedy tokens a second of all rows together, prefill and compilation left out; the median."""
    prompt = bundle.tokenizer.encode("Q:1+1=\n")
    job = prepare(bundle, [prompt] * batch, tokens, None, (), None)
    rates = []
    for _ in range(1 + repeats):
        state = prefill_jit(bundle.lm, bundle.params, Greedy(), job.tokens_BT, job.lengths_B,
                            Dense(), job.slots, job.keys_B)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state = decode_jit(bundle.lm, bundle.params, Greedy(), state, job.stop, tokens)
        jax.block_until_ready(state)
        rates.append(batch * tokens / (time.perf_counter() - began))
    return float(np.median(rates[1:]))  # the first one compiled


def record(findings: Findings) -> dict[str, Any]:
    """The findings as JSON has them."""
    plan = findings.plan
    return {
        "card": findings.card, "seed": findings.seed, "plan": asdict(plan),
        "arithmetic": [
            {"level": r.level, **{name: asdict(getattr(r, name)) for name in
                                  ("greedy", "sampled", "majority", "any_of", "steps")}}
            for r in findings.arithmetic
        ],
        "recall": [{"length": r.length, **asdict(r.accuracy)} for r in findings.recall],
        "caches": [asdict(row) for row in findings.caches],
        "searches": [asdict(row) for row in findings.searches],
        "taught": [asdict(row) for row in findings.taught],
        "speed": [{"batch": b, "tokens_per_s": rate} for b, rate in findings.speed],
        "seconds": findings.seconds, "versions": findings.device["versions"],
        "system": findings.device["system"], "backend": findings.device["backend"],
    }
