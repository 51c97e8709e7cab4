"""Attacks on the connections between hosts and readers: relays, imposters, and those who only hold connections open."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from modelstore.cluster.network import certificates, channel, wire
from modelstore.cluster.network.channel import TLS
from modelstore.cluster.network.wire import PieceClient, PieceServer, UnreachableError
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.errors import FormatError

SECRET = b"known to the cluster"
SOURCE = StoreAddress("s3://bucket", {"secret_access_key": "credential"})
DATA = np.arange(3 << 20, dtype=np.uint32).view(np.uint8)
PART = Piece(blake3(DATA).digest(), "ab" * 32, 0, len(DATA))


def tls_of(folder: Path, authority: Path) -> TLS:
    made = certificates.issue(authority, folder, ["127.0.0.1"])
    return TLS(made["RAY_TLS_SERVER_CERT"], made["RAY_TLS_SERVER_KEY"], made["RAY_TLS_CA_CERT"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TLS, TLS, TLS]:
    """A host's, a reader's, and that of another cluster."""
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = certificates.new_authority(folder / "ours"), certificates.new_authority(folder / "theirs")
    return tls_of(folder / "host", ours), tls_of(folder / "reader", ours), tls_of(folder / "other", theirs)


@contextlib.contextmanager
def serving(tls: TLS | None = None) -> Iterator[PieceServer]:
    server = PieceServer("127.0.0.1", SECRET, lambda *_: [DATA], tls)
    try:
        yield server
    finally:
        server.close()


def dial(server: PieceServer) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), 10)


class Relay:
    """A man in the middle who knows no secret: hands on, from an address of his own or in the place of the host, what is said."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.heard = bytearray()
        self.flips = False
        self.connect = socket.create_connection
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                host = self.connect(self.target)
                for a, b in ((client, host), (host, client)):
                    threading.Thread(target=self._hand_on, args=(a, b), daemon=True).start()

    def _hand_on(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                self.heard += data
                b.sendall(data if not self.flips else data[:-1] + bytes([data[-1] ^ 1]))
            b.shutdown(socket.SHUT_WR)


def test_what_is_encrypted_is_the_same(made: tuple[TLS, TLS, TLS]) -> None:
    with serving(made[0]) as server:
        client = PieceClient(server.address, SECRET, made[1])
        for _ in range(2):
            (found,) = client.read(SOURCE, [PART], True)
            assert found is not None
            assert bytes(found) == bytes(DATA)
        assert len(client._idle) == 1


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_proof_that_is_handed_on_from_another_address_is_worth_nothing(
    made: tuple[TLS, TLS, TLS], encrypted: bool
) -> None:
    host, reader = made[:2] if encrypted else (None, None)
    with serving(host) as server:
        relay = Relay(server.address)
        with pytest.raises(UnreachableError):
            PieceClient(relay.address, SECRET, reader).read(SOURCE, [PART], True)
        assert b"credential" not in relay.heard


def diverted(monkeypatch: pytest.MonkeyPatch, server: PieceServer, address: Any) -> None:
    """Who dials the host's address gets to another one, as who sits on the wire can bring about."""
    connect = socket.create_connection
    host, _, port = server.address.rpartition(":")
    monkeypatch.setattr(
        socket, "create_connection", lambda to, *a, **k: connect(address if to == (host, int(port)) else to, *a, **k)
    )


def test_who_sits_on_the_wire_itself_reads_and_changes_nothing_with_tls(
    made: tuple[TLS, TLS, TLS], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(made[0]) as server:
        relay = Relay(server.address)
        relay.connect = socket.create_connection
        diverted(monkeypatch, server, relay.server.getsockname())
        client = PieceClient(server.address, SECRET, made[1])
        assert client.read(SOURCE, [PART], True)
        assert len(relay.heard) > len(DATA), "all of it went through him"
        assert b"credential" not in relay.heard
        assert bytes(DATA[4096:4160]) not in relay.heard
        relay.flips = True
        with pytest.raises((OSError, EOFError, UnreachableError)):
            client.read(SOURCE, [PART], True)


@pytest.mark.parametrize("whose", ["another cluster's", "this cluster's"])
def test_an_imposter_with_tls_of_his_own_is_found_out(
    made: tuple[TLS, TLS, TLS], monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """He sits on the wire and ends the encryption on both sides, but does not know the secret."""
    imposter = made[1] if whose == "this cluster's" else made[2]
    heard: list[bytes] = []
    with serving(made[0]) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        direct = dial(server)

        def talk() -> None:
            with contextlib.suppress(OSError, EOFError):
                plain, _ = listener.accept()
                reader = imposter.server.wrap_socket(plain, server_side=True)
                host = imposter.client.wrap_socket(direct)
                reader.sendall(bytes(channel.exactly(host, 32)))
                host.sendall(bytes(channel.exactly(reader, 64)))
                reader.sendall(bytes(channel.exactly(host, 32)))
                heard.append(reader.recv(1))

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        diverted(monkeypatch, server, listener.getsockname())
        monkeypatch.setattr(channel, "GREETING", 2.0)
        with pytest.raises(UnreachableError):
            PieceClient(server.address, SECRET, made[1]).read(SOURCE, [PART], True)
        direct.close()
        thread.join(30)
        assert not thread.is_alive()
    assert heard in ([], [b""])


@pytest.mark.parametrize("who", ["plain", "another cluster's", "without a certificate"])
def test_who_is_not_of_the_cluster_is_told_nothing(
    made: tuple[TLS, TLS, TLS], monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(channel, "GREETING", 1.0)
    with serving(made[0]) as server:
        if who == "without a certificate":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            said = b""
            with contextlib.suppress(OSError), context.wrap_socket(dial(server)) as connection:
                said = connection.recv(1)
            assert said == b""
        else:
            with pytest.raises(UnreachableError):
                PieceClient(server.address, SECRET, made[2] if who != "plain" else None).read(SOURCE, [PART], True)
        assert PieceClient(server.address, SECRET, made[1]).read(SOURCE, [PART], True)


def test_a_false_host_is_not_sent_the_credentials(made: tuple[TLS, TLS, TLS]) -> None:
    """It greets, and takes any proof, but has none of its own."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.sendall(bytes(32))
                heard.extend(connection.recv(64, socket.MSG_WAITALL))
                connection.sendall(bytes(32))
                while data := connection.recv(1 << 16):
                    heard.extend(data)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        with pytest.raises(UnreachableError, match="does not know the cluster's secret"):
            PieceClient(f"127.0.0.1:{listener.getsockname()[1]}", SECRET).read(SOURCE, [PART], True)
        thread.join(30)
        assert not thread.is_alive()
    assert len(heard) == 64


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("says", ["nothing", "a byte now and then", "a long announcement"])
def test_who_only_holds_a_connection_loses_it(
    made: tuple[TLS, TLS, TLS], monkeypatch: pytest.MonkeyPatch, encrypted: bool, says: str
) -> None:
    monkeypatch.setattr(channel, "GREETING", 0.5)
    with serving(made[0] if encrypted else None) as server, dial(server) as connection:
        if says == "a long announcement":
            connection.sendall(struct.pack("<Q", 64 << 20))
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 30:
                if says == "a byte now and then":
                    connection.sendall(b"\x16")
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(64):
                        break
        assert time.monotonic() - began < 30, "it is held"


def test_an_announcement_of_one_who_is_known_takes_neither_memory_nor_a_connection_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "_ASKING", 0.3)
    with serving() as server, dial(server) as plain:
        connection = channel.meet(plain, SECRET, server.address, None)
        connection.sendall(struct.pack("<Q", 64 << 20) + b"x")
        connection.settimeout(30)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


def test_who_asks_nothing_for_long_loses_the_connection_and_the_client_makes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "_UNUSED", 0.1)
    with serving() as server:
        client = PieceClient(server.address, SECRET)
        assert client.read(SOURCE, [PART], True)
        (idle,) = client._idle
        idle.settimeout(30)
        assert idle.recv(1, socket.MSG_PEEK) == b"", "the host ended it"
        assert client.read(SOURCE, [PART], True)


def test_handshakes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One address cannot take them all, and those that are over count no more."""
    monkeypatch.setattr(channel, "FROM_ONE", 3)
    with serving() as server:
        waiting = [dial(server) for _ in range(3)]
        for connection in waiting:
            assert len(connection.recv(32, socket.MSG_WAITALL)) == 32
        with dial(server) as refused, contextlib.suppress(ConnectionError):
            assert refused.recv(1) == b""
        for connection in waiting:
            connection.close()
        client = PieceClient(server.address, SECRET)
        end = time.monotonic() + 30
        while True:
            try:
                assert client.read(SOURCE, [PART], True)
                break
            except UnreachableError:
                assert time.monotonic() < end


def test_an_authority_is_only_ones_own(tmp_path: Path) -> None:
    authority = certificates.new_authority(tmp_path / "a")
    assert authority.stat().st_mode & 0o777 == 0o600
    certificates.issue(authority, tmp_path / "n", ["192.0.2.1", "node.example"])
    for path in (tmp_path / "n").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    authority.chmod(0o666)
    with pytest.raises(FormatError, match="only you can change"):
        certificates.issue(authority, tmp_path / "n", ["192.0.2.1"])
    (tmp_path / "token").write_text("token")
    with pytest.raises(FormatError, match="not an authority"):
        certificates.issue(tmp_path / "token", tmp_path / "n", ["192.0.2.1"])
