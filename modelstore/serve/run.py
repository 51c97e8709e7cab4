"""The server as a process: its settings, its socket, its log, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import uvicorn

from modelstore.errors import StorageError, UnsupportedError
from modelstore.serve.access.gate import Gate
from modelstore.serve.access.limits import CallerLimits
from modelstore.serve.access.tokens import TokenFile
from modelstore.serve.app import HubApp
from modelstore.serve.connections import BoundedConnection
from modelstore.serve.reading.digests import Digests
from modelstore.serve.reading.library import Library
from modelstore.serve.reading.sending import Turns
from modelstore.serve.visits import Visit
from modelstore.serve.writing.spool import UploadSpool

if TYPE_CHECKING:
    from modelstore.client import Store

log = logging.getLogger("modelstore")

CONNECTIONS = 1000  # at once; more are answered 503
LARGEST_HEAD = 32 << 10  # bytes of a request's line and headers


@dataclass(frozen=True)
class ServerSettings:
    """How a store is served. Times are seconds; None of a limit: no limit."""

    host: str = "127.0.0.1"
    port: int = 8000
    cache: Path = Path()
    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    a_minute: int | None = None
    at_once: int | None = None
    turns: int = 8
    drain: float = 30.0
    spool: Path | None = None
    most: int = 1 << 40
    access: IO[str] | None = None


def serve(store: Store, settings: ServerSettings, ready: Callable[[str], None]) -> None:
    """Serve a store until SIGTERM or SIGINT; requests under way then have `drain` seconds to end.

    Args:
        store: The store to serve; its memory is that of one file that is made.
        settings: How.
        ready: Called with the server's URL once it can be connected to.

    Raises:
        UnsupportedError: Others could reach the server, and no tokens are asked for.
        StorageError: The address cannot be listened on.
        NotFoundError: There is no store.
    """
    if settings.tokens is None and not is_loopback(settings.host):
        raise UnsupportedError(
            f"{settings.host} can be reached from elsewhere, and nobody is asked for a token: make tokens with "
            "'modelstore token create', and give their file as --tokens"
        )
    store.repo.catalog.open()
    listening = _listen(settings.host, settings.port)
    asyncio.run(_serve(store, settings, listening, ready))


async def _serve(
    store: Store, settings: ServerSettings, listening: socket.socket, ready: Callable[[str], None]
) -> None:
    digests = Digests(settings.cache)
    own = settings.cache / "spool" / store.repo.catalog.open().id
    spool = UploadSpool(settings.spool or own, settings.most)
    gate = Gate(TokenFile(settings.tokens) if settings.tokens else None)
    limits = CallerLimits(settings.a_minute, settings.at_once)
    library = Library(store)
    app = HubApp(library, digests, gate, limits, Turns(settings.turns), spool, _journal(settings.access))
    threading.Thread(target=_warm, args=(library, app), name="modelstore-warm", daemon=True).start()
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        backlog=2048,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        h11_max_incomplete_event_size=LARGEST_HEAD,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    server = uvicorn.Server(config)
    app.feed.ends = lambda: server.should_exit
    host, port = listening.getsockname()[:2]
    ready(f"{'https' if settings.certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        await server.serve(sockets=[listening])
    finally:
        digests.close()
        spool.close()


def _warm(library: Library, app: HubApp) -> None:
    try:
        library.warm()
    except Exception as error:  # the store answers that to the caller
        log.warning("cannot warm up: %s", error)
    finally:
        app.warmed.set()


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host's name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise StorageError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from None
    listening.setblocking(False)
    return listening


def _journal(out: IO[str] | None) -> Callable[[Visit], None]:
    """The writer of a line of JSON for every request."""

    def write(visit: Visit) -> None:
        if out is None:
            return
        request = visit.request
        line = {
            "time": round(time.time(), 3),
            "client": request.client.host if request.client else None,
            "token": visit.caller.id if visit.caller else None,
            "method": request.method,
            "path": request.scope["raw_path"].decode("ascii", "replace"),
            "range": request.headers.get("range"),
            "status": visit.status,
            "sent": visit.sent,
            "seconds": round(time.monotonic() - visit.started, 4),
            "cut": visit.cut,
            "agent": request.headers.get("user-agent", "")[:200],
        }
        try:
            out.write(json.dumps(line) + "\n")
            out.flush()
        except OSError as error:  # a full disk ends the log, not the answer
            sys.stderr.write(f"modelstore: the access log cannot be written: {error}\n")

    return write
