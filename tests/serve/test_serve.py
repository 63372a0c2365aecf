"""The server on loopback, driven by the clients that people use."""

import asyncio
import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from jaxlm.decode.generate import generate  # noqa: E402
from jaxlm.decode.samplers import Categorical  # noqa: E402
from jaxlm.serve.engine import Engine, Refused  # noqa: E402
from tests.serve.running import ASK, CHAT, make_batcher, running  # noqa: E402
from tests.tiny import BOS  # noqa: E402


@pytest.fixture(scope="module")
def server(bundle):
    with running(make_batcher(bundle), max_body=20_000) as found:
        yield found


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=120) as made:
        yield made


def post(client, body, path="/v1/completions"):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(answer):
    return [choice.get("text", choice.get("message", {}).get("content"))
            for choice in answer["choices"]]


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def ours(bundle, prompt, count, seed=5, temperature=1.0, choice=0, **more):
    """What the library gives without a server."""
    keys = jax.random.split(jax.random.key(seed), 4)[choice][None]
    sampler = Categorical(temperature, top_k=258, top_p=1.0, min_p=0.0)
    return generate(bundle, prompt, max_new_tokens=count, key=keys, sampler=sampler, max_len=96,
                    **more)


def test_an_answer_is_that_of_generate(bundle, client):
    answer = post(client, ASK)
    mine = ours(bundle, "Hello, ", 12)
    assert texts(answer) == [mine.text]
    prompt = len(bundle.tokenizer.encode("Hello, "))
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": len(mine.tokens),
                               "total_tokens": prompt + len(mine.tokens)}


