"""Is orthogonal subspace fine-tuning exact? The references' numbers; the leak of 1,000 steps.

- `golden_max_error`: the factored form over five steps of SGD, momentum and AdamW, against
  mini_trainer 0.9.0 (arrays of the folder goldens beside the data sets).
- `peft_max_error`: the same with gradients alone projected, one step of SGD and five of AdamW in
  float32, against peft 0.21.2.
- `leak_left`, `leak_right`: ||U_h^T dW|| and ||dW V_h|| over ||W_0||, the worst matrix of a small
  Llama after 1,000 steps of AdamW with weight decay and clipping, in every form; in float64,
  against the subspaces that were protected. Kernels are (inputs, outputs): left is the input's.
- `control`: the same of a projected gradient before AdamW, as the references of before do it.
- `bit_exact`: u = 1 gives full fine-tuning, u = 0 the weights that were there.

Command: python experiments/osft_exact.py --out experiments/results/osft_exact/cpu.json
Hardware: any; measured on a CPU
Minutes: 3 on 2 quiet cores
Expected: golden_max_error float32 below 1e-6 and float64 below 1e-12; peft_max_error below 2e-6;
    leaks below 5e-7; control above 0.05 of the update; bit_exact all true
"""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import _harness
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.train.bases import bases_of, matrix
from jaxlm.train.leak import apart
from jaxlm.train.osft import Osft, project_updates
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from jaxlm.train.tuning import Full

FORMS = ("update", "coordinates", "factored")
MODEL = LM(ModelConfig(vocab_size=256, dim=96, num_layers=2, num_heads=4, num_kv_heads=2,
                       head_dim=24, ffn_dim=256))
ONE = "layers_0/mlp/up/kernel"


@dataclass(frozen=True)
class GradientsOnly(Osft):
    """What peft and the authors' code do: gradients are projected, what they lead to is not."""

    def wrap(self, optimizer):
        """The projection first, in form "update"."""
        if self.form == "update":
            return optax.chain(project_updates(), optimizer)
        return super().wrap(optimizer)

    def settle(self, trained, frozen):
        """As they are."""
        return trained


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts."""
    steps = 20 if args.smoke else 1000
    metrics: dict[str, Any] = goldens(args.data.parent / "goldens")
    runs = {(form, u): Osft(form, u) for form in FORMS for u in (0.5, 0.25)}
    if args.smoke:
        runs = {("update", 0.5): runs["update", 0.5]}
    found = {}
    for (form, u), tuning in tqdm(runs.items(), desc="runs", disable=None):
        found[f"{form} u={u}"] = leaks(tuning, train(tuning, steps, args.seed))
    metrics["forms"] = found
    for side in ("leak_left", "leak_right"):
        metrics[side] = max(one[side] for one in found.values())
    forms = FORMS[:1] if args.smoke else ("update", "factored")
    metrics["control"] = {
        form: leaks(tuning, train(tuning, steps, args.seed))
        for form in forms for tuning in [GradientsOnly(form, 0.5)]}
    metrics["bit_exact"] = bit_exact(args.seed)
    return metrics | {"steps": steps, "golden_folder": "golden_max_error" in metrics}


def optimizer() -> optax.GradientTransformation:
    """Clipping, AdamW, weight decay."""
    return optax.chain(optax.clip_by_global_norm(1.0),
                       optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1))


def train(tuning: Any, steps: int, seed: int) -> tuple[Params, Params, Any]:
    """A run on random tokens. Returns: parameters before and after, and what was frozen."""
    params = MODEL.init(jax.random.key(seed))
    trained, frozen = tuning.start(MODEL, params, jax.random.key(1))
    chain, objective = optimizer(), lm_objective(MODEL)

    def step(state, key):
        batch = {"tokens": jax.random.randint(key, (4, 33), 0, MODEL.config.vocab_size)}
        return tuned_step(objective, tuning, chain, state, frozen, batch)[0], None

    state = TrainState(trained, tuning.wrap(chain).init(trained), jnp.zeros((), jnp.int32))
    keys = jax.random.split(jax.random.key(seed + 1), steps)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)
    return params, (state.params, frozen), tuning


@contextlib.contextmanager
def float64(on: bool = True) -> Iterator[None]:
    """With jax's 64-bit types, or without; `jax.enable_x64` is newer than the oldest jax."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def leaks(tuning: Osft, found: Any) -> dict[str, float]:
    """The worst matrix, in float64, of the change that the trained coordinates stand for."""
    _, (trained, frozen), _ = found
    with float64():
        double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
        trained, frozen = double(trained), double(frozen)
        after, base = flatten(tuning.materialise(trained, frozen)), flatten(frozen["base"])
        rows = []
        for path, basis in bases_of(frozen).items():
            change = matrix(path, after[path] - base[path])
            left, _ = apart(change, exact(basis, "left"), "left")
            right, _ = apart(change.T, exact(basis, "right"), "right")
            norms = [float(jnp.linalg.norm(x)) for x in (left, right, change,
                                                         matrix(path, base[path]))]
            rows.append(norms)
    left, right, moved, weight = np.array(rows).T
    return {"leak_left": max(left / weight), "leak_right": max(right / weight),
            "leak_left_of_update": max(left / moved), "leak_right_of_update": max(right / moved),
            "moved": float(np.mean(moved / weight))}


