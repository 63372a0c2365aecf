"""From text to text: a search's request checked, its loop driven, its answers read."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError, whole
from jaxlm.core.hosts import to_host
from jaxlm.decode.generate import Job, Prompt, ending, placed, prepare
from jaxlm.decode.lend import sampler_of
from jaxlm.decode.rows import check_particles
from jaxlm.decode.samplers import Sampler
from jaxlm.decode.state import Kinds
from jaxlm.decode.text import text_rule
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Prompts, Reward, RewardError, Rows
from jaxlm.search.base import Answer, OnResult, SearchResult, Steps
from jaxlm.search.engine import (
    Population,
    StepStop,
    Tools,
    absorb,
    begin,
    give_up,
    loop,
    move,
    view,
)
from jaxlm.search.interrupt import ROUNDS, check, interruptible
from jaxlm.search.memory import check_memory, reward_bytes

CHOICES = ("best", "draw", "resampled")
begin_jit = jax.jit(begin, static_argnames=("lm", "steps", "kinds", "particles"))
loop_jit = jax.jit(loop, static_argnames=("lm", "steps", "width"), donate_argnames="pop")
move_jit = jax.jit(move, static_argnames=("lm", "steps", "width"), donate_argnames="pop")
absorb_jit = jax.jit(absorb, static_argnames="steps", donate_argnames="pop")
give_up_jit = jax.jit(give_up, donate_argnums=0)
view_jit = jax.jit(view)
final_jit = jax.jit(lambda method, held: method.final(held))


@dataclass(frozen=True)
class Task:
    """A checked request."""

    bundle: Bundle
    job: Job
    steps: Steps
    tools: Tools
    kinds: Kinds
    reward: Reward
    particles: int
    at_once: int
    rows: int | None
    choose: str
    questions: tuple[str, ...] | None = None

    def unwrap(self, found: list[SearchResult]) -> SearchResult | list[SearchResult]:
        """A list when one was given."""
        return found if self.job.many else found[0]


def make_task(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, method: Any, *,
    particles: int, steps: Steps, sampler: Sampler, cache: CacheKind | Kinds | str,
    key: jax.Array | None, at_once: int | None = None, rows: int | None = None,
    quorum: int | None = None, memory: int | None = None, choose: str = "best",
    questions: str | Sequence[str] | None = None,
) -> Task:
    """Check everything that can be wrong with a request, the memory too, before any compute."""
    check_particles(particles)
    if not isinstance(steps, Steps):
        raise ConfigError(f"steps is {steps!r}; expected a Steps, such as Steps('\\n')")
    if choose not in CHOICES:
        raise ConfigError(f"choose is {choose!r}; expected 'best' or 'draw'")
    if missing := [n for n in ("on_device", "init", "score", "gather") if not hasattr(reward, n)]:
        raise ConfigError(f"reward is {reward!r}, which lacks {missing}; expected a Reward as in "
                          "jaxlm.rewards.base")
    job = prepare(bundle, prompts, steps.max_new_tokens, key, steps.stop_ids, None, steps.stop)
    if steps.room is not None:
        job = widened(job, steps.room.prompt)
    count = len(job.prompts)
    at_once = min(whole("at_once", count if at_once is None else at_once), count)
    if quorum is None:  # a model is computed over all rows, however few of them wait for it
        quorum = at_once if getattr(reward, "costly", False) else 1
    kinds = placed(bundle, sampler, cache)
    rule = text_rule(bundle, job.strings, steps.delimiters, ids=job.stop.ids)
    stop = StepStop(rule, np.int32(steps.cap))
    limits = np.int32(steps.max_steps), np.int32(steps.max_new_tokens)
    tools = Tools(bundle.params, sampler, stop, method, np.int32(whole("quorum", quorum)), limits)
    rows = lent(bundle, sampler, rows, at_once * particles)
    task = Task(bundle, job, steps, tools, kinds, reward, particles, at_once, rows, choose,
                checked_questions(questions, count))
    slots = steps.program.max_new_tokens
    given = prompts_of(task, range(at_once))
    check_memory(bundle, kinds, at_once, job.tokens_BT.shape[1], particles, slots, memory,
                 lambda particles: reward_bytes(reward, given, particles, slots))
    return task


def checked_questions(
    questions: str | Sequence[str] | None, count: int
) -> tuple[str, ...] | None:
    """One text for each prompt, if any; ShapeError for anything else."""
    if questions is None:
        return None
    given = [questions] if isinstance(questions, str) else list(questions)
    if len(given) != count or not all(isinstance(text, str) for text in given):
        raise ShapeError(f"questions are {questions!r}; expected one text for each of {count} "
                         "prompts, or None: the prompts themselves")
    return tuple(given)


def lent(bundle: Bundle, sampler: Sampler, rows: int | None, batch: int) -> int | None:
    """The rows that an iteration computes, None for all; ConfigError where it cannot be fewer."""
    if rows is None or whole("rows", rows) >= batch:
        return None
    if bundle.mesh is not None and bundle.mesh.size > 1:
        raise ConfigError(f"rows is {rows} of {batch}, and the model lies over {bundle.mesh.size} "
                          "devices, each of which holds rows of its own; leave rows out")
    sampler_of(sampler, jnp.arange(rows), batch)
    return int(rows)


def widened(job: Job, width: int) -> Job:
    """Prompts padded further, to the room that programs have for them."""
    more = max(width - job.tokens_BT.shape[1], 0)
    return replace(job, tokens_BT=jnp.pad(job.tokens_BT, ((0, 0), (0, more))))


def search(task: Task, on_result: OnResult | None = None) -> list[SearchResult]:
    """All prompts, `at_once` in the batch; one that ends makes room for the next.

    on_result: called with a prompt's number and its result as soon as it is over, in the order in
    which they end; `row_utilisation` is then that up to there.
    """
    total, slots = len(task.job.prompts), list(range(task.at_once))
    waiting = list(range(task.at_once, total))
    found: dict[int, SearchResult] = {}
    pop, carry = start(task, slots)
    while len(found) < total:
        over = sum(which in found for which in slots)  # they stay where nothing takes their place
        enough = over + 1 if waiting or on_result is not None else len(slots)
        pop, carry, failed = grow(task, pop, carry, slots, enough)
        host, final = readable(pop), to_host(final_jit(task.tools.method, pop.held))
        worked = float(host.spent[1]) / max(float(host.spent[0]), 1.0)
        for slot in np.flatnonzero(host.over_R):
            if slots[slot] in found:
                continue
            one = replace(read(task, host, final, int(slot), slots[slot], failed.get(int(slot))),
                          row_utilisation=worked)
            found[slots[slot]] = one
            if on_result is not None:
                on_result(slots[slot], one)
            if waiting:
                slots[slot] = waiting.pop(0)
                new, new_carry = start(task, [slots[slot]])
                pop = put_jit(pop, new, int(slot))
                carry = put(carry, new_carry, int(slot))
    return [replace(found[i], row_utilisation=worked) for i in range(total)]


def start(task: Task, which: Sequence[int]) -> tuple[Population, Any]:
    """Some prompts before their first step; a host reward's carry stands beside the population."""
    given = prompts_of(task, which)
    pop = begin_jit(task.bundle.lm, task.steps.program, task.tools, given.tokens_RT, given.length_R,
                    kinds=task.kinds, keys_R=some(task, which, task.job.keys_B),
                    particles=task.particles)
    carry = task.reward.init(given, task.particles, task.steps.program.max_new_tokens)
    return (pop.replace(carry=carry), None) if task.reward.on_device else (pop, carry)


