"""A small Hugging Face Hub on localhost: the calls by which huggingface_hub creates, uploads and downloads a model."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Files by path in each commit, oldest first."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a revision: main, or a commit."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit with these files, and return its name."""
        name = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[name] = files
        return name


@dataclass
class Hub:
    """Repositories by name, and the requests in order as "METHOD path"."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    @property
    def downloads(self) -> set[str]:
        """The paths of all files that were downloaded."""
        parts = [request.split("/resolve/") for request in self.requests if request.startswith("GET")]
        return {part[1].partition("/")[2] for part in parts if len(part) == 2}


class Refusal(Exception):
    """An answer without content: its status, and the error code of the Hub."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty Hub in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "validate-yaml"]:
                self.send_json({"errors": [], "warnings": []})
            elif parts[:3] == ["api", "repos", "create"]:
                self.create(json.loads(body))
            elif parts[:2] == ["api", "models"]:
                self.model("/".join(parts[2:4]), parts[4:], body)
            elif len(parts) > 4 and parts[2] == "resolve":
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise Refusal(404)
        except Refusal as refusal:
            self.send(refusal.status, b"", {"X-Error-Code": refusal.code} if refusal.code else {})

    def create(self, wanted: dict[str, Any]) -> None:
        self.check_token()
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
            self.hub.repositories[name].commit({".gitattributes": b""})
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name}, status=409 if exists else 200)

    def model(self, name: str, action: list[str], body: bytes) -> None:
        repository = self.repository(name)
        kind, revision = action[:2] if action else ("revision", "main")
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        files = repository.commits[commit]
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        elif kind == "tree":
            self.send_json([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()])
        elif kind == "preupload":
            self.check_token()
            given = [file["path"] for file in json.loads(body)["files"]]
            self.send_json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in given]})
        elif kind == "commit":
            self.check_token()
            oid = repository.commit(_changed(files, body))
            self.send_json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "success": True})
        else:
            raise Refusal(404)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        if path not in repository.commits[commit]:
            raise Refusal(404, "EntryNotFound")
        content = repository.commits[commit][path]
        self.send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.has_token):
            raise Refusal(401 if not self.has_token else 404, "RepoNotFound")
        return repository

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if not self.has_token:
            raise Refusal(403)

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _changed(files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
    """Apply the lines of a commit, which are JSON, to files."""
    files = dict(files)
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    return files


def _oid(content: bytes) -> str:
    """Return the name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
