"""The LFS side of uploads: which objects are wanted, where they are sent, and whether they came whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from modelstore.serve.access.signing import Permit, permit
from modelstore.serve.refusals import RefusedError
from modelstore.serve.writing.spool import UploadSpool

PART = 256 << 20  # bytes of a part; larger objects are sent in parts, each of which can be tried again
LARGEST = 1 << 40


class Uploads:
    """Objects that are received before a commit names them."""

    def __init__(self, spool: UploadSpool, known: Callable[[str, str, int], bool]) -> None:
        """`known(model, oid, size)`: whether the model's newest version has that file."""
        self._spool = spool
        self._known = known

    def batch(self, model: str, base: str, asked: Any) -> Mapping[str, Any]:
        """The answer to LFS' batch request: of each object, where to send it, or nothing where it is there."""
        objects = asked.get("objects") if isinstance(asked, dict) else None
        if not isinstance(objects, list) or len(objects) > 1000:
            raise RefusedError(422, "an LFS batch has objects, at most 1000")
        return {"transfer": "basic", "objects": [self._object(model, base, one) for one in objects]}

    def _object(self, model: str, base: str, asked: Any) -> Mapping[str, Any]:
        oid, size = (asked.get("oid"), asked.get("size")) if isinstance(asked, dict) else (None, None)
        if not isinstance(oid, str) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST:
            raise RefusedError(422, "an LFS object has an oid and a size")
        found: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if self._spool.object(model, oid).exists() or self._known(model, oid, size):
            return found

        def address(part: int, length: int) -> str:
            return f"{base}/api/lfs/object?{permit(model, oid, length, part).query(self._spool.key)}"

        upload: dict[str, Any] = {"href": address(0, size)}
        if size > PART:
            starts = range(0, size, PART)
            parts = {str(i): address(i, min(PART, size - start)) for i, start in enumerate(starts, 1)}
            upload["header"] = {"chunk_size": str(PART), **parts}
        return {**found, "actions": {"upload": upload, "verify": {"href": f"{base}/{model}.git/info/lfs/verify"}}}

    async def receive(self, allowed: Permit, pieces: AsyncIterator[bytes], run: Any) -> str:
        """An object or a part as it comes; its SHA-256. Nothing of one that is not what was said stays."""
        with self._spool.receive(allowed.size) as file:
            async for piece in pieces:
                await run(file.write, piece)
            found = file.close()
            if file.size != allowed.size:
                raise RefusedError(422, f"{file.size} bytes came, and {allowed.size} were said: send it again")
            if not allowed.part and found != allowed.oid:
                raise RefusedError(422, f"the bytes are those of {found}, not of {allowed.oid}: send it again")
            path = self._spool.object(allowed.model, allowed.oid, allowed.part or None)
            await run(self._spool.keep, file, path)
        return found

    def complete(self, allowed: Permit) -> None:
        """Put an object together of its parts."""
        count = -(-allowed.size // PART)
        parts = [self._spool.object(allowed.model, allowed.oid, i) for i in range(1, count + 1)]
        if not all(part.exists() for part in parts):
            raise RefusedError(422, "not all parts came: send them again")
        with self._spool.receive(allowed.size) as file:
            for part in parts:
                with part.open("rb") as source:
                    while piece := source.read(4 << 20):
                        file.write(piece)
                self._spool.drop(part)
            found = file.close()
            if (file.size, found) != (allowed.size, allowed.oid):
                raise RefusedError(422, f"the parts are those of {found}, not of {allowed.oid}: send them again")
            self._spool.keep(file, self._spool.object(allowed.model, allowed.oid))

    def verify(self, model: str, asked: Any) -> None:
        """`RefusedError` where an object is not there, or not of that size."""
        oid = asked.get("oid") if isinstance(asked, dict) else None
        path = self._spool.object(model, oid if isinstance(oid, str) else "")
        if not path.exists() or path.stat().st_size != asked.get("size"):
            raise RefusedError(404, "this object did not come: send it again")
