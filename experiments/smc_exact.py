"""The Monte Carlo core against enumeration: evidence, laws, Gibbs kernels, swaps, a wrong rule.

Command: python experiments/smc_exact.py --out experiments/results/smc_exact/cpu.json
Hardware: 2 CPU cores.
Minutes: 3
Expected: every largest |z| below the bound printed beside it; `tv_over_floor` at most 1.3, and
  `tv_over_floor_max`, its largest over the settings, below `tv_over_floor_bound`;
  `its_hub_rejected_z` above 10

Chains of a few letters (`smc_chains.py`) whose laws are sums of a hundred terms. z: how many
standard errors an average over seeds lies from the exact number; the bound is Bonferroni's at 1 %
for as many numbers as were compared. That of the largest distance is simulated: exact draws, as
many settings, 1 %.
"""

import argparse
import zlib
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _harness, smc_kernels
from experiments.smc_chains import CHAINS, Chain, Law, lengths, letters
from jaxlm import smc

PARTICLES = 1024
SCHEMES = ("multinomial", "stratified", "systematic", "residual")
THRESHOLDS = {"never": 0.0, "below half": 0.5, "every step": 2.0}
RULES = ("size", "entropy", "progress")
PUBLISHED: dict[str, Any] = {"threshold": 2.0, "scheme": "multinomial", "reweigh_ended": True}


def bound(numbers: int) -> float:
    """The largest |z| that one in a hundred right programs exceeds somewhere, for `numbers`."""
    return NormalDist().inv_cdf(1 - 0.01 / (2 * numbers))


@partial(jax.jit, static_argnames=("chain", "scheme", "rule", "reweigh_ended"))
def filtered(key: jax.Array, state: smc.State, threshold: float, chain: str,
             scheme: str = "systematic", rule: str | None = None, reweigh_ended: bool = False):
    """Of many filters, as problems of one program: log-evidence, weights, texts, and the text of
    one particle of each, drawn by its weight."""
    made = CHAINS[chain]

    def step(state, t):
        temper = 1.0 if rule is None else smc.temperature(
            state.log_weights_P, t / made.length, rule, threshold=1.0)
        return smc.step(made.model(), jax.random.fold_in(key, t), state, threshold=threshold,
                        scheme=scheme, temper=temper, reweigh_ended=reweigh_ended)[0], None

    state, _ = jax.lax.scan(step, state, jnp.arange(made.length))
    texts = state.particles["text"]
    one = jax.random.categorical(jax.random.fold_in(key, made.length), state.log_weights_P)
    drawn = jnp.take_along_axis(texts, one[:, None, None], 1)[:, 0]
    return state.log_evidence, smc.normalise(state.log_weights_P).probs_P, texts, drawn


def sample(chain: str, name: str, options: dict[str, Any], args: argparse.Namespace):
    """`filtered` from the start, with a key of the setting's own; numpy arrays."""
    key = jax.random.fold_in(jax.random.key(args.seed), zlib.crc32(f"{chain} {name}".encode()))
    shape = (args.seeds, PARTICLES)
    state = smc.init(CHAINS[chain].start(*shape), shape)
    return map(np.asarray, filtered(key, state, chain=chain, **options))


def settings(chain: str) -> dict[str, dict[str, Any]]:
    """Every way to run the filter that must keep the target."""
    plain = {f"{scheme}, {name}": {"scheme": scheme, "threshold": value}
             for scheme in SCHEMES for name, value in THRESHOLDS.items()}
    return plain | {f"tempered by {rule}": {"rule": rule, "threshold": 2.0} for rule in RULES}


def z_of(log_evidence: jax.Array, truth: float) -> float:
    """Standard errors between the mean evidence over seeds and the truth."""
    z = np.exp(np.asarray(log_evidence, np.float64))
    return float((z.mean() - truth) / (z.std(ddof=1) / np.sqrt(len(z))))


def tabulate(texts: np.ndarray) -> Law:
    """The law of texts (n, T), padded with -1."""
    rows, counts = np.unique(texts, axis=0, return_counts=True)
    return {tuple(int(x) for x in row if x >= 0): float(n) / len(texts)
            for row, n in zip(rows, counts, strict=True)}


def law_z(made: Chain, evidence: np.ndarray, probs: np.ndarray, texts: np.ndarray) -> list[float]:
    """z of every text's mass: `E[Z^ sum_i W_i 1(x_i = x)] = p(x) prod w` without any bias."""
    z = []
    for text, mass in made.masses().items():
        row = np.array((*text, *(-1,) * (made.length - len(text))))
        found = np.exp(evidence.astype(np.float64)) * (probs * (texts == row).all(-1)).sum(1)
        if mass > 0 and (found > 0).sum() >= 30:  # enough for the mean to be normal
            z.append((found.mean() - mass) / (found.std(ddof=1) / np.sqrt(len(found))))
        elif mass == 0 and found.any():
            raise ValueError(f"{text} has probability 0 and was drawn")
    return z


