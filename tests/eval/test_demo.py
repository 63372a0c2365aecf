"""The demo's report: whole, self-contained, and true to what was measured."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.cli.demo import stages
from jaxlm.decode.generate import Generation
from jaxlm.eval import demo, demo_page, plots, report
from jaxlm.eval.arithmetic import Problem, check_steps
from jaxlm.eval.second_skill import Taught
from jaxlm.eval.skills import ArithmeticResult, Attempt, RecallResult, Share
from jaxlm.hf.bundle import BUNDLED

PROBLEM = Problem(("+", "-", "+"), ((37,), (16,), (5,)))
PNG = b"\x89PNG\r\n\x1a\n"


def attempt(text):
    """An answer to the problem, checked."""
    answer = Generation(PROBLEM.prompt, text, (), np.zeros(0), "stop")
    return Attempt(PROBLEM, answer, check_steps(PROBLEM, text))


def findings():
    """Made-up numbers."""
    shares = [Share(x, 0.01) for x in (0.91, 0.82, 0.73, 0.64, 0.55)]
    attempts = (attempt(PROBLEM.solution), attempt("37-16=20\n20+5=25\nA:25\n"))
    solved = [ArithmeticResult(level, *shares, attempts) for level in ("easy", "hard")]
    return demo.Findings(
        card={"model": "m<1>", "family": "llama", "parameters": 2_500_000, "layers": 8,
              "query heads": 4, "kv heads": 2, "head dim": 64, "context": 2048,
              "dtype": "float32", "kv bytes per token": 8192},
        plan=demo.Plan(problems=2), seed=0, arithmetic=solved,
        recall=[RecallResult(64, Share(0.5, 0.02)), RecallResult(128, Share(0.25, 0.02))],
        searches=[demo.SearchRow("greedy", Share(0.5, 0.1), 90.0)],
        caches=[demo.CacheRow("dense", 4000, 512, Share(0.875, 0.02), Share(0.25, 0.02)),
                demo.CacheRow("2 bits", 1000, 512, Share(0.75, 0.02), Share(0.125, 0.02))],
        speed=[(1, 10.0), (4, 30.0)],
        surprise=demo.Surprise(("Q", ":", "\n", "A"), -np.arange(4.0), 2),
        taught=[Taught("OSFT", (Share(0.97, 0.01), Share(0.43, 0.01)),
                       (Share(0.0, 0.01), Share(0.66, 0.01)))],
        device={"versions": {"jax": "1"}, "system": "s", "backend": "cpu"}, seconds=3.0,
    )


class Links(HTMLParser):
    """What a page loads from elsewhere, and its text."""

    def __init__(self):
        super().__init__()
        self.found, self.words = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_files_of_the_report():
    files = demo_page.files(findings())
    images = {name for name in files if name.endswith(".png")}
    assert images == {f"{name}{dark}.png" for dark in ("", "-dark")
                      for name in ("arithmetic", "recall", "speed", "surprise")}
    assert all(files[name].startswith(PNG) for name in images)
    assert list(files)[-1] == "index.html"  # last, so a page never shows what is not there
    links = Links()
    links.feed(files["index.html"])
    assert len(links.found) == len(images)
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"@import|url\(|<script|<link", files["index.html"])
    words = " ".join(links.words)
    for part in ("m<1>", "91 ± 1 %", "55 ± 1 %", "25 ± 2 %", "8,192 bytes", "2.50 million",
                 "2 bits", "1,000", "12 ± 2 %", "43 ± 1 %", "66 ± 1 %"):
        assert part in words, part
    stored = json.loads(files["demo.json"])
    assert stored["arithmetic"][1]["any_of"] == {"value": 0.64, "error": 0.01}
    assert stored["speed"] == [{"batch": 1, "tokens_per_s": 10.0},
                               {"batch": 4, "tokens_per_s": 30.0}]


def test_light_and_dark_differ():
    drawn = plots.plot(plots.line([1, 2], [3.0, 4.0], None, "x", "y"), "title")
    assert drawn.light != drawn.dark


@pytest.mark.parametrize(("text", "marks", "expected"), [
    (PROBLEM.solution, "✓✓✓", False),
    ("37-16=20\n20+5=25\nA:25\n", "✗✓✗", True),
    ("37-16=21\n21+5=26\nA:2", "✓✓✗", True),  # unfinished
    ("37-16=21\nA:26\n", "✓✓", False),
    ("nonsense", "✗", True),
])
def test_transcripts_mark_each_line(text, marks, expected):
    page = demo_page.transcript(attempt(text))
    assert "".join(re.findall("[✓✗]", page)) == marks
    assert (f"expected A:{PROBLEM.answer}" in page) == expected


def test_the_most_telling_answer_is_sound_and_hard():
    found = findings()
    assert demo.most_telling(found.arithmetic) is found.arithmetic[1].attempts[0]
    failed = [ArithmeticResult("easy", *[Share(0, 0)] * 5, (attempt("A:1\n"),))]
    assert demo.most_telling(failed) is failed[0].attempts[0]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    report.write_files(tmp_path, {"a.txt": "old"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        report.write_files(tmp_path, {"a.txt": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_html_is_escaped():
    page = report.page("<t>", report.table(["<h>"], [["<c>", 1234, 0.5]]))
    assert "<h>" not in page and "<c>" not in page and "<t>" not in page
    assert '<td class="n">1,234</td>' in page and '<td class="n">0.5</td>' in page


def test_stages_are_told_where_there_is_no_bar(capsys):
    class Bar:
        disable, told = True, []
        set_description = told.append

    stages(Bar)("scoring")
    assert re.fullmatch(r" +\d+ s: scoring\n", capsys.readouterr().err) and not Bar.told
    Bar.disable = False
    stages(Bar)("speed")
    assert Bar.told == ["speed"] and not capsys.readouterr().err


@pytest.mark.skipif(not (BUNDLED["tiny"] / "model.safetensors").exists(),
                    reason=f"the bundled model is not here: no weights in {BUNDLED['tiny']}")
def test_the_command(tmp_path, capsys):
    """`jaxlm demo --quick`, and its numbers against the model's own config."""
    out = tmp_path / "report"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    printed, told = capsys.readouterr()
    assert all(f" s: {name}\n" in told for name in ("arithmetic, easy", "a second skill"))
    assert re.search(r"^hard +\d", printed, re.M) and "tokens/s" in printed
    stored = json.loads((out / "demo.json").read_text())
    config = json.loads((BUNDLED["tiny"] / "config.json").read_text())
    per_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"]
    assert stored["card"]["kv bytes per token"] == per_token * config["head_dim"]
    assert [row["way"][:4] for row in stored["taught"]] == ["full", "OSFT"]
    assert [r["level"] for r in stored["arithmetic"]] == ["easy", "medium", "hard"]
    assert all(rate["tokens_per_s"] > 0 for rate in stored["speed"])
    dense, coded = stored["caches"]
    assert dense["length"] == coded["length"] == 64 and dense["bytes"] != coded["bytes"]
    assert dense["arithmetic"] == stored["arithmetic"][2]["greedy"]  # the long ones, that are coded
    assert {"index.html", "arithmetic.png"} <= {path.name for path in out.iterdir()}


def test_work_aside_gives_its_result_or_its_error():
    def fails():
        raise ValueError("why")

    assert demo.aside(lambda: 3).result() == 3
    with pytest.raises(ValueError, match="why"):
        demo.aside(fails).result()
