"""Pieces on their way from a host to who asks for them: over TCP, without the copies that Ray's objects take. Knows no Ray.

Server: 32 random bytes. Client: their BLAKE3 keyed with the cluster's secret. Then, again and again, a request (`_Request`
in MessagePack, its size in 8 bytes before it), and its answer (`_Answer`, likewise) with the bytes of the pieces behind it.
Nothing is encrypted, as between Ray's nodes; readers check digests.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from modelstore.cluster.pieces import Piece, Source
from modelstore.errors import ModelStoreError, StorageError
from modelstore.format.buffers import Bytes, view

log = logging.getLogger("modelstore")

Read = Callable[[Source, Sequence[Piece], bool], Sequence[Bytes | None]]

_NONCE = 32
_SIZE = struct.Struct("<Q")
_MESSAGE = 64 << 20  # bytes of a request, or of what stands before an answer, at most
_CONNECT = 1.0  # seconds: who is no further away than a cluster's nodes answers sooner
_LIMIT = struct.pack("ll", 60, 0)  # seconds, and microseconds, without a byte after which a connection is given up
_FETCHES = 8  # requests that get something from elsewhere, at once: each may hold as much memory as it asks for
_CLOSING = 0.1  # seconds within which a server that is closed notices it
_IDLE = 8  # connections to one host that are kept
_AVOIDED = 30.0  # seconds for which a host that could not be reached is asked in another way
_VECTORS = 512  # buffers that one system call takes


class UnreachableError(StorageError):
    """No connection comes about: a firewall, or nobody there."""


class _Request(msgspec.Struct, array_like=True):
    """Pieces that are wanted; with `fetch` also what the host has not got."""

    source: Source
    parts: list[Piece]
    fetch: bool


class _Answer(msgspec.Struct, array_like=True):
    """Whether each piece follows, in order; or why none does."""

    given: list[bool] = []
    error: str | None = None


class PieceServer:
    """Answers requests for pieces at an address of this machine, each connection in a thread of its own."""

    def __init__(self, host: str, secret: bytes, read: Read) -> None:
        """`read(source, parts, fetch)` gives the pieces' bytes, None for what is not there. `OSError` without the address."""
        fetching = threading.BoundedSemaphore(_FETCHES)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(
                    OSError, EOFError, msgspec.MsgspecError
                ):  # of one client, who sees that it ended
                    _prepare(self.request)
                    if _is_known(self.request, secret):
                        while True:
                            _answer(self.request, read, fetching)

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server((host, 0), Handler)
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, args=(_CLOSING,), daemon=True, name="modelstore-wire"
        ).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()


