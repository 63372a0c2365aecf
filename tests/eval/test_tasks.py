"""Problems from JSON lines: every kind of field, and lines that are wrong."""

import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.eval import tasks
from jaxlm.eval.tasks import held_out, open_data, read


def write(path, *records):
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n"
                            for r in records))
    return path


def test_each_kind_of_line(tmp_path):
    sums = write(tmp_path / "a.jsonl", {"prompt": "Q:1+1=\n", "answer": 2, "id": "one"})
    found = read(sums)
    assert found.task == "arithmetic" and found.problems[0] == tasks.Problem("one", "Q:1+1=\n", "2")
    math = read(write(tmp_path / "m.jsonl", {"problem": "What?", "solution": r"so \boxed{\frac12}",
                                             "unique_id": "x/1"}))
    assert math.task == "math" and math.problems[0].gold == r"\frac12"
    assert math.problems[0].id == "x/1" and "\\boxed{}" in math.problems[0].prompt
    gsm = read(write(tmp_path / "g.jsonl", {"question": "How many?", "answer": "2+2\n#### 1,234"}))
    assert gsm.task == "gsm8k" and gsm.problems[0].gold == "1,234" and gsm.problems[0].id == "1"


def test_wrong_lines_are_reported_with_their_numbers_and_the_others_go_on(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "answer": "1"}, "{broken", "[1]", "",
                 {"prompt": 3}, {"prompt": "b", "answer": [1]}, {"prompt": "c"},
                 {"prompt": "d", "answer": "2", "id": "1"})
    found = read(path)
    assert [p.prompt for p in found.problems] == ["a", "c"] and found.problems[1].gold is None
    assert [line for line, _ in found.wrong] == [2, 3, 5, 6, 8]
    assert "came before" in found.wrong[-1][1]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_a_report_or_an_error(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("bytes") / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match="no problem"):
        read(path)
    path.write_bytes(b"\n".join([*(line.replace(b"\n", b"") for line in lines),
                                 b'{"prompt": "fine"}']))
    assert read(path).problems[-1].prompt == "fine"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="gsm8k"):
        read(write(tmp_path / "a.jsonl", {"prompt": "x"}), task="sums")
    with pytest.raises(ConfigError, match="line 1"):
        read(write(tmp_path / "b.jsonl", {"text": "x"}))


def test_a_level_is_a_source_and_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = open_data("hard", limit=3, seed=1)
    assert found == held_out("hard", 3, 1) and found != held_out("hard", 3, 2)
    assert held_out("hard", 5, 1).problems[:3] == found.problems
    monkeypatch.delenv("JAXLM_DATA", raising=False)
    with pytest.raises(ConfigError, match="JAXLM_DATA"):
        open_data("math500")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_1_is_refused(tmp_path, limit):
    for source in ("easy", write(tmp_path / "x.jsonl", {"prompt": "a"})):
        with pytest.raises(ConfigError, match=f"limit is {limit}"):
            open_data(source, limit=limit)


def test_public_sets(tmp_path, monkeypatch):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    line = json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"})
    (folder / "test.jsonl.xz").write_bytes(lzma.compress(f"{line}\n".encode()))
    monkeypatch.setenv("JAXLM_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path / "gsm8k")
    assert open_data("gsm8k").problems[0].gold == "2"


def test_the_public_sets_themselves(data_dir, monkeypatch):
    monkeypatch.setenv("JAXLM_DATA", str(data_dir))
    for name, count in (("math500", 500), ("gsm8k", 1319)):
        found = open_data(name)
        assert len(found.problems) == count and not found.wrong
        assert all(problem.gold for problem in found.problems)
