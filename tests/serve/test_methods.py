"""Searches by name, over HTTP: each is what `jaxlm.search` gives."""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from jaxlm.eval.arithmetic_reward import arithmetic_reward  # noqa: E402
from jaxlm.hf.bundle import load  # noqa: E402
from jaxlm.rewards.base import Stateless  # noqa: E402
from jaxlm.rewards.call import TextReward  # noqa: E402
from jaxlm.search.base import Steps  # noqa: E402
from jaxlm.search.methods import METHODS  # noqa: E402
from jaxlm.search.methods import Request as Wanted  # noqa: E402
from jaxlm.search.particles import particle_filter  # noqa: E402
from jaxlm.serve.methods import Methods, room_of  # noqa: E402
from tests.serve.running import make_batcher, running  # noqa: E402

ASK = {"model": "tiny-model", "prompt": "Q:37+8*6=\n", "max_tokens": 24, "seed": 2, "budget": 2,
       "max_steps": 4}


@pytest.fixture(scope="module")
def bundle():
    return load("tiny")


@pytest.fixture(scope="module")
def client(bundle):
    methods = Methods(bundle, arithmetic_reward(), max_budget=8)
    with running(make_batcher(bundle), methods=methods) as (url, _):
        with httpx.Client(base_url=url, timeout=300) as made:
            yield made


def post(client, **changes):
    return client.post("/v1/completions", json=ASK | changes)


def test_a_particle_filter_over_http(bundle, client):
    answer = post(client, method="particle-filter")
    assert answer.status_code == 200, answer.text
    found = particle_filter(
        bundle, ASK["prompt"], arithmetic_reward(), particles=2,
        key=jax.random.split(jax.random.key(2), 1),
        steps=Steps("\n", max_steps=4, max_new_tokens=24))
    body = answer.json()
    assert body["choices"][0]["text"] == found.text
    assert body["usage"]["completion_tokens"] == found.tokens_drawn
    assert body["search"]["log_evidence"] == pytest.approx(found.log_evidence)
    chosen = found.answers[found.chosen]
    reason = {"stop": "stop", "string": "stop"}.get(chosen.finish, "length")
    assert body["choices"][0]["finish_reason"] == reason


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers(client, name):
    budget = 8  # what two tempered chains of two sweeps need
    body = post(client, method=name, budget=budget).json()
    assert body["choices"][0]["text"] and body["search"]["method"] == name
    again = post(client, method=name, budget=budget).json()
    assert again["choices"] == body["choices"]
    chat = client.post("/v1/chat/completions", json={
        **{k: v for k, v in ASK.items() if k != "prompt"}, "method": name, "budget": budget,
        "messages": [{"role": "user", "content": ASK["prompt"]}]}).json()
    assert chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"budget": 9}, "at most 8"), ({"n": 2}, "n out"), ({"stream": True}, "stream"),
    ({"top_p": 0.5}, "top_p"), ({"logprobs": 1}, "logprobs"), ({"method": "magic"}, "magic"),
    ({"prompt": ["a", "b"]}, "one prompt"), ({"max_tokens": 96}, "room"),
])
def test_what_a_search_cannot_do_is_400(client, changes, says):
    answer = post(client, **{"method": "particle-filter", **changes})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_without_a_reward_some_methods_go(bundle):
    job = Methods(bundle).job
    given = lambda **changes: Given(**changes)
    with pytest.raises(ValueError, match="rpc"):
        job(given(method="particle-filter"), [[1]], 5, 0)
    with pytest.raises(ValueError, match="--prm"):
        job(given(method="beam"), [[1]], 5, 0)
    assert isinstance(job(given(method="self-consistency"), [[1]], 5, 0).args[1], Wanted)


class Gate:
    """A reward that says when it is asked, and answers when it may."""

    def __init__(self):
        self.calls, self.asked, self.may = 0, threading.Event(), threading.Event()
        self.reward = Stateless(self.score, on_device=False)

    def score(self, rows):
        self.calls += 1
        self.asked.set()
        assert self.may.wait(300)
        return np.full(len(rows.length_B), 0.5, np.float32)


