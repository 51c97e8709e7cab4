"""The read side of the Hugging Face Hub's protocol on loopback, over files in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34


class Hub:
    """Models by name: each has commits (newest last) of files. `requests` are (method, path, range)."""

    def __init__(self) -> None:
        self.models: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.failing: list[int] = []  # statuses that the next ranges are answered with
        self.ignores_ranges = False
        self.flips: set[str] = set()  # files of which a bit is answered wrong
        self.cuts = 0  # answers of ranges that end early
        self.endpoint = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        self.models.setdefault(name, []).append(files)
        return self.sha(name, len(self.models[name]) - 1)

    def sha(self, name: str, number: int) -> str:
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.models[name]
        names = {self.sha(name, number): number for number in range(len(commits))}
        names["main"] = len(commits) - 1
        number = names.get(revision)
        return None if number is None else (self.sha(name, number), commits[number])


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, unquote(path), self.headers.get("range")))
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                name, rest = "/".join(parts[2:4]), parts[4:]
            else:
                name, rest = "/".join(parts[:2]), parts[2:]
            if name not in hub.models:
                return self.error(401, "RepoNotFound")
            if name in hub.private and self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self.error(401, "RepoNotFound")
            if name in hub.gated and rest[:1] == ["resolve"]:
                return self.error(403, "GatedRepo")
            found = hub.files(name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return self.error(404, "RevisionNotFound")
            commit, files = found
            if rest[:1] == ["resolve"]:
                return self.resolve(commit, files, "/".join(rest[2:]))
            if rest[:1] == ["tree"]:
                return self.json([self.row(path, data) for path, data in files.items()])
            return self.json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

        do_HEAD = do_GET  # noqa: N815

        def row(self, path: str, data: bytes) -> dict[str, Any]:
            row = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith((".safetensors", ".bin")):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return row

        def resolve(self, commit: str, files: dict[str, bytes], path: str) -> None:
            if path not in files:
                return self.error(404, "EntryNotFound", commit)
            data, asked = files[path], self.headers.get("range")
            if path in hub.flips:
                data = data[:-1] + bytes([data[-1] ^ 1])
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            if asked and hub.failing:
                return self.error(hub.failing.pop(0), "")
            if asked is None or hub.ignores_ranges:
                return self.answer(200, data, headers)
            start, _, end = asked.removeprefix("bytes=").partition("-")
            piece = data[int(start) : int(end) + 1]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}"
            if hub.cuts:
                hub.cuts -= 1
                piece = piece[: len(piece) // 2]
            return self.answer(206, piece, headers)

        def error(self, status: int, code: str, commit: str = "") -> None:
            self.answer(status, b"", {"X-Error-Code": code, "X-Repo-Commit": commit})

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
