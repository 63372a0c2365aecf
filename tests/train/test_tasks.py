"""Tasks in turn: the matrix and its figures, a stop in the middle, and the order of runs."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.decode.score import score
from jaxlm.train import Ewc, Full, OLora, Osft, Task, continual, evaluation, loop, rank_runs
from jaxlm.train import tasks as course
from jaxlm.train.data import open_examples
from jaxlm.train.evaluation import evaluate
from jaxlm.train.setup import mesh_of, plain, reader
from jaxlm.train.tasks import (
    _of_task,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)
from tests.train.small import settings, sums, write

MATRIX = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.1], [0.7, 0.8, 0.4], [0.8, 0.6, 1.0]]


def test_the_figures_of_a_matrix():
    assert average_accuracy(MATRIX) == pytest.approx((0.8 + 0.6 + 1.0) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)
    assert forward_transfer(MATRIX) == pytest.approx(((0.25 - 0.2) + (0.4 - 0.3)) / 2)
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    for one in (backward_transfer, forward_transfer, forgetting):
        assert one([[0.0], [1.0]]) == 0


def tasks(folder, choices=0):
    """Sums and products; so many of their answers, in order, to choose among."""
    made = []
    for name, sign in (("sums", "+"), ("products", "*")):
        files = [str(sums(folder / f"{name}{i}.jsonl", n, i, sign)) for i, n in ((0, 48), (1, 16))]
        answers = {f"{a + b if sign == '+' else a * b}" for a in range(10) for b in range(10)}
        made.append(Task(name, (files[0],), (files[1],), tuple(sorted(answers)[:choices])))
    return made


@pytest.mark.parametrize("tuning", [
    Full(), pytest.param(OLora(rank=2), marks=pytest.mark.slow),
    pytest.param(Ewc(weight=10.0), marks=pytest.mark.slow)], ids=lambda t: type(t).__name__)
def test_a_course_that_was_stopped_goes_on_to_the_same_end(bundle, tmp_path, tuning, monkeypatch):
    make = lambda out: settings(tmp_path, steps=6, out=str(tmp_path / out), tuning=tuning)
    other = {"text": [str(write(tmp_path / "other.jsonl", [{"text": "hello"}] * 4))]}
    whole = continual(make("one"), tasks(tmp_path), bundle=bundle, others=other)
    assert np.shape(whole.accuracy) == (3, 2) and len(whole.others["text"]) == 3
    assert whole.losses[1][0] < whole.losses[0][0] and whole.losses[2][1] < whole.losses[1][1]
    assert whole.backward == backward_transfer(whole.accuracy)
    stops = iter([3, 99, 4, 99, 99, 99, 99])

    @contextmanager
    def asked():
        last = next(stops)
        yield lambda step: step >= last

    monkeypatch.setattr(loop, "asked_to_stop", asked)
    for wanted in (True, True, False):
        found = continual(make("two"), tasks(tmp_path), bundle=bundle, others=other)
        assert found.stopped == wanted
    assert (found.accuracy, found.losses, found.others, found.notes) == (
        whole.accuracy, whole.losses, whole.others, whole.notes)
    if type(tuning) is not Full:
        assert found.notes[1] and not np.isnan(list(found.notes[1].values())).any()
    with pytest.raises(CheckpointError, match="of other tasks or settings"):
        continual(make("two").replace(seed=1), tasks(tmp_path), bundle=bundle, others=other)


def test_choices_measures_and_shares_are_followed_through_a_stop(bundle, tmp_path, monkeypatch):
    norm = lambda made: float(sum((x**2).sum() for x in jax.tree.leaves(made.params)))
    how = {"measures": {"norm": norm}, "subspaces": Osft()}
    make = lambda out: settings(tmp_path, steps=4, out=str(tmp_path / out), tuning=Full())
    turns = tasks(tmp_path, choices=100)
    whole = continual(make("one"), turns, bundle=bundle, **how)
    assert np.shape(whole.chosen) == (3, 2)
    assert whole.measures["norm"][0] == pytest.approx(norm(bundle))
    assert whole.measures["norm"][2] == pytest.approx(norm(whole.bundle))
    assert whole.measures["norm"][2] != whole.measures["norm"][0]
    for made, row in ((bundle, 0), (whole.bundle, 2)):
        for column, task in enumerate(turns):
            assert whole.chosen[row][column] == chosen_by_hand(made, task)
    stops = iter([2, *[99] * 9])

    @contextmanager
    def asked():
        last = next(stops)
        yield lambda step: step >= last

    monkeypatch.setattr(loop, "asked_to_stop", asked)
    for wanted in (True, False):
        found = continual(make("two"), turns, bundle=bundle, **how)
        assert found.stopped == wanted
    assert (found.chosen, found.measures, found.notes) == (
        whole.chosen, whole.measures, whole.notes)
    with pytest.raises(CheckpointError, match="of other tasks or settings"):
        continual(make("two"), turns, bundle=bundle, subspaces=Osft())
    assert continual(make("three"), tasks(tmp_path), bundle=bundle).chosen == []


def chosen_by_hand(bundle, task):
    """The share of samples whose answer, with its end, is the likeliest whole text."""
    end = bundle.tokenizer.id_of("eos_token")
    right = []
    for line in open(task.eval[0]):
        one = json.loads(line)
        texts = [bundle.tokenizer.encode(one["prompt"] + choice) + [end] for choice in task.choices]
        sums = [found.logprobs.sum() for found in score(bundle, texts, batch=64)]
        right.append(task.choices[int(np.argmax(sums))] == one["completion"])
    return np.mean(right)


def test_the_shares_of_a_change_are_those_of_its_singular_subspaces(bundle, tmp_path):
    """Full fine-tuning against numpy; OSFT leaves what it protects alone."""
    turn = tasks(tmp_path)[:1]
    made = {name: continual(settings(tmp_path, steps=3, out=str(tmp_path / name), tuning=tuning),
                            turn, bundle=bundle, subspaces=Osft())
            for name, tuning in (("full", Full()), ("osft", Osft(others="freeze")))}
    inside = total = 0.0
    for layer in (name for name in bundle.params if name.startswith("layers_")):
        for block, name in [("attn", x) for x in "qkvo"] + [("mlp", x) for x in
                                                            ("gate", "up", "down")]:
            was, now = (np.asarray(params[layer][block][name]["kernel"], np.float64)
                        for params in (bundle.params, made["full"].bundle.params))
            rows = was.shape[0] if name != "o" else was.shape[0] * was.shape[1]
            was, now = was.reshape(rows, -1), now.reshape(rows, -1)
            u, _, vt = np.linalg.svd(was, full_matrices=False)
            k = min(was.shape) - min(was.shape) // 2
            change = now - was
            free = change - u[:, :k] @ (u[:, :k].T @ change)
            free = free - (free @ vt[:k].T) @ vt[:k]
            total += (change**2).sum()
            inside += (change**2).sum() - (free**2).sum()
    note = made["full"].notes[0]
    assert note["subspaces/protected_share"] == pytest.approx(inside / total, abs=1e-4)
    assert inside / total > 0.1
    assert note["subspaces/free_share"] == pytest.approx(1 - inside / total, abs=1e-4)
    assert made["osft"].notes[0]["subspaces/protected_share"] < 1e-6


def test_an_answer_that_is_none_of_the_choices_is_named(bundle, tmp_path):
    with pytest.raises(DataError, match=r"sums1.jsonl:\d+ has completion '\d+'; expected one of"):
        continual(settings(tmp_path, steps=1), tasks(tmp_path, choices=2), bundle=bundle)


@pytest.fixture(scope="module")
def learnt(bundle, tmp_path_factory):
    """A course of two tasks: its folder, and the call."""
    folder = tmp_path_factory.mktemp("learnt")
    turns, config = tasks(folder), settings(folder, steps=2)

    def again(bundle=bundle, others=(), turns=turns, **changes):
        return continual(config.replace(**changes), turns, bundle=bundle, others=dict(others))

    again()
    return folder, again


@pytest.mark.parametrize(("changes", "said"), [
    ({"steps": 3}, "steps was 2 and is 3"), ({"steps": None, "epochs": 1}, "epochs was None and "),
    ({"others": {"text": ["train.jsonl"]}}, "the held-out text of others 'text' was None and is"),
], ids=["steps", "epochs", "others"])
def test_a_course_asked_for_otherwise_is_refused(learnt, changes, said):
    folder, again = learnt
    others = {name: [str(folder / file) for file in files]
              for name, files in changes.get("others", {}).items()}
    with pytest.raises(CheckpointError, match=f"{said}.*; choose another `out`"):
        again(**{**changes, "others": others})


def test_a_course_of_another_model_or_other_held_out_text_is_refused(learnt, bundle):
    folder, again = learnt
    again()  # as it was
    other = bundle.replace(params=bundle.lm.init(jax.random.key(7)))
    with pytest.raises(CheckpointError, match="the model's weights was '.*' and is '"):
        again(bundle=other)
    before = (folder / "sums1.jsonl").read_text()
    sums(folder / "sums1.jsonl", 16, seed=9)
    with pytest.raises(CheckpointError, match="the held-out text of task 'sums' was"):
        again()
    (folder / "sums1.jsonl").write_text(before)
    (folder / "out" / "course.json").write_text('{"digest": "", "rows": []}')
    with pytest.raises(CheckpointError, match="an earlier version wrote it"):
        again()


def test_a_sigterm_while_a_course_is_judged_ends_it_before_the_next_task(
        bundle, tmp_path, monkeypatch):
    config, turns, asked = settings(tmp_path, steps=1), tasks(tmp_path), []

    def interrupted(*args, real=evaluate):
        asked.append(1)
        if len(asked) == 3:  # the first of the first task's judgement
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(course, "evaluate", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody listened"))
    try:
        found = continual(config, turns, bundle=bundle)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found.stopped and len(found.accuracy) == 1 and len(asked) == 3
    found = continual(config, turns, bundle=bundle)
    assert not found.stopped and len(found.accuracy) == 3


def test_scheduled_ranks_follow_the_tasks(bundle, tmp_path):
    """Task i of n keeps (i - 1) / n, whether the course counts or the caller did."""
    scheduled, turns = Osft(ranks="scheduled"), tasks(tmp_path)
    config = settings(tmp_path, tuning=scheduled)
    shapes = bundle.lm.shapes()

    def kept(tunings, turns=turns):
        own = [_of_task(config, turns, i, tunings, False).tuning for i in range(len(turns))]
        return [tuning.kept(bundle.lm, shapes)["layers_0/attn/q/kernel"] for tuning in own]

    assert kept(None) == [(0,), (8,)]  # of a query matrix of 16 x 32
    assert kept([replace(scheduled, task=i, tasks=4) for i in (2, 3)]) == [(4,), (8,)]
    with pytest.raises(ConfigError, match="scheduled' of one task keeps nothing.*tuning.tasks"):
        kept(None, turns[:1])


def test_tasks_need_names_of_their_own(bundle, tmp_path):
    with pytest.raises(ConfigError, match="a name of its own"):
        continual(settings(tmp_path), [*tasks(tmp_path), tasks(tmp_path)[0]], bundle=bundle)


def test_accuracy_is_that_of_greedy_answers(bundle, tmp_path):
    """Judged from one forward pass, as by decoding."""
    import jaxlm
    from jaxlm.decode.samplers import Temperature

    rows = [{"prompt": f"{i}=", "completion": ""} for i in range(12)]
    answers = jaxlm.generate(bundle, [row["prompt"] for row in rows], max_new_tokens=1,
                             sampler=Temperature(0.0))
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        row["completion"] = answer.text if i % 3 else "~"
    rows = [row for row in rows if row["completion"].isascii() and row["completion"]]
    config = settings(tmp_path, batch=4)
    read = reader(bundle, config)
    path = write(tmp_path / "eval.jsonl", rows)
    read = type(read)(read.tokenizer)  # without an end mark: the answer is one token
    batches = plain(open_examples([path], read, 24), config, mesh_of(config), packed=True)
    found = evaluate(bundle.lm, bundle.params, batches)
    right = np.mean([row["completion"] != "~" for row in rows])
    assert 0 < right < 1 and found["accuracy"] == pytest.approx(right)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_an_evaluation_is_read_one_batch_behind(bundle, tmp_path, monkeypatch):
    """What the device has not answered yet is at most two batches."""
    happened = []

    class Sum(float):
        def __float__(self):
            happened.append("read")
            return 1.0

    def run(params, batch):
        happened.append("run")
        return {name: Sum() for name in ("nll", "tokens", "right", "whole", "samples")}

    monkeypatch.setattr(evaluation, "_evaluator", lambda *_: run)
    config = settings(tmp_path, batch=4, data={"pack": False})
    path = write(tmp_path / "eval.jsonl", [{"text": "abc"}] * 12)
    batches = plain(open_examples([path], reader(bundle, config), 24), config, None, packed=False)
    assert evaluate(bundle.lm, None, batches)["loss"] == 1
    assert happened == ["run", "run"] + ["read"] * 5 + ["run"] + ["read"] * 10


def test_runs_are_ordered_by_high_loss_and_low_norm():
    def history(loss, norm, steps=20):
        return [{"step": i, "loss": loss, "grad_norm": norm} for i in range(steps)]

    runs = {"a": history(1.0, 9.0), "b": history(3.0, 1.0), "c": history(2.0, 2.0)}
    runs["a"].append({"step": 19, "eval/loss": 0.5})
    with pytest.warns(UserWarning, match="stops none"):
        found = rank_runs(runs, window=10)
    assert found.order == ("b", "c", "a") and found.window == 10
    late = {"x": history(1.0, 1.0, 5) + history(9.0, 0.1), "y": history(2.0, 1.0)}
    with pytest.warns(UserWarning):
        assert rank_runs(late, window=5).order == ("y", "x")
    for bad, said in (({}, "got 0 runs"), ({"a": []}, "the shortest of 0 steps"),
                      ({"a": history(float("nan"), 1.0)}, "not finite")):
        with pytest.raises(ConfigError, match=said):
            rank_runs(bad)
    assert json.loads(json.dumps(found.loss)) == {"a": 1.0, "b": 3.0, "c": 2.0}
