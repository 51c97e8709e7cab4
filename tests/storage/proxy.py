"""A TCP proxy before the S3 server, that drops, stalls or cuts connections on command."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

Rule = Callable[[int, bytes], str]


def pass_on(number: int, request: bytes) -> str:
    return "pass"


def _without(data: bytes, header: bytes | None) -> bytes:
    """What a client sent, without one header; its requests' heads arrive in one piece here."""
    if header is None:
        return data
    return re.sub(rb"(?im)^" + re.escape(header) + rb":[^\r\n]*\r\n", b"", data)


class Proxy:
    """Asks `rule` about the beginning of each request: 'pass', 'drop' (close), 'stall' (never answer), 'cut' (half an answer).

    `requests` are the first lines of the requests seen. `strip`: a header's name that is left out of every request.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.target = parts.hostname or "127.0.0.1", parts.port or 80
        self.rule: Rule = pass_on
        self.strip: bytes | None = None
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(self.target) as server:
            self._sockets.append(server)
            verdict = ["pass"]
            threading.Thread(target=self._answer, args=(server, client, verdict), daemon=True).start()
            while data := client.recv(1 << 16):
                if data.startswith((b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")):
                    with self._lock:
                        self.requests.append(data.split(b"\r\n", 1)[0].decode())
                        verdict[0] = self.rule(len(self.requests), data)
                if verdict[0] == "drop":
                    return
                if verdict[0] == "stall":
                    self._closed.wait()
                    return
                server.sendall(_without(data, self.strip))

    def _answer(self, server: socket.socket, client: socket.socket, verdict: list[str]) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if verdict[0] == "cut":
                    client.sendall(data[: len(data) - 10])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
