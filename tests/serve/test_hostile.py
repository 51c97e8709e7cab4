"""Clients that are slow, vanish, or send what nobody should: nothing leaks, memory holds, others are served."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

import modelstore as ms
from tests.helpers.serving import Server, serving

SIZE = 96 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model of 96 MiB, with little memory."""
    root = tmp_path_factory.mktemp("large")
    store = ms.open(str(root / "store"))
    store.save("big", {"w": torch.randn(SIZE // 4 // 4096, 4096)}, codec="raw")
    with serving(root / "store", root / "server", "--memory", "448MiB") as found:
        yield found


def raw(server: Server, data: bytes) -> bytes:
    """What comes back for bytes on a connection."""
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(data)
        found = b""
        with suppress(ConnectionResetError):  # it is closed with bytes unread
            while (piece := connection.recv(1 << 16)) and len(found) < 1 << 20:
                found += piece
        return found


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/acme/tiny/resolve/main/..%2f..%2f..%2fetc%2fpasswd",
        "/acme/tiny/resolve/main/%00",
        "/%2e%2e/x/resolve/main/y",
        "//etc/passwd",
    ],
)
def test_paths_lead_nowhere(server: Server, path: str) -> None:
    reply = server.ask(path)
    assert reply.status in (400, 404)
    assert b"root:" not in reply.body


def test_a_head_has_a_bound(server: Server) -> None:
    answer = raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n")
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert server.ask("/health").status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Content-Length: -1\r\n",
        b" X: folded\r\n",
        b"X\x00: y\r\n",
    ],
)
def test_nothing_is_smuggled(server: Server, head: bytes) -> None:
    """What could be read as the beginning of another request is never answered as one."""
    hidden = b"GET /api/models HTTP/1.1\r\nHost: x\r\n\r\n"
    before = len(server.journal())
    asked = b"POST /api/models/acme/tiny/paths-info/main HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    raw(server, asked + head + b"\r\n0\r\n\r\n" + hidden)
    assert server.ask("/health").status == 200
    assert "/api/models" not in [line["path"] for line in server.journal()[before:]]


def test_a_method_that_is_not_for_a_path_is_refused(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        reply = server.ask("/acme/tiny/resolve/main/config.json", method)
        assert reply.status == 405
        assert reply.headers["allow"] == "GET, HEAD"


def test_a_body_has_a_bound(server: Server) -> None:
    reply = server.ask("/api/models/acme/tiny/paths-info/main", "POST", b"paths=" + b"a" * (5 << 20))
    assert reply.status == 413


@pytest.mark.slow
def test_clients_that_stall_or_vanish_cost_little(large: Server) -> None:
    """200 that ask for the model and read nothing, of which half close: others are served, and memory holds."""
    assert large.ask("/big/resolve/main/model.safetensors", headers={"Range": "bytes=0-9"}).status == 206
    before = large.resident()
    held = []
    try:
        for number in range(200):
            connection = socket.create_connection(large.address, timeout=30)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(b"GET /big/resolve/main/model.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
            if number % 2:
                connection.close()
            else:
                held.append(connection)
        with ThreadPoolExecutor(4) as pool:
            whole = [pool.submit(large.ask, "/big/resolve/main/model.safetensors") for _ in range(4)]
            bodies = {len(one.result().body) for one in whole}
        assert len(bodies) == 1
        assert min(bodies) > SIZE
        assert large.resident() - before < 1 << 30
    finally:
        for connection in held:
            connection.close()
    until = time.monotonic() + 60
    while b"modelstore_http_running 1\n" not in large.ask("/metrics").body:
        assert time.monotonic() < until, "requests of clients that are gone go on"


def test_one_that_is_killed_is_served_again(large: Server) -> None:
    """SIGTERM in the middle of a download: what is under way is sent to its end."""
    with socket.create_connection(large.address, timeout=60) as connection:
        connection.sendall(b"GET /big/resolve/main/model.safetensors HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = len(connection.recv(1 << 16))
        large.process.terminate()
        while piece := connection.recv(1 << 20):
            got += len(piece)
    assert got > SIZE
    assert large.process.wait(60) is not None
