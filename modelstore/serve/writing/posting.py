"""Answers of the write side: bodies are received here, and what they ask for is done in threads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from modelstore.serve.access.signing import allowed
from modelstore.serve.refusals import RefusedError, no_model
from modelstore.serve.writing import bodies
from modelstore.serve.writing.changes import Writing, full_name
from modelstore.serve.writing.spool import UploadSpool
from modelstore.serve.writing.uploads import Uploads

if TYPE_CHECKING:
    from starlette.requests import Request

    from modelstore.serve.visits import Visit

COMMIT = 8 << 30  # bytes of a commit's body
InThread = Callable[..., Awaitable[Any]]


class Posting:
    """The answers to requests that change something."""

    def __init__(self, writing: Writing, spool: UploadSpool, run: InThread) -> None:
        self._writing = writing
        self._spool = spool
        self._uploads = Uploads(spool, writing.has)
        self._run = run
        self.kinds: dict[str, Callable[[Visit], Awaitable[Response]]] = {
            "create": self._create,
            "delete": self._delete,
            "yaml": self._yaml,
            "preupload": self._preupload,
            "commit": self._commit,
            "tag": self._tag,
            "branch": self._branch,
            "lfs-batch": self._batch,
            "lfs-verify": self._verify,
            "lfs-object": self._object,
        }

    async def _create(self, visit: Visit) -> Response:
        asked = await bodies.value(visit.request)
        _covered(visit, asked)
        name = full_name(asked)
        url = f"{_base(visit.request)}/{name}"
        if not await self._run(self._writing.create, asked):  # clients look for the address in the refusal too
            raise RefusedError(409, f"You already created this model repo: {name}", url=url, name=name)
        return JSONResponse({"url": url, "name": name, "id": name})

    async def _delete(self, visit: Visit) -> Response:
        asked = await bodies.value(visit.request)
        _covered(visit, asked)
        await self._run(self._writing.delete, asked)
        return JSONResponse({})

    async def _yaml(self, visit: Visit) -> Response:
        await bodies.value(visit.request)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, visit: Visit) -> Response:
        asked = await bodies.value(visit.request)
        return JSONResponse(await self._run(self._writing.preupload, visit.target.model, asked))

    async def _commit(self, visit: Visit) -> Response:
        if visit.request.query_params.get("create_pr") in ("1", "true"):
            raise RefusedError(422, "there are no pull requests here: commit to main")
        with self._spool.receive(COMMIT) as body:
            async for piece in self._pieces(visit, COMMIT):
                await self._run(body.write, piece)
            body.close()
            commit = await self._run(self._writing.commit, visit.target.model, visit.target.revision, body.path)
        url = f"{_base(visit.request)}/{commit.model}/commit/{commit.id}"
        return JSONResponse({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    async def _tag(self, visit: Visit) -> Response:
        target = visit.target
        if visit.request.method == "DELETE":
            await self._run(self._writing.untag, target.model, target.revision)
        else:
            asked = await bodies.value(visit.request)
            await self._run(self._writing.tag, target.model, target.revision, asked)
        return JSONResponse({})

    async def _branch(self, visit: Visit) -> Response:
        raise RefusedError(422, f"there are no branches here: let a tag {visit.target.revision[:80]!r} name a version")

    async def _batch(self, visit: Visit) -> Response:
        asked = await bodies.value(visit.request)
        answer = await self._run(self._uploads.batch, visit.target.model, _base(visit.request), asked)
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    async def _verify(self, visit: Visit) -> Response:
        asked = await bodies.value(visit.request)
        await self._run(self._uploads.verify, visit.target.model, asked)
        return JSONResponse({})

    async def _object(self, visit: Visit) -> Response:
        """An object, or a part of one, by PUT; the end of one that came in parts by POST."""
        permit = allowed(dict(visit.request.query_params), self._spool.key)
        if visit.request.method == "POST":
            await bodies.value(visit.request)
            await self._run(self._uploads.complete, permit)
            return JSONResponse({})
        found = await self._uploads.receive(permit, self._pieces(visit, permit.size), self._run)
        return JSONResponse({}, headers={"ETag": f'"{found}"'})

    async def _pieces(self, visit: Visit, most: int) -> AsyncIterator[bytes]:
        async for piece in bodies.pieces(visit.request, most):
            visit.received += len(piece)
            yield piece


def _base(request: Request) -> str:
    """The server's address, as the client calls it."""
    return str(request.base_url).rstrip("/")


def _covered(visit: Visit, asked: Any) -> None:
    """Refuse a name in a body that the caller's token is not for, as the gate does one in a path."""
    name = full_name(asked)
    if visit.caller is None or not visit.caller.covers(name):
        raise no_model(name)
