"""A TCP proxy before the S3 server, that drops, stalls or cuts connections on command."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

Rule = Callable[[int, bytes], str]


def pass_on(number: int, request: bytes) -> str:
    return "pass"


_AUTHORIZATION = re.compile(
    r"Credential=[^/]+/(?P<scope>[^,]+),\s*SignedHeaders=(?P<names>[^,]+),\s*Signature=(?P<signature>\w+)"
)


def _without(data: bytes, header: bytes | None) -> bytes:
    """What a client sent, without one header, signed anew; its requests' heads arrive in one piece here."""
    head, gap, body = data.partition(b"\r\n\r\n")
    short = re.sub(rb"(?im)\r\n" + re.escape(header or b"") + rb":[^\r\n]*", b"", head) if header else head
    return data if short == head else _signed_anew(short.decode("latin-1")).encode("latin-1") + gap + body


def _signed_anew(head: str) -> str:
    """A request's head with the right signature (AWS Signature Version 4) of those signed headers that it still has."""
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    was = _AUTHORIZATION.search(headers.get("authorization", ""))
    if was is None:
        return head
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    names = [name for name in was["names"].split(";") if name in headers]
    signed = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in names)
    asked = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&"))) if query else ""
    request = "\n".join((method, path, asked, signed, ";".join(names), headers["x-amz-content-sha256"]))
    scope = was["scope"]
    text = "\n".join(("AWS4-HMAC-SHA256", headers["x-amz-date"], scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{os.environ['AWS_SECRET_ACCESS_KEY']}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.digest(key, part.encode(), "sha256")
    return head.replace(was["names"], ";".join(names)).replace(was["signature"], key.hex())


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
