"""What `jaxlm serve` says and refuses before it serves."""

import pytest

from jaxlm.cli import main
from jaxlm.cli.serve import listen, read_token, warn_of
from jaxlm.core.errors import ConfigError


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLM_TOKEN", raising=False)
    assert read_token(None) is None
    (tmp_path / "token").write_text("secret\n")
    assert read_token(tmp_path / "token") == "secret"
    monkeypatch.setenv("JAXLM_TOKEN", "other")
    assert read_token(None) == "other"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(("host", "warned"), [
    ("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True),
    ("192.168.1.7", True), ("example.org", True),
])
def test_only_loopback_is_silent(host, warned, capsys):
    warn_of(host, None)
    assert ("not loopback" in capsys.readouterr().err) is warned


def test_a_taken_port_is_one_line(capsys, tmp_path):
    pytest.importorskip("fastapi")
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "./nothing-here", "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err  # known before the model is looked for


@pytest.mark.parametrize("flags", [
    ("--port", "65536"), ("--port", "-1"), ("--queue", "-1"), ("--max-budget", "0"),
    ("--grace", "-1"), ("--grace", "nan"), ("--max-body-kb", "0"), ("--rows", "0"),
    ("--max-len", "1"), ("--chunk", "0"), ("--prompt-cache-mb", "-1"),
    ("--chat-template", "no-such.jinja"), ("--host", "no.such.host.invalid"),
])
def test_a_wrong_flag_is_one_line_before_a_model_is_read(flags, capsys):
    pytest.importorskip("fastapi")
    assert main(["serve", "--model", "./nothing-here", "--port", "0", *flags]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 + (flags[0] == "--host") and flags[0] in said[-1] and flags[1] in said[-1]
    assert "expected" in said[-1] or "take another" in said[-1]


def test_a_model_that_is_not_there_is_one_line(capsys):
    pytest.importorskip("fastapi")
    assert main(["serve", "--model", "./nothing-here"]) == 2
    assert "nothing-here" in capsys.readouterr().err
