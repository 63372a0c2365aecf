"""The server: speed against concurrency, against `generate`, and against its_hub driving it.

Command: python experiments/bench_serve.py --out experiments/results/bench_serve/cpu.json
Hardware: 2 cores and 6 GB; no accelerator. Leave the machine alone while it runs.
Minutes: 10
Expected: serve_overhead_ratio 1.2 to 1.4 (wanted: 1.3), mixed_requests 0, rss_growth_mb below 50,
  vs_its_hub_speed 3.5 to 5 (wanted: 10), vs_its_hub_accuracy_points 0 within two of its errors

`jaxlm serve --model tiny --prm arithmetic:0.1` runs in a process of its own.

- `load`: for 1 to 64 clients that ask without a pause, tokens a second and an answer's latency.
- `serve_overhead_ratio`: 32 plain requests at once over HTTP, against one `generate` of the same
  prompts in this process; they take turns, and the ratio is the median of the pairs'.
- `mixed_requests`: of 1,000 requests with prompts, seeds and lengths of their own, sent at once,
  how many answers differ from what the same request got alone.
- `rss_growth_mb`: growth of the server's resident memory over 5,000 plain requests, after it is
  warm; no searches, of whose programs those of 32 sizes are kept.
- `vs_its_hub_*`: the same problems with the same noisy checker and budget, by (a) its_hub's
  particle filter over HTTP with this server as its model, (b) this project's over HTTP, (c) in
  process. Speed is (a)'s seconds over (b)'s; accuracy points are (b)'s minus (a)'s, of exact
  answers, with the standard error of the paired difference. its_hub is `left_out` where it is not
  installed: `pip install --no-deps its_hub==1.2.0` with aiohttp, backoff and certifi.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _harness

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
MAX_LEN, TOKENS, ROWS, BUDGET, STEPS, NOISE = 256, 128, 32, 8, 12, 0.1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; a smoke run takes few of everything."""
    few = args.smoke
    metrics: dict[str, Any] = {"cores": os.cpu_count(), "rows": ROWS, "left_out": []}
    with served(few) as (url, pid):
        metrics["load"] = [load(url, clients, 1 if few else 3, 16 if few else TOKENS)
                           for clients in (CLIENTS[:2] if few else CLIENTS)]
        metrics["overhead"] = overhead(url, 4 if few else ROWS, 16 if few else TOKENS,
                                       1 if few else 7)
        metrics["serve_overhead_ratio"] = metrics["overhead"]["ratio"]
        metrics["mixed_requests"] = mixed_requests(url, "tiny", 8 if few else 1000)
        metrics["rss_growth_mb"] = rss_growth_mb(url, "tiny", pid, 16 if few else 5000)
        metrics.update(against_its_hub(url, 1 if few else 40, args.seed, metrics["left_out"]))
    return metrics