def exact(basis: dict[str, jax.Array], side: str) -> dict[str, jax.Array]:
    """A side's basis made orthonormal in float64: what float32 stands for."""
    name, = (n for n in (side, f"{side}_free", f"{side}_vectors") if n in basis)
    if not name.endswith("_vectors"):
        return {name: jnp.linalg.qr(basis[name])[0]}
    vectors = basis[name]
    return {name: vectors, f"{side}_core": 2 * jnp.linalg.inv(vectors.T @ vectors)}


def bit_exact(seed: int) -> dict[str, bool]:
    """u = 1 is full fine-tuning; u = 0 leaves every matrix."""
    weights = lambda tuning: flatten(tuning.materialise(*train(tuning, 20, seed)[1]))
    full, free, kept = weights(Full()), weights(Osft("update", 1.0)), weights(Osft("update", 0.0))
    before = flatten(MODEL.init(jax.random.key(seed)))
    same = lambda a, b, paths: all(bool((a[path] == b[path]).all()) for path in paths)
    kernels = [path for path in before if path.endswith("/kernel")]
    return {"u_1_is_full": same(full, free, full), "u_0_is_frozen": same(before, kept, kernels),
            "full_moves": not same(before, full, kernels[:1])}


def goldens(folder: Any) -> dict[str, Any]:
    """The largest differences from the references' weights; {} where their arrays are not."""
    if not (folder / "osft.npz").exists():
        return {}
    known = np.load(folder / "osft.npz")
    adamw = lambda decay: optax.adamw(1e-3, 0.9, 0.95, 1e-8, weight_decay=decay)
    mini_trainer = {
        "sgd_lr0.05_W1": (Osft, optax.sgd(0.05)),
        "sgdm_lr0.05_mu0.9_W": (Osft, optax.sgd(0.05, 0.9)),
        "adamw_gradparam_W": (Osft, adamw(0.0)), "adamw_wd0.1_gradparam_W": (Osft, adamw(0.1)),
        "adamw_gradonly_W": (GradientsOnly, adamw(0.0)),
        "adamw_wd0.1_gradonly_W": (GradientsOnly, adamw(0.1))}
    peft = {"sgd_lr0.05_W": (GradientsOnly, optax.sgd(0.05)),
            "adamw_W": (GradientsOnly, adamw(0.0))}
    return {"golden_max_error": {"float32": furthest(known, "A/f32", mini_trainer),
                                 "float64": furthest(known, "A/f64", mini_trainer)},
            "peft_max_error": furthest(known, "A/peft", peft)}


def furthest(known: Any, group: str, runs: dict[str, Any]) -> float:
    """The largest difference of any weight after any step of some runs, name -> (kind, chain)."""
    worst = 0.0
    for name, (kind, chain) in runs.items():
        wanted = known[f"{group}/{name}"].reshape(-1, 64, 48)
        with float64(group == "A/f64"):
            found = trajectory(kind("factored", 2 / 3, targets=("up",)), known["A/W"],
                               known["A/G"][:len(wanted)], chain)
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


def trajectory(tuning: Osft, W: Any, gradients: Any, chain: Any) -> Any:
    """One matrix after every step of given gradients."""
    tree = unflatten({ONE: jnp.asarray(W)})
    trained, frozen = tuning.start(MODEL, tree, jax.random.key(0))
    wrapped = tuning.wrap(chain)
    state, rows = wrapped.init(trained), []
    for G in jnp.asarray(gradients):
        _, pull = jax.vjp(lambda x: flatten(tuning.materialise(x, frozen))[ONE], trained)
        updates, state = wrapped.update(pull(G)[0], state, tuning.decayed(trained, frozen),
                                        frozen=frozen)
        trained = tuning.settle(optax.apply_updates(trained, updates), frozen)
        rows.append(np.asarray(flatten(tuning.materialise(trained, frozen))[ONE]))
    return np.array(rows)


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure)