class PieceClient:
    """Asks the host at one address. Safe to use from many threads: each request has a connection to itself."""

    def __init__(self, address: str, secret: bytes) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._secret = secret
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()

    def read(self, source: Source, parts: Sequence[Piece], fetch: bool) -> list[Bytes | None]:
        """The pieces' bytes, unchecked; None for what is not there. Those of one call share their memory.

        `UnreachableError` where no connection comes about, `StorageError` for what the host could not read, `OSError` or
        `EOFError` where the connection broke, `TypeError` where the source cannot be written in MessagePack.
        """
        request = msgspec.msgpack.encode(_Request(source, list(parts), fetch))
        with self._connection() as connection:
            _send(connection, [_SIZE.pack(len(request)), request])
            answer = msgspec.msgpack.decode(_message(connection), type=_Answer)
            if answer.error is None:
                return _receive(connection, parts, answer.given)
        raise StorageError(answer.error)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        """A connection for one request, closed where that fails, for nobody knows then what it would bring next."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> socket.socket:
        try:
            connection = socket.create_connection(self._address, timeout=_CONNECT)
        except OSError as error:
            raise UnreachableError(f"no host answers at {self._address[0]}:{self._address[1]} ({error})") from None
        try:
            nonce = bytes(_exactly(connection, _NONCE))
            _prepare(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LIMIT)
            _send(connection, [_proof(nonce, self._secret)])
        except (OSError, EOFError) as error:
            connection.close()
            raise UnreachableError(f"no host speaks at {self._address[0]}:{self._address[1]} ({error})") from None
        return connection


class PieceClients:
    """Clients by address. One that cannot be reached is not tried again for a while: what there is instead is used."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._clients: dict[str, PieceClient] = {}
        self._unreachable: dict[str, float] = {}

    def ask(
        self, address: str, source: Source, parts: Sequence[Piece], fetch: bool, instead: Callable[[], Future[Any]]
    ) -> Future[Sequence[Bytes | None]]:
        """As `PieceClient.read`, in a thread; `instead` where there is no address, or nobody to be reached there."""
        if not address or not self._secret or time.monotonic() < self._unreachable.get(address, 0.0):
            return instead()
        client = self._clients.setdefault(address, PieceClient(address, self._secret))

        def read() -> Sequence[Bytes | None]:
            try:
                return client.read(source, parts, fetch)
            except UnreachableError as error:
                log.info("%s: its pieces come through Ray", error)
                self._unreachable[address] = time.monotonic() + _AVOIDED
            except TypeError:  # options of the storage that only Python can write
                pass
            given: Sequence[Bytes | None] = instead().result()
            return given

        return in_thread(read)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """What `work` returns or raises, once it has, in a thread of its own: one that hangs takes none away from others."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="modelstore-ask").start()
    return future


def _prepare(connection: socket.socket) -> None:
    """Blocking calls that end when nothing moves; small messages at once; a peer that vanished is noticed."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _LIMIT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _is_known(connection: socket.socket, secret: bytes) -> bool:
    nonce = os.urandom(_NONCE)
    connection.settimeout(_CONNECT)
    connection.sendall(nonce)
    said = bytes(_exactly(connection, _NONCE))
    connection.settimeout(None)
    return hmac.compare_digest(said, _proof(nonce, secret))


def _proof(nonce: bytes, secret: bytes) -> bytes:
    return blake3(nonce, key=blake3(secret).digest()).digest()


def _answer(connection: socket.socket, read: Read, fetching: threading.BoundedSemaphore) -> None:
    """One request's answer. `EOFError` when there are no more."""
    request = msgspec.msgpack.decode(_message(connection), type=_Request)
    found: Sequence[Bytes | None] = []
    try:
        with fetching if request.fetch else contextlib.nullcontext():
            found = read(request.source, request.parts, request.fetch)
        answer = _Answer([data is not None for data in found])
    except (ModelStoreError, OSError, ValueError) as error:
        answer = _Answer(error=str(error))
    head = msgspec.msgpack.encode(answer)
    _send(connection, [_SIZE.pack(len(head)), head, *(data for data in found if data is not None)])


def _receive(connection: socket.socket, parts: Sequence[Piece], given: Sequence[bool]) -> list[Bytes | None]:
    """The pieces that follow, as long as they should be."""
    if len(given) != len(parts):
        raise EOFError("a host answered for other pieces than it was asked for")
    memory = np.empty(sum(part.length for part, there in zip(parts, given, strict=True) if there), np.uint8)
    _fill(connection, view(memory))
    found: list[Bytes | None] = []
    at = 0
    for part, there in zip(parts, given, strict=True):
        found.append(memory[at : at + part.length] if there else None)
        at += part.length if there else 0
    return found


def _message(connection: socket.socket) -> memoryview:
    size = _SIZE.unpack(_exactly(connection, _SIZE.size))[0]
    if size > _MESSAGE:
        raise EOFError(f"a message of {size} bytes: what speaks there is no modelstore host")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> memoryview:
    memory = memoryview(bytearray(size))
    _fill(connection, memory)
    return memory


def _fill(connection: socket.socket, memory: memoryview) -> None:
    """Receive until the memory is full, in as few system calls as it takes. `EOFError` where the other side ends before."""
    while memory:
        got = connection.recv_into(memory, 0, socket.MSG_WAITALL)
        if not got:
            raise EOFError("the other side closed the connection")
        memory = memory[got:]


def _send(connection: socket.socket, buffers: Sequence[bytes | Bytes]) -> None:
    """Send all of these, without a copy of them."""
    left = [memoryview(data) for data in buffers if len(data)]  # type: ignore[arg-type]
    while left:
        sent = connection.sendmsg(left[:_VECTORS])
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
