"""A stand-in for the hub on loopback: the few endpoints that huggingface_hub asks when single files are fetched or listed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@dataclass
class Hub:
    """`files` of each repository by name; `answers` status and headers that a repository gives to everything; `asked` what was fetched (not looked
    up), in order.
    """

    files: dict[str, Mapping[str, bytes]]
    answers: dict[str, tuple[int, Mapping[str, str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def find(self, path: str) -> tuple[int, dict[str, str], bytes, str]:
        """Status, headers, content and name of what a path asks for."""
        parts = path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if listing else parts[:2])
        if repository in self.answers:
            status, headers = self.answers[repository]
            return status, dict(headers), b"", ""
        if repository not in self.files:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"", ""
        held = self.files[repository]
        if listing:
            tree = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in held.items()]
            return 200, {}, json.dumps(tree).encode(), ""
        revision, name = parts[3], "/".join(parts[4:])
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b"", ""
        if name not in held:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT, "X-Error-Message": "Entry not found"}, b"", ""
        digest = hashlib.sha256(held[name]).hexdigest()
        return 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, held[name], name


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def _send(self, body: bool) -> None:
            status, headers, content, name = hub.find(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                hub.asked += [name] if name else []
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._send(True)

        def do_HEAD(self) -> None:
            self._send(False)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: tests read standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
