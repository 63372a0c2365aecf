"""Accuracy against the budget of answers: particles, beams, trees and votes over one model.

Command: python experiments/inference_scaling.py --seeds 1 --most 32 --minutes 150 --out FILE
Hardware: 2 CPU cores.
Minutes: 150 at most by --minutes; the committed part of one seed took more than two hours
  (`device_s`) beside other work, in several sittings. With three seeds and --prm some six hours of
  both cores, reckoned from the tokens of its cells and 2,800 a second and core (by hand): a stopped
  run goes on where it was (--parts), and --earlier a committed one
Expected: of 16 answers the particle filter 95.5 %, DVTS 95.5 % and best-of-n 94.5 % by the exact
  checker, 92.5, 90.5 and 84.0 % by the one with wrong verdicts; by that one best-of-n needs 8 times
  the filter's budget of 4, and with 128 answers does not reach that of 8 (docs/search.md)

Held-out hard sums, the bundled model at temperature 0.8. Rewards: the exact checker of steps, the
same with some of its verdicts turned round, and with --prm FOLDER a learned process reward model
(`train_prm.py`).
Methods that only select share one set of rollouts, by all rewards that read texts; the smaller
budgets take their first ones. The filter, DVTS and best-of-n go to 128 answers by the exact
checker, all else to 64, what steers by wrong verdicts to 32. Bands are 95 % of problems drawn anew
(a bootstrap over problems, seeds averaged). `budget_ratios`: at each budget of the filter, how many
times that another method needs to be right as often, with such a band; no ratio is above the
other's largest budget over the filter's, and `at_least` says so.
With --larger FOLDER, a larger sibling (`make_models.py`): `budget_to_match_larger`, the answers a
problem with which each method is right as often as the sibling is greedily, and by one sample.
With --earlier FILE, an earlier result, only the cells that it lacks are measured, of other methods,
budgets or seeds: a table can be made in several sittings. --minutes N begins no cell after N
minutes, and --most N leaves searches of more than N answers out.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments import _harness
from experiments.scaling_table import packed, ratios, reach, unpacked
from jaxlm.core.errors import ConfigError
from jaxlm.eval.arithmetic_reward import arithmetic_reward
from jaxlm.eval.solve import key_for
from jaxlm.eval.tasks import ANSWER_LINE, Problem, held_out
from jaxlm.rewards.answers import extract
from jaxlm.rewards.host import HostReward
from jaxlm.rewards.process import process_reward
from jaxlm.search import perplexity, select
from jaxlm.search.base import Steps
from jaxlm.search.methods import METHODS, Request, as_rollouts, draw
from jaxlm.search.select import Rollouts
from jaxlm.train.setup import weights_hash

BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)
LONG = ("particle-filter", "dvts", "best-of-n")  # to 128, as published; the others to 64
SEARCHES = ("particle-filter", "entropic-filter", "beam", "dvts", "particle-gibbs",
            "parallel-tempering")
SELECTIONS: dict[str, Callable] = {
    "best-of-n": select.best_of_n, "weighted-best-of-n": select.weighted_best_of_n,
    "calibrated-best-of-n": select.calibrated_best_of_n,
    "self-consistency": select.self_consistency,
    "perplexity-consistency": perplexity.perplexity_consistency, "rpc": perplexity.rpc,
}
REWARDED = tuple(name for name in SELECTIONS
                 if name not in ("self-consistency", "perplexity-consistency", "rpc"))
Cells = dict[str, dict[str, dict[str, Any]]]  # method|reward -> budget -> seed -> right, tokens
NOISES = (0.1, 0.3)
NOISY = ("particle-filter", "beam", "dvts")  # by rewards that err, beside the selections


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """The hard split's."""
    return list(held_out("hard", args.problems, 0).problems)


def request_of(bundle: jaxlm.Bundle, reward: Any) -> Request:
    """How every method is asked."""
    return Request(bundle, reward, steps=Steps(("\n",), max_steps=14, max_new_tokens=112),
                   extract=lambda text: extract(text, ANSWER_LINE))


def in_batches(
    problems: list[Problem], seed: int, batch: int, run: Callable[[list[str], Any], list]
) -> list[Any]:
    """`run` over all problems; the last batch is filled up, so that one program serves all."""
    out: list[Any] = []
    batch = min(max(batch, 1), len(problems))
    for at in range(0, len(problems), batch):
        part = problems[at: at + batch]
        full = part + [part[-1]] * (batch - len(part))
        keys = jnp.stack([key_for(seed, problem) for problem in full])
        out += run([problem.prompt for problem in full], keys)[:len(part)]
    return out


