"""The journal of a save: what is stored already, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import msgspec

from modelstore.errors import FormatError
from modelstore.execute.writing import Written
from modelstore.format.manifest import Digest
from modelstore.format.record import JOBS, pack_key
from modelstore.storage.base import Storage


class _Chunk(msgspec.Struct, frozen=True, array_like=True):
    digest: Digest
    pack: Digest
    offset: int
    length: int


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    digest: Digest
    planes: dict[str, tuple[_Chunk, ...]]


class Journal:
    """Finished tensors of one work, as create-only objects under `jobs/<id>/`."""

    def __init__(self, storage: Storage, job: str) -> None:
        self._storage = storage
        self._prefix = f"{JOBS}{job}/"

    def finished(self) -> dict[str, Written]:
        """Tensors that an earlier run stored, of which every pack is still there."""
        found: dict[str, Written] = {}
        there: dict[str, bool] = {}
        for info in list(self._storage.list(self._prefix)):
            try:
                page = msgspec.json.decode(self._storage.get(info.key), type=dict[str, _Tensor])
            except msgspec.MsgspecError as error:
                raise FormatError(
                    f"object {info.key} is not a valid journal ({error}): remove it", object=info.key
                ) from None
            for name, tensor in page.items():
                packs = {chunk.pack for chunks in tensor.planes.values() for chunk in chunks}
                for pack in packs - there.keys():
                    there[pack] = self._storage.info(pack_key(pack)) is not None
                if all(there[pack] for pack in packs):
                    planes = {
                        plane: [(bytes.fromhex(c.digest), (c.pack, c.offset, c.length)) for c in chunks]
                        for plane, chunks in tensor.planes.items()
                    }
                    found[name] = Written(tensor.digest, planes)
        return found

    def note(self, written: Mapping[str, Written]) -> None:
        """Record tensors of which every chunk is stored."""
        page = {
            name: _Tensor(
                done.digest, {p: tuple(_Chunk(d.hex(), *at) for d, at in chunks) for p, chunks in done.planes.items()}
            )
            for name, done in written.items()
        }
        self._storage.create(f"{self._prefix}{uuid.uuid4().hex}.json", msgspec.json.encode(page))

    def clear(self) -> None:
        """Remove the journal; what it speaks of is published, or given up."""
        for info in list(self._storage.list(self._prefix)):
            self._storage.delete(info.key)
