"""Pieces over TCP: the same bytes, only for who knows the secret, and no hang and no wrong byte whoever is at the other end."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.cluster.network import channel, wire
from modelstore.cluster.network.wire import PieceClient, PieceClients, PieceServer, UnreachableError
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.errors import NotFoundError, StorageError
from modelstore.format.buffers import Bytes

SECRET = b"known to the cluster"
SOURCE = StoreAddress("file:///store", {"key": "value", "nested": {"a": [1, 2]}}, "s3fs")


class Shelf:
    """Pieces behind a server, and what it was asked for."""

    def __init__(self, sizes: Sequence[int]) -> None:
        random = np.random.default_rng(0)
        self.data = {}
        self.parts = []
        for at, size in enumerate(sizes):
            data = random.integers(0, 256, size, np.uint8)
            part = Piece(blake3(data).digest() if size else bytes([at]) * 32, "ab" * 32, at, size)
            self.data[part.digest] = data
            self.parts.append(part)
        self.asked: list[tuple[StoreAddress, list[Piece], bool]] = []
        self.before: Callable[[], None] = lambda: None
        self.server = PieceServer("127.0.0.1", SECRET, self.read)
        self.client = PieceClient(self.server.address, SECRET)

    def read(self, source: StoreAddress, parts: Sequence[Piece], fetch: bool) -> list[Bytes | None]:
        self.asked.append((source, list(parts), fetch))
        self.before()
        return [self.data.get(part.digest) for part in parts]

    def right(self, found: Sequence[Bytes | None], parts: Sequence[Piece] | None = None) -> bool:
        wanted = [self.data.get(part.digest) for part in (self.parts if parts is None else parts)]
        return [None if d is None else bytes(d) for d in found] == [None if d is None else bytes(d) for d in wanted]


@contextlib.contextmanager
def shelf_of(sizes: Sequence[int]) -> Iterator[Shelf]:
    made = Shelf(sizes)
    try:
        yield made
    finally:
        made.server.close()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with shelf_of([100, 0, 1, 300_000, 5]) as made:
        yield made


@contextlib.contextmanager
def listening(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of something that takes one connection after another, and does what `talk` does with it."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    talk(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
        assert not thread.is_alive()


def greeted(connection: socket.socket) -> None:
    """As a server does: both prove who they are, and a request is read."""
    address = "{}:{}".format(*connection.getsockname())
    channel.greet(connection, SECRET, address, None)
    (size,) = struct.unpack("<Q", connection.recv(8, socket.MSG_WAITALL))
    connection.recv(size, socket.MSG_WAITALL)


def proof_of(nonce: bytes, shelf: Shelf) -> bytes:
    """A client's nonce and proof for a server's nonce."""
    return bytes(32) + channel.prove(b"client", nonce, bytes(32), channel._channel(shelf.server.address, b""), SECRET)


def framed(message: Any) -> bytes:
    data = msgspec.msgpack.encode(message)
    return struct.pack("<Q", len(data)) + data


# ---------------------------------------------------------------------- right


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), fetch=st.booleans())
def test_what_is_there_comes_and_what_is_not_is_none(shelf: Shelf, data: st.DataObject, fetch: bool) -> None:
    """Any pieces, in any order, twice, too; all examples on one connection."""
    gone = Piece(b"?" * 32, "cd" * 32, 0, 1 << 40)
    wanted = data.draw(st.lists(st.sampled_from([*shelf.parts, gone]), max_size=20))
    assert shelf.right(shelf.client.read(SOURCE, wanted, fetch), wanted)
    assert shelf.asked[-1] == (SOURCE, wanted, fetch)
    assert len(shelf.client._idle) == 1


def test_more_pieces_than_one_system_call_takes() -> None:
    with shelf_of([7] * (3 * channel._VECTORS + 1) + [20 << 20]) as shelf:
        assert shelf.right(shelf.client.read(SOURCE, shelf.parts, True))


def test_many_threads_share_connections(shelf: Shelf) -> None:
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda _: shelf.client.read(SOURCE, shelf.parts, True), range(200)))
    assert all(shelf.right(each) for each in found)
    assert 1 <= len(shelf.client._idle) <= wire._IDLE


def test_one_who_fetches_keeps_nobody_from_looking(shelf: Shelf) -> None:
    """As many requests that get something as may wait: whoever only looks is answered none the less."""
    waits, inside = threading.Event(), threading.Semaphore(0)

    def before() -> None:
        if shelf.asked[-1][2]:
            inside.release()
            assert waits.wait(60)

    shelf.before = before
    with ThreadPoolExecutor(wire._FETCHES + 1) as pool:
        fetching = [pool.submit(shelf.client.read, SOURCE, shelf.parts, True) for _ in range(wire._FETCHES + 1)]
        for _ in range(wire._FETCHES):
            assert inside.acquire(timeout=60)
        assert not inside.acquire(blocking=False), "one of them waits its turn"
        assert shelf.right(shelf.client.read(SOURCE, shelf.parts, False))
        waits.set()
        assert all(shelf.right(future.result(60)) for future in fetching)


# ---------------------------------------------------------------------- wrong


@pytest.mark.parametrize("error", [NotFoundError("no object packs/ab"), OSError("disk on fire"), ValueError("no tier")])
def test_what_the_host_could_not_read_is_said_and_the_connection_goes_on(shelf: Shelf, error: Exception) -> None:
    def fail() -> None:
        raise error

    shelf.before = fail
    with pytest.raises(StorageError, match=str(error)):
        shelf.client.read(SOURCE, shelf.parts, True)
    shelf.before = lambda: None
    assert shelf.right(shelf.client.read(SOURCE, shelf.parts, True))


@pytest.mark.parametrize("secret", [b"", b"guessed", SECRET + b" "])
def test_who_does_not_know_the_secret_is_told_nothing(shelf: Shelf, secret: bytes) -> None:
    with pytest.raises(UnreachableError):
        PieceClient(shelf.server.address, secret).read(SOURCE, shelf.parts, True)
    assert not shelf.asked


def test_a_proof_is_good_once(shelf: Shelf) -> None:
    """What somebody listened to opens no other connection."""
    host, _, port = shelf.server.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as first,
        socket.create_connection((host, int(port)), 10) as other,
    ):
        proof = proof_of(first.recv(32, socket.MSG_WAITALL), shelf)
        other.recv(32, socket.MSG_WAITALL)
        other.sendall(proof)
        other.sendall(framed(wire._Request(SOURCE, shelf.parts, True)))
        with contextlib.suppress(OSError):
            assert other.recv(1) == b""
    assert not shelf.asked


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    garbage=st.one_of(
        st.binary(max_size=200), st.recursive(st.integers(-(2**63), 2**63) | st.text(), st.lists).map(framed)
    )
)
def test_garbage_ends_only_its_own_connection(shelf: Shelf, garbage: bytes) -> None:
    host, _, port = shelf.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(proof_of(connection.recv(32, socket.MSG_WAITALL), shelf) + garbage)
        with contextlib.suppress(OSError):  # the server may have ended it already
            connection.shutdown(socket.SHUT_WR)
            assert len(connection.recv(33, socket.MSG_WAITALL)) <= 32, "nothing but the server's own proof"
    assert shelf.right(shelf.client.read(SOURCE, shelf.parts, True))


def test_a_size_that_cannot_be_takes_no_memory(shelf: Shelf) -> None:
    host, _, port = shelf.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(proof_of(connection.recv(32, socket.MSG_WAITALL), shelf) + struct.pack("<Q", 1 << 60))
        with contextlib.suppress(OSError):
            assert len(connection.recv(33, socket.MSG_WAITALL)) <= 32
    huge = struct.pack("<Q", 1 << 60)
    with (
        listening(lambda c: (greeted(c), c.sendall(huge))[0]) as address,
        pytest.raises(EOFError, match="no modelstore"),
    ):
        PieceClient(address, SECRET).read(SOURCE, shelf.parts, True)


@pytest.mark.parametrize("given_", [[], [True], [True] * 6])
def test_an_answer_for_other_pieces_is_refused(shelf: Shelf, given_: list[bool]) -> None:
    said = framed([given_, None])
    with (
        listening(lambda c: (greeted(c), c.sendall(said))[0]) as address,
        pytest.raises(EOFError, match="other pieces"),
    ):
        PieceClient(address, SECRET).read(SOURCE, shelf.parts, True)


@pytest.mark.parametrize("sent", [0, 4, 20, 1000, 299_000])
def test_a_host_that_dies_in_the_midst_of_an_answer(shelf: Shelf, sent: int) -> None:
    whole = framed([[True] * 5, None]) + bytes(300_106)
    with listening(lambda c: (greeted(c), c.sendall(whole[:sent]))[0]) as address:
        client = PieceClient(address, SECRET)
        with pytest.raises((EOFError, OSError)):
            client.read(SOURCE, shelf.parts, True)
        assert not client._idle, "a connection in the midst of an answer is used no more"


def test_a_host_that_says_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that does not greet, nor one that does not answer, is waited for without end."""
    over = threading.Event()
    monkeypatch.setattr(channel, "LIMIT", 0.2)
    monkeypatch.setattr(channel, "GREETING", 0.2)
    try:
        with listening(lambda _: (over.wait(30), None)[1]) as address:
            with pytest.raises(UnreachableError, match="no host of this cluster speaks"):
                PieceClient(address, SECRET).read(SOURCE, shelf.parts, True)
            over.set()
        over.clear()
        with listening(lambda c: (greeted(c), over.wait(30), None)[2]) as address:
            with pytest.raises(OSError):
                PieceClient(address, SECRET).read(SOURCE, shelf.parts, True)
            over.set()
    finally:
        over.set()


