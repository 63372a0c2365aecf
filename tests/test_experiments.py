"""Every script under experiments/ follows the contract, and the contract's own parts work."""

import argparse
import ast
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import _harness, bench_decode, device_suite, report
from tests.source_tree import ROOT

# They measure nothing.
TOOLS = {"__init__.py", "_harness.py", "report.py", "get_data.py", "readme_tables.py"}
LIBRARY = re.compile(r"^if __name__ == ", re.M)  # without it, a module that scripts share
SCRIPTS = [
    path
    for path in sorted((ROOT / "experiments").glob("*.py"))
    if path.name not in TOOLS and LIBRARY.search(path.read_text())
]
# The contract is 60 s on 2 cores. Processor time does not depend on how busy the machine is: a run
# of more than both cores' 60 s cannot keep it.
SMOKE_LIMIT_S, CORES, PATIENCE_S = 60, 2, 1200
CHEAP = ("bench_samplers", "kv_capacity")  # run in the default tests


def script(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True, text=True, env=environment, timeout=PATIENCE_S, cwd=ROOT,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_header_says_how_to_run_it(path):
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    missing = [
        word for word in ("Command", "Hardware", "Minutes", "Expected")
        if not re.search(rf"^{word}: \S", header, re.M)
    ]
    assert not missing, f"{path.name}: its docstring lacks lines {missing}"
    for out in re.findall(r"--out\s+(experiments/\S+)", header):
        assert re.fullmatch(rf"experiments/results/{path.stem}/\w+\.json", out), out


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_has_the_contract_s_arguments(path):
    done = script(path, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(flag in done.stdout for flag in ("--smoke", "--out", "--seed", "--data"))


def processor_seconds() -> float:
    """Of this process's children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=() if path.stem in CHEAP else pytest.mark.slow)
    for path in SCRIPTS])
def test_smoke_run_writes_the_contract_s_json(path, tmp_path):
    out = tmp_path / "result.json"
    before = processor_seconds()
    done = script(path, "--smoke", "--out", str(out))
    spent = processor_seconds() - before
    assert done.returncode == 0, done.stderr[-2000:]
    assert spent < SMOKE_LIMIT_S * CORES, f"{spent:.0f} s of processor time"
    result = json.loads(out.read_text())
    assert set(result) == set(_harness.FIELDS)
    assert result["name"] == path.stem and result["smoke"] is True and result["metrics"]


@pytest.mark.parametrize("path", sorted(_harness.RESULTS.rglob("*.json")),
                         ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_results(path):
    result = json.loads(path.read_text())
    name = result["name"]
    assert result["smoke"] is False
    assert path.parent.name == name and path.stem.startswith(result["device"])
    assert set(result) == set(_harness.FIELDS)
    assert result["metrics"] and re.fullmatch(r"[0-9a-f]{64}", result["sources"])
    words = shlex.split(result["command"])
    assert words[:2] == ["python", f"experiments/{name}.py"]
    own = str(path.relative_to(ROOT))
    assert words[words.index("--out") + 1] == own


def test_sources_follow_what_a_result_depends_on(tmp_path, monkeypatch):
    for name in ("jaxlm/a.py", "pallas_kernels/b.py", "experiments/one.py", "experiments/two.py",
                 "experiments/other.py", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import experiments.two\n" if "one" in name else "")
    monkeypatch.setattr(_harness, "ROOT", tmp_path)
    script = tmp_path / "experiments" / "one.py"
    seen = [_harness.sources(script)]
    for name, counts in (("jaxlm/a.py", True), ("experiments/two.py", True),
                         ("pallas_kernels/b.py", True), ("experiments/one.py", True),
                         ("experiments/other.py", False), ("tests/test_a.py", False)):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "x = 1\n")
        seen.append(_harness.sources(script))
        assert (seen[-1] != seen[-2]) is counts, name


def test_origin_without_git(monkeypatch):
    def absent(*arguments):
        raise OSError("no git")

    monkeypatch.setattr(_harness, "_git", absent)
    monkeypatch.setenv("JAXLM_COMMIT", "c0ffee")
    made = _harness.origin(ROOT / "experiments" / "parity.py")
    assert made["commit"] == "c0ffee" and made["dirty"] is None and len(made["sources"]) == 64


def run(tmp_path: Path, metrics: dict, *arguments: str) -> dict:
    return _harness.run("experiments/example.py", "doc", lambda args: metrics, argv=[*arguments])


def test_run_writes_what_was_measured(tmp_path):
    out = tmp_path / "deep" / "x.json"
    metrics = {"a": np.float32(0.5), "b": {"c": np.arange(2)}, "d": [1, None, True, "s"]}
    result = run(tmp_path, metrics, "--out", str(out), "--seed", "3")
    assert result == json.loads(out.read_text())
    assert result["metrics"] == {"a": 0.5, "b": {"c": [0, 1]}, "d": [1, None, True, "s"]}
    assert result["name"] == "example" and result["seed"] == 3 and result["device"] == "cpu"
    assert result["command"] == f"python experiments/example.py --out {out} --seed 3"
    assert [path.name for path in out.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("value", [float("nan"), np.inf, np.array([1.0, np.nan])])
def test_a_number_that_is_none_is_refused(tmp_path, value):
    out = tmp_path / "x.json"
    with pytest.raises(ValueError, match="finite"):
        run(tmp_path, {"loss": value}, "--out", str(out))
    assert not out.exists()


def test_smoke_is_refused_among_the_results(tmp_path):
    def never(args):
        raise AssertionError("measured")

    out = _harness.RESULTS / "example" / "cpu.json"
    with pytest.raises(SystemExit, match="smoke"):
        _harness.run("example.py", "doc", never, argv=["--smoke", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("where", ["", "file/x.json"], ids=["a folder", "under a file"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a folder|cannot be written"):
        _harness.run("example.py", "doc", lambda args: pytest.fail("measured"),
                     argv=["--out", str(tmp_path / where)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_that_could_not_be_written_after_all_is_printed(tmp_path, capsys):
    out = tmp_path / "x.json"
    with pytest.raises(OSError):
        _harness.run("experiments/example.py", "doc", lambda args: out.mkdir() or {"lost": 0.25},
                     argv=["--out", str(out)])
    assert json.loads(capsys.readouterr().out)["metrics"] == {"lost": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_of_more_than_ten_minutes_goes_on(path):
    text = path.read_text()
    said = re.search(r"^Minutes:(.*?)^Expected:", text, re.M | re.S)
    minutes = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", said[1])]
    if minutes[0] > 10 or "hours" in said[1]:
        assert re.search(r"go(es)?\s+on|resume", text), "the header does not say that it goes on"
        assert re.search(r"Resumable|parts_of|\.cells|fit\(|checkpoint", text)


def test_parts_are_kept_beside_the_result_until_it_is_done(tmp_path):
    args = argparse.Namespace(out=tmp_path / "cpu.json", smoke=False, seed=0)
    script = str(SCRIPTS[0])
    first = _harness.parts_of(args, script, length=3)
    assert first("a", lambda: 1) == 1
    again = _harness.parts_of(args, script, length=3)
    assert again("a", lambda: pytest.fail("computed again")) == 1
    with pytest.raises(ValueError, match="was made with"):
        _harness.parts_of(args, script, length=4)
    args.smoke = True
    assert _harness.parts_of(args, script, length=4)("a", lambda: 2) == 2
    again.done()
    assert not list(tmp_path.iterdir())


def test_resumable_goes_on_and_refuses_other_settings(tmp_path):
    path, calls = tmp_path / "parts.json", []

    def part(value):
        calls.append(value)
        return {"value": np.float64(value)}

    first = _harness.Resumable(path, {"seed": 0})
    assert first("a", lambda: part(1)) == {"value": 1.0}
    again = _harness.Resumable(path, {"seed": 0})
    assert again("a", lambda: part(2)) == {"value": 1.0}
    assert again("b", lambda: part(3)) == {"value": 3.0}
    assert calls == [1, 3]
    with pytest.raises(ValueError, match="seed"):
        _harness.Resumable(path, {"seed": 1})
    again.done()
    assert not path.exists()


def test_paired_ratio_finds_the_faster():
    found = _harness.paired_ratio(lambda: time.sleep(0.03), lambda: time.sleep(0.01))
    assert 1.5 < found["ratio"] < 6 and found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert 0.03 <= _harness.median_seconds(lambda: time.sleep(0.03)) < 0.3


def test_bench_decode_names_the_models_it_leaves_out(tmp_path, capsys):
    found, left_out = bench_decode.model_folders(argparse.Namespace(data=tmp_path))
    assert [folder.name for folder in found] == ["tiny"] and left_out == list(bench_decode.MODELS)
    assert "stories260K" in capsys.readouterr().err


def test_device_labels():
    kinds = {"NVIDIA H200": "h200", "NVIDIA L4": "l4", "TPU v6 lite": "v6e", "TPU v4": "v4",
             "NVIDIA H100 80GB HBM3": "h100", "Some Card": "some-card"}
    assert {kind: _harness.label(kind) for kind in kinds} == kinds


def test_suite_reports_failures_and_what_did_not_fit(tmp_path, monkeypatch):
    def broken(args):
        raise RuntimeError("no kernel")

    parts = [
        device_suite.Part("good", lambda args: {"x": 1}, 0),
        device_suite.Part("broken", broken, 0),
        device_suite.Part("long", lambda args: {"x": 2}, 1000),
    ]
    monkeypatch.setattr(device_suite, "PARTS", parts)
    args = argparse.Namespace(smoke=True, seed=0, out=tmp_path / "x.json", budget=10)
    found = device_suite.measure(args)
    assert found["good"] == {"x": 1} and "no kernel" in found["broken"]["failed"]
    assert "not_run" in found["long"]
    args.budget = 2000
    monkeypatch.setattr(device_suite, "PARTS", [parts[0], parts[2]])
    assert device_suite.measure(args) == {"good": {"x": 1}, "long": {"x": 2}}
    assert not list(tmp_path.iterdir())


def test_report_holds_everything_and_needs_nothing(tmp_path):
    folder = tmp_path / "results" / "bench"
    folder.mkdir(parents=True)
    values = ["bench", "python x <y>", "cpu", False, {}, 0, "c0ffee", True, "0" * 64]
    metrics = {"speed": 2.5, "rows": [{"n": 1, "t": 0.25}, {"n": 2}]}
    result = dict(zip(_harness.FIELDS, [*values, metrics], strict=True))
    (folder / "cpu.json").write_text(json.dumps(result))
    (folder / "cpu_speed.png").write_bytes(b"\x89PNG data")
    out = tmp_path / "report.html"
    report.main(["--results", str(tmp_path / "results"), "--out", str(out)])
    text = out.read_text()
    for part in ("bench", "python x &lt;y&gt;", "2.5", "0.25", "c0ffee and changes",
                 "data:image/png;base64,"):
        assert part in text
    assert "http://" not in text and "https://" not in text and 'src="data:' in text


def test_report_refuses_what_is_no_result(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="metrics"):
        report.load(tmp_path)