def searched(request: Request, name: str, budget: int, problems: list[Problem], seed: int,
             rows: int) -> dict[str, Any]:
    """One cell of a method that steers: which problems were right, and the tokens of each."""
    request, began = replace(request, particles=budget), time.perf_counter()
    found = in_batches(problems, seed, rows // budget, lambda prompts, keys:
                       METHODS[name].run(request, prompts, keys))
    right = [one.answer == problem.gold for one, problem in zip(found, problems, strict=True)]
    return {"right": right, "tokens": float(np.mean([one.tokens for one in found])),
            "seconds": time.perf_counter() - began}


def selected(
    request: Request, judges: dict[str, Any], budgets: list[int], problems: list[Problem],
    seed: int, args: argparse.Namespace,
) -> dict[str, Any]:
    """All cells of the methods that select, by every judge: one set of rollouts, its first ones for
    less. What was drawn holds the scores of the first judge; others, on the host, score its texts.
    """
    most, began = max(budgets), time.perf_counter()
    found = in_batches(problems, seed, args.rows // most, lambda prompts, keys: [
        as_rollouts(request, [one]) for one in draw(request, prompts, keys, most)])
    cells: dict[str, Any] = {}
    for number, (reward, judge) in enumerate(judges.items()):
        judged = found if number == 0 else [scored(judge, problem, drawn)
                                            for problem, drawn in zip(problems, found, strict=True)]
        for name in SELECTIONS if number == 0 and reward == "checker" else REWARDED:
            for budget in (b for b in budgets if b <= longest(name)):
                parts = [drawn.take(slice(budget)) for drawn in judged]
                right = [part.answers[SELECTIONS[name](part).index] == problem.gold
                         for part, problem in zip(parts, problems, strict=True)]
                cells[f"{name}|{reward}|{budget}"] = {
                    "right": right, "tokens": float(np.mean([p.lengths_P.sum() for p in parts]))}
    any_right = [[answer == problem.gold for answer in drawn.answers]
                 for drawn, problem in zip(found, problems, strict=True)]
    return {"cells": cells, "one": float(np.mean(any_right)),
            "seconds": time.perf_counter() - began}


def scored(judge: HostReward, problem: Problem, drawn: Rollouts) -> Rollouts:
    """The same rollouts by another judge of their texts."""
    count = len(drawn.texts)
    scores, failed = judge.values([problem.prompt] * count, drawn.texts, [0] * count)
    assert not failed, failed
    return replace(drawn, rewards_P=scores)


