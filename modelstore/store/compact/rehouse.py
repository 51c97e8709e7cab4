"""Copies objects that a collection is removing to other names: the same chunks, in packs and a manifest with a nonce."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from modelstore.errors import NotFoundError
from modelstore.format.buffers import Pieces
from modelstore.format.digest import name_of_pieces
from modelstore.format.files.safetensors import build_header
from modelstore.format.objects import manifest as man
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VariantEntry, manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.store import packs
from modelstore.store.mend.heal import pieces

NONCE = "nonce"  # in a pack's metadata: says nothing, and gives the pack another name


@dataclass
class Rehousing:
    """Moves what entries of one model rely on; a pack that several of them share is copied once."""

    storage: Storage
    model: str
    _moved: dict[str, tuple[str, int]] = field(default_factory=dict)  # pack → its copy, how much later its data starts

    def entry(self, entry: VariantEntry, taken: set[str]) -> VariantEntry:
        """An entry that relies on no object that is `taken`; `NotFoundError` if one is gone, or is that of a base."""
        key = manifest_key(self.model, entry.manifest)
        manifest = man.decode(self.storage.get(key), entry.manifest, key)
        ours = {key, pack_key(entry.copy), *map(pack_key, manifest.packs)}
        if manifest.base is not None and taken - ours:
            base = f"{manifest.base.model} (manifest {manifest.base.manifest[:12]}…)"
            raise NotFoundError(f"the base {base} was deleted: save with another parent", object=min(taken - ours))
        if not taken & ours:
            return entry
        moved = self._manifest(manifest, taken)
        digest, data = man.encode(moved)
        copy = packs.copy_pack(self.model, digest, data)
        self.storage.put(pack_key(copy.digest), copy.pieces, copy.size)
        self.storage.put(manifest_key(self.model, digest), [data], len(data))
        return msgspec.structs.replace(entry, manifest=digest, copy=copy.digest)

    def _manifest(self, manifest: Manifest, taken: set[str]) -> Manifest:
        places = [self._pack(digest) if pack_key(digest) in taken else (digest, 0) for digest in manifest.packs]
        later = np.array([shift for _, shift in places], np.int64)
        offset = (manifest.offset.astype(np.int64) + later[manifest.pack]) if places else manifest.offset
        table = msgspec.structs.replace(manifest.chunks, offset=offset.astype("<u8").tobytes())
        return msgspec.structs.replace(
            manifest, packs=tuple(digest for digest, _ in places), chunks=table, nonce=secrets.token_hex(16)
        )

    def _pack(self, digest: str) -> tuple[str, int]:
        if digest not in self._moved:
            self._moved[digest] = self._copied(digest)
        return self._moved[digest]

    def _copied(self, digest: str) -> tuple[str, int]:
        key = pack_key(digest)
        opened = packs.open_pack(self.storage, key)
        header = build_header(opened.entries, {**opened.metadata, NONCE: secrets.token_hex(16)})

        def data() -> Iterator[bytes]:
            yield header
            yield from pieces(self.storage, key, opened.size, start=opened.data_start)

        name = name_of_pieces(data())
        size = len(header) + opened.size - opened.data_start
        self.storage.put(pack_key(name), Pieces(data), size)
        return name, len(header) - opened.data_start
