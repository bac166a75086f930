"""A server on loopback that speaks as much of the Hugging Face hub's protocol as fetching files takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LARGE = ".safetensors"
_API = re.compile(
    r"/api/(models|datasets)/([\w.-]+(?:/[\w.-]+)?)(?:/(revision|tree|paths-info)/([^/]+|refs/[^/]+/[^/]+)(?:/(.+))?)?"
)


@dataclass
class Repository:
    """Files by commit, and what branches and tags stand for.

    Attributes:
        token: Who reads it must send this one; None lets everybody.
        is_gated: Whether the token alone is not enough: its terms must be accepted.
        on_listed: Called when somebody has asked what it holds.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False
    on_listed: Callable[[], None] = lambda: None

    def push(self, files: dict[str, bytes], ref: str = "main") -> str:
        """A new commit with these files alone, under a branch or tag."""
        digest = hashlib.sha1(b"\0".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class HubServer:
    """Repositories, and the requests that were made.

    Attributes:
        models: By `user/name`.
        datasets: By `user/name`.
        paths: Paths that were asked for, with the method before.
        tokens: Tokens that were sent.
        sends: Replaces what is sent of a file, where it returns bytes.
    """

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.paths: list[str] = []
        self.tokens: set[str | None] = set()
        self.sends: Callable[[str, bytes], bytes] = lambda _, data: data
        self.endpoint = ""

    def push(self, repo_id: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Put files into a model's repository, which is made if it is not there; the commit."""
        return self.models.setdefault(repo_id, Repository()).push(files, ref)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve while the block runs."""
        hub = self

        class Handler(_Handler):
            server_of = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub = self.server_of
        hub.paths.append(f"{self.command} {path}")
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        hub.tokens.add(token)
        found = _API.fullmatch(path)
        if found is not None:
            kind, repo_id, what, revision, place = found.groups()
            repository = getattr(hub, kind).get(repo_id)
            commit = self._commit(repository, revision or "main", token)
            if commit is not None:
                self._list(repository, repo_id, commit, what, place, body)
            return
        found = re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if found is not None:
            repository = (hub.datasets if found[1] else hub.models).get(found[2])
            commit = self._commit(repository, found[3], token)
            if commit is not None:
                self._send_file(repository.commits[commit], commit, found[4])
            return
        self._send(404, b"{}")

    def _commit(self, repository: Repository | None, revision: str, token: str | None) -> str | None:
        """The commit of a revision, if it may be read; else the refusal is sent."""
        if repository is None or (repository.token is not None and token != repository.token):
            self._send(401, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"})
        elif repository.is_gated:
            self._send(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        else:
            commit = repository.refs.get(revision, revision)
            if commit in repository.commits:
                return commit
            self._send(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
        return None

    def _list(
        self, repository: Repository, repo_id: str, commit: str, what: str | None, place: str | None, body: bytes
    ) -> None:
        files = repository.commits[commit]
        if what == "tree":
            listed = [_entry(n, d) for n, d in files.items() if place is None or n.startswith(f"{place}/")]
            if place is not None and not listed:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            else:
                self._send(200, json.dumps(listed).encode())
            return
        if what == "paths-info":
            wanted = re.findall(rb"[\w./-]+", unquote(body.decode()).encode())
            listed = [_entry(n, d) for n, d in files.items() if n.encode() in wanted]
            self._send(200, json.dumps(listed).encode())
            return
        siblings = []
        for name, data in files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_hash(data)}
            if name.endswith(_LARGE):
                sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        repository.on_listed()
        self._send(200, json.dumps(info).encode())

    def _send_file(self, files: dict[str, bytes], commit: str, name: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        is_large = name.endswith(_LARGE)
        headers["ETag"] = f'"{_sha256(data) if is_large else _git_hash(data)}"'
        if is_large:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        self._send(200, self.server_of.sends(name, data), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        first, size = 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if found is not None and status == 200:
            status, first = 206, int(found[1])
            data = data[first : int(found[2]) + 1 if found[2] else None]
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if name.endswith(_LARGE):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