def rewards_of(args: argparse.Namespace, bundle: jaxlm.Bundle) -> tuple[dict[str, Any], list[str]]:
    """The rewards by name, and what had to be left out."""
    found: dict[str, Any] = {"checker": arithmetic_reward()}
    left_out, args.judge = [], ""
    if args.prm:
        judge = jaxlm.load(str(args.prm), dtype=jnp.float32)
        args.judge = weights_hash(judge.params)
        found["prm"] = process_reward(judge, bundle, aggregate="prod")  # as train_prm.py judges it
    else:
        left_out.append("the learned reward: no --prm")
    if not args.quick and not args.smoke:
        found |= {f"checker, noise {noise}": arithmetic_reward(noise) for noise in NOISES}
    elif args.quick:
        found[f"checker, noise {NOISES[0]}"] = arithmetic_reward(NOISES[0])
    return found, left_out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every cell that the settings ask for; each is kept as it is done."""
    plan(args)
    problems, bundle = problems_of(args), jaxlm.load(args.model, dtype=jnp.float32)
    rewards, left_out = rewards_of(args, bundle)
    cells, sibling, earlier = gone_before(args)
    settings = {name: str(getattr(args, name)) for name in
                ("model", "problems", "seed", "smoke")}
    parts = _harness.Resumable(args.parts, settings)
    for seed in range(args.seed, args.seed + args.seeds):
        for names in together(rewards):
            judges = {name: rewards[name] for name in names}
            first = request_of(bundle, rewards[names[0]])
            add_selected(cells, parts, first, judges, problems, seed, args)
        for reward, made in rewards.items():
            add_searched(cells, parts, request_of(bundle, made), reward, problems, seed, args)
    metrics = table(cells, len(problems), args)
    metrics["larger"] = larger(args, parts, problems) if args.larger else sibling
    if not metrics["larger"]:
        left_out.append("the larger sibling: no --larger")
    metrics["budget_to_match_larger"] = matching(metrics["accuracy"], metrics["larger"])
    if args.late:
        left_out.append(f"{args.late} cells of searches, for want of time (--minutes)")
    spent = sum(part["seconds"] for part in parts.parts.values())
    return metrics | {"judge": args.judge, "left_out": left_out, "quick": bool(args.quick),
                      "device_s": spent, **earlier}


def gone_before(args: argparse.Namespace) -> tuple[Cells, dict[str, Any], dict[str, Any]]:
    """The cells of --earlier, its larger sibling's accuracy, and its origin.

    Raises: SystemExit where it is of other problems or of another learned reward, or too old to
      keep which problems were right.
    """
    if not args.earlier:
        return {}, {}, {}
    earlier = json.loads(args.earlier.read_text())
    metrics = earlier["metrics"]
    same = {"problems": args.problems, "smoke": args.smoke, "judge": args.judge}
    had = {"problems": metrics["problems"], "smoke": earlier["smoke"],
           "judge": metrics.get("judge")}
    if "" in (had["judge"], args.judge):  # without a learned reward, any goes
        del same["judge"], had["judge"]
    kept = all("each" in cell for by in metrics["accuracy"].values() for cell in by.values())
    if had != same or not kept:
        raise SystemExit(
            f"--earlier {args.earlier} is of {had}{'' if kept else ', without `each`'}; "
            f"expected {same}, and `each` in every cell: leave it out")
    cells = {line: {budget: {seed: one | {"right": unpacked(one["right"], args.problems).tolist()}
                             for seed, one in cell["each"].items()}
                    for budget, cell in by.items()} for line, by in metrics["accuracy"].items()}
    about = {name: earlier[name] for name in ("command", "commit", "sources")}
    return cells, metrics["larger"], {"earlier": about | {"device_s": metrics["device_s"]}}


def plan(args: argparse.Namespace) -> None:
    """Sizes: a smoke run, the subset of a half hour, or everything."""
    if args.smoke:
        args.problems, args.seeds, args.budgets, args.rows = 4, 1, [1, 4], 16
    args.most_noisy = 16 if args.quick and not args.budgets else 32
    args.budgets = args.budgets or ([1, 4, 16, 64] if args.quick else list(BUDGETS))
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.late, args.ends = 0, time.monotonic() + 60 * args.minutes
    default = args.out or Path("inference_scaling.json")
    args.parts = args.parts or default.with_name(f".{default.stem}.parts.json")


def together(rewards: dict[str, Any]) -> list[list[str]]:
    """Rewards that may score the same rollouts: those that read texts; each other draws anew."""
    texts = [name for name, reward in rewards.items() if isinstance(reward, HostReward)]
    return [texts, *([name] for name in rewards if name not in texts)]


def add_selected(
    cells: Cells, parts: _harness.Resumable, request: Request, judges: dict[str, Any],
    problems: list[Problem], seed: int, args: argparse.Namespace,
) -> None:
    """The methods that select, of one seed, into `cells`, unless all of them are there."""
    wanted = [(f"{name}|{reward}", str(budget)) for reward in judges
              for name in (SELECTIONS if reward == "checker" else REWARDED)
              for budget in args.budgets if budget <= longest(name)]
    if all(str(seed) in cells.get(line, {}).get(budget, {}) for line, budget in wanted):
        return
    names = ", ".join(known(name, args) for name in judges)
    shared = parts(f"rollouts to {args.budgets}, {names}, seed {seed}", lambda: selected(
        request, judges, args.budgets, problems, seed, args))
    for key, cell in shared["cells"].items():
        line, _, budget = key.rpartition("|")
        cells.setdefault(line, {}).setdefault(budget, {})[str(seed)] = cell


def add_searched(
    cells: Cells, parts: _harness.Resumable, request: Request, reward: str,
    problems: list[Problem], seed: int, args: argparse.Namespace,
) -> None:
    """The methods that steer, by one reward and of one seed, into `cells`, where they lack."""
    for name in searches(reward, args):
        for budget in args.budgets:
            seeds = cells.setdefault(f"{name}|{reward}", {}).setdefault(str(budget), {})
            if (budget > most(name, reward, args) or not shared_out(name, budget)
                    or str(seed) in seeds):
                continue
            key = f"{name}, {budget}, {known(reward, args)}, seed {seed}"
            if key not in parts.parts and time.monotonic() > args.ends:
                args.late += 1
                continue
            cell = parts(key, lambda: searched(
                request, name, budget, problems, seed, args.rows))  # noqa: B023
            print(f"{name} {budget} {reward} seed {seed}: {np.mean(cell['right']):.3f}, "
                  f"{cell['seconds']:.0f} s", flush=True)
            seeds[str(seed)] = {part: cell[part] for part in ("right", "tokens")}


def known(reward: str, args: argparse.Namespace) -> str:
    """A reward's name among the parts: of a learned one, with its weights."""
    return f"prm {args.judge[:8]}" if reward == "prm" else reward


