"""The contract of every experiment: the same arguments, the same JSON, results to trust.

A script's docstring has lines `Command:`, `Hardware:`, `Minutes:` and `Expected:`, and it ends in

    if __name__ == "__main__":
        run(__file__, __doc__, measure)

where `measure(args) -> dict` returns the metrics. `args.smoke` asks for a run of under 60 seconds
on 2 cores.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
FIELDS = ("name", "command", "device", "smoke", "versions", "seed", "commit", "dirty", "sources",
          "metrics")
PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def run(
    script: str,
    doc: str | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """Parse the arguments, measure, and write the result where `--out` says.

    Args:
      script: the script's `__file__`; its stem is the experiment's name.
      doc: the script's `__doc__`, shown by `--help`.
      measure: takes the arguments, returns the metrics: nested dicts and lists of numbers and text.
      add_arguments: adds the script's own arguments.
      argv: instead of the command line's.
    Returns: the result, as written.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser(doc)
    if add_arguments:
        add_arguments(arguments)
    args = arguments.parse_args(argv)
    check_out(args.out, args.smoke)
    command = shlex.join(["python", f"experiments/{Path(script).name}", *argv])
    made = origin(Path(script))  # before it is measured: sources may change meanwhile
    result = record(Path(script).stem, command, args, made, measure(args))
    try:
        if args.out:
            write_json(result, args.out)
    except OSError:  # what took hours is not lost with a full disk
        print(json.dumps(result, indent=1))
        raise
    if not args.out:
        print(json.dumps(result, indent=1))
    return result


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The four arguments that every script has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="under 60 s on 2 cores, not a result")
    made.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--data", type=Path, default=default_data(), help="folder of the data sets")
    return made


def default_data() -> Path:
    """`JAXLM_DATA`, or the folder shared/data beside the checkout."""
    return Path(os.environ.get("JAXLM_DATA", ROOT.parent / "shared" / "data")).expanduser()


def check_out(out: Path | None, smoke: bool) -> None:
    """Refuse, before anything is measured, a smoke run among the results, and a file that could
    not be written when all is measured."""
    if smoke and out and out.resolve().is_relative_to(RESULTS):
        raise SystemExit(f"--smoke measures nothing: {out} is under {RESULTS}; write it elsewhere")
    if out is None:
        return
    if out.is_dir():
        raise SystemExit(f"--out {out} is a folder; expected a file, such as {out / 'cpu.json'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error}; choose another") from error


def record(
    name: str, command: str, args: argparse.Namespace, made: dict[str, Any], metrics: dict
) -> dict[str, Any]:
    """The result in the contract's form; `made` as `origin` gives it."""
    known = {"name": name, "command": command, "device": device(), "smoke": args.smoke,
             "versions": versions(), "seed": args.seed, "metrics": plain(metrics), **made}
    return {field: known[field] for field in FIELDS}


