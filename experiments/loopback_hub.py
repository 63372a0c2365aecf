"""A hub on this machine: the few requests of huggingface_hub that fetch a model, over loopback.

For tests and smoke runs where there is no network. `Hub({"org/name": {"main": folder}})` serves
folders as revisions; point HF_ENDPOINT at its `url` before huggingface_hub is imported.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Revisions = Mapping[str, Path]


@dataclass
class Hub:
    """Folders by repository and revision, the token that each gated repository wants, and a log.

    log: (method, path, Authorization header or None) of every request, in order.
    """

    repos: Mapping[str, Revisions]
    tokens: Mapping[str, str] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables that send huggingface_hub here, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **more}

    def downloads(self) -> list[str]:
        """The files that were sent, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.log
                if method == "GET" and "/resolve/" in path]


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision's name stands for: 40 hexadecimal digits."""
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class Refused(Exception):
    """A request that the hub answers with an error: status, X-Error-Code, message."""


class _Handler(BaseHTTPRequestHandler):
    """Model info, the list of a revision's files, and the files."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Any request; the name is http.server's."""
        self.hub.log.append((self.command, self.path, self.headers.get("Authorization")))
        try:
            self.answer([unquote(part) for part in urlsplit(self.path).path.split("/")[1:]])
        except Refused as refusal:
            status, code, message = refusal.args
            body = json.dumps({"error": message}).encode()
            self.send(status, body, {"X-Error-Code": code, "X-Error-Message": message})

    do_HEAD = do_GET

    def answer(self, parts: list[str]) -> None:
        """By the shape of the path."""
        match parts:
            case ["api", "models", org, name]:
                self.info(f"{org}/{name}", "main")
            case ["api", "models", org, name, "revision", revision]:
                self.info(f"{org}/{name}", revision)
            case ["api", "models", org, name, "tree", revision]:
                folder, _ = self.folder(f"{org}/{name}", revision)
                self.send_json([{"type": "file", "path": path, "size": len(content), "oid": sha}
                                for path, content, sha in files(folder)])
            case [org, name, "resolve", revision, *path]:
                self.file(f"{org}/{name}", revision, "/".join(path))
            case _:
                raise Refused(404, "RepoNotFound", "no such page")

    def folder(self, repo: str, revision: str) -> tuple[Path, str]:
        """A revision's folder and commit."""
        if repo not in self.hub.repos:
            raise Refused(401, "RepoNotFound", "Repository not found")
        wanted = self.hub.tokens.get(repo)
        if wanted and self.headers.get("Authorization") != f"Bearer {wanted}":
            raise Refused(401, "GatedRepo", f"Access to model {repo} is restricted")
        for name, folder in self.hub.repos[repo].items():
            if revision in (name, commit_of(repo, name)):
                return folder, commit_of(repo, name)
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, repo: str, revision: str) -> None:
        """What the hub says of a model."""
        folder, commit = self.folder(repo, revision)
        self.send_json({"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": False,
                        "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": path} for path, _, _ in files(folder)]})

    def file(self, repo: str, revision: str, path: str) -> None:
        """One file, or a part of it."""
        folder, commit = self.folder(repo, revision)
        known = {name: (content, sha) for name, content, sha in files(folder)}
        if path not in known:
            raise Refused(404, "EntryNotFound", f"no {path} in {repo}")
        content, sha = known[path]
        begin = int((self.headers.get("Range") or "bytes=0-")[len("bytes="):].split("-")[0])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha}"'}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.send(206 if begin else 200, content[begin:], headers)

    def send_json(self, value: Any) -> None:
        """A page of JSON."""
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """A whole answer; HEAD gets its headers only."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet: `hub.log` has it."""


def files(folder: Path) -> list[tuple[str, bytes, str]]:
    """(path, content, hash) of every file below a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found.append((path.relative_to(folder).as_posix(), content,
                          hashlib.sha1(content).hexdigest()))
    return found
