"""Connections between hosts and readers: both sides prove who they are before anything else is sent.

Server: 32 random bytes. Client: 32 random bytes, and its proof. Server: its proof. A proof is BLAKE3, keyed with the cluster's
secret, of the role, both nonces, and the channel: the address that was dialled, and with TLS the server's certificate. So who
knows no secret can neither use a proof twice, nor hand it on from another address, nor, with TLS, from within the connection.
Without TLS nothing is encrypted: who can change packets between two machines can take over a connection of theirs.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from blake3 import blake3

from modelstore.errors import StorageError
from modelstore.format.buffers import Bytes
from modelstore.format.digest import digest_of

NONCE = 32
GREETING = 5.0  # seconds that a handshake may take, all of it
LIMIT = 60.0  # seconds without a byte after which a connection is given up
GREETED = 256  # handshakes at once
FROM_ONE = 32  # of these from one address
_STEP = 1 << 20  # bytes of a message for which memory is taken at once: what is announced need not come
_VECTORS = 512  # buffers that one system call takes


class TLS:
    """This process's certificate and the cluster's authority, from the environment that Ray's own TLS reads."""

    def __init__(self, cert: str, key: str, authority: str) -> None:
        """PEM files. `OSError` (`ssl.SSLError` is one) where one cannot be read."""
        self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
        self.client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority)
        self.client.check_hostname = (
            False  # every certificate of the authority is of this cluster, under whatever address
        )
        for context in (self.server, self.client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(cert, key)
        with open(cert) as file:  # noqa: PTH123
            self.own = ssl.PEM_cert_to_DER_cert(_first_certificate(file.read()))

    @classmethod
    def from_environment(cls) -> TLS | None:
        """As RAY_USE_TLS and the RAY_TLS_ variables say; None without. `StorageError` if they name no certificate."""
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            return None
        files = [os.environ.get(f"RAY_TLS_{name}", "") for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")]
        try:
            return cls(*files)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"RAY_USE_TLS is set, and the files that RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT name cannot "
                f"be used ({error}): set them"
            ) from None


def _first_certificate(text: str) -> str:
    end = "-----END CERTIFICATE-----"
    return text[text.index("-----BEGIN CERTIFICATE-----") : text.index(end) + len(end)] + "\n"


class Greeting:
    """How many handshakes are under way, by address: a server takes no more than so many."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, address: str) -> bool:
        """Whether one more may start."""
        with self._lock:
            if self._open.total() >= GREETED or self._open[address] >= FROM_ONE:
                return False
            self._open[address] += 1
            return True

    def end(self, address: str) -> None:
        """One is over."""
        with self._lock:
            self._open[address] -= 1
            if self._open[address] <= 0:
                del self._open[address]


@contextlib.contextmanager
def deadline(connection: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection that is still within the block after so many seconds, however often a byte of it comes."""

    twin = socket.socket(
        fileno=os.dup(connection.fileno())
    )  # what is encrypted meanwhile takes the connection's own away

    def cut() -> None:
        with contextlib.suppress(OSError):
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        twin.close()


def greet(connection: socket.socket, secret: bytes, address: str, tls: TLS | None) -> socket.socket:
    """A server's part. `EOFError` or `OSError` if the other side is not of the cluster."""
    with deadline(connection, GREETING):
        connection.settimeout(GREETING)
        channel = _channel(address, tls.own if tls else b"")
        if tls:
            connection = tls.server.wrap_socket(connection, server_side=True)
        nonce = os.urandom(NONCE)
        connection.sendall(nonce)
        said = bytes(exactly(connection, 2 * NONCE))
        theirs, proof = said[:NONCE], said[NONCE:]
        if not hmac.compare_digest(proof, prove(b"client", nonce, theirs, channel, secret)):
            raise EOFError("the other side does not know the cluster's secret")
        connection.sendall(prove(b"server", nonce, theirs, channel, secret))
    return _prepared(connection)


def meet(connection: socket.socket, secret: bytes, address: str, tls: TLS | None) -> socket.socket:
    """A client's part. Errors as for `greet`."""
    with deadline(connection, GREETING):
        connection.settimeout(GREETING)
        certificate = b""
        if tls:
            wrapped = tls.client.wrap_socket(connection)
            certificate = wrapped.getpeercert(binary_form=True) or b""
            connection = wrapped
        channel = _channel(address, certificate)
        theirs, nonce = bytes(exactly(connection, NONCE)), os.urandom(NONCE)
        connection.sendall(nonce + prove(b"client", theirs, nonce, channel, secret))
        if not hmac.compare_digest(bytes(exactly(connection, NONCE)), prove(b"server", theirs, nonce, channel, secret)):
            raise EOFError("the other side does not know the cluster's secret")
    return _prepared(connection)


def prove(role: bytes, server: bytes, client: bytes, channel: bytes, secret: bytes) -> bytes:
    """The proof of two nonces and a channel, which only a holder of the secret can make. Pure."""
    return blake3(role + server + client + channel, key=blake3(secret).digest()).digest()


def _channel(address: str, certificate: bytes) -> bytes:
    return digest_of(address.encode()) + digest_of(certificate)


def _prepared(connection: socket.socket) -> socket.socket:
    """A connection whose calls end when nothing moves, and that sends small messages immediately; a peer that vanished is
    noticed.
    """
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(LIMIT)
    else:  # by the kernel: a timeout of Python's would make every call two
        limit = struct.pack("ll", int(LIMIT), int(LIMIT % 1 * 1e6))
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def exactly(connection: socket.socket, size: int) -> memoryview:
    """So many bytes; memory for them is taken as they come. `EOFError` if the other side ends before."""
    if size <= _STEP:
        memory = memoryview(bytearray(size))
        fill(connection, memory)
        return memory
    whole = bytearray()
    while len(whole) < size:
        part = memoryview(bytearray(min(_STEP, size - len(whole))))
        fill(connection, part)
        whole += part
    return memoryview(whole)


def fill(connection: socket.socket, memory: memoryview) -> None:
    """Receive until the memory is full, in as few system calls as it takes. `EOFError` if the other side ends before."""
    flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
    while memory:
        got = connection.recv_into(memory, 0, flags)
        if not got:
            raise EOFError("the other side closed the connection")
        memory = memory[got:]


def send(connection: socket.socket, buffers: Sequence[bytes | Bytes]) -> None:
    """Send all of these, without a copy of them."""
    left = [memoryview(data) for data in buffers if len(data)]  # type: ignore[arg-type]
    if isinstance(connection, ssl.SSLSocket):
        for data in left:
            connection.sendall(data)
        return
    while left:
        sent = connection.sendmsg(left[:_VECTORS])
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
