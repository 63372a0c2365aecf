"""Searches by name, over HTTP: each is what `jaxlm.search` gives."""

import http.client
import json
import re
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from jaxlm.core.errors import ConfigError, DeviceError  # noqa: E402
from jaxlm.core.tree import nbytes  # noqa: E402
from jaxlm.eval.arithmetic_reward import arithmetic_reward  # noqa: E402
from jaxlm.hf.bundle import load  # noqa: E402
from jaxlm.rewards.base import RewardError, Stateless  # noqa: E402
from jaxlm.rewards.call import TextReward  # noqa: E402
from jaxlm.rewards.process_text import TextProcessReward  # noqa: E402
from jaxlm.search.base import Steps  # noqa: E402
from jaxlm.search.methods import METHODS  # noqa: E402
from jaxlm.search.methods import Request as Wanted  # noqa: E402
from jaxlm.search.particles import particle_filter  # noqa: E402
from jaxlm.serve.methods import Methods, memory_left, room_of  # noqa: E402
from jaxlm.serve.schema import ChatRequest, CompletionRequest  # noqa: E402
from tests.rewards.twins import Told  # noqa: E402
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
    ({"prompt": "what?"}, "'what?' is no arithmetic problem"),
    ({"method": "particle-gibbs"}, "a multiple of 2, at least 4"),
    ({"method": "parallel-tempering", "budget": 6}, "a multiple of 4, at least 8"),
    ({"method": "dvts", "budget": 7}, "not a multiple of width 4"),
    ({"stop": ["\x00\u00e9"]}, "stop texts hold '\\x00"),
])
def test_what_a_search_cannot_do_is_400_before_its_turn(bundle, client, changes, says):
    answer = post(client, **{"method": "particle-filter", **changes})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    made = Methods(bundle, arithmetic_reward(), max_budget=8)
    given = CompletionRequest(**ASK | {"method": "particle-filter"} | changes)
    if says != "room":
        with pytest.raises(ValueError, match=re.escape(says)):
            made.job(given, [bundle.tokenizer.encode(one) for one in given.prompts], 24, 0)


def test_a_table_of_texts_is_bounded_before_it_is_made(bundle, monkeypatch):
    made = Methods(bundle, arithmetic_reward())
    ids = [bundle.tokenizer.encode(ASK["prompt"])]
    texts = lambda count: CompletionRequest(**ASK | {
        "method": "particle-filter", "stop": [f"{i:08}{10**7 - i:08}" * 16 for i in range(count)]})
    made.job(texts(16), ids, 24, 0)  # few tokens, so all are taken
    monkeypatch.setattr("jaxlm.serve.methods.CELLS", 300 * bundle.lm.config.vocab_size)
    made.job(texts(1), ids, 24, 0)
    with pytest.raises(ConfigError, match="stop texts need 5.. states .* at most 300, .* fewer"):
        made.job(texts(2), ids, 24, 0)


def test_more_steps_than_a_reward_model_has_room_for_are_refused(bundle):
    judge = TextProcessReward(bundle.lm, bundle.params, None, None, None, "last", steps=64)
    ask = lambda steps: Methods(bundle, judge).job(CompletionRequest(
        **ASK | {"method": "beam", "max_steps": steps}), [[1]], 24, 0)
    ask(64)
    with pytest.raises(ConfigError, match="max_steps is 65; expected at most 64"):
        ask(65)


def test_a_search_is_told_what_memory_the_batch_leaves(bundle, monkeypatch):
    batcher = make_batcher(bundle)
    held = 3 * nbytes(batcher._state) // 2 + (256 << 20)  # 4 rows, 2 readers, kept prompts
    monkeypatch.setattr("jaxlm.serve.methods.device_limit", lambda bundle: None)
    assert memory_left(batcher) is None  # the device does not say what it has
    monkeypatch.setattr("jaxlm.serve.methods.device_limit", lambda bundle: 1 << 30)
    assert memory_left(batcher) == (1 << 30) - held
    made = Methods(bundle, memory=1000)
    with pytest.raises(DeviceError, match="particles fit"):
        made.job(Given(method="greedy"), [[1]], 2, 0)(lambda: False)
    assert not made._sizes  # nothing was compiled, so nothing is to be let go
    judged = Methods(bundle, arithmetic_reward(), memory=1000)
    for name in ("beam", "particle-gibbs"):
        given = CompletionRequest(**ASK | {"method": name, "budget": 4})
        with pytest.raises(DeviceError, match="particles fit"):
            judged.job(given, [bundle.tokenizer.encode(ASK["prompt"])], 2, 0)(lambda: False)


def test_of_a_chat_the_reward_is_told_the_user_s_last_turn(bundle):
    told = Told()
    turns = [("system", "Add up. "), ("user", "Q:1+1=\n"), ("assistant", "A:2\n"),
             ("user", ASK["prompt"])]
    chat = {name: value for name, value in ASK.items() if name != "prompt"} | {
        "method": "particle-filter",
        "messages": [{"role": role, "content": text} for role, text in turns]}
    with running(make_batcher(bundle), methods=Methods(bundle, told)) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=300)
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"{url}/v1/completions", json=ASK | {"method": "particle-filter"},
                          timeout=300).status_code == 200
    chatted, plain = told.prompts
    assert chatted.texts == plain.texts == [ASK["prompt"]]
    assert chatted.own[0].startswith("Add up. ")


