"""Solving: every method runs, results survive a kill, failures stay their own."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli import main
from jaxlm.cli.solve import jobs_of, reading
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.eval.arithmetic_reward import arithmetic_reward
from jaxlm.eval.solve import Job, Results, key_for, records_of, solve, summary
from jaxlm.eval.tasks import ANSWER_LINE, TASKS, Problem, held_out, read
from jaxlm.rewards.answers import Judge, extract
from jaxlm.rewards.base import RewardError, Stateless
from jaxlm.rewards.call import TextReward
from jaxlm.search.base import Steps
from jaxlm.search.methods import METHODS, Request, Solution, method
from tests.rewards.twins import CHAT, Told, twin
from tests.search import toy
from tests.source_tree import ROOT

SETTINGS = {"seed": 0}
PROBLEMS = held_out("easy", 3).problems


@pytest.fixture(scope="module")
def request_():
    return Request(jaxlm.load("tiny"), arithmetic_reward(), particles=4, temperature=0.8,
                   steps=Steps(("\n",), max_steps=6, max_new_tokens=48),
                   extract=lambda text: extract(text, ANSWER_LINE))


@pytest.fixture
def faked(monkeypatch):
    """A method without a model: the answer is the prompt's last digit; some prompts fail."""
    seen = []

    def run(request, prompts, keys_R):
        seen.append(list(prompts))
        if bad := [i for i, prompt in enumerate(prompts) if "bad" in prompt]:
            raise RewardError("it hangs", bad, ["it hangs"])
        noise = np.asarray(jax.vmap(jax.random.uniform)(keys_R))
        return [Solution(prompt, prompt[-1], float(x), math.nan, (2.0,), 5, ())
                for prompt, x in zip(prompts, noise, strict=True)]

    monkeypatch.setitem(METHODS, "fake", type(METHODS["rpc"])(run, False))
    return seen


def problems(*texts):
    return [Problem(f"id {text}", text, text[-1]) for text in texts]


def run(path, some, batch=2, **options):
    results = Results(path, SETTINGS)
    solve(some, Request(None), Job("fake", 4), results, batch=batch, **options)
    results.close()
    return {record["id"]: record for record in results.records.values()}


def test_a_problem_that_fails_takes_no_other_with_it(tmp_path, faked):
    found = run(tmp_path / "r.jsonl", problems("a1", "bad2", "c3"), batch=3)
    assert [record.get("failed") is not None for record in found.values()] == [False, True, False]
    assert "it hangs" in found["id bad2"]["failed"] and found["id c3"]["correct"] is True
    row = summary(list(found.values()))[0]
    assert (row.problems, row.failed) == (3, 1) and abs(row.accuracy.value - 2 / 3) < 1e-9
    again = len(faked)
    run(tmp_path / "r.jsonl", problems("a1", "bad2", "c3"))
    assert len(faked) == again  # nothing was left to do
    run(tmp_path / "r.jsonl", problems("a1", "bad2", "c3"), retry_failed=True)
    assert faked[again:] == [["bad2"]]


def test_what_could_not_be_judged_is_said_and_judged_again_when_asked(tmp_path, faked):
    path, some, able = tmp_path / "r.jsonl", problems("a1", "b2"), False

    def equal(gold, answer):
        return True if able or gold == "1" else None

    def solved(**options):
        results = Results(path, SETTINGS)
        solve(some, Request(None, equal=equal), Job("fake", 4), results, **options)
        results.close()
        return list(results.records.values())

    found = solved()
    assert [(r["correct"], r["flags"]) for r in found] == [(True, []), (False, ["unjudged"])]
    row = summary(found)[0]
    assert (row.unjudged, row.accuracy.value) == (1, 0.5)
    able, again = True, len(faked)
    assert solved() == found and len(faked) == again
    found = solved(retry_failed=True)
    assert faked[again:] == [["b2"]] and all(r["correct"] for r in found)
    assert summary(found)[0].unjudged == 0


def test_comparisons_given_up_in_votes_are_told(monkeypatch, capsys):
    class Slow(Judge):
        def __init__(self):
            super().__init__(timeout=3, command=["absent"])
            self.timeouts = 2

    monkeypatch.setattr("jaxlm.rewards.answers.Judge", Slow)
    for task, told in (("math", "2 comparisons"), ("gsm8k", "")):
        with ExitStack() as stack:
            reading(TASKS[task], stack)
        err = capsys.readouterr().err
        assert err.startswith(told) if told else not err


