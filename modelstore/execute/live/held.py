"""A follower's tensors, as the base of deltas: a step of training is applied to memory, and no base is read again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modelstore.errors import CorruptionError
from modelstore.execute.live.cells import Cell
from modelstore.execute.read.reader import Reader
from modelstore.format.boxes import copy, cut
from modelstore.format.buffers import Bytes
from modelstore.format.digest import name_of
from modelstore.format.locks import Lock
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Region, extent, full, shift, size
from modelstore.plan.layout import Share, whole
from modelstore.plan.layout_share import overlaps
from modelstore.plan.read import Want
from modelstore.plan.update import Slot

log = logging.getLogger("modelstore")

_CHANGED = "tensor %r was changed in memory since it was read: it is read whole"


class HeldBases:
    """Regions of tensors that memory holds, found by the tensor's digest, whatever version that is of. Many threads may use it.

    Tensors must not be written to, but somebody may. A whole tensor made from it is compared with the digest of the new one
    (`checked`); a part of a tensor is compared with its old digest, once, before anything is made of it.
    """

    def __init__(self, manifest: Manifest, cells: Mapping[Slot, Cell], wanted: Iterable[Slot]) -> None:
        """`wanted`: all that is read of deltas against these."""
        self._cells: dict[tuple[str, str, tuple[int, ...]], list[tuple[Share, Cell]]] = {}
        for (name, share), cell in cells.items():
            tensor = manifest.by_name[name]
            if tensor.digest:
                self._cells.setdefault(_identity(tensor), []).append((share, cell))
        self._wanted: dict[str, set[Share]] = {}
        for name, share in wanted:
            self._wanted.setdefault(name, set()).add(share)
        self._lock = Lock()
        self._bytes: dict[int, Bytes | None] = {}

    def __call__(self, tensor: Tensor, region: Region) -> Bytes | None:
        """The raw bytes of a region of a tensor, None if they are not held as they were read.

        If no more of the tensor is requested than is held, the rest of the region is zeros: each element of a delta is made of
        the same element of its base.
        """
        for share, cell in self._cells.get(_identity(tensor), ()):
            if share == whole(tensor.shape):
                data = self._host(cell, tensor.name, None)
                return None if data is None else cut(data, tensor.shape, tensor.kind.itemsize, region)
            boxes = list(overlaps(share.pieces(), region))
            covered = any(both == region for both, _ in boxes)
            if not covered and self._wanted.get(tensor.name) != {share}:
                continue
            data = self._host(cell, tensor.name, cell.digest)
            if data is not None:
                return _region(data, share, region, boxes, tensor.kind.itemsize)
        return None

    def _host(self, cell: Cell, name: str, digest: str | None) -> Bytes | None:
        """A cell's content, in host memory; with a digest, None if it has another one."""
        if cell.buffer is not None and digest is None:
            return cell.buffer
        with self._lock:
            if id(cell) not in self._bytes:
                data = cell.host()
                right = digest is None or name_of(data) == digest
                if not right:
                    log.warning(_CHANGED, name)
                self._bytes[id(cell)] = data if right else None
            return self._bytes[id(cell)]


def _region(data: Bytes, share: Share, region: Region, boxes: Sequence[tuple[Region, Region]], itemsize: int) -> Bytes:
    """A region's bytes of a share: its own memory if they follow one another there. Zeros for the parts that it does not have.

    boxes: the parts that both have, and their place in the share.
    """
    shape = extent(region)
    if len(boxes) == 1 and boxes[0][0] == region:
        return cut(data, share.shape, itemsize, boxes[0][1])
    out = np.zeros(size(region) * itemsize, np.uint8)
    for both, inner in boxes:
        copy(data, share.shape, inner, out, shape, shift(both, region), itemsize)
    return out


def _identity(tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    return tensor.digest, tensor.dtype, tensor.shape


def checked(stored: Reader, want: Want, buffer: Bytes) -> str:
    """See that what was made of a delta and what is held is what was saved. The digest of a part of a tensor; "" of a whole one.

    `stored` reads without what is held: it is asked again where the bytes are not right, since somebody wrote to the tensors.
    """
    tensor = want.tensor
    if want.share != whole(tensor.shape):
        return name_of(buffer)
    if not stored.codec(tensor).needs_base or name_of(buffer) == tensor.digest:
        return ""
    log.warning(_CHANGED, tensor.name)
    stored.read_into(tensor, full(tensor.shape), buffer)
    if name_of(buffer) != tensor.digest:
        raise CorruptionError(
            f"tensor {tensor.name!r} has other values than were saved: run 'modelstore verify --deep' on its store",
            tensor=tensor.name,
        )
    return ""
