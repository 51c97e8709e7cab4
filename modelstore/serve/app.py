"""One request, from its head to its answer: an ASGI application, for uvicorn or any other server of such."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from modelstore.format.names import is_model
from modelstore.serve.access.gate import Gate
from modelstore.serve.access.limits import CallerLimits
from modelstore.serve.metrics import Metrics
from modelstore.serve.reading.answers import PAGE, Answers, Listed, etag, whoami
from modelstore.serve.reading.digests import Digests
from modelstore.serve.reading.feed import MODELS, Feed
from modelstore.serve.reading.library import Library
from modelstore.serve.reading.ranges import parse_range
from modelstore.serve.reading.sending import ClientGoneError, Connection, Turns, send_range
from modelstore.serve.refusals import RefusedError, no_model, refusal
from modelstore.serve.routes import METHODS, READS, parse_path
from modelstore.serve.visits import Visit
from modelstore.serve.writing import bodies
from modelstore.serve.writing.changes import Writing
from modelstore.serve.writing.posting import Posting
from modelstore.serve.writing.spool import UploadSpool

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from modelstore.execute.export.view import ExportedFile

log = logging.getLogger("modelstore")
_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}


class HubApp:
    """The Hub's protocol over a library."""

    def __init__(
        self,
        library: Library,
        digests: Digests,
        gate: Gate,
        limits: CallerLimits,
        turns: Turns,
        spool: UploadSpool,
        journal: Callable[[Visit], None],
    ) -> None:
        self._library = library
        self._digests = digests
        self._answers = Answers(library, digests)
        self._gate = gate
        self._limits = limits
        self._turns = turns
        self._journal = journal
        self._metrics = Metrics()
        self.warmed = threading.Event()  # until then others are better asked
        self.feed = Feed(library, self._run)
        self._streams = {"resolve": self._file, "changes": self._changes}
        self._kinds: dict[str, Callable[[Visit], Awaitable[Response | None]]] = {
            "health": self._health,
            "ready": self._ready,
            "metrics": self._counted,
            "whoami": self._whoami,
            "list": self._list,
            "revision": self._info,
            "tree": self._tree,
            "refs": self._refs,
            "commits": self._commits,
            "paths-info": self._paths_info,
            **Posting(Writing(library, digests, spool), spool, self._run).kinds,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            return
        visit = Visit(Request(scope, receive))
        self._metrics.begin()
        try:
            await self._answer(visit, scope, receive, send)
        finally:
            seconds = time.monotonic() - visit.started
            self._metrics.end(
                visit.target.kind, visit.status, seconds, visit.sent, received=visit.received, cut=visit.cut
            )
            self._journal(visit)

    async def _answer(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(visit)
            with self._limits.request(visit.name):
                if visit.target.kind in self._streams:
                    await self._streams[visit.target.kind](visit, receive, send)
                    return
                answer = await self._kinds[visit.target.kind](visit)
        except ClientGoneError as gone:
            log.info("%s: %s", visit.request.url.path, gone)
            visit.cut = True
            visit.status = visit.status or 499
            scope["state"]["abort"]()
            return
        except Exception as error:
            if visit.status:  # the head of the answer is sent: the client sees that the rest is missing
                log.error("%s: %s", visit.request.url.path, error, exc_info=error)
                visit.cut = True
                scope["state"]["abort"]()
                return
            answer = _refused(error)
        assert answer is not None
        visit.status = answer.status_code
        visit.sent = len(answer.body)
        await answer(scope, receive, send)

    def _admit(self, visit: Visit) -> None:
        request = visit.request
        visit.target = target = parse_path(request.scope["raw_path"])
        allowed = METHODS.get(target.kind, READS)
        if request.method not in allowed:
            said = ", ".join(allowed)
            raise RefusedError(405, f"{request.method} is not for this path: {said} is", headers={"Allow": said})
        if request.method not in READS and request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RefusedError(403, "a page of another site may change nothing here")
        visit.caller = self._gate.caller(request.headers.get("authorization", ""))
        self._gate.check(visit.caller, target)

    async def _run(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Work that reads the store, in a thread."""
        return await to_thread.run_sync(partial(work, *args, **options), limiter=self._turns.threads)

    # ------------------------------------------------------------------ a file

    async def _file(self, visit: Visit, receive: Receive, send: Send) -> None:
        target, request = visit.target, visit.request
        commit = await self._run(self._library.commit, target.model, target.revision)
        file: ExportedFile = await self._run(self._library.file, commit, target.path)
        mark = f'"{etag(file)}"'
        headers = {
            "ETag": mark,
            "X-Repo-Commit": commit.id,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            **_SAFE,
        }
        if mark in [one.strip() for one in request.headers.get("if-none-match", "").split(",")]:
            await self._head(visit, send, 304, headers)
            await send({"type": "http.response.body", "body": b""})
            return
        start, stop, status = 0, file.size, 200
        asked = request.headers.get("range")
        if asked is not None and request.headers.get("if-range", mark) == mark:
            start, stop = parse_range(asked, file.size)
            headers["Content-Range"], status = f"bytes {start}-{stop - 1}/{file.size}", 206
        headers["Content-Length"] = str(stop - start)
        await self._head(visit, send, status, headers)
        if request.method != "HEAD":
            connection = Connection(receive, send)
            try:
                known = await self._run(self._digests.known, file)
                finder = self._digests if known is None else None
                await send_range(file, start, stop, connection, self._turns, finder)
            finally:
                connection.close()
                visit.sent = connection.sent
        await send({"type": "http.response.body", "body": b""})

    async def _changes(self, visit: Visit, receive: Receive, send: Send) -> None:
        models = visit.request.query_params.getlist("model")
        if not 1 <= len(models) <= MODELS:
            raise RefusedError(400, f"name 1 to {MODELS} models: ?model=NAME&model=NAME")
        for model in models:
            if visit.caller is None or not is_model(model) or not visit.caller.covers(model):
                raise no_model(model)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", **_SAFE}
        await self._head(visit, send, 200, headers)
        connection = Connection(receive, send)
        try:
            async for event in self.feed.events(models):
                await connection.insist(memoryview(event))
        finally:
            connection.close()
            visit.sent = connection.sent
        await send({"type": "http.response.body", "body": b""})

    async def _head(self, visit: Visit, send: Send, status: int, headers: dict[str, str]) -> None:
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        visit.status = status

    # ------------------------------------------------------------------ of the server

    async def _health(self, _visit: Visit) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, _visit: Visit) -> Response:
        if not self.warmed.is_set():
            raise RefusedError(503, "the server is starting", headers={"Retry-After": "1"})
        await self._run(self._library.store.repo.catalog.open, again=True)
        return PlainTextResponse("ready\n")

    async def _counted(self, _visit: Visit) -> Response:
        gauges = {"turns_held": self._turns.held, "turns_waiting": self._turns.waiting, "turns": self._turns.most}
        return PlainTextResponse(self._metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _whoami(self, visit: Visit) -> Response:
        assert visit.caller is not None
        return JSONResponse(whoami(visit.caller.name, visit.caller.role))

    # ------------------------------------------------------------------ of models

    async def _list(self, visit: Visit) -> Response:
        query = visit.request.query_params
        assert visit.caller is not None
        allowed = visit.caller.prefixes or None
        search, author, after = query.get("search", ""), query.get("author", ""), query.get("cursor", "")
        page = await self._run(self._answers.models, allowed, search, author, after, _limit(visit))
        return _rows(visit, page)

    async def _info(self, visit: Visit) -> Response:
        commit = await self._run(self._library.commit, visit.target.model, visit.target.revision)
        blobs = visit.request.query_params.get("blobs", "").lower() == "true"
        return JSONResponse(await self._run(self._answers.info, commit, blobs=blobs))

    async def _tree(self, visit: Visit) -> Response:
        query = visit.request.query_params
        commit = await self._run(self._library.commit, visit.target.model, visit.target.revision)
        recursive = query.get("recursive", "").lower() in ("true", "1")
        path, after = visit.target.path, query.get("cursor", "")
        page = await self._run(self._answers.tree, commit, path, recursive=recursive, after=after, limit=_limit(visit))
        return _rows(visit, page)

    async def _refs(self, visit: Visit) -> Response:
        return JSONResponse(await self._run(self._answers.refs, visit.target.model))

    async def _commits(self, visit: Visit) -> Response:
        commit = await self._run(self._library.commit, visit.target.model, visit.target.revision)
        rows = await self._run(self._answers.commits, commit)
        first = _number(visit, "p", 0) * _limit(visit)
        return JSONResponse(rows[first : first + _limit(visit)], headers={"X-Total-Count": str(len(rows))})

    async def _paths_info(self, visit: Visit) -> Response:
        paths = await bodies.fields(visit.request, "paths")
        commit = await self._run(self._library.commit, visit.target.model, visit.target.revision)
        return JSONResponse(await self._run(self._answers.paths_info, commit, paths))


def _refused(error: Exception) -> Response:
    """The answer to a request that is refused."""
    found = refusal(error)
    if found.status >= 500:
        log.error("%s", error, exc_info=error)
    headers = {**_SAFE, **found.headers, "X-Error-Message": str(found).encode("ascii", "replace").decode()}
    if found.code:
        headers["X-Error-Code"] = found.code
    return JSONResponse({"error": str(found), **found.more}, found.status, headers)


def _number(visit: Visit, name: str, otherwise: int) -> int:
    text = visit.request.query_params.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RefusedError(400, f"{name}={text[:40]!r} is not a number: leave it out, or give one")
    return int(text)


def _limit(visit: Visit) -> int:
    return max(1, min(PAGE, _number(visit, "limit", PAGE)))


def _rows(visit: Visit, page: Listed) -> Response:
    """A page's rows, and where the next page is."""
    headers = {}
    if page.after is not None:
        url = visit.request.url
        query = [(k, v) for k, v in visit.request.query_params.multi_items() if k != "cursor"]
        headers["Link"] = f'<{url.replace(query=urlencode([*query, ("cursor", page.after)]))}>; rel="next"'
    return JSONResponse(page.rows, headers=headers)