@pytest.mark.parametrize(("turns", "question"), [
    ("system:be brief|user:one|assistant:yes|user:two", "two"), ("user:one|user:two", "one\ntwo"),
    ("user:one|assistant:so", "one\nso"), ("system:alone", None)])
def test_the_last_turn_may_be_several_messages_and_an_answer_begun(turns, question):
    messages = [dict(zip(("role", "content"), turn.split(":"), strict=True))
                for turn in turns.split("|")]
    assert ChatRequest(model="m", messages=messages).question == question


def test_without_a_reward_some_methods_go(bundle):
    job = Methods(bundle).job
    given = lambda **changes: Given(**changes)
    with pytest.raises(ValueError, match="rpc"):
        job(given(method="particle-filter"), [[1]], 5, 0)
    with pytest.raises(ValueError, match="--prm"):
        job(given(method="beam"), [[1]], 5, 0)
    assert isinstance(job(given(method="self-consistency"), [[1]], 5, 0).args[1], Wanted)


EVEN = Stateless(lambda rows: 0.5 + 0.0 * rows.length_B)


@pytest.mark.slow
@pytest.mark.parametrize("reward", [EVEN, arithmetic_reward()], ids=["device", "host"])
def test_plain_answers_beside_searches_are_those_alone(bundle, reward):
    """To the last bit, while a search computes at every moment."""
    with (running(make_batcher(bundle), methods=Methods(bundle, reward)) as (url, engine),
          ThreadPoolExecutor(8) as pool):
        ask = lambda body: httpx.post(f"{url}/v1/completions", timeout=300, json=body)
        plain = lambda i: ask({
            "model": "tiny-model", "prompt": f"Q:{i}+8*6=\n", "max_tokens": 5 + i, "seed": i,
            "temperature": [0, 0.8][i % 2], "logprobs": 2}).json()["choices"]
        search = lambda: ask(ASK | {"method": "particle-filter", "budget": 8, "max_tokens": 64,
                                    "max_steps": 32}).status_code
        alone = [plain(i) for i in range(24)]
        assert search() == 200  # compiled
        over = threading.Event()

        def searching():
            found = []
            while not over.is_set():
                found.append(search())
            return found

        busy = [pool.submit(searching) for _ in range(2)]
        while engine.searching < 2:
            time.sleep(0.01)
        together = list(pool.map(plain, range(24)))
        over.set()
        found = sum((one.result() for one in busy), [])
        assert together == alone and set(found) == {200} and len(found) > 2


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
    for reward, says in ((TextReward(broken, retries=0, wait_s=0), "the judge is away"),
                         (wrong, "ZeroDivisionError")):
        with (warnings.catch_warnings(record=True) as warned,
              running(make_batcher(bundle), methods=Methods(bundle, reward)) as (url, _)):
            with httpx.Client(base_url=url, timeout=300) as client:
                found = post(client, method="particle-filter", prompt="what?")
                assert found.status_code == 500, found.text
                assert found.json()["error"]["type"] == "api_error"
                assert says in found.json()["error"]["message"]
                assert post(client, budget=None, max_steps=None).status_code == 200
        assert not any(says in str(one.message) for one in warned)  # the client alone is told


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
    from jaxlm.search.programs import PROGRAMS, forget_programs
    from jaxlm.search.run import begin_jit

    forget_programs()
    assert [program._cache_size() for program in PROGRAMS] == [0] * len(PROGRAMS)
    monkeypatch.setattr("jaxlm.serve.methods.SIZES", 1)
    methods = Methods(bundle)
    for budget, kept in ((2, 1), (2, 1), (3, 0)):
        job = methods.job(Given(method="self-consistency", budget=budget), [[1]], 2, 0)
        assert job(lambda: False).text is not None
        assert begin_jit._cache_size() == kept


def test_a_size_is_what_compiles(bundle, monkeypatch):
    """Budget, room, and the tables of step and stop texts; not what a search that fails asked."""
    methods = Methods(bundle)

    def after(fails=None, **asked):
        def solved(*given):
            if fails:
                raise fails

        monkeypatch.setattr("jaxlm.serve.methods.solve", solved)
        job = methods.job(Given(method="greedy", **asked), [[1]], 2, 0)
        if fails:
            with pytest.raises(type(fails)):
                job(lambda: False)
        else:
            job(lambda: False)
        return len(methods._sizes)

    assert after(DeviceError("too many")) == 0
    assert [after(), after(), after(budget=2), after(stops=["x"]), after(stops=["y"])] == (
        [1, 1, 2, 3, 3])
    long = [chr(97 + i) * 40 for i in range(16)]  # whose table is larger
    assert [after(stops=long), after(RewardError("away", [0], ["away"]), budget=3)] == [4, 5]


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
                             "top_k", "min_p", "n", "step", "max_steps", "temperature",
                             "question")),
            "stops": [], **changes}
