"""Fetch the public data sets from their sources, and prove that they are the right bytes.

Command: python experiments/get_data.py --out data && export JAXLM_DATA=$PWD/data
Size: 57 MB over the network, 17 MB on disk. Run again, it goes on where it stopped.

sources.json gives for each file its URL (a repository at a commit), the sha256 and the size of the
original bytes, and its licence. A file named .xz is compressed here, after the check.
`--check FOLDER` only verifies what a folder holds.
"""

import argparse
import hashlib
import json
import lzma
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SOURCES = Path(__file__).resolve().parent / "sources.json"
TIMEOUT_S = 60


class DataError(Exception):
    """A file that is missing, or is not what its source says."""


def load_sources(path: Path = SOURCES) -> dict[str, dict[str, Any]]:
    """name -> {"url", "sha256", "bytes", "licence"}."""
    sources = json.loads(path.read_text())
    for name, source in sources.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{name!r} in {path} would be written outside the folder")
        if urlsplit(source["url"]).scheme not in ("http", "https"):
            raise DataError(f"{name}: {source['url']!r} is no http address")
    return sources


def verify(name: str, data: bytes, source: dict[str, Any]) -> bytes:
    """The original bytes, if they are the expected ones."""
    if len(data) != source["bytes"]:
        raise DataError(f"{name}: got {len(data)} bytes, expected {source['bytes']}: fetch again")
    found = hashlib.sha256(data).hexdigest()
    if found != source["sha256"]:
        raise DataError(f"{name}: got sha256 {found}, expected {source['sha256']}: fetch again")
    return data


def check(folder: Path, name: str, source: dict[str, Any]) -> bytes:
    """The original bytes of a file in a folder; DataError if it is missing or differs."""
    path = folder / name
    if not path.is_file():
        raise DataError(f"{name}: missing in {folder}")
    data = path.read_bytes()
    try:
        return verify(name, lzma.decompress(data) if name.endswith(".xz") else data, source)
    except lzma.LZMAError as error:
        raise DataError(f"{name}: {path} is not xz: {error}") from error


def fetch(folder: Path, name: str, source: dict[str, Any]) -> None:
    """Download, verify, write under a temporary name, rename."""
    request = urllib.request.Request(source["url"], headers={"User-Agent": "jaxlm-get-data"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            data = answer.read(source["bytes"] + 1)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{name}: {source['url']}: {error}. Without a network, set JAXLM_DATA to a folder "
            "that has the files; the tests that need none run as they are"
        ) from error
    verify(name, data, source)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    os.replace(temporary, path)


def get(folder: Path, name: str, source: dict[str, Any]) -> str:
    """Fetch a file unless it is there already; what was done."""
    try:
        check(folder, name, source)
        return "there"
    except DataError:
        fetch(folder, name, source)
        return "fetched"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if any file is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FOLDER", help="fetch into this folder")
    what.add_argument("--check", type=Path, metavar="FOLDER", help="verify this folder")
    parser.add_argument("--only", default="", metavar="PREFIX", help="names that start so: gsm8k/")
    parser.add_argument("--sources", type=Path, default=SOURCES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sources = load_sources(args.sources)
    chosen = {name: s for name, s in sources.items() if name.startswith(args.only)}
    if not chosen:
        parser.error(f"no file starts with {args.only!r}; there are {', '.join(sorted(sources))}")
    wrong = 0
    for name, source in chosen.items():
        try:
            done = get(args.out, name, source) if args.out else check(args.check, name, source)
            print(f"{'ok' if args.check else done}: {name} ({source['licence']})")
        except DataError as error:
            wrong += 1
            print(f"error: {error}", file=sys.stderr)
    print(f"{len(chosen) - wrong} of {len(chosen)} files are right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
