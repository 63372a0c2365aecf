"""Answers: found, compared, gathered; the judge's process may hang or die without harm."""

import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.rewards import answers
from jaxlm.rewards.answers import Judge, boxed, classes, extract, last_number, number, same


@pytest.mark.parametrize(("text", "found"), [
    (r"\boxed{5}", "5"), (r"a \boxed{1} b \boxed{ 2 }", "2"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"), (r"\fbox {7}", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{1} then \boxed{2", "1"),
    (r"\boxed{3", None), ("none", None), (r"\boxed{\left\} x}", r"\left\} x"),
])
def test_boxed(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(("text", "how", "found"), [
    ("5 + 5\n#### 10", "auto", "10"), (r"#### 3 and \boxed{4}", "auto", "4"),
    ("so it is 1,234.50.", "auto", "1234.50"), ("nothing", "auto", None),
    ("#### ", "####", None), ("#### 1\n#### 2\nx", "####", "2"),
    ("1+1=2\nA:2\n", r"(?m)^A:([0-9]+)$", "2"), ("x=3 x=4", "x=.", "x=4"), ("", "a", None),
    ("The answer is 1/2", "auto", "1/2"), ("x=5-3", "auto", "3"), ("x = -3.", "auto", "-3"),
    ("so 5 - -3", "auto", "-3"), ("2 1/2 hours", "auto", "2 1/2"), ("f(x)-3", "auto", "3"),
    (r"is $2 \frac{1}{2}$.", "auto", r"2 \frac{1}{2}"), (r"is $-\frac{1}{2}$", "auto",
    r"-\frac{1}{2}"), ("on 11/26/2026", "auto", "2026"), ("3/4.5", "auto", "4.5"),
    ("0.5/2", "auto", "0.5/2"), ("1,200/7 of it", "auto", "1200/7"), ("$5/hour", "auto", "5"),
])
def test_extract(text, how, found):
    assert extract(text, how) == found


def test_an_expression_that_does_not_compile_is_named():
    with pytest.raises(ConfigError, match="regular expression"):
        extract("x", "(")


@pytest.mark.parametrize(("one", "other", "equal"), [
    ("2", "2.0", True), (r"\frac{1}{2}", "0.5", True), (r"-\dfrac{2}{4}", "-1/2", True),
    ("1,000", "1000", True), ("$ 7. $", "7", True), ("(1,2)", "(1, 2)", True), ("1,2", "12", False),
    ("(100,200)", "(100200)", False),
    ("3", "4", False), ("x", "y", False), ("1/0", "1/0", True), ("1/0", "2/0", False),
    ("", "0", False), ("1e3", "1000", False), ("9" * 80, "9" * 80 + ".0", False),
    (r"\$18", "18", True), (r"18\text{ dollars}", "18", True), (r"18\%", "18", True),
    (r"\$1,800.00", "1800", True), (r"1,800 \text{ m}^2.", "1800", True), ("18%", r"18\%", True),
    (r"\frac{1}{2}\mathrm{~cm}", "0.5", True), (r"18\text{ dollars}", "19", False),
    (r"3\text{ p.m.}", r"3\text{ a.m.}", False), (r"18\%", "0.18", False),
    (r"\text{Ann}", r"\text{Bob}", False), (r"2\text{ or }3", "2", False),
    ("2x", "2", False), ("1 2", "12", False), ("1 1/2", "11/2", False), ("1 1/2", "1.5", True),
    (r"1\frac{1}{2}", r"\frac{11}{2}", False), (r"2\frac{3}{4}", "23/4", False),
    (r"2\frac{3}{4}", "2.75", True), (r"-1\ \dfrac{1}{2}", "-3/2", True), ("3 5/4", "17/4", False),
    (r"1\frac{1}{2}\text{ hours}", "1.5", True), (r"\frac{1}{2} 3", "1/23", False),
    (r"\frac{1}{2}\frac{3}{4}", "1/23/4", False), (r"3^\frac{1}{2}", "3^1/2", False),
    (r"x2\frac{1}{2}", "x5/2", False), (r"(1\frac{1}{2}, 2)", "(3/2,2)", True),
    (r"(\frac{3}{5},2\frac{2}{3}]", "(3/5, 2 2/3]", True), (r"1,200\frac{1}{2}", "1,401/2", False),
    (r"10\,000", "10000", True), (r"11,\! 111,\! 100", "11111100", True), (r"1\,2", "12", False),
    ("100, 200", "100200", False), ("100, 200", "100,200", False), ("1 .5", "1.5", False),
    ("3 - 5", "3-5", True), (" $ 4 $ . ", "4", True), (r"\frac{1}{2}x", r"\frac{1}{2} x", True),
])
def test_same(one, other, equal):
    assert same(one, other) is equal and same(other, one) is equal


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_taken(one, other):
    assert same(one, one) and same(one, other) == same(other, one)
    for how in ("auto", "boxed", "####", "number"):
        assert extract(one, how) is None or isinstance(extract(one, how), str)


@given(st.integers(-10**9, 10**9), st.integers(1, 10**6))
def test_numbers_are_exact(top, bottom):
    assert number(f"{top}/{bottom}") == Fraction(top, bottom)
    assert last_number(f"it is {top:,} here") == str(top)


def test_what_would_take_for_ever_is_no_number():
    began = time.perf_counter()
    assert number("9" * 5000) is None and number("1e999999999") is None
    boxed("\\boxed{" * 500)
    assert time.perf_counter() - began < 2


def test_classes_join_what_is_equal():
    assert classes(["1/2", "x", None, "0.5", "y", "x "]).tolist() == [0, 1, -1, 0, 2, 1]
    calls = []

    def equal(a, b):
        calls.append((a, b))
        return a.lower() == b.lower()

    assert classes(["a", "A", "b", "A"], equal).tolist() == [0, 0, 1, 0]
    assert calls == [("a", "A"), ("a", "b")]  # a text met before is not compared again


FAKE = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["answer"] == "hang": time.sleep(60)
    if asked["answer"] == "die": sys.exit(1)
    print(json.dumps({"same": asked["answer"] == "yes"}), flush=True)
"""


def test_a_judge_that_hangs_or_dies_is_started_anew():
    with Judge(timeout=0.5, command=[sys.executable, "-c", FAKE]) as judge:
        assert judge("gold", "yes") is True and judge("gold", "no") is False
        first = judge._process
        assert judge("gold", "hang") is None and judge.timeouts == 1 and first.poll() is not None
        judge.timeout = 30  # a busy machine starts slowly
        assert judge("gold", "yes") and judge("gold", "die") is None and judge("gold", "yes")
        last = judge._process
    assert last.poll() is not None


def test_a_judge_that_does_not_start_says_so():
    with pytest.raises(ConfigError, match="did not start"):
        Judge(command=[sys.executable, "-c", "pass"])("1", "x")


SLOW = """
import time
seen = []
def parse(text, parsing_timeout): return text
def verify(gold, answer, timeout_seconds):
    seen.append(answer)
    time.sleep(4 if len(seen) == 1 else 0)
    return "yes" in answer
"""


def test_the_first_comparison_of_a_process_has_the_time_of_its_start(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Path(answers.__file__).with_name("math_worker.py")
    with Judge(timeout=2, command=[sys.executable, "-P", str(worker)]) as judge:
        assert judge("gold", "yes") is True and judge("gold", "no") is False
    assert judge.timeouts == 0


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        Judge()


@pytest.mark.slow
def test_math_verify_itself():
    pytest.importorskip("math_verify")
    with Judge(timeout=60) as judge:
        assert judge(r"\sqrt{12}", r"2\sqrt{3}") and judge("x+1", "1+x")
        assert not judge(r"\sqrt{12}", r"3\sqrt{2}") and not judge("5", "no answer")
        assert judge(r"\frac{1}{2}", "0.5") and judge.timeouts == 0