def test_order_and_batch_do_not_matter(tmp_path, faked):
    some = problems("a1", "b2", "c3", "d4", "e5")
    one = run(tmp_path / "a.jsonl", some, batch=1)
    other = run(tmp_path / "b.jsonl", some[::-1], batch=3)
    strip = lambda record: {**record, "seconds": 0}
    assert {k: strip(v) for k, v in one.items()} == {k: strip(v) for k, v in other.items()}
    keys = {str(jax.random.key_data(key_for(seed, p))) for p in some for seed in (0, 1)}
    assert len(keys) == 10


@pytest.mark.parametrize("torn", [b'{"id": "id b2", "meth', b"{", b""])
def test_a_torn_last_line_is_dropped_and_done_again(tmp_path, faked, torn):
    path = tmp_path / "r.jsonl"
    run(path, problems("a1"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    found = run(path, problems("a1", "b2"))
    assert list(found) == ["id a1", "id b2"] and path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_problem_that_has_changed_under_its_id_is_solved_anew(tmp_path, faked):
    """Lines without an id have their number for one: it changes hands when a line is put in."""
    data, path = tmp_path / "data.jsonl", tmp_path / "r.jsonl"

    def solved(*lines):
        data.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in lines))
        before, found = len(faked), read(data).problems
        run(path, found)
        results = Results(path, SETTINGS)
        results.close()
        return faked[before:], [(r["text"], r["correct"]) for r in records_of(results, found)]

    assert solved(("a1", 1), ("b2", 2)) == ([["a1", "b2"]], [("a1", True), ("b2", True)])
    assert solved(("a1", 1), ("b2", 2)) == ([], [("a1", True), ("b2", True)])
    assert solved(("c3", 3), ("a1", 1), ("b2", 2)) == (
        [["c3", "a1", "b2"]], [("c3", True), ("a1", True), ("b2", True)])
    assert solved(("c3", 3), ("a1", 7), ("b2", 2)) == (  # the right answer was mended
        [["a1"]], [("c3", True), ("a1", False), ("b2", True)])
    assert solved(("c3", 3)) == ([], [("c3", True)])  # what was taken out is no result any more


def test_other_settings_and_other_files_are_refused(tmp_path, faked):
    path = tmp_path / "r.jsonl"
    run(path, problems("a1"))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="seed"):
        Results(path, {"seed": 1})
    for text in ("my notes", "my notes\nand more\n"):
        (tmp_path / "notes").write_text(text)
        with pytest.raises(ConfigError):
            Results(tmp_path / "notes", SETTINGS)
        assert (tmp_path / "notes").read_text() == text
    assert path.read_bytes() == before


def test_unknown_methods_and_missing_rewards_are_named():
    with pytest.raises(ConfigError, match="particle-filter"):
        method("magic")
    with pytest.raises(ConfigError, match="needs a reward"):
        method("best-of-n")


def test_budgets_that_a_method_cannot_share_are_found_before_a_model_is_read():
    with pytest.raises(ConfigError, match="a budget of 4 answers"):
        jobs_of(("particle-filter", "parallel-tempering"), (4, 16), "arithmetic")
    with pytest.raises(ConfigError, match="6 is not a multiple of width 4"):
        jobs_of(("best-of-n", "dvts"), (6,), "arithmetic")
    assert len(jobs_of(("greedy", "dvts", "particle-gibbs"), (4, 16), "arithmetic")) == 5


@pytest.fixture
def queued(monkeypatch):
    """A method with a queue and without a model: `at_once` problems run, and each in turn is told;
    one that is bad fails with those that run then, and one that is too long before all of them."""
    seen = []

    def run(request, prompts, keys_R):
        seen.append(list(prompts))
        if any("long" in prompt for prompt in prompts):
            raise ShapeError("it does not fit")
        for i, prompt in enumerate(prompts):
            if any("bad" in text for text in prompts[i: i + request.at_once]):
                raise RewardError("it hangs", [i], ["it hangs"])
            request.on_solution(i, Solution(prompt, prompt[-1], 0.5, math.nan, (2.0,), 5, ()))
        return [Solution("never told", "9", 0.0, math.nan, (), 0, ())] * len(prompts)

    monkeypatch.setitem(METHODS, "fake", type(METHODS["rpc"])(run, False))
    return seen


