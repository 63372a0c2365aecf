"""The server under load: many clients, clients that die, generated input, another project."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from experiments import bench_serve  # noqa: E402
from jaxlm.hf.bundle import load  # noqa: E402
from jaxlm.search.methods import METHODS  # noqa: E402
from jaxlm.serve import methods  # noqa: E402
from jaxlm.serve.methods import Methods  # noqa: E402
from tests.serve.running import make_batcher, running  # noqa: E402
from tests.source_tree import ROOT  # noqa: E402
from tests.tiny import write_folder  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def url(folder):
    model = load(folder)
    with running(make_batcher(model, rows=16, prompt_bytes=8 << 20), waiting=2000,
                 methods=Methods(model, max_budget=2)) as (found, _):
        yield found


def test_a_thousand_clients_each_get_their_own_answer(url):
    assert bench_serve.mixed_requests(url, "tiny-model", 1000) == 0


def test_the_comparison_sees_a_mixture(url):
    """Another seed's answers are counted as mixed."""
    assert bench_serve.mixed_requests(url, "tiny-model", 20, shift=1) > 10


def test_clients_that_die_harm_nobody(url):
    """Of 40 streams, 10 are cut by force; the others get what they get alone; no row is lost."""
    victims = set(random.Random(0).sample(range(40), 10))
    ask = lambda number: {"model": "tiny-model", "prompt": f"number {number}", "seed": number,
                          "max_tokens": 60}

    async def one(client, number):
        text = ""
        body = ask(number) | {"stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if number in victims and text:
                    return None
                text += line
        assert text.count('finish_reason":"') == 1 and text.endswith("data: [DONE]")
        pieces = [json.loads(piece) for piece in text.split("data: ")[1:-1]]
        return "".join(piece["choices"][0]["text"] for piece in pieces)

    async def everyone():
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            return await asyncio.gather(*(one(client, number) for number in range(40)))

    found = asyncio.run(everyone())
    assert [number for number, whole in enumerate(found) if whole is None] == sorted(victims)
    for number in set(range(40)) - victims:
        alone = httpx.post(f"{url}/v1/completions", json=ask(number), timeout=60).json()
        assert found[number] == alone["choices"][0]["text"]
    until = time.monotonic() + 30
    while "answers_pending 0" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_memory_stays_flat(url):
    assert bench_serve.rss_growth_mb(url, "tiny-model", os.getpid(), 5000) < 50


def fuzz(description, url, examples):
    """No status of 500, whatever schemathesis makes of a description."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", description, "--url", url, "--checks",
         "not_a_server_error", "--max-examples", str(examples), "--generation-deterministic",
         "--request-timeout", "300"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_generated_requests_never_break_the_server(url):
    """Requests made from the server's own description of its endpoints."""
    pytest.importorskip("schemathesis")
    before = answered(url)
    fuzz(f"{url}/openapi.json", url, 30)
    assert answered(url) > before  # the model's name is in the description


def answered(url):
    """Completions and chats with status 200."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(
        "jaxlm_requests_total") and "completions" in line and 'status="200"' in line)


def test_generated_searches_never_break_the_server(url, tmp_path, monkeypatch):
    """The same, of the description's fields of a search alone, few of whose values contradict."""
    pytest.importorskip("schemathesis")
    description = httpx.get(f"{url}/openapi.json").json()
    described = description["components"]["schemas"]["CompletionRequest"]
    fields = described["properties"]
    assert fields["method"]["enum"] == ["plain", *METHODS]
    free = [name for name, method in METHODS.items() if not method.rewarded]
    wanted = ("model", "prompt", "method", "budget", "step", "stop", "max_steps", "max_tokens",
              "temperature", "seed")
    described["properties"] = {name: fields[name] for name in wanted} | {
        "prompt": {"type": "string", "minLength": 1, "maxLength": 8},
        "method": {"enum": free}, "budget": {"enum": [None, 1, 2]},
        "max_tokens": {"enum": [None, 1, 7]}}
    described["required"] = ["model", "prompt", "method"]
    description["paths"] = {"/v1/completions": description["paths"]["/v1/completions"]}
    (tmp_path / "searches.json").write_text(json.dumps(description))
    solved, solve = [], methods.solve

    def noted(name, *rest):
        solved.append(name)
        return solve(name, *rest)

    monkeypatch.setattr(methods, "solve", noted)
    fuzz(str(tmp_path / "searches.json"), url, 40)
    assert len(solved) > 5 and set(solved) <= set(free)


def test_its_hub_drives_a_particle_filter(url):
    pytest.importorskip("its_hub")
    from its_hub.api.reward_models.prm import AbstractProcessRewardModel
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.lms.step_generation import StepGeneration

    class Short(AbstractProcessRewardModel):
        """Prefers short answers."""

        def score(self, prompt, steps):
            return [1 / (2 + len(step)) for step in steps]

        async def ascore(self, prompt, steps):
            return self.score(prompt, steps)

    lm = OpenAICompatibleLanguageModel(url + "/v1", "none", "tiny-model", max_tries=1)
    for generation in (
        StepGeneration(max_steps=2, tokens_per_step=3),
        StepGeneration(max_steps=2, step_token="e", include_stop_str_in_output=True,
                       stop_token="q"),
    ):
        lm.max_completion_tokens = 4  # random bytes: each may come back as three
        found = ParticleFiltering(generation, Short()).infer(
            lm, "Hello, ", budget=4, return_response_only=False)
        assert len(found.responses) == 4 and all(r["content"] for r in found.responses)


@pytest.mark.parametrize("grace", [20, 0])
def test_sigterm_closes_the_command(folder, grace):
    """An answer in flight is finished, or ends with a reason; then the process ends."""
    command = [sys.executable, "-m", "jaxlm", "serve", "--model", str(folder), "--name", "m",
               "--port", "0", "--rows", "4", "--max-len", "96", "--grace", str(grace),
               "--chat-template", "verbatim"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if line.startswith("serving"))
        url = line.split(" at ")[1].strip()
        body = {"model": "m", "prompt": "Hi", "max_tokens": 90, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert rest.endswith("data: [DONE]") or "shutting down" in rest
        assert process.wait(timeout=60) == 0


HANG = """
import pathlib, time
def score(prompts, answers):
    pathlib.Path("asked").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize(("grace", "signals", "code"), [(1, 1, 0), (600, 2, 128 + 15)])
def test_sigterm_closes_the_command_in_the_middle_of_a_search(
    folder, tmp_path, grace, signals, code
):
    """The reward hangs: whoever waits gets a reason in time; a second signal ends at once."""
    (tmp_path / "hang.py").write_text(HANG)
    command = [sys.executable, "-m", "jaxlm", "serve", "--model", str(folder), "--name", "m",
               "--port", "0", "--rows", "4", "--max-len", "96", "--grace", str(grace),
               "--prm", "hang:score"]
    root = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": root}) as process:
        line = next(line for line in process.stderr if line.startswith("serving"))
        url = line.split(" at ")[1].strip()
        body = {"model": "m", "prompt": "Hi", "max_tokens": 9, "method": "particle-filter"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{url}/completions", json=body, timeout=120)
            until = time.monotonic() + 100
            while not (tmp_path / "asked").exists():
                assert time.monotonic() < until
                time.sleep(0.1)
            began = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(1.0)
            assert process.wait(timeout=30) == code and time.monotonic() - began < 25
            if signals == 1:
                answer = asked.result()
                assert answer.status_code == 503
                assert "shutting down" in answer.json()["error"]["message"]
                assert "Traceback" not in process.stderr.read()
            else:
                with pytest.raises(httpx.TransportError):
                    asked.result()