def test_a_search_ends_when_its_client_leaves(bundle):
    gate = Gate()
    with running(make_batcher(bundle), methods=Methods(bundle, gate.reward)) as (url, engine):
        with httpx.Client(base_url=url, timeout=300) as patient:
            gate.may.set()
            assert post(patient, method="particle-filter").status_code == 200
        whole, gate.calls = gate.calls, 0
        gate.may.clear(), gate.asked.clear()
        impatient = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps(ASK | {"method": "particle-filter"})
        head = {"Content-Type": "application/json"}
        impatient.request("POST", "/v1/completions", body, head)
        assert gate.asked.wait(100)
        impatient.close()
        time.sleep(2.0)  # the server's loop sees it
        gate.may.set()
        until = time.monotonic() + 100
        while engine.searching and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.searching == 0 and gate.calls == 1 < whole


def test_plain_answers_pass_a_search_and_a_shutdown_does_not_wait_for_it(bundle):
    """While one search hangs and another waits; both get a reason in time."""
    gate = Gate()
    methods = Methods(bundle, gate.reward)
    with ThreadPoolExecutor(2) as pool:
        with running(make_batcher(bundle), methods=methods, grace=0.5) as (url, engine):
            ask = lambda **more: httpx.post(f"{url}/v1/completions", json=ASK | more, timeout=300)
            first = pool.submit(ask, method="particle-filter")
            assert gate.asked.wait(300)
            second = pool.submit(ask, method="beam")
            while engine.searching < 2:
                time.sleep(0.02)
            assert ask(budget=None, max_steps=None).status_code == 200
            assert engine.searching == 2 and not first.done()
            began = time.monotonic()
        assert time.monotonic() - began < 15 and engine.alive
        for search in (first, second):
            assert search.result().status_code == 503
            assert "shutting down" in search.result().json()["error"]["message"]
        gate.may.set()


def test_what_fails_inside_a_search_is_500_and_the_engine_lives_on(bundle):
    def broken(prompts, answers):
        raise OSError("the judge is away")

    wrong = Stateless(lambda rows: 1 / 0, on_device=False)
    sums = arithmetic_reward()  # which the prompt is not
    for reward, says in ((TextReward(broken, retries=0, wait_s=0), "the judge is away"),
                         (sums, "no arithmetic problem"),
                         (wrong, "ZeroDivisionError")):
        with running(make_batcher(bundle), methods=Methods(bundle, reward)) as (url, _):
            with httpx.Client(base_url=url, timeout=300) as client:
                found = post(client, method="particle-filter", prompt="what?")
                assert found.status_code == 500, found.text
                assert found.json()["error"]["type"] == "api_error"
                assert says in found.json()["error"]["message"]
                assert post(client, budget=None, max_steps=None).status_code == 200


def test_clients_lengths_share_programs(bundle, client):
    """Other lengths, limits, steps and stop texts, within a room: nothing is compiled."""
    ask = lambda **changes: post(client, method="particle-filter", **changes)
    assert ask(stop="zz").status_code == ask().status_code == 200
    from jaxlm.search.run import absorb_jit, begin_jit, move_jit

    size = lambda: [program._cache_size() for program in (begin_jit, move_jit, absorb_jit)]
    before = size()
    for changes in ({"max_tokens": 9}, {"max_tokens": 40}, {"max_steps": 2}, {"step": "="},
                    {"prompt": "Q:1+2=\n"}, {"stop": "A:"}, {"temperature": 1.1}):
        answer = ask(**changes)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 2 * changes.get("max_tokens", 24)
    assert size() == before
    assert ask(max_tokens=70).status_code == 200
    assert size() != before  # the power check


def test_the_programs_of_few_sizes_are_kept(bundle, monkeypatch):
    from jaxlm.search.run import begin_jit, forget_programs

    methods = Methods(bundle)
    forget_programs()

    def after(budget):
        asked = Given(method="self-consistency", budget=budget)
        assert methods.job(asked, [[1]], 2, 0)(lambda: False).text is not None
        return begin_jit._cache_size()

    monkeypatch.setattr("jaxlm.serve.methods.SIZES", 2)
    assert [after(budget) for budget in (2, 3, 2, 4, 2)] == [1, 2, 2, 1, 2]


def test_rooms_are_few():
    rooms = {room_of(prompt, steps, tokens) for prompt in range(1, 1025, 5)
             for steps in (1, 40, 1024) for tokens in range(1, 1025, 5)}
    assert len({room.prompt for room in rooms}) == 6 and len({r.tokens for r in rooms}) == 5
    assert len({room.steps for room in rooms}) == 2


class Given:
    """A request's fields."""

    def __init__(self, **changes):
        self.__dict__ = {
            **dict.fromkeys(("budget", "stream", "logprobs", "include_stop_str_in_output", "top_p",
                             "top_k", "min_p", "n", "step", "max_steps", "temperature")),
            "stops": [], **changes}
