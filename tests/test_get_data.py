"""The fetcher of public data: right bytes are kept, wrong ones never land."""

import hashlib
import http.server
import json
import lzma
import threading
from pathlib import Path

import pytest

from experiments import get_data

FILES = {"plain/a.txt": b"one\n" * 50, "b.txt.xz": b"two\n" * 70, "c.json": b"[3]"}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on loopback that holds the original bytes, and the list of sources for it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path / "web"
    root.mkdir()

    def handler(*args):
        return QuietHandler(*args, directory=str(root))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        sources = {}
        for number, (name, data) in enumerate(FILES.items()):
            (root / str(number)).write_bytes(data)
            sources[name] = {
                "url": f"{address}/{number}", "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data), "licence": "MIT",
            }
        listing = tmp_path / "sources.json"
        listing.write_text(json.dumps(sources))
        yield root, listing
        running.shutdown()


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def main(*arguments) -> int:
    return get_data.main([str(argument) for argument in arguments])


def test_fetches_verifies_and_goes_on(server, tmp_path, capsys):
    root, listing = server
    out = tmp_path / "data"
    assert main("--out", out, "--sources", listing) == 0
    assert files(out) == sorted(FILES)
    assert lzma.decompress((out / "b.txt.xz").read_bytes()) == FILES["b.txt.xz"]
    assert main("--check", out, "--sources", listing) == 0
    for path in root.iterdir():
        path.unlink()  # a second run asks the server for nothing
    capsys.readouterr()
    assert main("--out", out, "--sources", listing) == 0
    assert capsys.readouterr().out.count("there:") == len(FILES)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"X" + d[1:], lambda d: b""]
)
def test_wrong_bytes_never_land(server, tmp_path, capsys, damage):
    root, listing = server
    (root / "0").write_bytes(damage(FILES["plain/a.txt"]))
    out = tmp_path / "data"
    assert main("--out", out, "--sources", listing) == 1
    assert files(out) == ["b.txt.xz", "c.json"]
    message = capsys.readouterr().err
    assert "plain/a.txt" in message and "got" in message and "expected" in message


def test_a_damaged_file_is_found_and_mended(server, tmp_path, capsys):
    _, listing = server
    out = tmp_path / "data"
    main("--out", out, "--sources", listing)
    (out / "c.json").write_bytes(b"[4]")
    (out / "b.txt.xz").write_bytes(b"not xz")
    (out / "plain/a.txt").unlink()
    assert main("--check", out, "--sources", listing) == 1
    message = capsys.readouterr().err
    assert "c.json" in message and "not xz" in message and "missing" in message
    assert main("--out", out, "--sources", listing) == 0
    assert main("--check", out, "--sources", listing) == 0


def test_no_server_says_what_works_offline(server, tmp_path, capsys):
    root, listing = server
    (root / "2").unlink()
    assert main("--out", tmp_path / "data", "--only", "c.json", "--sources", listing) == 1
    assert "JAXLM_DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "url"), [("../x", "http://a/b"), ("/x", "http://a/b"), ("x", "file:///etc/passwd")]
)
def test_odd_sources_are_refused(tmp_path, name, url):
    listing = tmp_path / "sources.json"
    listing.write_text(json.dumps({name: {"url": url, "sha256": "", "bytes": 0, "licence": ""}}))
    with pytest.raises(get_data.DataError):
        get_data.load_sources(listing)


def test_the_list_is_complete():
    for name, source in get_data.load_sources().items():
        assert len(source["sha256"]) == 64 and source["bytes"] > 0 and source["licence"], name
        assert source["url"].startswith("https://raw.githubusercontent.com/")


def test_the_copies_are_the_originals(data_dir):
    assert main("--check", data_dir) == 0


@pytest.mark.network
def test_one_file_from_its_source(tmp_path):
    assert main("--out", tmp_path, "--only", "cl/COPA/COPA/labels.json") == 0