@contextlib.contextmanager
def served(few: bool) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and its process id."""
    command = [
        sys.executable, "-m", "jaxlm", "serve", "--model", "tiny", "--prm", f"arithmetic:{NOISE}",
        "--port", "0", "--rows", str(4 if few else ROWS), "--max-len", str(MAX_LEN),
        "--queue", "2000", "--prompt-cache-mb", "64", "--chat-template", "verbatim"]
    path = f"{_harness.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": path})
    try:
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                yield found[1], process.pid
                break
        else:
            raise SystemExit(f"the server did not start: {''.join(lines[-20:])}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


# asking


def together(url: str, bodies: Sequence[dict], at_once: int) -> tuple[list[dict], list[float]]:
    """Answers and latencies of completions, `at_once` in flight."""
    import httpx

    async def everyone() -> list[tuple[dict, float]]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        plain = {"base_url": url, "timeout": 900, "verify": False}  # no certificates to load
        async with httpx.AsyncClient(limits=limits, **plain) as client:
            async def one(body: dict) -> tuple[dict, float]:
                async with gate:
                    began = time.perf_counter()
                    answer = await client.post("/v1/completions", json=body)
                    if answer.status_code != 200:
                        raise SystemExit(f"{answer.status_code}: {answer.text}")
                    return answer.json(), time.perf_counter() - began

            return await asyncio.gather(*map(one, bodies))

    found = asyncio.run(everyone())
    return [answer for answer, _ in found], [seconds for _, seconds in found]


def requests(count: int, tokens: int, model: str = "tiny", seed: int = 0) -> list[dict]:
    """Plain requests, each with a problem and a seed of its own."""
    from jaxlm.eval.arithmetic import sample

    random = np.random.default_rng(seed)
    return [{"model": model, "max_tokens": tokens, "seed": seed + number, "temperature": 1.0,
             "prompt": sample(random, "hard", "test").prompt} for number in range(count)]


def various(count: int, model: str, seed: int = 0) -> list[dict]:
    """Requests that differ in length, temperature, cuts and alternatives too."""
    bodies = requests(count, 1, model, seed)
    for number, body in enumerate(bodies):
        body |= {"max_tokens": 4 + number * 7 % 37, "temperature": [0.7, 1.0, 1.5][number % 3],
                 "top_p": [1.0, 0.95][number // 3 % 2], "logprobs": [None, 2][number // 5 % 2],
                 "prompt": body["prompt"] + "x" * (number % 23)}
    return bodies


# figures


def load(url: str, clients: int, rounds: int, tokens: int) -> dict[str, float]:
    """Tokens a second and latency under so many clients."""
    bodies = requests(clients * rounds, tokens, seed=1000 * clients)
    together(url, bodies[:1], 1)
    began = time.perf_counter()
    answers, latencies = together(url, bodies, clients)
    spent = time.perf_counter() - began
    drawn = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return {"clients": clients, "tokens_per_s": drawn / spent,
            "latency_median_s": statistics.median(latencies),
            "latency_95_s": float(np.quantile(latencies, 0.95))}


def overhead(url: str, count: int, tokens: int, repeats: int) -> dict[str, float]:
    """Requests at once over HTTP against `generate`, the same prompts, taking turns."""
    import jax

    from jaxlm import Temperature, generate
    from jaxlm import load as load_model

    bundle = load_model("tiny")
    rounds = iter(range(10**6))
    drawn: dict[str, list[int]] = {"http": [], "generate": []}

    def http() -> None:
        bodies = requests(count, tokens, seed=7 + 1000 * next(rounds))
        answers, _ = together(url, bodies, count)
        drawn["http"].append(sum(a["usage"]["completion_tokens"] for a in answers))

    def direct() -> None:
        bodies = requests(count, tokens, seed=7 + 1000 * (next(rounds) - 1))
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(
            np.array([body["seed"] for body in bodies]))
        found = generate(bundle, [body["prompt"] for body in bodies], max_new_tokens=tokens,
                         sampler=Temperature(1.0), key=keys, max_len=MAX_LEN)
        drawn["generate"].append(sum(len(answer.tokens) for answer in found))

    paired = _harness.paired_ratio(http, direct, repeats)
    return paired | {"tokens_http": statistics.mean(drawn["http"]),
                     "tokens_generate": statistics.mean(drawn["generate"])}


def mixed_requests(url: str, model: str, count: int, shift: int = 0) -> int:
    """How many answers differ between all at once and one by one; `shift` spoils the seeds."""
    bodies = various(count, model)
    spoilt = [body | {"seed": body["seed"] + shift} for body in bodies]
    at_once, _ = together(url, spoilt, count)
    alone, _ = together(url, bodies, 1)
    same = lambda a, b: (a["choices"], a["usage"]) == (b["choices"], b["usage"])
    return sum(not same(a, b) for a, b in zip(at_once, alone, strict=True))


def rss_growth_mb(url: str, model: str, pid: int, count: int) -> float:
    """Growth of a process's resident memory over `count` requests, once it is warm."""
    warm = max(count // 5, 8)
    together(url, various(warm, model, seed=10**6), 64)
    before = resident_mb(pid)
    together(url, various(count, model, seed=2 * 10**6), 64)
    return resident_mb(pid) - before


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found[1]) / 1024


# its_hub


