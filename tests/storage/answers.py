"""A server on loopback that answers as it is told: for what no real server says on demand."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any


def xml(code: str, message: str = "said so") -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message><RequestId>R</RequestId></Error>'.encode()


class Answers:
    """Gives the answers of `script` (status, body), one a request, then 200; `seen` are method, path and headers."""

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes]] = []
        self.always: tuple[int, bytes] | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.endpoint = ""


@contextmanager
def answering(context: Any = None) -> Iterator[Answers]:
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            answers.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            status, body = answers.always or (answers.script.pop(0) if answers.script else (200, b""))
            self.send_response(status)
            for name, value in (
                ("content-length", str(len(body))),
                ("etag", '"e"'),
                ("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    answers.endpoint = f"http{'s' * (context is not None)}://127.0.0.1:{server.server_port}"
    try:
        yield answers
    finally:
        server.shutdown()
        server.server_close()


def certified(folder: Path) -> tuple[str, ssl.SSLContext]:
    """An authority of its own, as a file, and a server's context with a certificate for 127.0.0.1 that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(name: str, issuer: str, key: Any, by: Any, extension: Any) -> Any:
        attribute = x509.oid.NameOID.COMMON_NAME
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(attribute, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(attribute, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(extension, critical=False)
        )
        return builder.sign(by, hashes.SHA256())

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = signed("authority", "authority", authority, authority, x509.BasicConstraints(ca=True, path_length=None))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = signed("server", "authority", own, authority, names)
    pem = serialization.Encoding.PEM
    bundle, chain = folder / "authority.pem", folder / "server.pem"
    bundle.write_bytes(root.public_bytes(pem))
    private = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain.write_bytes(leaf.public_bytes(pem) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return str(bundle), context
