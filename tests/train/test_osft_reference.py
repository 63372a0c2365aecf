"""The factored form against mini_trainer's and peft's numbers, and against its equations."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.osft_exact import float64
from jaxlm.core.errors import ConfigError
from jaxlm.train.osft import Osft, project, project_corner, project_factors
from jaxlm.train.ranks import cosine, importance, kept, normalised
from jaxlm.train.subspace import svd
from tests.train.numpy_osft import AdamW, trajectory
from tests.train.osft_cases import MODEL, PATH, kernel, run, start

FACTORED = Osft(form="factored", unfreeze_ratio=2 / 3)  # 16 of 48 directions are kept
TOLERANCE = {"f64": 1e-12, "f32": 1e-6}


@dataclass(frozen=True)
class GradientsOnly(Osft):
    """The negative control: the factors themselves are not projected."""

    def settle(self, trained, frozen):
        return trained


@pytest.fixture(scope="module")
def golden(goldens_dir):
    return np.load(goldens_dir / "osft.npz")


def adamw(decay):
    return optax.adamw(1e-3, 0.9, 0.95, 1e-8, weight_decay=decay)


RUNS = {
    "sgd_lr0.05_W1": (FACTORED, optax.sgd(0.05), 1),
    "sgdm_lr0.05_mu0.9_W": (FACTORED, optax.sgd(0.05, 0.9), 5),
    "adamw_gradparam_W": (FACTORED, adamw(0.0), 5),
    "adamw_wd0.1_gradparam_W": (FACTORED, adamw(0.1), 5),
    "adamw_gradonly_W": (GradientsOnly("factored", 2 / 3), adamw(0.0), 5),
    "adamw_wd0.1_gradonly_W": (GradientsOnly("factored", 2 / 3), adamw(0.1), 5),
}


@pytest.mark.parametrize("bits", ["f64", "f32"])
@pytest.mark.parametrize("name", RUNS)
def test_trajectories_are_mini_trainer_s(golden, name, bits):
    tuning, optimizer, steps = RUNS[name]
    with float64(bits == "f64"):
        found, _ = run(tuning, golden["A/W"], golden["A/G"][:steps], optimizer, each=True)
        assert found.dtype == {"f64": np.float64, "f32": np.float32}[bits]
    wanted = golden[f"A/{bits}/{name}"].reshape(steps, 64, 48)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE[bits], rtol=0)


def test_gradients_are_mini_trainer_s(golden):
    with float64():
        trained, frozen = start(FACTORED, golden["A/W"])
        grads = jax.vjp(lambda x: kernel(FACTORED.materialise(x, frozen)), trained)[1](
            jnp.asarray(golden["A/G"][0]))[0]
        outside = project_factors(grads, frozen)
        own = parts_of(trained)
        signs = np.sign(np.sum(own["u"] * golden["A/svd/U_low"], 0))
        for tree, which in ((grads, "raw"), (outside, "proj")):
            parts = parts_of(tree)
            for ours, theirs in (("u", golden[f"A/grad_{which}/U_low"]),
                                 ("v", golden[f"A/grad_{which}/V_low"].T)):
                np.testing.assert_allclose(parts[ours] * signs, theirs, atol=1e-12)
            np.testing.assert_allclose(parts["s"], golden[f"A/grad_{which}/S_low"], atol=1e-12)


def parts_of(tree):
    for name in PATH.split("/"):
        tree = tree[name]
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


@pytest.mark.parametrize(("name", "optimizer", "steps"), [
    ("sgd_lr0.05_W", optax.sgd(0.05), 1), ("adamw_W", adamw(0.0), 5)])
def test_peft_projects_gradients_alone(golden, name, optimizer, steps):
    found, _ = run(GradientsOnly("factored", 2 / 3), golden["A/W"].astype(np.float32),
                   golden["A/G"][:steps].astype(np.float32), optimizer, each=True)
    np.testing.assert_allclose(found, golden[f"A/peft/{name}"], atol=2e-6)


def test_dense_projections(golden):
    with float64():
        found = svd(jnp.asarray(golden["A/W"]))
        basis = {"left": found.u[:, :16], "right": found.v[:, :16]}
        G = jnp.asarray(golden["A/G"][0])
        for function, name in ((project, "two_sided_complement"), (project_corner, "paper_eq")):
            np.testing.assert_allclose(function(G, basis), golden[f"A/dense/G_{name}"], atol=1e-12)


def test_importance_and_ranks(golden):
    with float64():
        raw = {}
        for layer in range(5):
            X, W = (jnp.asarray(golden[f"imp/L{layer}/{x}"]) for x in "XW")
            raw[layer] = float(cosine(X.T, (W @ X).T, jnp.ones(X.shape[1]))) / X.shape[1]
    np.testing.assert_allclose(list(raw.values()), golden["imp/I_raw"], atol=1e-9)
    relative = normalised(raw, clip=False)
    np.testing.assert_allclose(list(relative.values()), golden["imp/I_norm"], atol=1e-8)
    for clip, name in ((False, "k_paper_clipped"), (True, "k_negclip")):
        shares = normalised(raw, clip)
        found = [kept(32, 0.1 + 0.7 * share) for share in shares.values()]
        assert found == golden[f"imp/{name}"].tolist()


def test_importance_is_a_mean_over_tokens():
    """However the samples are put in batches; those of a last, small batch weigh no more."""
    params, lengths = MODEL.init(jax.random.key(0)), jnp.array([9, 2, 3, 9, 1, 4, 2, 7])
    tokens = jax.random.randint(jax.random.key(1), (8, 10), 0, MODEL.config.vocab_size)
    segments = 1 * (jnp.arange(9) < lengths[:, None])
    found = [importance(MODEL, params, [
        {"tokens": tokens[i:i + size], "segments": segments[i:i + size]}
        for i in range(0, 8, size)]) for size in (8, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert np.mean(list(found[0].values())) == pytest.approx(1)


def test_negative_cosines_count_as_none():
    """In a small model their mean may lie below 0, from which no ranks follow."""
    cosines = {"a": -3.0, "b": 1.0, "c": 1.0}
    assert normalised(cosines) == {"a": 0.0, "b": 1.5, "c": 1.5}
    with pytest.raises(ConfigError, match="clip=True"):
        normalised(cosines, clip=False)
    with pytest.raises(ConfigError, match="uniform"):
        normalised({"a": -1.0})


@pytest.mark.parametrize("project_parameters", [True, False])
def test_the_equations_in_numpy(project_parameters):
    """The same without the reference's files: 20 x 12, 5 kept, AdamW with weight decay."""
    rng = np.random.default_rng(0)
    W, G = rng.standard_normal((20, 12)), rng.standard_normal((6, 20, 12))
    wanted = trajectory(W, G, 5, AdamW(1e-2, 0.1), project_parameters)
    kind = Osft if project_parameters else GradientsOnly
    with float64():
        found, _ = run(kind("factored", 7 / 12), W, G, optax.adamw(1e-2, 0.9, 0.95, 1e-8,
                                                                   weight_decay=0.1), each=True)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_projected_gradient_under_adam_leaks():
    """What the metric is for: it must see the leak of the gradient-only rule."""
    rng = np.random.default_rng(1)
    W, G = rng.standard_normal((24, 24)), rng.standard_normal((5, 24, 24))
    leaks = {}
    for kind in (Osft, GradientsOnly):
        tuning = kind("factored", 0.5)
        _, (trained, frozen) = run(tuning, W.astype(np.float32), G.astype(np.float32),
                                   optax.adamw(1e-3))
        leaks[kind] = tuning.metrics(trained, frozen)
    for side in ("leak_left_of_update", "leak_right_of_update"):
        assert leaks[GradientsOnly][side] > 0.05 and leaks[Osft][side] < 1e-4
