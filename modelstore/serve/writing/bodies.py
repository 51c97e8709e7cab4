"""A request's body, read within a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from modelstore.serve.reading.sending import STALLED, ClientGoneError
from modelstore.serve.refusals import RefusedError

if TYPE_CHECKING:
    from starlette.requests import Request

FORM = 4 << 20  # bytes of a body that is held in memory


async def pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """A body as it comes; `RefusedError` (413) if it is longer, `ClientGoneError` if nothing comes for too long."""
    so_far = 0
    stream = request.stream().__aiter__()
    while True:
        try:
            piece: bytes = await asyncio.wait_for(anext(stream), STALLED)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ClientGoneError(f"the client sent nothing for {STALLED:.0f} s") from None
        except Exception as error:
            if type(error).__name__ != "ClientDisconnect":
                raise
            raise ClientGoneError("the client closed the connection") from None
        so_far += len(piece)
        if so_far > most:
            raise RefusedError(
                413, f"the body is longer than the {most} bytes that may be", headers={"Connection": "close"}
            )
        yield piece


async def value(request: Request) -> Any:
    """What the body says in JSON."""
    data = b"".join([piece async for piece in pieces(request, FORM)])
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise RefusedError(400, "the body is not JSON") from None


async def fields(request: Request, name: str) -> list[str]:
    """The values of a field, of a form or of a JSON object."""
    data = b"".join([piece async for piece in pieces(request, FORM)])
    try:
        if "json" in request.headers.get("content-type", ""):
            found = msgspec.json.decode(data)
            values = found.get(name, []) if isinstance(found, dict) else []
            return [str(value) for value in (values if isinstance(values, list) else [values])]
        return parse_qs(data.decode(), keep_blank_values=True, max_num_fields=100_000).get(name, [])
    except (UnicodeDecodeError, ValueError, msgspec.DecodeError):
        raise RefusedError(400, f"the body is neither a form nor a JSON object with {name!r}") from None