def prompts_of(task: Task, which: Sequence[int]) -> Prompts:
    """Some prompts as the reward is given them."""
    own = [task.bundle.tokenizer.decode(task.job.prompts[i]) for i in which]
    texts = own if task.questions is None else [task.questions[i] for i in which]
    return Prompts(some(task, which, task.job.tokens_BT), some(task, which, task.job.lengths_B),
                   texts, own)


def some(task: Task, which: Sequence[int], leaf_R: jax.Array) -> jax.Array:
    """What belongs to some prompts; all of them stay as they are, and where."""
    return leaf_R if len(which) == len(task.job.prompts) else leaf_R[np.asarray(which)]


def grow(
    task: Task, pop: Population, carry: Any, slots: Sequence[int], enough: int
) -> tuple[Population, Any, dict[int, str]]:
    """Rounds until `enough` prompts are over: one program, or one hop to the host a round.

    Raises: Interrupted, between two rounds, in a context that may end.

    Returns: the population, the reward's carry, and for which slots the reward failed, and why.
    """
    program, reward = task.steps.program, task.reward
    static = task.bundle.lm, program, task.tools
    known: dict[tuple, str] = {}
    failed: dict[int, str] = {}
    if reward.on_device:
        return on_device(task, static, pop, enough), None, failed
    while int(pop.over_R.sum()) < enough:
        check()
        pop, ancestors_RP = move_jit(*static, pop, width=task.rows)
        carry = reward.gather(carry, to_host(ancestors_RP))
        seen = to_host(view_jit(pop))
        texts = [texts_of(task, slots, seen, row, known) for row in range(len(seen.start_B))]
        given, carry, lost = scored(reward, carry, seen._replace(texts=texts))
        if lost:
            failed |= lost
            pop = give_up_jit(pop, np.isin(np.arange(len(slots)), list(lost)))
        score_B = np.asarray(given, np.float32)
        if score_B.shape != seen.start_B.shape:
            raise ConfigError(f"the reward gave scores of shape {score_B.shape}; expected one for "
                              f"each of {len(seen.start_B)} rows")
        pop = absorb_jit(program, task.tools, pop, jnp.asarray(score_B))
    return pop, carry, failed


