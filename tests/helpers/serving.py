"""`modelstore serve` as a process, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest


@dataclass(frozen=True)
class Reply:
    """What a server answered; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running server: where it is, its process, and its folder."""

    url: str
    process: subprocess.Popen[str]
    folder: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; the path is sent as it is."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            named = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, named, reply.read())
        finally:
            connection.close()

    def journal(self) -> list[dict[str, Any]]:
        """The lines of its access log so far."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) << 10


@contextmanager
def serving(store: Path, folder: Path, *options: str, warm: bool = True) -> Iterator[Server]:
    """A server of a store on a free port, ended with the block; `folder` takes its cache and log."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    args = ["--store", str(store), "--port", "0", "--cache", str(folder / "cache"), *options]
    command = [sys.executable, "-m", "modelstore", "serve", *args, "--access-log", str(folder / "access.log")]
    folder.mkdir(exist_ok=True)
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, text=True)
    try:
        yield _started(process, folder, warm=warm)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def _started(process: subprocess.Popen[str], folder: Path, *, warm: bool) -> Server:
    """The server, once it says where it is, and, if wanted, is ready."""
    server = None
    until = time.monotonic() + 120
    while time.monotonic() < until:
        said = (folder / "stderr").read_text()
        assert process.poll() is None, said
        found = re.search(r"at (https?://\S+): ", said)
        if found:
            server = Server(found[1], process, folder)
            if not warm or server.url.startswith("https") or server.ask("/ready").status == 200:
                return server
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {(folder / 'stderr').read_text()}")
