"""Pieces on their way from a host to who asks for them: over TCP, without the copies that Ray's objects take. Knows no Ray.

After the handshake of `channel`, again and again, a request (`_Request` in MessagePack, its size in 8 bytes before it), and its
answer (`_Answer`, likewise) with the bytes of the pieces behind it. Readers check digests.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np

from modelstore.cluster.network.channel import TLS, Greeting, deadline, exactly, fill, greet, meet, send
from modelstore.cluster.network.futures import in_thread
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.errors import ModelStoreError, StorageError
from modelstore.format.buffers import Bytes, view
from modelstore.format.objects.decoding import prepared

log = logging.getLogger("modelstore")

Read = Callable[[StoreAddress, Sequence[Piece], bool], Sequence[Bytes | None]]

_SIZE = struct.Struct("<Q")
_MESSAGE = 64 << 20  # bytes of a request, or of what stands before an answer, at most
_CONNECT = 1.0  # seconds: a peer that is no further away than a cluster's nodes answers sooner
_ASKING = 60.0  # seconds within which a request that began is there
_UNUSED = 600.0  # seconds without a request after which a server ends a connection
_FETCHES = 8  # requests that get something from elsewhere, at once: each may hold as much memory as it asks for
_CLOSING = 0.1  # seconds within which a server that is closed notices it
_IDLE = 8  # connections to one host that are kept
_AVOIDED = 30.0  # seconds for which a host that could not be reached is asked in another way


class UnreachableError(StorageError):
    """No connection comes about: a firewall, or nobody there."""


class _Request(msgspec.Struct, array_like=True):
    """Requested pieces; with `fetch` also those that the host does not have."""

    source: StoreAddress
    parts: list[Piece]
    fetch: bool


class _Answer(msgspec.Struct, array_like=True):
    """Whether each piece follows, in order; or why none does."""

    given: list[bool] = []
    error: str | None = None


class PieceServer:
    """Answers requests for pieces at an address of this machine, each connection in a thread of its own."""

    def __init__(self, host: str, secret: bytes, read: Read, tls: TLS | None = None) -> None:
        """`read(source, parts, fetch)` gives the pieces' bytes, None for what is not there. `OSError` without the address."""
        fetching = threading.BoundedSemaphore(_FETCHES)
        greeting = Greeting()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(
                    OSError, EOFError, msgspec.MsgspecError
                ):  # of one client, who sees that it ended
                    try:
                        self.request = greet(self.request, secret, address, tls)
                    finally:
                        greeting.end(self.client_address[0])
                    while True:
                        _answer(self.request, read, fetching)

            def finish(self) -> None:
                self.request.close()  # the encrypted one, where it took the plain one's place

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def verify_request(self, _: Any, client_address: Any) -> bool:
                return greeting.begin(client_address[0])

        self._server = Server((host, 0), Handler)
        self.address = address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, args=(_CLOSING,), daemon=True, name="modelstore-wire"
        ).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()


