"""A hub on loopback: as much of its HTTP API as downloads of models and data sets take."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 20_000  # bytes: files of the hub's large-file storage, named by their sha256


class HubServer(ThreadingHTTPServer):
    """Repositories as ``models/ORG/NAME`` -> revision -> commit -> files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refs: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        """File -> bytes after which its transfer breaks off; once."""
        self.sent: list[tuple[str, int]] = []
        """File and first byte of each transfer."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, files: dict[str, bytes], *revisions: str) -> str:
        """A commit that ``main`` and other revisions then name."""
        parts = [name.encode() + content for name, content in sorted(files.items())]
        commit = hashlib.sha1(repo.encode() + b"".join(parts)).hexdigest()
        self.files[repo, commit] = files
        self.refs.setdefault(repo, {}).update(dict.fromkeys(revisions or ["main"], commit))
        return commit

    def put_folder(self, repo: str, folder: Path, *revisions: str) -> str:
        return self.put(repo, {p.name: p.read_bytes() for p in folder.iterdir()}, *revisions)

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(repo, {}).get(revision, revision)
        files = self.files.get((repo, commit))
        return None if files is None else (commit, files)


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> Any:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(body)["paths"]
        else:
            asked = parse_qs(body.decode()).get("paths", [])
        match = re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/paths-info/(.+)", unquote(self.path))
        known = match and self.server.found(match[1], match[2])
        if not known:
            return self.refuse(404, "RepoNotFound")
        folders = {str(f) for name in known[1] for f in Path(name).parents}
        made = [{"type": "directory", "path": n, "size": 0, "oid": git_hash(n.encode())}
                for n in asked if n in folders]  # fmt: skip
        return self.answer([*made, *(self.entry(n, known[1]) for n in asked if n in known[1])])

    def do_GET(self) -> Any:
        path = unquote(urlsplit(self.path).path)
        for form, reply in (
            (r"/api/(\w+/[^/]+/[^/]+)/revision/(.+)", self.info),
            (r"/api/(\w+/[^/]+/[^/]+)/tree/(refs/convert/parquet|[^/]+)(?:/(.*))?", self.tree),
            (r"/api/(\w+/[^/]+/[^/]+)", self.info),
            (r"/(datasets/[^/]+/[^/]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", self.resolve),
            (r"/([^/]+/[^/]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(form, path):
                repo, revision, *rest = (*match.groups(), "main")[: max(2, len(match.groups()))]
                repo = repo if reply != self.resolve or "datasets/" in repo else f"models/{repo}"
                if repo in self.server.gated and reply == self.resolve:
                    return self.refuse(403, "GatedRepo")
                if repo not in self.server.refs:
                    return self.refuse(404, "RepoNotFound")
                known = self.server.found(repo, revision)
                if known is None:
                    return self.refuse(404, "RevisionNotFound")
                return reply(repo, *known, *rest)
        return self.refuse(404, "EntryNotFound")

    def info(self, repo: str, commit: str, files: dict[str, bytes], *_: str) -> None:
        name = repo.partition("/")[2]
        names = [{"rfilename": file} for file in files]
        self.answer({"id": name, "sha": commit, "siblings": names, "tags": [], "private": False,
                     "disabled": False, "downloads": 0, "likes": 0})  # fmt: skip

    def tree(
        self, repo: str, commit: str, files: dict[str, bytes], folder: str | None = None
    ) -> Any:
        prefix = f"{folder}/" if folder else ""
        if folder and not any(name.startswith(prefix) for name in files):
            return self.refuse(404, "EntryNotFound")
        deep = "recursive=true" in self.path.lower()
        folders = {str(f) for name in files for f in Path(name).parents if str(f) != "."}
        made = [self.entry(name, files) for name in files]
        made += [{"type": "directory", "path": f, "size": 0, "oid": git_hash(f.encode())}
                 for f in sorted(folders)]  # fmt: skip
        return self.answer([e for e in made if e["path"].startswith(prefix)
                     and (deep or "/" not in e["path"][len(prefix):])])  # fmt: skip

    def entry(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        data = files[name]
        made = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if len(data) >= LARGE:
            sha256 = hashlib.sha256(data).hexdigest()
            made["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return made

    def resolve(self, repo: str, commit: str, files: dict[str, bytes], name: str) -> Any:
        if name not in files:
            return self.refuse(404, "EntryNotFound", commit)
        data, first = files[name], 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(match[1])
        large = len(data) >= LARGE
        self.send_response(206 if first else 200)
        self.send_header(
            "ETag", f'"{hashlib.sha256(data).hexdigest() if large else git_hash(data)}"'
        )
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.server.sent.append((name, first))
        stop = self.server.cut.pop(name, None)
        self.close_connection = stop is not None
        return self.wfile.write(data[first:stop])

    def refuse(self, code: int, kind: str, commit: str = "") -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Error-Message", kind)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub until the end of the block."""
    server = HubServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
