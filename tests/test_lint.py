"""ruff and mypy have nothing to say; the check of a change runs both (make lint)."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.source_tree import ROOT

# What a user may write; mypy finds fault with the lines that say so, in these words.
USER = """\
from collections.abc import Generator
from typing import assert_type
import jax
import jaxlm
from jaxlm.rewards import Reward
b = jaxlm.load("tiny", dtype="own")
warm = jaxlm.Temperature(0.8)
assert_type(jaxlm.generate(b, "Q:", sampler=warm, cache="kivi2", stop="A:"), jaxlm.Generation)
assert_type(jaxlm.generate(b, [1, 2], cache=jaxlm.Squat(), stop_ids=[3]), jaxlm.Generation)
assert_type(jaxlm.generate(b, ["Q:", [1]], key=jax.random.key(0)), list[jaxlm.Generation])
assert_type(jaxlm.stream(b, "Q:", chunk=4), Generator[str, None, jaxlm.Generation])
assert_type([text for texts in jaxlm.stream(b, ["Q:"]) for text in texts], list[str])
assert_type(jaxlm.score(b, "Q:").perplexity, float)
assert_type(jaxlm.perplexity(jaxlm.score(b, ["Q:"], window=8)), float)
assert_type(jaxlm.contrast(b, b, "Q:", sampler=jaxlm.Mirostat2()), jaxlm.Generation)
def search(reward: Reward, texts: list[str]) -> None:
    assert_type(jaxlm.particle_filter(b, "Q:", reward, particles=4, tau=0.5).text, str)
    assert_type([found.text for found in jaxlm.beam_search(b, texts, reward, width=2)], list[str])
    assert_type(jaxlm.particle_gibbs(b, "Q:", reward, sweeps=2).swapped, float)
    jaxlm.dvts(b, texts, reward, particles=4)  # Unexpected keyword argument "particles"
    jaxlm.particle_filter(b, texts, "reward")  # No overload variant of "particle_filter"
assert_type(jaxlm.decode.DecodeState, type[jaxlm.DecodeState])
jaxlm.loda("tiny")  # Module has no attribute "loda"
jaxlm.load(3)  # Argument 1 to "load" has incompatible type "int"
jaxlm.load("tiny", foo=1)  # Unexpected keyword argument "foo" for "load"
jaxlm.generate(b, 5)  # No overload variant of "generate" matches
jaxlm.generate(b, "Q:", max_new_tokens="many")  # No overload variant of "generate" matches
jaxlm.generate(b, "Q:", nonsense=3)  # Unexpected keyword argument "nonsense"
jaxlm.generate(b, ["Q:"]).text  # "list[Generation]" has no attribute "text"
jaxlm.stream(b, "Q:", sampler="greedy")  # No overload variant of "stream" matches
jaxlm.score(b, "Q:")[0]  # Value of type "Score" is not indexable
"""


def complaints(tool: str, *arguments: str) -> str:
    """What a tool prints when it fails; empty when it is content."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"no {tool}: make test installs it")
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_ruff():
    assert not complaints("ruff", "check", "--no-cache", "--quiet", ".")


def test_ruff_notices(tmp_path):
    (tmp_path / "x.py").write_text("import os\n")
    assert "F401" in complaints("ruff", "check", "--no-cache", str(tmp_path))


def test_the_check_of_a_change_type_checks():
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "mypy" in lint and "ruff check" in lint
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_mypy():
    assert not complaints("mypy")


@pytest.mark.slow
def test_mypy_knows_the_public_names(tmp_path):
    user = tmp_path / "user.py"
    user.write_text(USER)
    said: dict[int, str] = {}
    for line, words in re.findall(r"user\.py:(\d+): error: (.*)", complaints("mypy", str(user))):
        said[int(line)] = said.get(int(line), "") + words
    lines = enumerate(USER.splitlines(), 1)
    faults = {number: line.split("  # ")[1] for number, line in lines if "  # " in line}
    assert said.keys() == faults.keys(), said
    assert not {number: said[number] for number, words in faults.items()
                if words not in said[number]}
