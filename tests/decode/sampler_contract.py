"""What every sampler must do, whatever it computes; `test_samplers` runs it for each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxlm.decode.samplers import read_text

VOCAB, ROWS, DRAWS = 24, 4, 20_000
STEP = jax.jit(lambda sampler, *arguments: sampler.step(*arguments))
LOGPROB = jax.jit(lambda sampler, *arguments: sampler.logprob(*arguments))


@dataclass(frozen=True)
class Case:
    """A sampler, and its distribution written a second time, in numpy.

    reference(logits_V float64, seen_V bool) -> probabilities (V,).
    cold: the same sampler at temperature 0. sweep: samplers that must share one compilation.
    """

    name: str
    sampler: Any
    reference: Callable[[np.ndarray, np.ndarray], np.ndarray]
    cold: Any
    sweep: tuple[Any, ...]


@functools.cache
def example(rows: int = ROWS, seed: int = 3) -> jax.Array:
    """Logits with a clear order and a long tail."""
    return 2.0 * jax.random.normal(jax.random.key(seed), (rows, VOCAB))


def keys(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def history(rows: int) -> tuple[jax.Array, jax.Array]:
    """A text a row: tokens and how many of them count."""
    tokens = (jnp.arange(rows)[:, None] * 5 + jnp.arange(6) * 3) % VOCAB
    return tokens, jnp.arange(rows) % 5 + 2


def state_of(case: Case, rows: int, sampler: Any = None) -> Any:
    """The sampler's state after the rows' histories."""
    return read_text((sampler or case.sampler).init(rows, VOCAB), *history(rows))


def seen(rows: int) -> np.ndarray:
    """What the histories hold, bool (B, V)."""
    tokens, counts = (np.asarray(x) for x in history(rows))
    table = np.zeros((rows, VOCAB), bool)
    for row in range(rows):
        table[row, tokens[row, : counts[row]]] = True
    return table


def check_jit_equals_eager(case: Case) -> None:
    arguments = keys(ROWS), example(), state_of(case, ROWS)
    eager, jitted = case.sampler.step(*arguments), STEP(case.sampler, *arguments)
    np.testing.assert_array_equal(eager[0], jitted[0])
    chex.assert_trees_all_close(eager, jitted, atol=1e-5)
    assert eager[0].dtype == jnp.int32 and eager[1].dtype == jnp.float32


def check_rows_do_not_see_each_other(case: Case) -> None:
    logits, state = example(), state_of(case, ROWS)
    batch = STEP(case.sampler, keys(ROWS), logits, state)
    one_row = lambda *x: case.sampler.step(*jax.tree.map(lambda y: y[None], x))
    mapped = jax.jit(jax.vmap(one_row))(keys(ROWS), logits, state)
    chex.assert_trees_all_close(batch, jax.tree.map(lambda x: x[:, 0], mapped), atol=1e-5)
    for row in range(ROWS):
        part = jax.tree.map(lambda x, row=row: x[row : row + 1], (keys(ROWS), logits, state))
        alone = STEP(case.sampler, *part)
        there = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        np.testing.assert_array_equal(alone[0], there[0])
        chex.assert_trees_all_close(alone, there, atol=1e-5)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of counts under probabilities; bins below 5 expected are pooled."""
    expected = counts.sum() * probabilities
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())
    observed, expected = pool(counts), pool(expected)
    some = expected > 0
    assert observed[~some].sum() == 0, "a token was drawn that has no probability"
    return float(stats.chisquare(observed[some], expected[some] * observed.sum()
                                 / expected[some].sum()).pvalue)