def test_what_is_told_is_on_the_disk_and_all_problems_are_one_queue(tmp_path, queued):
    path, sizes = tmp_path / "r.jsonl", []
    tick = lambda count: sizes.append((count, path.read_bytes().count(b"\n")))
    found = run(path, problems("a1", "b2", "c3", "d4", "e5"), tick=tick)
    assert queued == [["a1", "b2", "c3", "d4", "e5"]]
    assert sizes == [(0, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert all(record["correct"] for record in found.values())


@pytest.mark.parametrize("bad", ["bad", "long"])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_problem_that_fails_in_a_queue_costs_little(tmp_path, queued, bad, place):
    texts = [f"p{i} 1" for i in range(40)]
    texts[place] = f"{bad} 1"
    found = run(tmp_path / "r.jsonl", problems(*texts), batch=4)
    assert len(found) == 40
    assert [text for text in texts if "failed" in found[f"id {text}"]] == [texts[place]]
    assert len(queued) <= 14


def test_records_come_one_by_one_from_a_search(tmp_path):
    """Of problems that run together, each when it is over: the reward is called between them."""
    calls, at = [], []

    def score(rows):
        calls.append(None)
        return toy.HOST.function(rows)

    request = Request(toy.bundle(), Stateless(score, on_device=False), temperature=1.0,
                      steps=Steps("\n", tokens=3, max_steps=8, max_new_tokens=16))
    solve(problems("abb", "b", "aabba", "ba"), request, Job("best-of-n", 2),
          Results(tmp_path / "r.jsonl", SETTINGS), batch=4, seed=1,  # one in which they do not
          tick=lambda _: at.append(len(calls)))  # all end together
    assert len(at) == 5 and at[0] == 0 and len(set(at[1:])) > 1


@pytest.mark.parametrize("name", [
    "best-of-n", *(pytest.param(other, marks=pytest.mark.slow)
                   for other in ("particle-filter", "particle-gibbs", "beam"))])
def test_a_chat_has_one_begin_mark_and_the_reward_is_told_the_question(tmp_path, name):
    model, told = twin(tmp_path / "model", None, chat="<s>" + CHAT), Told()
    (tmp_path / "x.jsonl").write_text(json.dumps({"problem": "What is 1+1?", "answer": "2"}) + "\n")
    found = read(tmp_path / "x.jsonl", model.tokenizer)
    request = Request(model, told, steps=Steps("\n", tokens=2, max_steps=1, max_new_tokens=2))
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    solve(found.problems, request, Job(name, 4), results)
    assert not any("failed" in record for record in results.records.values())
    prompts = told.prompts[0]
    ids = np.asarray(prompts.tokens_RT)[0, : int(prompts.length_R[0])].tolist()
    assert ids.count(model.tokenizer.id_of("bos_token")) == 1
    assert model.tokenizer.decode(ids, special=True) == found.problems[0].prompt
    assert all(list(given.texts) == ["What is 1+1?"] for given in told.prompts)


@pytest.mark.parametrize("name", ["particle-filter", "best-of-n", "self-consistency", "greedy"])
def test_methods_on_the_bundled_model(tmp_path, request_, name):
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    solve(PROBLEMS, request_, Job(name, 4), results, batch=3)
    rows = list(results.records.values())
    assert sum(row["correct"] for row in rows) >= 2 and all(row["tokens"] > 0 for row in rows)
    assert (rows[0]["log_evidence"] is not None) == (name == "particle-filter")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_runs(tmp_path, request_, name):
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    solve(PROBLEMS[:2], request_, Job(name, 8), results)
    assert all(row["correct"] is not None for row in results.records.values())


@pytest.mark.parametrize("name", [
    "best-of-n", *(pytest.param(other, marks=pytest.mark.slow)
                   for other in ("particle-filter", "particle-gibbs", "multi-temperature"))])
def test_a_reward_that_raises_is_that_problem_s_alone(tmp_path, request_, name):
    bad, calls = PROBLEMS[1].prompt, []

    def scores(prompts, answers):
        calls.append(set(prompts))
        if bad in prompts:
            raise RuntimeError("no such problem")
        return [0.5] * len(answers)

    reward = TextReward(scores, retries=0, wait_s=0)
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    solve(PROBLEMS, replace(request_, reward=reward), Job(name, 4), results, batch=3)
    failed = [results.records[name, 4, problem.id].get("failed") for problem in PROBLEMS]
    assert failed[0] is None and "no such problem" in failed[1] and failed[2] is None
    assert len(set().union(*calls)) == 3 and sum(bad in asked for asked in calls) <= 8


def command(tmp_path, capsys, *more, anew=True, jobs=("--method", "fake", "--particles", "2")):
    """The settings and the records of `jaxlm solve`, or its refusal."""
    path = tmp_path / "r.jsonl"
    if anew:
        path.unlink(missing_ok=True)
    argv = ["--model", "tiny", "--data", "easy", *jobs]
    if main(["solve", *argv, "--out", str(path), *more]):
        return capsys.readouterr().err
    head, *records = map(json.loads, path.read_text().splitlines())
    return head["settings"], records


def test_a_seed_draws_answers_and_another_one_problems(tmp_path, faked, capsys):
    texts = lambda *more: [record["text"] for record in command(
        tmp_path, capsys, "--limit", "2", *more)[1]]
    assert texts() == texts("--seed", "1") != texts("--data-seed", "1")
    assert texts() == [problem.prompt for problem in PROBLEMS[:2]]
    assert command(tmp_path, capsys, "--limit", "1", "--data-seed", "3")[0]["data_seed"] == 3


@pytest.mark.parametrize("option", [
    "--limit", "--max-new-tokens", "--max-steps", "--step-tokens", "--memory-mb"])
def test_a_bound_of_nothing_is_refused_before_a_model_is_read(tmp_path, faked, capsys, option):
    for number in ("0", "-1"):
        name = option[2:].replace("-", "_")
        told = command(tmp_path, capsys, option, number, "--model", "absent")
        assert told.startswith(f"jaxlm: {name} is {number}; expected a whole number")


@pytest.mark.parametrize("option, number", [
    ("--seed", str(2**63)), ("--seed", str(-2**63 - 1)), ("--data-seed", "-1")])
def test_a_seed_that_none_can_be_made_of_is_refused(tmp_path, faked, capsys, option, number):
    told = command(tmp_path, capsys, option, number, "--model", "absent")
    assert told.startswith(f"jaxlm: {option} is {number}; expected a whole number")


def test_steps_and_stops_are_as_asked_and_part_of_what_a_file_was_made_with(
        tmp_path, faked, capsys):
    default = command(tmp_path, capsys, "--limit", "1")[0]["steps"]
    assert (default["delimiters"], default["tokens"], default["stop"]) == (["\n"], None, [])
    assert (default["max_steps"], default["max_new_tokens"]) == (40, 112)
    asked = ["--limit", "1", "--delimiter", "\n\n", "Step", "--step-tokens", "5", "--stop", "B:"]
    found = command(tmp_path, capsys, *asked)[0]["steps"]
    assert (found["delimiters"], found["tokens"], found["stop"]) == (["\n\n", "Step"], 5, ["B:"])
    assert command(tmp_path, capsys, *asked, anew=False)[0]["steps"] == found  # goes on
    assert "was made with" in command(tmp_path, capsys, *asked, "C:", anew=False)
    by_count = command(tmp_path, capsys, "--limit", "1", "--step-tokens", "5", "--delimiter")
    assert by_count[0]["steps"]["delimiters"] == []
    assert "a step has no end" in command(tmp_path, capsys, "--limit", "1", "--delimiter")


def test_more_answers_than_memory_are_refused_on_a_cpu_too(tmp_path, capsys, monkeypatch):
    jobs = ("--method", "self-consistency", "--particles", "100000")
    says = r"100000 particles for each of 1 prompts need .*; \d+ particles fit"
    refusal = lambda *more: command(tmp_path, capsys, "--limit", "1", *more, jobs=jobs)
    assert re.search(says, refusal("--memory-mb", "1"))
    monkeypatch.setattr("jaxlm.search.memory.host_memory_left", lambda: 2**20)
    assert re.search(says, refusal())


@pytest.mark.slow
def test_a_killed_command_goes_on_and_loses_nothing(tmp_path):
    out = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "jaxlm", "solve", "--model", "tiny", "--data", "easy",
               "--limit", "6", "--method", "best-of-n", "--particles", "2", "--prm", "arithmetic",
               "--batch", "1", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    until = time.monotonic() + 400
    while time.monotonic() < until and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = out.read_bytes()
    kept = kept[:kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") >= 3
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(kept) and "best-of-n" in done.stdout
    ids = [json.loads(line)["id"] for line in out.read_bytes().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 6 and out.with_suffix(".png").exists()
