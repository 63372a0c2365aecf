"""What a refusal says: what, got, expected, what to do."""

import json
import threading

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from jaxlm.serve.invalid import EXPECTED  # noqa: E402
from jaxlm.serve.schema import ChatRequest, CompletionRequest  # noqa: E402
from tests.serve.running import ASK, CHAT, make_batcher, running  # noqa: E402


@pytest.fixture(scope="module")
def client(bundle):
    with running(make_batcher(bundle)) as (url, _):
        with httpx.Client(base_url=url, timeout=120) as made:
            yield made


SPOILT = {
    "a stop that is a number": ({"stop": 5}, None, (
        "stop is 5; expected a text of 1 to 256 characters that is valid Unicode, or a list of up "
        "to 16 of them; change it or leave it out")),
    "a stop inside a list": ({"stop": ["a", 5]}, None, (
        'stop is ["a", 5]; expected a text of 1 to 256 characters that is valid Unicode, or a list '
        "of up to 16 of them; change it or leave it out")),
    "a prompt that is a number": ({"prompt": 5}, None, (
        "prompt is 5; expected a text, a list of token ids, or a list of 1 to 1024 of either; "
        "change it")),
    "a penalty": ({"presence_penalty": 0.5}, None, (
        "presence_penalty is 0.5; expected 0, for a penalty is not offered; change it or leave it "
        "out")),
    "another penalty": ({"repetition_penalty": 1.1}, None, (
        "repetition_penalty is 1.1; expected 1, for a penalty is not offered; change it or leave "
        "it out")),
    "a form": ({"response_format": {"type": "json_object"}}, None, (
        'response_format is {"type": "json_object"}; expected {"type": "text"}, for another form '
        "is not offered; change it or leave it out")),
    "a field that there is not": ({"what": 1}, None, (
        "there is no field what, which is 1; leave it out")),
    "half of a surrogate pair": ({"prompt": "\ud800"}, None, (
        "prompt: the text is not valid Unicode: it holds a lone surrogate; send both halves of the "
        "pair")),
    "options without a stream": ({"stream_options": {"include_usage": True}}, None, (
        "stream_options needs stream: true; ask for a stream, or leave it out")),
    "no JSON": (None, b"{", (
        "the body is not JSON: Expecting property name enclosed in double quotes; send a JSON "
        "object, with the header Content-Type: application/json")),
    "no object": (None, b"5", (
        "the body is 5; send a JSON object, with the header Content-Type: application/json")),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_reason_says_what_got_expected_and_what_to_do(client, name):
    changes, raw, says = SPOILT[name]
    raw = json.dumps(ASK | changes).encode() if raw is None else raw
    answer = client.post("/v1/completions", content=raw,
                         headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, says)


def test_a_body_without_its_content_type(client):
    answer = client.post("/v1/completions", content=json.dumps(ASK).encode())
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert "Content-Type: application/json" in said and " at 0x" not in said


@pytest.mark.parametrize(("changes", "says"), [
    ({"tools": [{"type": "function"}]}, (
        'tools is [{"type": "function"}]; expected an empty list, for tool calls are not offered; '
        "change it or leave it out")),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, (
        'messages.0.content is [{"type": "image_url", "image_url": {}}]; expected a text, or a '
        'list of at least one {"type": "text", "text": ...}; images and sounds are not offered; '
        "change it")),
    ({"messages": [{"role": "user"}]}, (
        'messages.0.content is missing; expected a text, or a list of at least one {"type": '
        '"text", "text": ...}; images and sounds are not offered; give it')),
    ({"messages": [{"role": "robot", "content": "x"}]}, (
        'messages.0.role is "robot"; expected system, developer, user or assistant; change it')),
    ({"messages": [5]}, (
        'messages.0 is 5; expected {"role": ..., "content": ...}; change it')),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, (
        'messages.0.name is "Ann"; expected null, for templates take no names; change it or leave '
        "it out")),
    ({"logprobs": 3}, "logprobs is 3; expected true or false; change it or leave it out"),
])
def test_the_reasons_of_chats(client, changes, says):
    answer = client.post("/v1/chat/completions", json=CHAT | changes)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, says)


def test_too_many_answers_are_refused_before_any_is_looked_at(bundle, monkeypatch):
    """And a prompt is read once, however many answers it gets; chats too, beside the loop."""
    read = []
    encode = type(bundle.tokenizer).encode

    def noted(self, text, **more):
        read.append((text, threading.current_thread()))
        return encode(self, text, **more)

    monkeypatch.setattr(type(bundle.tokenizer), "encode", noted)
    with running(make_batcher(bundle)) as (url, _), httpx.Client(base_url=url, timeout=60) as asks:
        loops = [t for t in threading.enumerate() if "run" in t.name]  # this server's and another's
        answer = asks.post("/v1/completions", json=ASK | {"prompt": ["a", "b"] * 512, "n": 1024})
        assert answer.status_code == 400 and "1048576 answers" in answer.json()["error"]["message"]
        assert not read
        whole = asks.post("/v1/completions", json=ASK | {"prompt": ["a", "b"], "n": 3}).json()
        assert [text for text, _ in read] == ["a", "b"]
        assert len({choice["text"] for choice in whole["choices"]}) == 6
        alone = asks.post("/v1/completions", json=ASK | {"prompt": "b", "n": 1}).json()
        assert alone["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]
        assert asks.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert loops and not {thread for _, thread in read} & set(loops)


def test_every_field_has_its_expected_value_in_words():
    for form in (ChatRequest, CompletionRequest):
        assert set(form.model_fields) <= set(EXPECTED)


def test_without_a_template_chats_are_refused_in_a_sentence(bundle):
    with running(make_batcher(bundle), template=None) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == (
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template verbatim, or a Jinja file")
    refusing = "{{ raise_exception('no such turns') }}"
    with running(make_batcher(bundle), template=refusing) as (url, _):
        said = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).json()
        assert "no such turns" in said["error"]["message"]
        assert str(bundle.tokenizer.folder) not in said["error"]["message"]
