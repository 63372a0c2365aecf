"""Final answers: taken out of a text, compared, and gathered into classes.

`same` needs nothing beyond Python: texts alike after normalisation, or equal as exact numbers.
`Judge` asks math-verify (the extra `eval`) where that does not suffice, in a process of its own
that is killed when it takes too long: symbolic algebra on a model's text can run for ever.
"""

import importlib.util
import json
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import ConfigError

Same = Callable[[str, str], bool | None]  # None: it could not be told, which counts as different
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_LATEX = r"\\[dt]?frac\{[0-9]{1,60}\}\{[0-9]{1,60}\}"
_NUMBER = re.compile(  # a minus behind a digit, a letter or a bracket is no sign
    rf"(?:(?<![\w)}}\]])-)?(?:(?:{_DIGITS} ?)?{_LATEX}|{_DIGITS} [0-9]+/[0-9]+(?!\.?[0-9])"
    rf"|(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+(?!\.?[0-9]))?)")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_PLAIN = re.compile(r"[-+]?[0-9]{0,60}(?:\.[0-9]{0,60})?(?:/[0-9]{1,60})?")
_ALONE = r"(?<![\w./^)}\]])"  # nothing stands before it that it would be multiplied with
_FRACTION = re.compile(  # nor behind it
    _ALONE + r"(-?)\\[dt]?frac\{(-?[0-9]{1,60})\}\{([0-9]{1,60})\}(?![\w.(^]|\\[dt]?frac)")
_MIXED = re.compile(  # nor a comma, where it could be of thousands
    _ALONE + r"(?!(?<=[0-9],)[0-9]{3}(?![0-9]))(-?)([0-9]{1,60})(?: ([0-9]{1,60})/([0-9]{1,60})"
    r"|\\[dt]?frac\{([0-9]{1,60})\}\{([0-9]{1,60})\})(?![\w./(^]|\\[dt]?frac)")
_NONE = re.compile(r"\\!\s*|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")  # of no width, or of thousands
_NOISE = re.compile(r"\\(?:left|right|[,;: ])|\\(?:text|mathrm|mbox)\{\s*\}|\\?\$|\s")
_GAP = re.compile(r"(?<![0-9.]) | (?![0-9.])")
_UNIT = re.compile(
    r"(?<=[0-9])(?:\\?%|\\(?:text|textrm|mathrm|mbox)\{~*[a-zA-Z][^{}]*\}(?:\^\{?[23]\}?)?)$")


def boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}` or `\fbox{...}`, nested braces and all.

    >>> boxed(r"so \boxed{\frac{1}{2}}, or \boxed{3")
    '\\frac{1}{2}'
    """
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, skip = 1, False
        for at in range(found.end(), len(text)):
            letter = text[at]
            if skip or letter == "\\":
                skip = not skip
                continue
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return text[found.end():at].strip()
    return None


def after_mark(text: str, mark: str = "####") -> str | None:
    """The rest of the line after the last mark; None without one, or when nothing follows.

    >>> after_mark("3 + 4 = 7\\n#### 7")
    '7'
    """
    _, found, rest = text.rpartition(mark)
    return (rest.split("\n")[0].strip() or None) if found else None


def last_number(text: str) -> str | None:
    r"""The last number, fraction or mixed number, without its commas.

    >>> last_number("about 1,200 of 3,400.5 kg."), last_number("x = 5-3"), last_number("is 1 1/2.")
    ('3400.5', '3', '1 1/2')
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def extract(text: str, how: str = "auto") -> str | None:
    r"""The final answer of a worked solution; None where there is none.

    Args:
      how: 'boxed', '####', 'number', 'auto' (these in turn, the first that finds something), or a
        regular expression, whose last match counts: its group 1, or all of it.
    Raises: ConfigError for an expression that does not compile.

    >>> extract("1+1=2\nA:2\n", r"(?m)^A:(-?[0-9]+)$")
    '2'
    """
    known: dict[str, Callable[[str], str | None]] = {
        "boxed": boxed, "####": after_mark, "number": last_number}
    if how == "auto":
        return next((found for find in known.values() if (found := find(text))), None)
    if how in known:
        return known[how](text)
    try:
        matches = list(re.finditer(how, text))
    except re.error as error:
        raise ConfigError(f"answers are extracted by {how!r}, which is neither one of "
                          f"{['auto', *known]} nor a regular expression: {error}") from error
    if not matches:
        return None
    return matches[-1].group(1 if matches[-1].re.groups else 0)


def normal(answer: str) -> str:
    r"""An answer without what changes no meaning: spaces, dollars, also as `\$`, a final point,
    commas of thousands, `\left`; a fraction of two numbers as `a/b`, a mixed number too.

    A space between two numbers stays, for "1 2" is not 12.

    >>> normal(r"$ 1{,}234. $"), normal(r"\dfrac{3}{4}"), normal(r"1\frac{1}{2}"), normal("1 1/2")
    ('1234', '3/4', '3/2', '3/2')
    """
    spaced = " ".join(_NOISE.sub(" ", _NONE.sub("", answer)).rstrip(" .").split())
    spaced = spaced.replace("{,}", ",")
    text = _GAP.sub("", spaced)
    if _THOUSANDS.fullmatch(text):  # "100, 200" are two numbers
        return spaced if ", " in spaced else text.replace(",", "")
    if text.count("\\frac") > 8:
        return text
    return _FRACTION.sub(r"\1\2/\3", _MIXED.sub(improper, text))


def improper(found: re.Match[str]) -> str:
    """A mixed number as one fraction; what is none, for its fraction is above 1, as it is."""
    sign, ones, *parts = found.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    return f"{sign}{int(ones) * bottom + top}/{bottom}" if top < bottom else found[0]


def apart(answer: str) -> tuple[str, str]:
    r"""A normal answer, and the unit that stood behind its last digit: `%`, or words in `\text{}`.

    >>> apart(r"1,800\text{ dollars}"), apart(r"18\%"), apart(r"\text{Ann}")
    (('1800', 'text{dollars}'), ('18', '%'), ('\\text{Ann}', ''))
    """
    text = normal(answer)
    found = _UNIT.search(text)
    return (text, "") if found is None else (normal(text[: found.start()]), found[0].lstrip("\\"))


def number(answer: str) -> Fraction | None:
    """The exact value of a plain number or fraction, at most 60 digits a part; else None.

    >>> number("0.50") == number("1/2"), number("x")
    (True, None)
    """
    text = normal(answer)
    if not _PLAIN.fullmatch(text) or not re.search("[0-9]", text):
        return None
    top, _, bottom = text.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def same(one: str, other: str) -> bool:
    r"""Whether two answers are alike as normal text or as exact numbers; needs no math-verify.

    A unit that only one of them names is no difference.

    >>> same("0.5", r"\frac{1}{2}"), same("2", "3"), same(r"\$18", r"18\text{ dollars}")
    (True, False, True)
    """
    (left, unit), (right, others) = apart(one), apart(other)
    if unit and others and unit != others:
        return False
    if left == right:
        return True
    exact = number(left)
    return exact is not None and exact == number(right)


def classes(answers: Sequence[str | None], equal: Same = same) -> np.ndarray:
    """A class for every answer, int (P,): 0, 1, ... in order of appearance; -1 for None.

    An answer joins the first class whose first member it equals.

    >>> classes(["2", None, "2.0", "3"]).tolist()
    [0, -1, 0, 1]
    """
    first: list[str] = []
    seen: dict[str, int] = {}
    out = []
    for answer in answers:
        if answer is None:
            out.append(-1)
            continue
        key = normal(answer)
        if key not in seen:
            near = (i for i, member in enumerate(first) if equal(member, answer))
            seen[key] = next(near, len(first))
            if seen[key] == len(first):
                first.append(answer)
        out.append(seen[key])
    return np.array(out, int)


class Judge:
    """Equality by math-verify in a process of its own; a comparison that hangs is given up.

    Use it as `same`: `classes(answers, judge)`. What `same` can tell needs no process. A comparison
    that was given up is None, and counted by `timeouts`. Threads may share one.

    Args:
      timeout: seconds for one comparison, after which the process is killed and, for the next one,
        started anew. start_timeout: seconds for it to import math-verify and to compare once,
        for the first comparison takes longest.
      command: of the process; for tests.
    Raises: ConfigError when math-verify is not installed, or its process does not start.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    """

    def __init__(self, timeout: float = 5.0, start_timeout: float = 60.0,
                 command: Sequence[str] | None = None):
        """No process yet: it starts with the first comparison that needs it."""
        if not timeout > 0:
            raise ConfigError(f"timeout is {timeout}; expected seconds above 0")
        if command is None and importlib.util.find_spec("math_verify") is None:
            raise ConfigError("math-verify is not installed; pip install '.[eval]', or compare "
                              "answers by jaxlm.rewards.answers.same")
        worker = Path(__file__).with_name("math_worker.py")
        self.command = list(command or [sys.executable, "-P", str(worker)])
        self.timeout, self.start_timeout, self.timeouts = timeout, start_timeout, 0
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(self, gold: str, answer: str) -> bool | None:
        """Whether `answer` means what `gold` does; None when the comparison was given up."""
        if same(gold, answer):
            return True
        with self._lock:
            return self._ask({"gold": gold, "answer": answer})

    def _ask(self, question: dict[str, str]) -> bool | None:
        """One comparison; None when it was given up."""
        process = self._started()
        try:
            process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = self._line(process, self.timeout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.timeouts += 1
            self.close()
            return None
        return answer["same"]

    def _started(self) -> subprocess.Popen:
        """The process, started where there is none."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True)
            if self._line(self._process, self.start_timeout) != {"ready": True}:
                self.close()
                raise ConfigError(f"math-verify did not start within {self.start_timeout:g} s; "
                                  f"see what `{' '.join(self.command)}` says")
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen, timeout: float) -> dict[str, Any] | None:
        """The next line, or None after `timeout`, or when the process has died."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