class PieceClient:
    """Asks the host at one address. Safe to use from many threads: each request has a connection to itself."""

    def __init__(self, address: str, secret: bytes, tls: TLS | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._tls = tls
        self._secret = secret
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()

    def read(self, source: StoreAddress, parts: Sequence[Piece], fetch: bool) -> list[Bytes | None]:
        """The pieces' bytes, unchecked; None for what is not there. Those of one call share their memory.

        `UnreachableError` if no connection comes about, `StorageError` for what the host could not read, `OSError` or
        `EOFError` if the connection broke, `TypeError` if the source cannot be written in MessagePack.
        """
        request = msgspec.msgpack.encode(_Request(source, list(parts), fetch))
        if len(request) > _MESSAGE:
            raise StorageError(f"a request for {len(parts)} pieces is too long: ask for fewer at once")
        while (idle := self._idle_one()) is not None:  # which the host may have ended meanwhile
            with contextlib.suppress(EOFError, ConnectionError):
                return self._read(idle, request, parts)
        return self._read(self._connect(), request, parts)

    def _read(self, connection: socket.socket, request: bytes, parts: Sequence[Piece]) -> list[Bytes | None]:
        """One request, after which the connection is kept; it is closed where that fails: it could bring anything."""
        try:
            send(connection, [_SIZE.pack(len(request)), request])
            answer = msgspec.msgpack.decode(_message(connection), type=prepared(_Answer))
            found = _receive(connection, parts, answer.given) if answer.error is None else []
        except BaseException:
            connection.close()
            raise
        with self._lock:
            kept = len(self._idle) < _IDLE
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.close()
        if answer.error is not None:
            raise StorageError(answer.error)
        return found

    def _idle_one(self) -> socket.socket | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _connect(self) -> socket.socket:
        where = f"{self._address[0]}:{self._address[1]}"
        try:
            connection = socket.create_connection(self._address, timeout=_CONNECT)
        except OSError as error:
            raise UnreachableError(f"no host answers at {where} ({error})") from None
        try:
            return meet(connection, self._secret, where, self._tls)
        except (OSError, EOFError) as error:
            connection.close()
            raise UnreachableError(f"no host of this cluster speaks at {where} ({error})") from None


class PieceClients:
    """Clients by address. One that cannot be reached is not tried again for a while: what there is instead is used."""

    def __init__(self, secret: str, tls: TLS | None = None) -> None:
        self._secret = secret.encode()
        self._tls = tls
        self._clients: dict[str, PieceClient] = {}
        self._unreachable: dict[str, float] = {}

    def ask(
        self,
        address: str,
        source: StoreAddress,
        parts: Sequence[Piece],
        fetch: bool,
        instead: Callable[[], Future[Any]],
    ) -> Future[Sequence[Bytes | None]]:
        """As `PieceClient.read`, in a thread; `instead` where there is no address, or nobody to be reached there."""
        if not address or not self._secret or time.monotonic() < self._unreachable.get(address, 0.0):
            return instead()
        client = self._clients.setdefault(address, PieceClient(address, self._secret, self._tls))

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


def _answer(connection: socket.socket, read: Read, fetching: threading.BoundedSemaphore) -> None:
    """One request's answer. `EOFError` when there are no more."""
    request = msgspec.msgpack.decode(_request(connection), type=prepared(_Request))
    found: Sequence[Bytes | None] = []
    try:
        with fetching if request.fetch else contextlib.nullcontext():
            found = read(request.source, request.parts, request.fetch)
        answer = _Answer([data is not None for data in found])
    except (ModelStoreError, OSError, ValueError) as error:
        answer = _Answer(error=str(error))
    head = msgspec.msgpack.encode(answer)
    send(connection, [_SIZE.pack(len(head)), head, *(data for data in found if data is not None)])


def _receive(connection: socket.socket, parts: Sequence[Piece], given: Sequence[bool]) -> list[Bytes | None]:
    """The pieces that follow, as long as they should be."""
    if len(given) != len(parts):
        raise EOFError("a host answered for other pieces than it was asked for")
    memory = np.empty(sum(part.length for part, there in zip(parts, given, strict=True) if there), np.uint8)
    fill(connection, view(memory))
    found: list[Bytes | None] = []
    at = 0
    for part, there in zip(parts, given, strict=True):
        found.append(memory[at : at + part.length] if there else None)
        at += part.length if there else 0
    return found


def _request(connection: socket.socket) -> memoryview:
    """The next request, waited for as long as none starts, up to a limit; one that started must come to its end."""
    if not _buffered(connection):
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        if not waiting.poll(_UNUSED * 1000):
            raise EOFError("nothing was asked for a long time")
    with deadline(connection, _ASKING):
        return _message(connection)


def _buffered(connection: socket.socket) -> bool:
    """Whether bytes were decrypted already, of which the kernel knows no more."""
    return isinstance(connection, ssl.SSLSocket) and connection.pending() > 0


def _message(connection: socket.socket) -> memoryview:
    size = _SIZE.unpack(exactly(connection, _SIZE.size))[0]
    if size > _MESSAGE:
        raise EOFError(f"a message of {size} bytes: what speaks there is no modelstore host")
    return exactly(connection, size)