def test_several_answers_and_prompts(bundle, client):
    answer = post(client, ASK | {"n": 2, "prompt": ["Hello, ", "Bye"]})
    assert texts(answer) == [ours(bundle, prompt, 12, choice=2 * i + j).text
                             for i, prompt in enumerate(["Hello, ", "Bye"]) for j in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    ids = bundle.tokenizer.encode("Hello, ")
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(bundle.tokenizer.encode("Bye"))
    assert texts(post(client, ASK | {"prompt": ids})) == texts(post(client, ASK))


def test_openai_client(bundle, url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny-model"]
        whole = client.completions.create(**ASK, logprobs=2)
        assert whole.choices[0].finish_reason in ("length", "stop")
        assert len(whole.choices[0].logprobs.token_logprobs) == whole.usage.completion_tokens
        pieces = list(client.completions.create(
            **ASK, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
        assert pieces[-1].usage == whole.usage and len(pieces) > 2
        chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
        mine = ours(bundle, [BOS, *bundle.tokenizer.encode("Hi. ")], 9, seed=1)
        assert chat.choices[0].message.content == mine.text
        assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content] == [2] * 9
        stream = client.chat.completions.create(**CHAT, stream=True)
        assert "".join(p.choices[0].delta.content for p in stream) == mine.text
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.completions.create(**ASK | {"model": "other"})
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(**ASK, temperature=-1)


def test_a_last_message_goes_on(bundle, client):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "So \n"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    answer = post(client, CHAT | {"messages": messages} | fields, "/v1/chat/completions")
    ids = [BOS, *bundle.tokenizer.encode("Hi. So \n")]
    assert texts(answer) == [ours(bundle, ids, 9, seed=1).text]
    folded = post(client, CHAT | {"messages": messages, "extra_body": fields},
                  "/v1/chat/completions")
    assert texts(folded) == texts(answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_cut_exactly(bundle, client, stream, include):
    plain = ours(bundle, "Hello, ", 30).text
    stop = next(letter for letter in plain[4:] if letter.isascii() and letter not in plain[:4])
    body = ASK | {"max_tokens": 30, "stop": [stop, "\0never"], "stream": stream,
                  "include_stop_str_in_output": include,
                  **({"stream_options": {"include_usage": True}} if stream else {})}
    mine = ours(bundle, "Hello, ", 30, stop=[stop, "\0never"], include_stop=include)
    if not stream:
        answer = post(client, body)
        text, count = texts(answer)[0], answer["usage"]["completion_tokens"]
    else:
        lines = client.post("/v1/completions", json=body).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        pieces = [json.loads(line[6:]) for line in lines[:-2]]
        text = "".join(p["choices"][0]["text"] for p in pieces if p["choices"])
        count = pieces[-1]["usage"]["completion_tokens"]
        assert pieces[-2]["choices"][0]["finish_reason"] == "stop"
    assert (text, count) == (mine.text, len(mine.tokens))
    assert text.endswith(stop) == include and mine.finish == "string"


def test_curl(url):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    run = lambda *arguments: subprocess.run(
        ["curl", "-sS", "-m", "60", *arguments], capture_output=True, text=True, check=True).stdout
    assert json.loads(run(f"{url}/health")) == {"status": "ok"}
    head = ["-H", "Content-Type: application/json", "-d"]
    answer = json.loads(run(f"{url}/v1/completions", *head, json.dumps(ASK)))
    assert answer["object"] == "text_completion"
    events = run("-N", f"{url}/v1/completions", *head, json.dumps(ASK | {"stream": True}))
    assert events.endswith("data: [DONE]\n\n")


def test_concurrent_answers_are_those_alone(client, url):
    bodies = [ASK | {"prompt": f"{'x' * (i % 17)}{i}", "seed": i, "max_tokens": 3 + i % 20,
                     "temperature": [0, 0.7, 1.5][i % 3], "top_p": [1, 0.9][i % 2], "logprobs": 1,
                     "n": 1 + i % 2} for i in range(24)]
    alone = [post(client, body)["choices"] for body in bodies]
    with ThreadPoolExecutor(24) as threads:
        together = list(threads.map(
            lambda body: httpx.post(f"{url}/v1/completions", json=body, timeout=120).json(),
            bodies))
    assert [answer["choices"] for answer in together] == alone


@pytest.mark.parametrize(("changes", "says"), [
    ({"prompt": ""}, "empty"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [999]}, "999"), ({"prompt": "\ud800"}, "surrogate"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 500}, "a row holds 96"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"n": 0}, "n"), ({"n": 100}, "at most"),
    ({"logprobs": 21}, "logprobs"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 17}, "stop"),
    ({"seed": 2**63}, "seed"), ({"echo": True}, "echo"), ({"best_of": 3}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"what": 1}, "what"), ({"method": "magic"}, "method"), ({"budget": 4}, "method"),
])
def test_bad_input_is_400_with_a_reason(client, changes, says):
    body = json.dumps(ASK | changes, ensure_ascii=True)
    answer = client.post("/v1/completions", content=body,
                         headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]
    assert says in found["message"] and found["type"] == "invalid_request_error"