def check_distribution(case: Case) -> None:
    """Draws fit the reference, and would not fit it sharpened or flattened by a fifth."""
    logits = jnp.repeat(example(1), DRAWS, 0)
    state = jax.tree.map(lambda x: jnp.repeat(x, DRAWS, 0), state_of(case, 1))
    tokens, _, _ = STEP(case.sampler, keys(DRAWS, seed=5), logits, state)
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    right = case.reference(np.asarray(example(1)[0], np.float64), seen(1)[0])
    assert chi_square(counts, right) > 1e-3
    if (right > 0).sum() > 1:
        for power in (0.8, 1.25):
            wrong = right**power * (right > 0)
            assert chi_square(counts, wrong / wrong.sum()) < 1e-6


def check_logprob_is_the_references(case: Case) -> None:
    """Over all tokens it sums to 1, is the reference's, and is what a step reports."""
    logits, state = example(), state_of(case, ROWS)
    table = np.stack([
        LOGPROB(case.sampler, logits, jnp.full(ROWS, token), state) for token in range(VOCAB)
    ], 1)
    wanted = np.stack([
        case.reference(np.asarray(l, np.float64), s)
        for l, s in zip(logits, seen(ROWS), strict=True)
    ])
    np.testing.assert_allclose(np.exp(table).sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.exp(table), wanted, atol=1e-5)
    assert np.isfinite(table).all() and (table[wanted == 0] < -1e30).all()
    tokens, logprobs, _ = STEP(case.sampler, keys(ROWS), logits, state)
    np.testing.assert_allclose(logprobs, table[np.arange(ROWS), tokens], atol=1e-6)


def check_cold_is_argmax(case: Case) -> None:
    logits = example()
    tokens, logprobs, _ = STEP(
        case.cold, keys(ROWS), logits, state_of(case, ROWS, case.cold)
    )
    wanted = [
        case.reference(np.asarray(l, np.float64), s).argmax()
        for l, s in zip(logits, seen(ROWS), strict=True)
    ]
    np.testing.assert_array_equal(tokens, wanted)
    assert np.isfinite(logprobs).all()


def check_sweep_compiles_once(case: Case) -> None:
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda sampler, *x: sampler.step(*x), n=1))
    arguments = keys(ROWS), example(), state_of(case, ROWS)
    for sampler in (case.sampler, *case.sweep):
        tokens, _, _ = step(sampler, *arguments)
        np.testing.assert_array_equal(tokens, STEP(sampler, *arguments)[0])


def check_values_per_row(case: Case) -> None:
    """Numbers given as (B,) act row by row as the scalars would."""
    each = [case.sampler, *case.sweep][:ROWS]
    logits = example(len(each))
    join = lambda *x: jnp.stack([jnp.asarray(v, jnp.float32) for v in x])
    joined = jax.tree.map(join, *each)
    state = state_of(case, len(each), joined)
    together = STEP(joined, keys(len(each)), logits, state)
    for row, sampler in enumerate(each):
        part = jax.tree.map(lambda x, row=row: x[row : row + 1], (keys(len(each)), logits, state))
        token, logprob, _ = STEP(sampler, *part)
        np.testing.assert_array_equal(token, together[0][row : row + 1])
        np.testing.assert_allclose(logprob, together[1][row : row + 1], atol=1e-5)


def check_nan_is_not_hidden(case: Case) -> None:
    """A row with a NaN, or with nothing left, reports NaN; its neighbours are untouched."""
    state = state_of(case, ROWS)
    logits = example().at[0, 7].set(jnp.nan).at[1].set(jnp.nan).at[2].set(-jnp.inf)
    tokens, logprobs, after = STEP(case.sampler, keys(ROWS), logits, state)
    assert np.isnan(logprobs[:3]).all() and np.isfinite(logprobs[3])
    tokens = np.asarray(tokens)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    clean = STEP(case.sampler, keys(ROWS), example(), state)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[3], (tokens, logprobs, after)),
        jax.tree.map(lambda x: x[3], clean), atol=1e-6,
    )


CHECKS = (
    check_jit_equals_eager, check_rows_do_not_see_each_other, check_distribution,
    check_logprob_is_the_references, check_cold_is_argmax, check_sweep_compiles_once,
    check_values_per_row, check_nan_is_not_hidden,
)