def cells(chain: Chain, law: Law) -> dict[str, np.ndarray]:
    """The laws whose distances are taken: of the lengths, and of the letter at every place."""
    count = chain.step.shape[1]
    places = {f"letter {at}": letters(law, at, count) for at in range(chain.length)}
    return places | {"length": lengths(law, chain.length)} if chain.end >= 0 else places


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Total variation, the mean over the laws."""
    return float(np.mean([0.5 * np.abs(one[name] - other[name]).sum() for name in one]))


def distances(chain: Chain, draws: int, seed: int, count: int) -> np.ndarray:
    """The distance of `draws` exact independent texts, `count` times, by simulation."""
    law = chain.law()
    rows = [cells(chain, {text: 1.0}) for text in law]  # a text's own laws are certain
    joined = np.array([np.concatenate(list(row.values())) for row in rows])
    p = np.array(list(law.values()))
    found = np.random.default_rng(seed).multinomial(draws, p, size=count) / draws
    return 0.5 * np.abs(found @ joined - p @ joined).sum(1) / len(rows[0])


def largest(chains: list[str], draws: int, seed: int, count: int = 20_000) -> float:
    """What the largest distance over its floor, of one setting for each entry of `chains`, exceeds
    in one of a hundred experiments of exact draws."""
    rng = np.random.default_rng(seed)
    simulated = {name: distances(CHAINS[name], draws, seed + 1, count) for name in set(chains)}
    ratios = [rng.permutation(simulated[name]) / simulated[name].mean() for name in chains]
    return float(np.quantile(np.max(ratios, 0), 0.99))


def compare(chain: str, name: str, options: dict[str, Any], args: argparse.Namespace) -> dict:
    """One setting: z of the evidence and of every text's mass; and the law of one text drawn from
    each seed's last set, by its distance and that of as many exact draws."""
    made = CHAINS[chain]
    evidence, probs, texts, drawn = sample(chain, name, options, args)
    masses, exact = law_z(made, evidence, probs, texts), cells(made, made.law())
    return {"z": z_of(evidence, made.evidence()), "law_z_max": float(max(map(abs, masses))),
            "laws": len(masses), "tv": distance(cells(made, tabulate(drawn)), exact),
            "floor": float(distances(made, args.seeds, args.seed, 4000).mean())}


def published(args: argparse.Namespace) -> dict[str, Any]:
    """The rule that weighs finished particles at every round, under the same tests."""
    made = CHAINS["texts"]
    found = compare("texts", "published", PUBLISHED, args)
    evidence, _, _, drawn = sample("texts", "published", PUBLISHED, args)
    share = lambda law: float(lengths(law, made.length)[1])
    return {**found, "length_2_truth": share(made.law()), "length_2_measured":
            share(tabulate(drawn)), "length_2_of_its_rule": share(made.law(reweigh_ended=True)),
            "z_against_its_rule": z_of(evidence, made.evidence(reweigh_ended=True))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every comparison, and the metrics over them."""
    chains = list(CHAINS)
    if args.smoke:
        args.seeds, args.chains, chains = 200, 2000, ["texts"]
    table: dict[str, dict[str, Any]] = {}
    for chain in chains:
        for name, options in list(settings(chain).items())[:: 5 if args.smoke else 1]:
            table[f"{chain}: {name}"] = row = compare(chain, name, options, args)
            print(chain, name, {k: round(v, 4) for k, v in row.items()}, flush=True)
    rows = list(table.values())
    kernels = smc_kernels.measure(jax.random.key(args.seed + 1), args.chains)
    for found in kernels.values():
        found["bound"] = bound(found["numbers"])
    wrong = published(args)
    metrics = {
        "seeds": args.seeds, "particles": PARTICLES,
        "evidence_z_max": max(abs(row["z"]) for row in rows), "evidence_z_bound": bound(len(rows)),
        "law_z_max": max(row["law_z_max"] for row in rows),
        "law_z_bound": bound(sum(row["laws"] for row in rows)),
        "tv_over_floor": float(np.mean([row["tv"] / row["floor"] for row in rows])),
        "tv_over_floor_max": max(row["tv"] / row["floor"] for row in rows),
        "tv_over_floor_bound": largest([name.split(":")[0] for name in table], args.seeds,
                                       args.seed),
        "its_hub_rejected_z": abs(wrong["z"]), "its_hub": wrong, "kernels": kernels, "rows": table,
    }
    print({name: value for name, value in metrics.items() if name != "rows"}, flush=True)
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is averaged."""
    parser.add_argument("--seeds", type=int, default=400, help="filters a setting, at least 200")
    parser.add_argument("--chains", type=int, default=100_000, help="of each Markov kernel")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