@pytest.mark.parametrize("changes", [
    {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user"}]}, {"top_logprobs": 2},
    {"add_generation_prompt": True, "continue_final_message": True},
    {"max_tokens": 3, "max_completion_tokens": 4}, {"tools": [{"type": "function"}]},
])
def test_bad_chats_are_400(client, changes):
    answer = client.post("/v1/chat/completions", json=CHAT | changes)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = {"response_format": {"type": "text"}, "repetition_penalty": 1.0, "store": False,
               "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "echo": False}
    assert texts(post(client, ASK | nothing)) == texts(post(client, ASK))


def test_other_refusals(client):
    for answer, status in [
        (client.get("/v1/nothing"), 404), (client.get("/v1/completions"), 405),
        (client.get("/v1/models/other"), 404), (client.post("/v1/completions", content=b"{"), 400),
        (client.post("/v1/completions", json=ASK | {"prompt": "x" * 30_000}), 413),
        (client.post("/v1/completions", content=(b"x" * 9000 for _ in range(4))), 413),
    ]:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_metrics_count_what_was_done(client):
    names = ["jaxlm_generated_tokens_total", "jaxlm_prompt_tokens_total",
             'jaxlm_requests_total{path="/v1/completions",status="200"}']
    before = [metric(client, name) for name in names]
    used = post(client, ASK)["usage"]
    after = [metric(client, name) for name in names]
    assert np.subtract(after, before).tolist() == [
        used["completion_tokens"], used["prompt_tokens"], 1]


def test_a_stream_s_time_ends_with_its_last_byte(client):
    name = 'jaxlm_request_seconds_sum{path="/v1/completions"}'
    post(client, ASK)
    before, began = metric(client, name), time.perf_counter()
    with client.stream("POST", "/v1/completions", json=ASK | {"max_tokens": 80, "stream": True,
                                                              "temperature": 0}) as answer:
        head = time.perf_counter() - began
        assert "[DONE]" in "".join(answer.iter_lines())
    whole = time.perf_counter() - began
    until = time.monotonic() + 5
    while metric(client, name) == before and time.monotonic() < until:
        time.sleep(0.02)
    assert head + 0.5 * (whole - head) < metric(client, name) - before <= whole + 0.5


def test_a_client_that_leaves_frees_its_row(client, url):
    for stream in (True, False):
        body = ASK | {"max_tokens": 80, "n": 4, "stream": stream}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body,
                              timeout=60 if stream else 0.02) as answer:
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
        until = time.monotonic() + 30
        while metric(client, "jaxlm_answers_pending") and time.monotonic() < until:
            time.sleep(0.05)
        assert metric(client, "jaxlm_answers_pending") == metric(client, "jaxlm_rows_live") == 0
    assert texts(post(client, ASK))


def test_a_token_is_asked_for(bundle):
    with running(make_batcher(bundle), token="secret") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"},
                        {"Authorization": b"Bearer \xff"}):
            answer = httpx.post(f"{url}/v1/completions", json=ASK, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["message"]
            for path in ("/metrics", "/openapi.json", "/v1/models", "/nothing"):
                assert httpx.get(f"{url}{path}", headers=headers).status_code == 401
            broken = httpx.post(f"{url}/v1/completions", content=b"{", headers=headers)
            assert broken.status_code == 401 and "www-authenticate" in broken.headers
        good = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/completions", json=ASK, headers=good).status_code == 200


def submitting(work):
    """Run a coroutine function of an engine inside an event loop."""
    return asyncio.run(work())


def test_a_full_queue_is_429(bundle):
    engine = Engine(make_batcher(bundle), waiting=1)  # not started: nothing is ever answered

    async def fill():
        ask = lambda: engine.batcher.request("x", max_new_tokens=5)
        engine.submit([ask() for _ in range(5)])
        with pytest.raises(Refused) as found:
            engine.submit([ask()])
        assert found.value.status == 429
        with pytest.raises(Refused) as found:
            engine.submit([ask() for _ in range(6)])
        assert found.value.status == 400

    submitting(fill)


@pytest.mark.parametrize("grace", [30.0, 0.0])
def test_a_close_ends_every_answer(bundle, grace):
    """In time, or with a reason."""
    engine = Engine(make_batcher(bundle))

    async def close():
        requests = [engine.batcher.request("x", max_new_tokens=80) for _ in range(9)]
        ticket = engine.submit(requests)
        engine.drain(grace)
        engine.start()
        with pytest.raises(Refused) as found:
            engine.submit(requests[:1])
        assert found.value.status == 503
        ends = []
        with pytest.raises(Refused, match="shutting down") if not grace else nothing():
            while len(ends) < 9:
                progress = await ticket.next()
                ends += [progress.finish] if progress.finish else []
        await asyncio.to_thread(engine.close)

    submitting(close)


def test_a_broken_engine_says_so(bundle):
    engine = Engine(make_batcher(bundle))
    engine.batcher.step = lambda: 1 / 0

    async def fail():
        ticket = engine.submit([engine.batcher.request("x", max_new_tokens=5)])
        engine.start()
        with pytest.raises(Refused, match="ZeroDivisionError") as found:
            await ticket.next()
        assert found.value.status == 500
        with pytest.raises(Refused) as found:
            engine.submit([])
        assert found.value.status == 503

    submitting(fail)


def nothing():
    """A context that expects nothing."""
    from contextlib import nullcontext

    return nullcontext()