def on_device(task: Task, static: tuple, pop: Population, enough: int) -> Population:
    """One call for all rounds, or, where somebody may end the search, for a few at a time."""
    some = lambda pop, rounds: loop_jit(*static, task.reward, pop, np.int32(enough),
                                        width=task.rows, rounds=np.int32(rounds))
    if not interruptible():
        return some(pop, 2**31 - 1)
    while int(pop.over_R.sum()) < enough:
        check()
        pop = some(pop, ROUNDS)
    return pop


def scored(reward: Reward, carry: Any, rows: Rows) -> tuple[Any, Any, Mapping[int, str]]:
    """Scores, carry, and the slots that got none: one prompt's failure is not the others'."""
    try:
        return *reward.score(carry, rows), {}
    except RewardError as error:
        if error.scores_B is None or error.carry is None:
            raise
        lost = dict(zip(map(int, error.prompts), error.reasons, strict=True))
        warnings.warn(f"the reward failed for {len(lost)} of the batch's prompts, which end here: "
                      f"{error.reasons[0]}", stacklevel=2)
        return error.scores_B, error.carry, lost


def texts_of(
    task: Task, slots: Sequence[int], seen: Rows, row: int, known: dict[tuple, str]
) -> str:
    """The answer so far of one row; `known` keeps those of rows that did not grow."""
    which = slots[row // task.particles]
    drawn = seen.tokens_BS[row, seen.start_B[row]: seen.length_B[row]]
    name = (which, drawn.tobytes())
    if name not in known:
        known[name] = answer_text(task, task.job.prompts[which], drawn.tolist())[1]
    return known[name]


def answer_text(task: Task, prompt: list[int], drawn: list[int]) -> tuple[str, str]:
    """Why an answer ended, and its text."""
    finish, text = ending(task.bundle, task.job, prompt, drawn, True)
    before = task.bundle.tokenizer.decode(prompt)
    if finish == "length" and len(drawn) < task.steps.max_new_tokens:
        finish = "steps"
    return finish, text.removeprefix(before)


def put(tree: Any, new: Any, slot: Any) -> Any:
    """One prompt's leaves in place of those of `slot`; what leads with no axis stays."""
    def one(leaf, part):
        if leaf.ndim == 0:
            return leaf
        if any(new > old for new, old in zip(part.shape[1:], leaf.shape[1:], strict=True)):
            raise ShapeError(f"a prompt's part of the search is {part.shape[1:]} and its place "
                             f"{leaf.shape[1:]}: the reward reads it as longer than all before it; "
                             "put it among the first, or raise at_once")
        start = slot * part.shape[0]
        if isinstance(leaf, np.ndarray):
            leaf = leaf.copy()
            leaf[start: start + len(part)] = part
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf.at[start].set(part[0]) if len(part) == 1 else jax.random.wrap_key_data(
                one(jax.random.key_data(leaf), jax.random.key_data(part)),
                impl=jax.random.key_impl(leaf))
        return jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), start, 0)

    return jax.tree.map(one, tree, new)


