"""The parts of sft_recipe.py and masked_thought.py that a wrong number could come from."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import masked_thought, sft_recipe
from experiments.recipe_stats import Trace, correlation, paired, signal, spearman, stopped
from experiments.sft_recipe import PHASES, Setting, effects, grid, phase_of
from experiments.task_texts import chat, instructions
from jaxlm.eval.arithmetic import split_of

FEW = 400  # resamples


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_spearman_is_scipy_s_with_ties(points):
    x, y = np.array(points, float).T
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_correlation_s_interval_and_p():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    tied, free = x + 0.5 * rng.normal(size=40), rng.normal(size=40)
    strong, none = correlation(x, tied, resamples=FEW), correlation(x, free, resamples=FEW)
    assert strong["p"] == pytest.approx(1 / (FEW + 1)) and 0 < strong["low"] < strong["rho"]
    assert none["low"] < 0 < none["high"] and none["p"] > 0.05
    exact = stats.spearmanr(x, free).pvalue  # of Student's approximation
    assert none["p"] == pytest.approx(exact, abs=4 * (exact * (1 - exact) / FEW) ** 0.5)


def test_p_of_unrelated_numbers_is_small_as_rarely_as_it_says():
    rng = np.random.default_rng(1)
    p = [correlation(*rng.normal(size=(2, 12)), resamples=99, seed=i)["p"] for i in range(200)]
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 4 * (0.1 * 0.9 / 200) ** 0.5
    tied = [correlation(x, x + rng.normal(size=12), resamples=99)["p"]
            for x in rng.normal(size=(50, 12))]
    assert np.mean(np.array(tied) <= 0.1) > 0.5  # power


def test_within_groups_what_groups_alone_explain_is_gone():
    rng = np.random.default_rng(2)
    groups = np.repeat([0, 1, 2], 20)
    x, y = (10 * groups + rng.normal(size=60) for _ in range(2))
    assert correlation(x, y, resamples=FEW)["rho"] > 0.8
    within = correlation(x, y, groups, resamples=FEW)
    assert within["low"] < 0 < within["high"] and within["p"] > 0.05


def test_points_of_a_block_count_as_one():
    """Four copies of each of few unrelated points: without blocks, p is small far too often."""
    rng = np.random.default_rng(4)
    p = {False: [], True: []}
    for seed in range(100):
        x, y = np.repeat(rng.normal(size=(2, 7)), 4, axis=1)
        for known, found in p.items():
            blocks = np.repeat(np.arange(7), 4).tolist() if known else ()
            found.append(correlation(x, y, (), blocks, seed, 99)["p"])
    assert np.mean(np.array(p[True]) <= 0.1) < 0.1 + 4 * (0.1 * 0.9 / 100) ** 0.5
    assert np.mean(np.array(p[False]) <= 0.1) > 0.3
    with pytest.raises(ValueError, match=r"blocks of \[1, 2\] points"):
        correlation([1, 2, 3], [1, 2, 3], (), [0, 0, 1])


def test_paired_is_student_s():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 9))
    found, known = paired(a, b), stats.ttest_1samp(b - a, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(b - a)) and found["pairs"] == 9
    assert (found["low"], found["high"]) == pytest.approx((known.low, known.high))


@pytest.mark.parametrize("count", [2, 5, 6])
def test_stopping_half(count):
    final = dict(enumerate(np.random.default_rng(count).normal(size=count).tolist()))
    cost = {name: 0.1 * name for name in final}
    order = sorted(final, key=final.__getitem__)
    keep = -(-count // 2)
    found = stopped(order, final, cost)
    assert found["regret"] == 0
    assert found["compute_saved_fraction"] == pytest.approx(
        sum(cost[name] for name in order[keep:]) / count)
    halves = [min(final[i] for i in half) for half in itertools.combinations(final, keep)]
    assert found["regret_at_random"] == pytest.approx(np.mean(halves) - min(halves))
    worst = stopped(order[::-1], final, cost)["regret"]
    assert worst == pytest.approx(sorted(final.values())[count - keep] - min(final.values()))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("window", [2, 0.5])
def test_signal_has_the_paper_s_sign(sign, window):
    """Higher loss and lower norm at first, better at the end; and the other way round."""
    traces = {i: Trace([5 + sign * i, 5 + sign * i, -99], [9 - sign * i, 9 - sign * i, 0], 4,
                       final=3 - 0.1 * i) for i in range(8)}
    found = signal(traces, {"size": [0] * 4 + [1] * 4}, [*traces], window, resamples=FEW)
    assert found["early_loss_spearman_within_size"]["rho"] == pytest.approx(sign)
    assert found["early_loss_spearman"]["rho"] == pytest.approx(sign)
    assert found["early_gradnorm_spearman"]["rho"] == pytest.approx(-sign)
    assert found["rank_runs_spearman"]["rho"] == pytest.approx(sign)
    assert found["compute_saved_fraction"] == pytest.approx(0.25)
    assert found["regret"] == pytest.approx(0 if sign == 1 else 0.4)
    assert found["reversed"]["regret"] == pytest.approx(0 if sign == -1 else 0.4)


def test_effects_are_those_that_were_put_in():
    worth = {"batch": {2: 0, 8: 1, 32: 3}, "warmup": {0.0: 0, 0.1: -2},
             "schedule": {"constant": 0, "linear": 0.5, "cosine": 0.25}}
    runs = [{"batch": s.batch, "rate": s.rate, "warmup": s.warmup, "schedule": s.schedule,
             "final": sum(worth[f][getattr(s, f)] for f in worth)} for s in grid()]
    assert len(runs) == 36 == len({s.name for s in grid()})
    found = effects(runs)
    for factor, values in worth.items():
        for a, b in itertools.combinations(values, 2):
            one = found[f"{factor} {b} - {a}"]
            assert one["mean"] == pytest.approx(values[b] - values[a])
            assert one["low"] == pytest.approx(one["high"])
    assert found["rate 0.0005 - 0.0001"]["mean"] == 0
    assert found["batch 8 - 2"]["pairs"] == 12 and found["warmup 0.1 - 0.0"]["pairs"] == 9
    assert found["schedule linear - constant"]["pairs"] == 9
    mean = sft_recipe.means(runs)
    of_cell = lambda s: sum(worth[f][getattr(s, f)] for f in worth)
    cell = [of_cell(s) for s in grid() if s.batch == 8 and s.rate == 5e-4]
    assert mean["batch 8"]["0.0005"] == pytest.approx(np.mean(cell))
    assert mean["constant after a warm-up"]["0.0001"] == pytest.approx(np.mean([0, 1, 3]) - 2)


@pytest.mark.parametrize(("asked", "answer", "phase"), [
    ("What is the boiling point of neon?", "-246 degrees.", "knowledge"),
    ("Define 'simile'.", "A figure of speech.", "knowledge"),
    ("Rewrite it.\nHe go home.", "He goes home.", "given"),
    ("Convert 2 km to m.", "2000 m.", "given"),
    ("Generate a sentence with 'effort'.", "It took effort.", "writing"),
    ("Explain convection.", "word " * 40, "writing"),
])
def test_phases_by_form(asked, answer, phase):
    assert phase_of(chat(asked, answer)) == phase


def test_phases_share_out_every_sample_and_hold_some_back(data_dir, tmp_path):
    files = sft_recipe.write_files(tmp_path, data_dir)
    lines = [open(path, encoding="utf-8").read().splitlines() for path in files.train]
    train, held_out = instructions(data_dir)
    assert sum(map(len, lines)) == len(train) == 1020 and min(map(len, lines)) > 100
    assert [files.samples[phase] for phase in PHASES] == [len(part) for part in lines]
    seen = set(itertools.chain(*lines))
    assert not seen & set(open(files.held_out, encoding="utf-8").read().splitlines())
    assert files.samples["held_out"] == len(held_out) == 255


def test_settings_become_the_trainer_s():
    files = sft_recipe.Files(("a", "b", "c"), "d", {})
    config = sft_recipe.config_of(Setting(8, 1e-3, 0.1, "cosine", True, 4), files, "out", 2, 50)
    assert (config.batch, config.optimizer.warmup, config.optimizer.schedule) == (8, 5, "cosine")
    assert config.data.phased and config.epochs == 2 and config.seed == 4
    assert config.data.train == ("a", "b", "c") and config.data.eval == ("d",)


def test_sums_differ_and_sides_do_not_meet():
    train, test = (masked_thought.sums(40, side, 3) for side in ("train", "test"))
    prompts = [{line["prompt"] for line in part} for part in (train, test)]
    assert len(prompts[0]) == len(prompts[1]) == 40 and not prompts[0] & prompts[1]
    for side, part in (("train", prompts[0]), ("test", prompts[1])):
        assert all(split_of(prompt[2:-2]) == side for prompt in part)
    assert train == masked_thought.sums(40, "train", 3) != masked_thought.sums(40, "train", 4)