def longest(name: str) -> int:
    """The largest budget that is asked of a method by the exact checker."""
    return 128 if name in LONG else 64


def most(name: str, reward: str, args: argparse.Namespace) -> int:
    """The largest budget that a method which steers is asked for."""
    bound = args.most_noisy if "noise" in reward else longest(name) if reward == "checker" else 64
    return min(bound, args.most or bound)


def shared_out(name: str, budget: int) -> bool:
    """Whether a method can share out this budget among its beams or chains."""
    try:
        METHODS[name].check(budget)
    except ConfigError:
        return False
    return True


def searches(reward: str, args: argparse.Namespace) -> tuple[str, ...]:
    """The methods that steer by this reward in this plan."""
    if args.smoke:
        return ("particle-filter",)
    if reward != "checker":
        return NOISY
    return ("particle-filter", "dvts") if args.quick else SEARCHES


def table(cells: Cells, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy over the seeds that a cell has, with its band, tokens, which problems were right
    with each seed, and the ratios of budgets."""
    rng = np.random.default_rng(args.seed)
    again = rng.integers(0, count, (2000, count))  # the same problems for every cell
    accuracy: dict[str, dict[str, Any]] = {}
    for line, by_budget in cells.items():
        for budget, seeds in sorted(by_budget.items(), key=lambda item: int(item[0])):
            if not seeds:
                continue
            often = np.mean([cell["right"] for cell in seeds.values()], 0)
            low, high = np.quantile(often[again].mean(1), (0.025, 0.975))
            accuracy.setdefault(line, {})[budget] = {
                "value": often.mean(), "low": low, "high": high, "seeds": len(seeds),
                "tokens": np.mean([cell["tokens"] for cell in seeds.values()]),
                "each": {seed: {"right": packed(cell["right"]), "tokens": cell["tokens"]}
                         for seed, cell in seeds.items()}}
    return {"problems": count, "seeds": args.seeds, "accuracy": accuracy,
            "budget_ratios": ratios(accuracy, again)}


def matching(accuracy: dict[str, dict[str, Any]], sibling: dict[str, Any]) -> dict[str, Any]:
    """The budget with which each method by each reward reaches the larger sibling, by what of it;
    nothing without one."""
    found: dict[str, Any] = {}
    for what in ("greedy", "one_sample"):
        for line, by_budget in accuracy.items() if what in sibling else ():
            budgets = sorted(map(int, by_budget))
            values = [by_budget[str(budget)]["value"] for budget in budgets]
            need, at_least = reach(budgets, values, sibling[what])
            found.setdefault(what, {})[line] = {"budget": need, "at_least": at_least}
    return found


def larger(args: argparse.Namespace, parts: _harness.Resumable,
           problems: list[Problem]) -> dict[str, Any]:
    """A larger sibling's accuracy greedily and of one sample: what the small one has to reach."""
    request = request_of(jaxlm.load(str(args.larger), dtype=jnp.float32), None)

    def compute() -> dict[str, Any]:
        cell = searched(request, "greedy", 1, problems, args.seed, 16)
        shared = selected(request, {"none": None}, [16], problems, args.seed, args)
        return {"greedy": float(np.mean(cell["right"])), "one_sample": shared["one"],
                "seconds": cell["seconds"] + shared["seconds"]}

    return parts(f"larger, {args.larger}", compute)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models and sizes."""
    parser.add_argument("--model", default="tiny", help="'tiny', a folder or a hub id")
    parser.add_argument("--larger", type=Path, help="a larger sibling's folder (make_models.py)")
    parser.add_argument("--earlier", type=Path, metavar="FILE",
                        help="a result whose cells are not measured again")
    parser.add_argument("--prm", type=Path, help="folder of a process reward model (train_prm.py)")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=0, help="default 3, with --quick 1")
    parser.add_argument("--budgets", type=int, nargs="+", help="default 1 to 128")
    parser.add_argument("--most", type=int, help="search with no more answers than this")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="begin no search after these; --earlier goes on")
    parser.add_argument("--rows", type=int, default=256, help="answers at once")
    parser.add_argument("--quick", action="store_true",
                        help="half an hour: few budgets, one seed; without --budgets, wrong "
                        "verdicts up to 16")
    parser.add_argument("--parts", type=Path, help="where finished cells are kept")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