@partial(jax.jit, donate_argnums=0)
def put_jit(pop: Population, new: Population, slot: jax.Array) -> Population:
    """`put` on the device; what was spent stays."""
    return put(pop, new, slot).replace(spent=pop.spent)


def readable(pop: Population) -> Population:
    """What is read of a population, as numpy: all but its caches, logits and the reward's carry."""
    rows = pop.rows.replace(caches=(), logits_BV=None, sampler=(), keys_B=None)
    return to_host(pop.replace(rows=rows, carry=None, keys_R=None))


def read(
    task: Task, host: Population, final: tuple[Any, Any, Any], slot: int, which: int,
    failed: str | None = None,
) -> SearchResult:
    """One prompt's result; `failed`: why the reward has no more scores for it."""
    prompt, (weights_RP, evidence_R, broken_R) = task.job.prompts[which], final
    log_weights, steps = weights_RP[slot], int(host.step_R[slot])
    first = slot * task.particles
    answers = [read_row(task, host, prompt, first + p, float(log_weights[p]))
               for p in range(task.particles)]
    if failed is not None:
        answers = [replace(a, finish="failed") if a.finish == "steps" else a for a in answers]
    scores = np.asarray(host.score_B[first: first + task.particles])
    answers, chosen = pick(
        answers, scores, log_weights, task.choose, task.job.keys_B, which)
    line = lambda x: x[slot, :steps]
    size, resampled, ancestors, roots = map(line, host.trail)
    return SearchResult(
        prompt=task.bundle.tokenizer.decode(prompt), answers=tuple(answers), chosen=chosen,
        log_evidence=float(evidence_R[slot]), ess=size, resampled=resampled, ancestors=ancestors,
        unique_roots=roots, tokens_drawn=int(host.drawn_R[slot]), steps=steps, row_utilisation=0.0,
        flags=("broken",) * bool(broken_R[slot]) + ("failed",) * (failed is not None),
        failed=failed)


def read_row(
    task: Task, host: Population, prompt: list[int], row: int, log_weight: float
) -> Answer:
    """One answer; NumericsError when the model gave NaN."""
    begin_at, end = int(host.start_B[row]), int(host.at_B[row])
    drawn = host.rows.tokens_BS[row, begin_at:end].tolist()
    logprobs = host.rows.logprob_BS[row, begin_at:end]
    if not np.isfinite(logprobs).all():
        raise NumericsError("the model gave a logit that is NaN or infinite; check the weights, or "
                            "load in float32")
    finish, text = answer_text(task, prompt, drawn)
    count, score = int(host.steps_B[row]), lambda x: float(np.nan_to_num(x, nan=0.0))
    return Answer(
        text, tuple(drawn), float(logprobs.sum(dtype=np.float64)), score(host.score_B[row]),
        log_weight, finish, tuple(map(score, host.scores_BT[row, :count])),
        tuple(host.ends_BT[row, :count].tolist()))


def pick(
    answers: list[Answer], scores: np.ndarray, log_weights: np.ndarray, choose: str,
    keys_R: jax.Array, which: int,
) -> tuple[list[Answer], int]:
    """The answers, and which is chosen: the best, a draw, or the best after one resampling.

    The best has a score that is a number, and some weight, where any has both.
    """
    if choose != "best":
        key = jax.random.fold_in(keys_R[which], 0)
        drawn = jax.random.categorical(key, _known(log_weights), shape=(len(answers),)).tolist()
        if choose == "draw":
            return answers, drawn[0]
        answers = [answers[i] for i in drawn]
        scores, log_weights = scores[drawn], log_weights[drawn]
    sound = np.isfinite(scores) & (log_weights > -np.inf)
    return answers, int(np.argmax(np.where(sound, scores, -np.inf)))


def _known(log_weights: np.ndarray) -> jax.Array:
    """Log-weights that can be drawn by: without any weight, all alike."""
    good = np.isfinite(log_weights)
    known = np.where(good, log_weights, -np.inf) if good.any() else np.zeros(len(good))
    return jnp.asarray(known, jnp.float32)


