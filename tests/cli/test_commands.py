"""info, generate and score: what they print is what the library computes; bad input is one line."""

import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli import COMMANDS, clock, main, options
from jaxlm.cli.fit import open_config
from jaxlm.hf.bundle import BUNDLED
from tests.source_tree import ROOT
from tests.tiny import write_folder

PROMPT = "Q:12+34=\n"
WIDTH = 24  # new tokens everywhere, so that one compiled program serves


@pytest.fixture(scope="module")
def tiny():
    if not (BUNDLED["tiny"] / "model.safetensors").exists():
        pytest.skip(f"the bundled model is not here: no weights in {BUNDLED['tiny']}")
    return jaxlm.load("tiny")


def outcome(capsys, *argv):
    """(exit code, stdout, stderr) of one command, run in this process."""
    code = main(argv)
    return code, *capsys.readouterr()


PLATFORMS = os.environ.get("JAX_PLATFORMS", "")


def process(*argv, platforms=PLATFORMS, **options):
    """One command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platforms}
    return subprocess.run([sys.executable, "-m", "jaxlm", *argv], env=environment, text=True,
                          capture_output=True, timeout=300, **options)


def refused(capsys, *argv):
    """The one line of a refusal."""
    code, out, err = outcome(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("jaxlm: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_usage_names_every_command(capsys):
    for argv in ((), ("--help",)):
        code, out, _ = outcome(capsys, *argv)
        assert code == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert not stopped.value.code and f"jaxlm {name}" in told


def test_info_is_the_device_report(capsys):
    code, out, _ = outcome(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["jax"] == jax.__version__
    assert len(found["devices"]) == jax.local_device_count()
    _, out, _ = outcome(capsys, "info")
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", out, re.M)


@pytest.mark.parametrize("argv, code", [(("generate", "tiny", "Q:1"), 2), (("info",), 0)])
def test_a_platform_asked_for_and_absent(argv, code):
    """In a process of its own, for jax settles this once; `info` says it beside the versions."""
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    ended = process(*argv, platforms="cuda")
    assert ended.returncode == code and "Traceback" not in ended.stderr
    told = ended.stdout if code == 0 else ended.stderr
    assert "jax has no device: JAX_PLATFORMS=cuda asks for what is not here" in told
    assert told.count("\n") == 1 or re.search(rf"^jaxlm +{jaxlm.__version__}$", told, re.M)


def test_info_advises_about_an_idle_accelerator(capsys, monkeypatch):
    monkeypatch.setattr("jaxlm.core.device.visible_accelerators", lambda: ["NVIDIA GPU"])
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    _, out, _ = outcome(capsys, "info")
    assert re.search(r"^advice: NVIDIA GPU is visible .*jax\[cuda12\]", out, re.M)
    monkeypatch.setattr("jaxlm.core.device.visible_accelerators", lambda: [])
    assert "advice" not in outcome(capsys, "info")[1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generate_prints_the_library_s_text(capsys, tiny, temperature):
    sampler = jaxlm.Temperature(temperature) if temperature else jaxlm.Greedy()
    expected = jaxlm.generate(
        tiny, PROMPT, max_new_tokens=WIDTH, sampler=sampler, key=jax.random.key(5)
    )
    for flag in ("--stream", "--no-stream"):
        code, out, err = outcome(
            capsys, "generate", "tiny", PROMPT, "--max-new-tokens", str(WIDTH), "--seed", "5",
            "--temperature", str(temperature), flag,
        )
        assert (code, out) == (0, expected.text + "\n")
        assert f"{len(expected.tokens)} tokens" in err
        ended = "ended by the model" if expected.finish == "stop" else "cut at --max-new-tokens"
        assert ended in err


@pytest.mark.parametrize("flags, included", [
    (("--max-new-tokens", "5"), "loading and compilation"),
    (("--max-new-tokens", "5", "--no-stream"), "prefill and compilation"),
    (("--max-new-tokens", str(WIDTH)), None),
])
def test_the_speed_is_always_told(capsys, tiny, flags, included):
    _, _, err = outcome(capsys, "generate", "tiny", PROMPT, *flags)
    rate = re.search(r", (\d+\.?\d*) tokens/s(.*);", err)
    assert rate and float(rate[1]) > 0, err
    assert rate[2] == (f", {included} included" if included else " after the first 8")


def test_the_first_text_is_timed_from_the_start(capsys, tiny, monkeypatch):
    told = lambda: float(re.search(r"first text (\d+\.\d+) s", outcome(
        capsys, "generate", "tiny", PROMPT, "--max-new-tokens", str(WIDTH))[2])[1])
    assert told() < 500  # this process is older than the command that it runs
    monkeypatch.setattr(clock, "start", lambda own: None)
    monkeypatch.setattr(clock, "_began", clock.began() - 1000)
    assert told() > 1000


def test_a_command_of_its_own_process_began_with_it():
    code = ("import time; time.sleep(0.5); from jaxlm.cli import clock; seen = {}\n"
            "for own in (True, False): clock.start(own); "
            "seen[own] = time.perf_counter() - clock.began()\n"
            "print(seen[True], seen[False], clock.process_age())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    own, other, age = map(float, done.stdout.split())
    assert 0.5 < own <= age + 0.05 and other < own


def test_generate_stops_at_strings(capsys, tiny):
    whole = jaxlm.generate(tiny, PROMPT, max_new_tokens=WIDTH).text
    assert "A:" in whole
    for flag in ("--stream", "--no-stream"):
        argv = ("generate", "tiny", PROMPT, "--max-new-tokens", str(WIDTH), flag,
                "--stop", "A:", "zz")
        code, out, err = outcome(capsys, *argv)
        assert (code, out) == (0, whole.split("A:")[0] + "\n") and "ended by a stop string" in err
        _, out, _ = outcome(capsys, *argv, "--include-stop")
        assert out == whole.split("A:")[0] + "A:\n"
        _, again, _ = outcome(capsys, *argv[:-3], "--stop", "A:", "--stop", "zz")
        assert again == whole.split("A:")[0] + "\n"


def test_stream_returns_what_generate_returns(tiny):
    def keep(run):
        answers.append((yield from run))

    answers: list = []
    pieces = list(keep(jaxlm.stream(tiny, PROMPT, max_new_tokens=WIDTH, chunk=8)))
    answer = answers[0]
    expected = jaxlm.generate(tiny, PROMPT, max_new_tokens=WIDTH)
    assert "".join(pieces) == expected.text and answer.tokens == expected.tokens
    assert np.array_equal(answer.logprobs, expected.logprobs)


def test_prompt_from_stdin_keeps_its_line_end(tiny):
    argv = ("generate", "tiny", "-", "--max-new-tokens", str(WIDTH))
    done = process(*argv, input=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == jaxlm.generate(tiny, PROMPT, max_new_tokens=WIDTH).text + "\n"
    assert "first text" in done.stderr


def test_score_prints_the_library_s_numbers(capsys, tiny, tmp_path):
    texts = ["Q:1+1=\n1+1=2\n", "R:ab=12;cd=34;\n?ab=12\n"]
    path = tmp_path / "one.txt"
    path.write_text(texts[0])
    expected = jaxlm.score(tiny, texts)
    argv = ("score", "tiny", str(path), "--text", texts[1], "--format")
    code, out, _ = outcome(capsys, *argv, "json")
    rows = json.loads(out)
    assert code == 0 and [row["text"] for row in rows] == [str(path), "text 0", "all"]
    assert [row["perplexity"] for row in rows] == pytest.approx(
        [expected[0].perplexity, expected[1].perplexity, jaxlm.perplexity(expected)]
    )
    together = np.concatenate([found.logprobs for found in expected])
    assert rows[-1]["tokens"] == len(together)
    assert rows[-1]["mean_logprob"] == pytest.approx(together.mean(), rel=1e-5)
    _, out, _ = outcome(capsys, *argv, "tsv", "--per-token")
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert head == ["text", "index", "id", "logprob", "token"]
    assert [float(line[3]) for line in lines] == pytest.approx(together)
    assert [int(line[2]) for line in lines] == [i for f in expected for i in f.tokens[1:]]
    pieces = [json.loads(line[4]) for line in lines]
    assert "".join(pieces) == "".join(texts)
    argv = ("score", "tiny", "--text", texts[0])
    assert outcome(capsys, *argv, "--text", texts[1]) == outcome(capsys, *argv, texts[1])


def test_score_honours_window_and_stride(capsys, tiny):
    text = "Q:1+1=\n1+1=2\nA:2\n"
    expected = jaxlm.score(tiny, text, window=8, stride=2)
    assert expected.perplexity != pytest.approx(jaxlm.score(tiny, text).perplexity)
    _, out, _ = outcome(capsys, "score", "tiny", "--text", text, "--window", "8", "--stride", "2",
                        "--format", "json")
    assert json.loads(out)[0]["perplexity"] == pytest.approx(expected.perplexity)


def test_bad_requests_are_one_line_and_exit_code_2(capsys, tiny, tmp_path):
    bare, odd = write_folder(tmp_path / "bare"), write_folder(tmp_path / "odd", unheard_of=3)
    (bare / "tokenizer.json").unlink()
    swapped = write_folder(tmp_path / "swapped", bos_token_id=5)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    cases = {
        ("genrate", "x"): "did you mean 'generate'",
        ("generate", "no-such-model", "x"): "neither a folder",
        ("generate", str(latin), "x"): "is a file",
        ("generate", str(bare), "x"): "has no tokenizer.json",
        ("generate", str(odd), "x"): "or to a command --ignore-fields unheard_of",
        ("fit", "--model", str(odd), "--target", "v5e:1x1"): "--ignore-fields unheard_of",
        ("score", str(swapped), "--text", "x"): "or to a command --no-check-tokenizer",
        ("generate", "tiny", ""): "empty",
        ("generate", "tiny", "x", "--temperature", "-1"): "temperature is -1.0",
        ("generate", "tiny", "x", "--max-new-tokens", "0"): "max_new_tokens is 0",
        ("generate", "tiny", "x", "--stop", ""): "not empty",
        ("generate", "tiny", "x" * 3000): "made for",
        ("generate", "tiny", "x", "--max-new-tokens", "5000"): "ask for fewer tokens",
        ("generate", "tiny", "x", "--seed", "9" * 20): f"--seed is {'9' * 20}; expected a whole",
        ("generate", "tiny", "x", "--seed", f"-{'9' * 20}"): "--seed is -999",
        ("demo", "--seed", "9" * 20): f"--seed is {'9' * 20}; expected a whole",
        ("demo", "--seed", "-1"): "--seed is -1; expected a whole number of at least 0",
        ("score", "tiny"): "nothing to score",
        ("score", "tiny", str(tmp_path / "none.txt")): "cannot read",
        ("score", "tiny", str(latin)): "not UTF-8",
        ("score", "tiny", "--text", "abc", "--stride", "0"): "stride is 0",
        ("demo", "--out", str(latin)): "is a file",
        ("generate", "tiny", "x", "--cache", "nope"): "cache 'nope' is unknown",
        ("generate", "tiny", "x", "--cache", "nope.json"): "no cache policy",
        ("generate", "tiny", "x", "--cache", "squat2:group=24,window=32"): "multiple of group",
    }
    for argv, expected in cases.items():
        assert expected in refused(capsys, *argv), argv
    assert latin.read_bytes() == b"caf\xe9"


def test_without_a_tokenizer_nothing_but_our_line_is_said(tmp_path):
    """transformers' own advice, that torch is not there, is silent; its words are the cause."""
    folder = write_folder(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    ended = process("score", str(folder), "--text", "x")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "tokenizer files beside the weights" in ended.stderr
    with pytest.raises(jaxlm.JaxlmError) as told:
        jaxlm.load(folder)
    assert told.value.__cause__ is not None


def test_what_load_may_pass_over_commands_may_too(capsys, tmp_path):
    folder = write_folder(tmp_path / "m", unheard_of=3, bos_token_id=5)
    flags = ("--ignore-fields", "unheard_of", "--no-check-tokenizer")
    code, out, err = outcome(capsys, "score", str(folder), "--text", "abc", *flags)
    assert code == 0 and "text 0" in out, err
    code, out, _ = outcome(capsys, "convert", str(folder), str(tmp_path / "out"), *flags)
    assert code == 0 and (tmp_path / "out" / "config.json").exists()
    assert open_config(str(folder), ignore_fields=["unheard_of"]).vocab_size == 258
    for name in ("generate", "score", "solve", "serve", "tune-cache", "convert", "demo"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        told = capsys.readouterr().out
        assert "--ignore-fields" in told and "--no-check-tokenizer" in told, name


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator to be found")
def test_an_absent_accelerator_is_named(capsys, tiny):
    assert "'gpu'" in refused(capsys, "generate", "tiny", "x", "--device", "gpu")


@pytest.mark.parametrize("argv", [("generate", "tiny"), ("info", "--nope")])
def test_wrong_arguments_exit_with_code_2(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "jaxlm", "info"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment) as running:
        running.stdout.close()
        error = running.stderr.read()
        assert running.wait(timeout=120) == 141 and b"BrokenPipe" not in error


def test_an_unwritable_cache_folder_is_only_a_note(capsys, tiny, monkeypatch):
    def deny(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(options, "enable_compilation_cache", deny)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert options.open_model("tiny").lm == tiny.lm
    assert "read-only" in capsys.readouterr().err


def test_text_from_stdin(monkeypatch):
    raw = io.TextIOWrapper(io.BytesIO("é\n".encode()))
    monkeypatch.setattr(sys, "stdin", raw)
    assert options.read_text("-") == "é\n"
