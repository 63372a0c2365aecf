"""Searches by name, over HTTP: each is what `jaxlm.search` gives."""

import jax
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from jaxlm.eval.arithmetic_reward import arithmetic_reward  # noqa: E402
from jaxlm.hf.bundle import load  # noqa: E402
from jaxlm.search.base import Steps  # noqa: E402
from jaxlm.search.methods import METHODS  # noqa: E402
from jaxlm.search.methods import Request as Wanted  # noqa: E402
from jaxlm.search.particles import particle_filter  # noqa: E402
from jaxlm.serve.methods import BEAMS, Methods  # noqa: E402
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
@pytest.mark.parametrize("name", [*METHODS, *BEAMS])
def test_every_method_answers(client, name):
    body = post(client, method=name, budget=4).json()
    assert body["choices"][0]["text"] and body["search"]["method"] == name
    again = post(client, method=name, budget=4).json()
    assert again["choices"] == body["choices"]
    chat = client.post("/v1/chat/completions", json={
        **{k: v for k, v in ASK.items() if k != "prompt"}, "method": name,
        "messages": [{"role": "user", "content": ASK["prompt"]}]}).json()
    assert chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"budget": 9}, "at most 8"), ({"n": 2}, "n out"), ({"stream": True}, "stream"),
    ({"top_p": 0.5}, "top_p"), ({"logprobs": 1}, "logprobs"), ({"method": "magic"}, "magic"),
    ({"prompt": ["a", "b"]}, "one prompt"), ({"max_tokens": 96}, "room"),
    ({"prompt": "what?"}, "arithmetic"),
])
def test_what_a_search_cannot_do_is_400(client, changes, says):
    answer = post(client, **{"method": "particle-filter", **changes})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_without_a_reward_some_methods_go(bundle):
    job = Methods(bundle).job
    given = lambda **changes: Given(**changes)
    with pytest.raises(ValueError, match="reward"):
        job(given(method="particle-filter"), [[1]], 5, 0)
    with pytest.raises(ValueError, match="--prm"):
        job(given(method="beam"), [[1]], 5, 0)
    assert isinstance(job(given(method="self-consistency"), [[1]], 5, 0).args[1], Wanted)


class Given:
    """A request's fields."""

    def __init__(self, **changes):
        self.__dict__ = {
            **dict.fromkeys(("budget", "stream", "logprobs", "include_stop_str_in_output", "top_p",
                             "top_k", "min_p", "n", "step", "max_steps", "temperature")),
            "stops": [], **changes}
