"""What orthogonal subspaces promise, in every form, for any optimiser."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import muon

from experiments.osft_exact import float64
from jaxlm.core.count import count
from jaxlm.core.errors import ConfigError, NumericsError
from jaxlm.core.tree import flatten, nbytes, size
from jaxlm.models.stack import stack, unstack
from jaxlm.train.osft import Osft, project, project_corner
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from jaxlm.train.subspace import svd
from jaxlm.train.tuning import Full
from tests.train.osft_cases import CONFIG, MODEL, PATH, kernel, only, params_of, run, start

FORMS = ("update", "factored", "coordinates")
RNG = np.random.default_rng(0)
W = RNG.standard_normal((20, 28)).astype(np.float32)
G = RNG.standard_normal((1000, 20, 28)).astype(np.float32)
OPTIMISERS = {
    "sgd": optax.sgd(1e-3, 0.9),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1)),
    "lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(3e-4, weight_decay=0.1)),
    "muon": muon(1e-3, weight_decay=0.1),
}
TOKENS = jax.random.randint(jax.random.key(3), (4, 13), 0, CONFIG.vocab_size)


def true_bases(W, k):
    """U_h and V_h by numpy, in float64."""
    U, _, Vt = np.linalg.svd(W.astype(np.float64))
    return U[:, :k], Vt[:k].T


@functools.cache
def after(form, name, u=0.5, steps=1000):
    """W after so many steps with random gradients."""
    found, (trained, frozen) = run(Osft(form, u), W, G[:steps], OPTIMISERS[name])
    return np.asarray(found, np.float64), trained, frozen


@pytest.mark.parametrize(("form", "name", "u"), [
    *((form, "adamw", 0.5) for form in FORMS), ("update", "sgd", 0.5), ("update", "lion", 0.5),
    ("update", "muon", 0.8), pytest.param("update", "adamw", 0.3, marks=pytest.mark.slow),
    pytest.param("coordinates", "adamw", 0.3, marks=pytest.mark.slow)])
def test_nothing_leaks_in_a_thousand_steps(form, name, u):
    found, trained, frozen = after(form, name, u)
    k = int(20 * (1 - u) + 1e-9)
    U, V = true_bases(W, k)
    change = found - W
    for leak in (U.T @ change, change @ V):
        assert np.linalg.norm(leak) < 1e-6 * np.linalg.norm(W)
    assert np.linalg.norm(change) > 0.01 * np.linalg.norm(W)
    assert np.linalg.matrix_rank(change, 1e-4 * np.linalg.norm(change)) <= 20 - k
    measured = replace(Osft(form, u), targets=("up",)).metrics(trained, frozen)
    assert measured["leak_left"] <= 5e-7 and measured["leak_right"] <= 5e-7
    assert measured["free_share"] > 0.999 and measured["protected_share"] < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_what_was_learnt_gives_the_same_outputs(form):
    found, *_ = after(form, "adamw")
    U, V = true_bases(W, 10)
    inside = RNG.standard_normal((10, 5))
    np.testing.assert_allclose(found @ (V @ inside), W @ (V @ inside), atol=2e-5)
    np.testing.assert_allclose(U.T @ found, U.T @ W, atol=2e-5)


def test_float64_leaks_nothing():
    with float64():
        for form in FORMS:
            found, _ = run(Osft(form, 0.5), W.astype(np.float64), G[:100].astype(np.float64),
                           OPTIMISERS["adamw"])
            U, V = true_bases(W, 10)
            for leak in (U.T @ (found - W), (found - W) @ V):
                assert np.linalg.norm(leak) < 1e-12 * np.linalg.norm(W)


def test_a_gradient_projected_before_the_optimiser_leaks():
    """The negative control: Adam and weight decay bring back what was projected away."""
    tuning = replace(Osft("update", 0.5), targets=("up",))
    trained, frozen = start(tuning, W)
    wrapped = tuning.wrap(optax.identity())
    outside, _ = wrapped.update(params_of(G[0]), wrapped.init(trained), frozen=frozen)
    step = optax.adamw(1e-3, weight_decay=0.1)
    update, _ = step.update(outside, step.init(trained), params_of(W))
    leaked = tuning.metrics(update, frozen)
    assert leaked["leak_left_of_update"] > 0.05 and leaked["leak_right_of_update"] > 0.05
    assert leaked["protected_share"] > 0.05


def tuned(tuning, steps=4, params=None, model=MODEL, parts=1):
    """A model after steps on one batch."""
    params = model.init(jax.random.key(0)) if params is None else params
    trained, frozen = tuning.start(model, params, jax.random.key(1))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    state = TrainState(trained, tuning.wrap(chain).init(trained), jnp.zeros((), jnp.int32))
    step = jax.jit(lambda state: tuned_step(
        lm_objective(model), tuning, chain, state, frozen, {"tokens": TOKENS}, parts=parts)[0])
    for _ in range(steps):
        state = step(state)
    return params, tuning.materialise(state.params, frozen), (state, frozen)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_free_is_full_fine_tuning_bit_for_bit():
    _, full, _ = tuned(Full())
    _, free, (_, frozen) = tuned(Osft(unfreeze_ratio=1.0))
    same(full, free)
    assert not jax.tree.leaves(frozen)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_free_leaves_every_matrix_bit_for_bit(form):
    before, found, _ = tuned(Osft(form, 0.0))
    for path, leaf in flatten(before).items():
        assert bool((flatten(found)[path] == leaf).all()) == path.endswith("/kernel"), path


@pytest.mark.parametrize("form", FORMS)
def test_others_freeze(form):
    before, found, (state, _) = tuned(Osft(form, 0.5, others="freeze", targets=("q", "*/mlp/*")))
    moved = {path for path, leaf in flatten(before).items()
             if not bool((flatten(found)[path] == leaf).all())}
    targets = {path for path in flatten(before)
               if path.endswith(("q/kernel", "gate/kernel", "up/kernel", "down/kernel"))}
    assert moved == targets and size(state.params) < size(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_of_layers_trains_as_the_layers_do(form):
    """With ranks that differ by layer, so that bases are filled up with zeros."""
    tuning = Osft(form, 0.5, patterns=(("layers_1/mlp/*", 0.25), ("layers_0/attn/q", 0.75)))
    _, plain, _ = tuned(tuning)
    params = stack(MODEL.init(jax.random.key(0)), CONFIG)
    _, stacked, (state, frozen) = tuned(tuning, params=params)
    if form != "coordinates":  # Adam there depends on which basis stands for a complement
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
                     plain, unstack(stacked))
    assert tuning.metrics(state.params, frozen)["leak_left"] < 5e-7


def test_parts_of_a_batch_add_up():
    tuning = Osft()
    _, whole, _ = tuned(tuning)
    _, parts, _ = tuned(tuning, parts=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, parts)


def test_a_model_s_start_is_its_own_weights():
    before = MODEL.init(jax.random.key(0))
    for form in FORMS:
        tuning = Osft(form, 0.5)
        same(before, tuning.materialise(*tuning.start(MODEL, before, jax.random.key(1))))


def test_base_weights_keep_their_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.init(jax.random.key(0)))
    trained, frozen = Osft().start(MODEL, half, jax.random.key(1))
    assert {x.dtype for x in jax.tree.leaves(frozen["base"])} == {jnp.dtype("bfloat16")}
    found = Osft().materialise(trained, frozen)
    same(found, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_sgd_on_coordinates_is_projected_sgd():
    update, _ = run(Osft("update", 0.4), W, G[:20], optax.sgd(1e-2, 0.9))
    small, _ = run(Osft("coordinates", 0.4), W, G[:20], optax.sgd(1e-2, 0.9))
    np.testing.assert_allclose(small, update, atol=1e-5)


def test_weight_decay_is_that_of_the_weights_in_both_dense_forms():
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.scale(-0.1))
    zero = np.zeros((3, 20, 28), np.float32)
    update, _ = run(Osft("update", 0.4), W, zero, decay)
    small, _ = run(Osft("coordinates", 0.4), W, zero, decay)
    np.testing.assert_allclose(small, update, atol=1e-5)
    U, V = true_bases(W, 12)
    P, Q = np.eye(20) - U @ U.T, np.eye(28) - V @ V.T
    np.testing.assert_allclose(update, W - (1 - 0.99**3) * P @ W @ Q, atol=1e-5)


def test_coordinates_keep_the_smallest_state():
    square = RNG.standard_normal((32, 32)).astype(np.float32)
    adam = optax.scale_by_adam()
    for u in (0.25, 0.5, 0.75):
        trained, frozen = start(Osft("coordinates", u), square)
        state = adam.init(trained)
        assert size((state.mu, state.nu)) == 2 * 32 * 32 * u**2
        bases = {n: x for n, x in flatten(frozen["bases"]).items() if not n.endswith("start")}
        assert nbytes(list(bases.values())) <= 2 * nbytes(square) * min(u, 1 - u) * (1 + u)


def test_the_basis_within_its_span_does_not_matter():
    found = svd(jnp.asarray(W))
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))[0]
    basis = {"left": found.u[:, :8], "right": found.v[:, :8]}
    turned = {"left": -found.u[:, :8] @ turn, "right": found.v[:, :8] @ turn.T}
    np.testing.assert_allclose(project(G[0], basis), project(G[0], turned), atol=1e-5)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([3, 6]), st.sampled_from([3, 6]), st.floats(0, 1), st.integers(0, 99))
def test_projection_is_one(n, m, share, seed):
    """Linear, idempotent, symmetric; by kept columns or by free ones."""
    rng = np.random.default_rng(seed)
    x, y, w = (jnp.asarray(a, jnp.float32) for a in rng.standard_normal((3, n, m)))
    k, found = int(share * min(n, m)), svd(w)
    basis = {"left": found.u[:, :k], "right": found.v[:, :k]}
    once = project(x, basis)
    np.testing.assert_allclose(project(once, basis), once, atol=1e-5)
    np.testing.assert_allclose(project(2 * x + y, basis), 2 * once + project(y, basis), atol=1e-5)
    np.testing.assert_allclose((once * y).sum(), (x * project(y, basis)).sum(), atol=1e-4)
    assert jnp.linalg.norm(once) <= jnp.linalg.norm(x) * 1.00001
    short = {"left_free": found.u[:, k:]} if n <= m else {"right_free": found.v[:, k:]}
    side = "right" if n <= m else "left"
    np.testing.assert_allclose(project(x, short | {side: basis[side]}), once, atol=1e-5)
    if n == m:
        both = {"left_free": found.u[:, k:], "right_free": found.v[:, k:]}
        np.testing.assert_allclose(project(x, both), once, atol=1e-5)


def test_the_corner_is_all_that_the_printed_equation_protects():
    tuning = Osft("update", 0.5, constraint="corner")
    found, (trained, frozen) = run(tuning, W, G[:50], OPTIMISERS["adamw"])
    U, V = true_bases(W, 10)
    change, norm = np.asarray(found, np.float64) - W, np.linalg.norm(W)
    assert np.linalg.norm(U.T @ change @ V) < 1e-6 * norm < 1e-3 * np.linalg.norm(U.T @ change)
    assert tuning.metrics(trained, frozen)["protected_share"] > 0.2
    inside = project_corner(G[0], {"left": U, "right": V})
    np.testing.assert_allclose(inside, G[0] - U @ (U.T @ G[0] @ V) @ V.T, atol=1e-5)


@pytest.mark.parametrize(("fields", "words"), [
    ({"unfreeze_ratio": 1.5}, "unfreeze_ratio is 1.5"),
    ({"unfreeze_ratio": -0.1}, r"\[0, 1\]"),
    ({"unfreeze_ratio": float("nan")}, r"\[0, 1\]"),
    ({"unfreeze_ratio": True}, "True"),
    ({"patterns": (("q", 2),)}, r"tuning.q is 2"),
    ({"form": "dense"}, "update, factored, coordinates"),
    ({"others": "drop"}, "train, freeze"),
    ({"ranks": "random"}, "uniform"),
    ({"task": 3, "tasks": 2}, "tuning.task is 3"),
    ({"constraint": "corner", "form": "factored"}, "'update'"),
])
def test_settings_that_cannot_be(fields, words):
    with pytest.raises(ConfigError, match=words):
        Osft(**fields)


@pytest.mark.parametrize(("fields", "words"), [
    ({"targets": ("q", "qkv")}, "'qkv'"), ({"patterns": (("layers_7/*", 0.5),)}, r"layers_7/\*"),
    ({"ranks": "importance"}, "batches"),
])
def test_settings_that_do_not_fit_the_model(fields, words):
    with pytest.raises(ConfigError, match=words):
        Osft(**fields).start(MODEL, MODEL.init(jax.random.key(0)), jax.random.key(1))


def test_a_weight_that_is_no_number_has_no_subspace():
    broken = W.copy()
    broken[3, 4] = np.nan
    with pytest.raises(NumericsError, match="NaN"):
        start(Osft(), broken)


def test_one_projection_is_the_last_of_the_chain():
    """`kernel` of an update that optax alone makes: clipped, with momentum, decayed, projected."""
    tuning = replace(Osft(), targets=("up",))
    trained, frozen = start(tuning, W)
    plain, wrapped = OPTIMISERS["adamw"], tuning.wrap(OPTIMISERS["adamw"])
    expected, _ = plain.update(params_of(G[0]), plain.init(trained), params_of(W))
    found, _ = wrapped.update(params_of(G[0]), wrapped.init(trained), params_of(W), frozen=frozen)
    U, V = true_bases(W, 10)
    P, Q = np.eye(20) - U @ U.T, np.eye(28) - V @ V.T
    np.testing.assert_allclose(kernel(found), P @ np.asarray(kernel(expected)) @ Q, atol=1e-8)
    assert PATH in flatten(found)


COSTS = {  # of one n x m matrix with k directions kept, a step: docs/osft.md
    "update, kept": ("update", (20, 28, 4), lambda n, m, k: 4 * n * m * (k + k)),
    "update, free": ("update", (24, 24, 18), lambda n, m, k: 4 * n * m * 6 + 4 * m * 6**2),
    "coordinates, free": ("coordinates", (20, 28, 16),
                          lambda n, m, k: 4 * n * (n - k) * (m - k) + 4 * n * m * (m - k)),
    "coordinates, right reflected": ("coordinates", (20, 28, 12),
                                     lambda n, m, k: 4 * n * (n - k) * (m - k) + 8 * n * m * k),
    "coordinates, left reflected": ("coordinates", (28, 20, 12),
                                    lambda n, m, k: 8 * n * k * (m - k) + 4 * n * m * (m - k)),
    "coordinates, reflected": ("coordinates", (20, 28, 6),
                               lambda n, m, k: 8 * n * k * (m - k) + 8 * n * m * k),
    "factored": ("factored", (20, 28, 12),
                 lambda n, m, k: 8 * (n + m) * k * (20 - k) + 6 * n * m * (20 - k)),
}


@pytest.mark.parametrize("case", COSTS)
def test_what_a_form_adds_to_a_step(case):
    form, (n, m, k), wanted = COSTS[case]
    tuning, weights = Osft(form, 1 - k / min(n, m)), RNG.standard_normal((n, m))
    trained, frozen = start(tuning, weights.astype(np.float32))
    wrapped = only(tuning).wrap(optax.sgd(1.0))

    def step(trained, G):
        W, pull = jax.vjp(lambda x: kernel(tuning.materialise(x, frozen)), trained)
        updates, _ = wrapped.update(pull(G)[0], wrapped.init(trained), frozen=frozen)
        return W, tuning.settle(optax.apply_updates(trained, updates), frozen)

    assert count(jax.make_jaxpr(step)(trained, jnp.ones((n, m))), "cpu").flops == wanted(n, m, k)