def device() -> str:
    """What jax computes on, as the result's file is called: cpu, h200, a100, t4, v5e, ..."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else label(jax.devices()[0].device_kind)


def label(device_kind: str) -> str:
    """The short name of a device kind.

    >>> label("NVIDIA A100-SXM4-40GB"), label("Tesla T4"), label("TPU v5 lite")
    ('a100', 't4', 'v5e')
    """
    kind = device_kind.lower().replace(" lite", "e")
    known = re.search(r"\b(?:[hablt]|gb|gh|v)\d+[a-z]?\b", kind)
    return known.group() if known else re.sub(r"\W+", "-", kind)


def versions() -> dict[str, str]:
    """Python, the packages that are installed, and the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def origin(script: Path) -> dict[str, Any]:
    """What a result was made from: three fields that nobody edits afterwards.

    `commit`, of which a rebase makes another (`JAXLM_COMMIT` where there is no git); `dirty`, that
    tracked files differed from it (None: unknown); `sources`, which survives a rebase. In a result
    only `command` may be edited, to take folders of one machine out (docs/experiments.md).
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        dirty: bool | None = bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        head, dirty = os.environ.get("JAXLM_COMMIT", "unknown"), None
    return {"commit": head, "dirty": dirty, "sources": sources(script)}


def sources(script: Path) -> str:
    """sha256 over the names and the bytes of the Python files that a script's result depends on:
    itself, the experiments that it imports, and all of jaxlm and pallas_kernels."""
    files = {*(ROOT / "jaxlm").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")}
    waiting = [script.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in files and path.exists():
            files.add(path)
            waiting += [ROOT / "experiments" / f"{name}.py" for name in _experiments(path)]
    digest = hashlib.sha256()
    names = {str(p.relative_to(ROOT) if p.is_relative_to(ROOT) else p.name): p for p in files}
    for name in sorted(names):
        digest.update(f"{name} {hashlib.sha256(names[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _experiments(path: Path) -> set[str]:
    """The modules of `experiments` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names
                      if alias.name.startswith("experiments.")}
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def plain(value: Any) -> Any:
    """Numbers and arrays as JSON has them; a NaN or an infinity is an error, not a result."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    if hasattr(value, "tolist"):  # numpy and jax, scalars included
        return plain(value.tolist())
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"metrics hold {number}; expected finite numbers: mend the measurement")
    return number


def write_json(value: Any, out: Path) -> None:
    """Write under a temporary name, then rename: never half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


class Resumable:
    """Finished parts of a long run, kept as JSON, so that a stopped run goes on where it was.

    `settings` says what the parts depend on; a file made with others is an error.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "parts.json"
    >>> Resumable(path, {"seed": 0})("two", lambda: 1 + 1)
    2
    >>> Resumable(path, {"seed": 0})("two", lambda: 1 / 0)  # stored, not computed again
    2
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Open the file if it is there."""
        self.path, self.settings, self.parts = Path(path), plain(settings), {}
        if not self.path.exists():
            return
        stored = json.loads(self.path.read_text())
        if stored["settings"] != self.settings:
            raise ValueError(
                f"{path} was made with {stored['settings']}, this run has {self.settings}: "
                "delete it, or name another file"
            )
        self.parts = stored["parts"]

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """The part's value, computed now unless it is stored."""
        if key not in self.parts:
            self.parts[key] = plain(compute())
            write_json({"settings": self.settings, "parts": self.parts}, self.path)
        return self.parts[key]

    def done(self) -> None:
        """Remove the file, once the result is written."""
        self.path.unlink(missing_ok=True)


def parts_of(args: argparse.Namespace, script: str, **settings: Any) -> Resumable:
    """Finished parts beside `--out`, hidden, until `done`; of a smoke run, or without `--out`, they
    are not kept. They depend on the sources, the versions, the seed and `settings`."""
    kept = args.out and not args.smoke
    folder = args.out.parent if kept else Path(tempfile.mkdtemp())
    name = f".{args.out.stem}.parts.json" if kept else "parts.json"
    return Resumable(folder / name, {"versions": versions(), "sources": sources(Path(script)),
                                     "seed": args.seed, **settings})


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """The wall time of one call, the device's work included."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def median_seconds(function: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
    """The median wall time of a call, after one that warms up."""
    seconds(function, *args)
    return statistics.median(seconds(function, *args) for _ in range(repeats))


def paired_ratio(
    slow: Callable[[], Any], fast: Callable[[], Any], repeats: int = 5
) -> dict[str, float]:
    """How many times faster `fast` is than `slow`, timed in turn: a busy machine hits both.

    Returns: the median of the pairs' ratios, the lowest and highest, and both medians in seconds.
    """
    seconds(slow), seconds(fast)
    pairs = [(seconds(slow), seconds(fast)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "slow_s": statistics.median(a for a, _ in pairs),
        "fast_s": statistics.median(b for _, b in pairs),
    }