def test_a_reader_that_takes_nothing_lets_its_connection_go(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LIMIT", 0.2)
    before = set(threading.enumerate())
    with shelf_of([64 << 20]) as large:
        host, _, port = large.server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(proof_of(connection.recv(32, socket.MSG_WAITALL), large))
            connection.sendall(framed(wire._Request(SOURCE, large.parts, True)))
            done = next(t for t in set(threading.enumerate()) - before if "process_request_thread" in t.name)
            done.join(30)
            assert not done.is_alive()


# ---------------------------------------------------------------------- another way


def through(shelf: Shelf) -> tuple[Callable[[], Future[Any]], list[int]]:
    """The other way, and a list that grows by each use of it."""
    used: list[int] = []

    def instead() -> Future[Any]:
        used.append(1)
        future: Future[Any] = Future()
        future.set_result([shelf.data[part.digest] for part in shelf.parts])
        return future

    return instead, used


def test_without_an_address_or_a_secret_there_is_another_way(shelf: Shelf) -> None:
    instead, used = through(shelf)
    clients = PieceClients(SECRET.decode())
    assert shelf.right(clients.ask(shelf.server.address, SOURCE, shelf.parts, True, instead).result(60))
    assert not used
    assert shelf.right(clients.ask("", SOURCE, shelf.parts, True, instead).result(60))
    assert shelf.right(PieceClients("").ask(shelf.server.address, SOURCE, shelf.parts, True, instead).result(60))
    assert len(used) == 2
    assert len(shelf.asked) == 1


def test_who_cannot_be_reached_is_asked_in_another_way_for_a_while(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead, used = through(shelf)
    clients = PieceClients(SECRET.decode())
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setattr(wire, "_AVOIDED", 1e9)
    assert shelf.right(clients.ask(address, SOURCE, shelf.parts, True, instead).result(60))
    tried: list[int] = []
    monkeypatch.setattr(PieceClient, "_connect", lambda _: tried.append(1))
    assert shelf.right(clients.ask(address, SOURCE, shelf.parts, True, instead).result(60))
    assert (len(used), tried) == (2, [])
    clients._unreachable[address] = 0.0
    monkeypatch.undo()
    clients._clients[address] = shelf.client
    assert shelf.right(clients.ask(address, SOURCE, shelf.parts, True, instead).result(60))
    assert len(used) == 2


def test_options_that_only_python_can_write_take_another_way(shelf: Shelf) -> None:
    instead, used = through(shelf)
    source = StoreAddress("file:///store", {"session": object()})
    clients = PieceClients(SECRET.decode())
    assert shelf.right(clients.ask(shelf.server.address, source, shelf.parts, True, instead).result(60))
    assert used
    assert not shelf.asked


def test_an_error_on_the_way_is_the_callers(shelf: Shelf) -> None:
    """Nobody is asked twice: the next holder is quicker."""
    instead, used = through(shelf)
    with listening(greeted) as address, pytest.raises(EOFError):
        PieceClients(SECRET.decode()).ask(address, SOURCE, shelf.parts, True, instead).result(60)
    assert not used
