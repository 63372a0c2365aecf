"""The engine: P rows of each of R prompts grow by steps, together, and are chosen between steps.

One round: prompts that stand at a step's end choose ancestors and are released; all live rows draw
tokens until enough prompts wait again; the reward scores those; the method weighs them. A prompt
waits for its own rows alone, never for other prompts, unless `quorum` asks for it. With `width`, an
iteration computes so many live rows of all, whichever prompts they belong to: while a prompt waits
for its slowest row, rows of others fill the batch.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.tree import Params, gather_rows
from jaxlm.decode.rows import fork, gather, release, split_keys
from jaxlm.decode.state import DecodeState, Kinds, iterate, prefill
from jaxlm.decode.stop import Stop
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Carry, Rows
from jaxlm.search.base import Steps

OF_STEPS = 2  # folded into a prompt's key; 0 and 1 draw among the answers at the end


class Report(NamedTuple):
    """What a method's choice reports: effective_size_R, resampled_R, ancestors_RP, roots_R."""

    effective_size_R: jax.Array
    resampled_R: jax.Array
    ancestors_RP: jax.Array
    roots_R: jax.Array


class Method(Protocol):
    """How rows are chosen between steps: weights of particles, or ranks of beams; a pytree."""

    def init(self, prompts: int, particles: int) -> Any:
        """What is carried; leaves lead with R."""

    def choose(
        self, keys_R: jax.Array, held: Any, open_R: jax.Array, progress_R: jax.Array
    ) -> tuple[Any, Report]:
        """Ancestors of the prompts that stand at a step's end; the others keep their rows."""

    def known(self, score_B: jax.Array) -> jax.Array:
        """The scores, NaN for those that the rule can do nothing with."""

    def weigh(
        self, held: Any, score_RP: jax.Array, before_RP: jax.Array, ended_RP: jax.Array,
        ready_R: jax.Array,
    ) -> Any:
        """Take in the scores of the prompts that have reached one. before_RP: the score whose place
        the new one takes, NaN where it is of a further step."""

    def final(self, held: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of the last sets: log-weights (R, P), log-evidence (R,), and whether they broke (R,)."""


class Tools(NamedTuple):
    """What a round uses beside the static model and steps. quorum: int32, prompts that wait before
    the round ends; 1: none waits for another. limits: int32, the most steps and the most tokens of
    an answer; None: the room that the static steps have."""

    params: Params
    sampler: Any
    stop: "StepStop"
    method: Any
    quorum: Any = 1
    limits: tuple[Any, Any] | None = None


@struct.dataclass
class StepStop:
    """A stop rule that also holds a row once it has drawn `cap` tokens since it was released.

    Its matchers stand in three columns: those of `rule`, and the tokens of the step.
    """

    rule: Stop
    cap: Any

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens that end a row."""
        return self.rule.ids

    def step(self, match_B3, token_B):
        """As `Stop.step`."""
        match_B2, done_B, hold_B = self.rule.step(match_B3[:, :2], token_B)
        count_B = match_B3[:, 2] + 1
        hold_B |= count_B >= self.cap
        count_B = jnp.where(hold_B, 0, count_B)
        return jnp.concatenate([match_B2, count_B[:, None]], 1), done_B, hold_B


class Population(struct.PyTreeNode):
    """All rows between two rounds; leaves lead with B = R P or with R, but for `rows_spent`.

    rows: the decode state. carry: the reward's. held: the method's. keys_R: of all steps.
    start_B: where answers begin. at_B: a row's length at its last step's end; score_B: float32,
    of the text up to there; steps_B: steps of the text; scores_BT, ends_BT: of each of them.
    step_R: steps taken, of most_R. ready_R: all rows of the prompt stand at a step's end.
    over_R: for good. drawn_R: tokens drawn, losers included. spent: int32, row-iterations, and
    those that drew. trail: (R, T, ...), the reports by step.
    """

    rows: DecodeState
    carry: Carry
    held: Any
    keys_R: jax.Array
    start_B: jax.Array
    at_B: jax.Array
    score_B: jax.Array
    steps_B: jax.Array
    scores_BT: jax.Array
    ends_BT: jax.Array
    step_R: jax.Array
    most_R: jax.Array
    ready_R: jax.Array
    over_R: jax.Array
    drawn_R: jax.Array
    trail: Report
    spent: jax.Array


def begin(
    lm: LM, steps: Steps, tools: Tools, tokens_RT: jax.Array, lengths_R: jax.Array, kinds: Kinds,
    keys_R: jax.Array, particles: int,
) -> Population:
    """Read each prompt once, and stand before the first step; the reward's carry comes later."""
    keys_R = jax.vmap(lambda key: jax.random.fold_in(key, OF_STEPS))(keys_R)
    read = prefill(lm, tools.params, tools.sampler, tokens_RT, lengths_R, kinds,
                   tokens_RT.shape[1], keys_R)
    rows = fork(lm, tools.params, read, particles, steps.max_new_tokens)
    if tools.limits is None:
        return around(rows, keys_R, tools.method, particles, steps)
    most, tokens = tools.limits
    rows = rows.replace(limit_B=jnp.minimum(rows.limit_B, rows.length_B + tokens))
    pop = around(rows, keys_R, tools.method, particles, steps)
    return pop.replace(most_R=jnp.full_like(pop.most_R, most))


def around(
    rows: DecodeState, keys_R: jax.Array, method: Any, particles: int, steps: Steps
) -> Population:
    """A population before its first step, around fresh rows."""
    prompts, batch, most = len(keys_R), len(rows.length_B), steps.max_steps
    int_R, int_B = jnp.zeros(prompts, jnp.int32), jnp.zeros(batch, jnp.int32)
    of_steps = lambda *shape, dtype=jnp.float32: jnp.zeros((prompts, most, *shape), dtype)
    trail = Report(of_steps(), of_steps(dtype=bool), of_steps(particles, dtype=jnp.int32),
                   of_steps(dtype=jnp.int32))
    return Population(
        rows=rows.replace(match_B2=jnp.zeros((batch, 3), jnp.int32)), carry=None,
        held=method.init(prompts, particles), keys_R=keys_R, start_B=rows.length_B + 0,
        at_B=rows.length_B + 0, score_B=jnp.zeros(batch), steps_B=int_B,
        scores_BT=jnp.zeros((batch, most)), ends_BT=jnp.zeros((batch, most), jnp.int32),
        step_R=int_R, most_R=int_R + most, ready_R=jnp.ones(prompts, bool),
        over_R=jnp.zeros(prompts, bool), drawn_R=int_R + 0, trail=trail,
        spent=jnp.zeros(2, jnp.int32))


def move(
    lm: LM, steps: Steps, tools: Tools, pop: Population, width: int | None = None
) -> tuple[Population, jax.Array]:
    """Choose ancestors where a step has ended, then draw until `quorum` prompts wait.

    width: static, rows that an iteration computes; None: all.

    Returns: the population, and the ancestors (R, P), which the reward has yet to follow.
    """
    open_R, prompts = pop.ready_R & ~pop.over_R, len(pop.step_R)
    particles = len(pop.at_B) // prompts
    keys_R2 = jax.vmap(lambda key, step: jax.random.split(jax.random.fold_in(key, step)))(
        pop.keys_R, pop.step_R)
    held, report = tools.method.choose(
        keys_R2[:, 0], pop.held, open_R & (pop.step_R > 0), pop.step_R / pop.most_R)
    pop = follow(pop, report.ancestors_RP, one_device=width is not None)
    at = jnp.where(open_R, pop.step_R, steps.max_steps)
    log = lambda old, new: old.at[jnp.arange(prompts), at].set(new, mode="drop")
    open_B = jnp.repeat(open_R, particles)
    # Draws are keyed by row and place, and a row may now hold a shorter text than it had: with the
    # key of the step before it would draw again what it drew then, which may live on in another.
    keys_B = jnp.where(open_B, split_keys(keys_R2[:, 1], particles), pop.rows.keys_B)
    rows = release(pop.rows.replace(keys_B=keys_B), open_B)

    def enough(rows):
        waiting_R = stands(rows, prompts) & ~pop.over_R
        return waiting_R.sum() >= jnp.minimum(tools.quorum, (~pop.over_R).sum())

    batch = len(pop.at_B)
    most = steps.max_new_tokens * (1 if width is None else 1 + -(-batch // width))  # all end in it
    count, drawn = iterate(lm, tools.params, tools.sampler, rows, tools.stop,  # type: ignore
                           most, enough, width)
    new_B = drawn.length_B - rows.length_B
    spent = jnp.stack([count * (width or batch), new_B.sum()])
    return pop.replace(
        rows=drawn, held=held, ready_R=stands(drawn, prompts) & ~pop.over_R,
        drawn_R=pop.drawn_R + new_B.reshape(prompts, -1).sum(1), spent=pop.spent + spent,
        trail=jax.tree.map(log, pop.trail, report)), report.ancestors_RP


def stands(rows: DecodeState, prompts: int) -> jax.Array:
    """Whether all rows of a prompt wait or are done, bool (R,)."""
    return (rows.done_B | rows.hold_B).reshape(prompts, -1).all(1)


def follow(pop: Population, ancestors_RP: jax.Array, one_device: bool = False) -> Population:
    """Rows with all that belongs to their texts; the suffix alone moves, layer by layer.

    one_device: static, prompts may move one after another: those that stay then cost nothing.
    """
    names = ("start_B", "at_B", "score_B", "steps_B", "scores_BT", "ends_BT")
    moved = gather_rows({name: getattr(pop, name) for name in names}, ancestors_RP)
    own_RP = jnp.arange(ancestors_RP.shape[1], dtype=ancestors_RP.dtype)
    moves_R = (ancestors_RP != own_RP).any(1)
    rows = gather(pop.rows, ancestors_RP, moves_R if one_device else moves_R.any())
    return pop.replace(rows=rows, **moved)


def view(pop: Population) -> Rows:
    """What the reward sees: each text up to its last step's end. The last of all steps ends it."""
    by_row = lambda of_R: jnp.repeat(of_R, len(pop.at_B) // len(of_R))
    ready_B = by_row(pop.ready_R)
    length_B = jnp.where(ready_B, pop.rows.length_B, pop.at_B)
    ended_B = pop.rows.done_B | by_row(pop.step_R + 1 >= pop.most_R)
    return Rows(pop.rows.tokens_BS, pop.start_B, length_B, ended_B & ready_B)


def absorb(steps: Steps, tools: Tools, pop: Population, score_B: jax.Array) -> Population:
    """Scores of the prompts that stand at a step's end: kept, and weighed by the method.

    A stop id alone is no step: the text was scored before, and the score that it has now that it
    has ended takes the place of that one. As the first of all tokens it is a step, of no text.
    """
    seen, prompts = view(pop), len(pop.step_R)
    particles = len(pop.at_B) // prompts
    grew_B = seen.length_B > pop.at_B
    last_B = jnp.take_along_axis(seen.tokens_BS, seen.length_B[:, None] - 1, 1)[:, 0]
    bare_B = (seen.length_B == pop.at_B + 1) & (pop.steps_B > 0) & jnp.isin(
        last_B, jnp.asarray(tools.stop.ids, jnp.int32))
    before_B = jnp.where(bare_B, pop.score_B, jnp.nan)
    score_B = tools.method.known(score_B.astype(jnp.float32))
    score_B = jnp.where(grew_B, score_B, pop.score_B)
    rows = jnp.arange(len(grew_B))
    at_B = jnp.where(grew_B, pop.steps_B - bare_B, steps.max_steps)
    by_prompt = lambda x: x.reshape(prompts, particles)
    held = tools.method.weigh(pop.held, by_prompt(score_B), by_prompt(before_B),
                              by_prompt(seen.ended_B), pop.ready_R)
    step_R = pop.step_R + pop.ready_R
    done_R = by_prompt(pop.rows.done_B).all(1) | (step_R >= pop.most_R)
    over_R = pop.over_R | (pop.ready_R & done_R)
    return pop.replace(
        rows=pop.rows.replace(done_B=pop.rows.done_B | jnp.repeat(over_R, particles)),
        held=held, at_B=seen.length_B, score_B=score_B, steps_B=pop.steps_B + (grew_B & ~bare_B),
        scores_BT=pop.scores_BT.at[rows, at_B].set(score_B, mode="drop"),
        ends_BT=pop.ends_BT.at[rows, at_B].set(seen.length_B - pop.start_B, mode="drop"),
        step_R=step_R, over_R=over_R)


def give_up(pop: Population, failed_R: jax.Array) -> Population:
    """Prompts that got no score are over, and stand where they last had one."""
    failed_B = jnp.repeat(failed_R, len(pop.at_B) // len(failed_R))
    return pop.replace(ready_R=pop.ready_R & ~failed_R, over_R=pop.over_R | failed_R,
                       rows=pop.rows.replace(done_B=pop.rows.done_B | failed_B))


def loop(
    lm: LM, steps: Steps, tools: Tools, reward: Any, pop: Population, enough: jax.Array | int,
    width: int | None = None, rounds: jax.Array | int = 2**31 - 1,
) -> Population:
    """Up to so many rounds, with a reward on the device, until `enough` prompts are over: one loop,
    no host."""
    def round_of(carry):
        count, pop = carry
        pop, ancestors_RP = move(lm, steps, tools, pop, width)
        score_B, carry = reward.score(reward.gather(pop.carry, ancestors_RP), view(pop))
        return count + 1, absorb(steps, tools, pop.replace(carry=carry), score_B)

    more = lambda carry: (carry[0] < rounds) & (carry[1].over_R.sum() < enough)
    return jax.lax.while_loop(more, round_of, (jnp.int32(0), pop))[1]