def against_its_hub(url: str, count: int, seed: int, left_out: list[str]) -> dict[str, Any]:
    """The same problems by its_hub over HTTP, by our filter over HTTP, and in process."""
    from jaxlm.eval.arithmetic import sample

    random = np.random.default_rng(seed)
    problems = [sample(random, "hard", "test") for _ in range(count)]
    ways = {"ours_http": ours_over_http(url), "ours_in_process": ours_in_process()}
    if importlib.util.find_spec("its_hub") is None:
        left_out.append("its_hub")
    else:
        ways["its_hub"] = its_hub_way(url)
    found: dict[str, Any] = {}
    right: dict[str, list[bool]] = {}
    for name, way in ways.items():
        way(problems[0].prompt, 10**6)  # compiles
        began = time.perf_counter()
        answers = [way(problem.prompt, seed + i) for i, problem in enumerate(problems)]
        spent = time.perf_counter() - began
        right[name] = [final(text) == problem.answer
                       for (text, _), problem in zip(answers, problems, strict=True)]
        found[name] = {"seconds": spent, "accuracy": statistics.mean(right[name]),
                       "tokens": sum(tokens for _, tokens in answers)}
    out: dict[str, Any] = {"particle_filters": found, "problems": count, "budget": BUDGET}
    if "its_hub" in found:
        gain = np.subtract(right["ours_http"], right["its_hub"], dtype=float)
        out["vs_its_hub_speed"] = found["its_hub"]["seconds"] / found["ours_http"]["seconds"]
        out["vs_its_hub_accuracy_points"] = 100 * gain.mean()
        out["vs_its_hub_accuracy_error"] = 100 * gain.std() / max(count, 2) ** 0.5
    return out


def final(text: str) -> int | None:
    """The number after the last "A:"."""
    found = re.findall(r"^A:([0-9]{1,9})$", text, re.M)
    return int(found[-1]) if found else None


def reward() -> Any:
    """The checker of all three, wrong now and then."""
    from jaxlm.eval.arithmetic_reward import arithmetic_reward

    return arithmetic_reward(NOISE)


def ours_over_http(url: str) -> Any:
    """One request a problem."""
    def solve(prompt: str, seed: int) -> tuple[str, int]:
        body = {"model": "tiny", "prompt": prompt, "seed": seed, "method": "particle-filter",
                "budget": BUDGET, "max_steps": STEPS, "max_tokens": 128, "temperature": 0.8}
        answer = together(url, [body], 1)[0][0]
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    return solve


def ours_in_process() -> Any:
    """One call a problem."""
    import jax

    from jaxlm import load as load_model
    from jaxlm.search.base import Steps
    from jaxlm.search.particles import particle_filter

    bundle, steps = load_model("tiny"), Steps("\n", max_steps=STEPS, max_new_tokens=128)

    def solve(prompt: str, seed: int) -> tuple[str, int]:
        found = particle_filter(bundle, prompt, reward(), particles=BUDGET, steps=steps,
                                key=jax.random.key(seed))
        return found.text, found.tokens_drawn

    return solve


def its_hub_way(url: str) -> Any:
    """its_hub's particle filter: a request a particle and step."""
    import httpx
    from its_hub.api.reward_models.prm import AbstractProcessRewardModel
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.lms.step_generation import StepGeneration

    class Checker(AbstractProcessRewardModel):
        """Our reward in its_hub's form."""

        def score(self, prompt: Any, steps: list[str]) -> list[float]:
            scores, failed = reward().values([prompt] * len(steps), steps, [0] * len(steps))
            if failed:
                raise SystemExit(f"the checker failed: {failed}")
            return scores.tolist()

        async def ascore(self, prompt: Any, steps: list[str]) -> list[float]:
            return self.score(prompt, steps)

    lm = OpenAICompatibleLanguageModel(f"{url}/v1", "none", "tiny", max_completion_tokens=64)
    steps = StepGeneration(max_steps=STEPS, step_token="\n", stop_token="A:", temperature=0.8,
                           include_stop_str_in_output=True)
    filtering = ParticleFiltering(steps, Checker())

    def drawn() -> int:
        text = httpx.get(f"{url}/metrics", verify=False).text  # no certificates to load
        found = re.search(r"^jaxlm_generated_tokens_total (\S+)$", text, re.M)
        assert found
        return int(float(found[1]))

    def solve(prompt: str, seed: int) -> tuple[str, int]:
        before = drawn()
        answer = filtering.infer(lm, prompt, budget=BUDGET)
        return answer["content"], drawn() - before

    return solve


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure)
