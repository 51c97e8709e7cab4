"""Sends bytes of a file as they are made, to many clients in parallel, within a bounded memory.

So many files are made at the same time; who waits longest goes next. The client that has a turn gives it up after some MiB if
others wait, and immediately when it does not take the bytes: a slow client holds one part of 256 KiB, and no turn. One that takes
nothing for half a minute is cut off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, CapacityLimiter, to_thread

from modelstore.serve.reading.digests import FileHash

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from modelstore.execute.export.view import ExportedFile
    from modelstore.serve.reading.digests import Digests

log = logging.getLogger("modelstore")

PART = 256 << 10  # bytes that are given to a connection at once
TURN = 32 << 20  # bytes after which a turn ends, where others wait
PATIENCE = 0.5  # seconds that a client may take for a part before the turn goes on
STALLED = 30.0  # seconds without a byte taken after which a client is cut off
SMALL = 1 << 20  # bytes of a range that is made without a turn


class ClientGoneError(Exception):
    """The client closed the connection, or takes nothing."""


@dataclass
class Turns:
    """How many files are made in parallel, and which requests wait; of one event loop."""

    most: int
    held: int = 0
    waiting: int = 0
    _free: asyncio.Semaphore = field(init=False)
    threads: CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.most)
        self.threads = CapacityLimiter(self.most + 16)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn to make files; in the order of asking."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
            self._free.release()


class Connection:
    """The way to one client: what was sent, and whether it is there."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._send = send
        self.sent = 0
        self._gone = asyncio.ensure_future(self._watch(receive))

    @staticmethod
    async def _watch(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    def close(self) -> None:
        """Watch no more."""
        self._gone.cancel()

    async def give(self, part: memoryview, patience: float) -> bool:
        """Hand a part over; False if the client did not take enough of what came before in that time, and this one waits."""
        if self._gone.done():
            raise ClientGoneError("the client closed the connection")
        message: dict[str, Any] = {"type": "http.response.body", "body": part, "more_body": True}
        try:
            async with asyncio.timeout(patience):  # not `wait_for`, which makes a task for each part
                await self._send(message)
        except TimeoutError:
            return False
        self.sent += len(part)
        return True

    async def insist(self, piece: memoryview) -> None:
        """Hand a piece over, at the client's pace; `ClientGoneError` if it takes nothing for too long."""
        for part in _parts(piece):
            if not await self.give(part, STALLED):
                raise ClientGoneError(f"the client took nothing for {STALLED:.0f} s")


async def send_range(
    file: ExportedFile, start: int, stop: int, connection: Connection, turns: Turns, digests: Digests | None
) -> None:
    """Send bytes [start, stop) of a file. `digests`: told of what the whole file was found to be, where it passes whole."""
    hashing = FileHash(file.path, file.size) if digests is not None and (start, stop) == (0, file.size) else None
    at = start
    while at < stop:
        if stop - start <= SMALL:
            made = await to_thread.run_sync(file.read, start, stop, limiter=turns.threads)
            rest, at = memoryview(made), stop
            if hashing is not None:
                hashing.update(made)
        else:
            async with turns.turn():
                at, rest = await _one_turn(file, at, stop, connection, turns, hashing)
        await connection.insist(rest)
    found = hashing.found() if hashing is not None else None
    if found is not None and digests is not None:
        await to_thread.run_sync(digests.keep, file, found, limiter=turns.threads)


async def _one_turn(
    file: ExportedFile, at: int, stop: int, connection: Connection, turns: Turns, hashing: FileHash | None
) -> tuple[int, memoryview]:
    """Make and send until the turn ends: the byte up to which parts were taken from pieces, and the part that the client left."""
    pieces, until = file.stream(at, stop), at + TURN
    try:
        while at < stop:
            piece = await to_thread.run_sync(next, pieces, limiter=turns.threads)
            left, taken = memoryview(b""), len(piece)
            for given in range(0, len(piece), PART):
                if not await connection.give(piece[given : given + PART], PATIENCE):
                    left = memoryview(
                        bytes(piece[given : given + PART])
                    )  # a copy: the piece may be sixty times as large
                    taken = given + len(left)
                    break
            if hashing is not None:
                await to_thread.run_sync(hashing.update, piece[:taken], limiter=turns.threads)
            at += taken
            if left:
                return at, left
            if at >= until and turns.waiting:
                break
        return at, memoryview(b"")
    finally:
        with CancelScope(shield=True):  # what reads ahead ends with the turn, also where the request was cancelled
            await to_thread.run_sync(_close, pieces, limiter=turns.threads)


def _close(pieces: Any) -> None:
    pieces.close()


def _parts(piece: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(piece), PART):
        yield piece[start : start + PART]
