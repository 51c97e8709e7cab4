"""Host memory that versions of a model share page by page, copy-on-write: only what differs between two is held twice.

A version's tensors are in a file in memory (memfd). The next version maps that file privately and writes what changed: the
kernel copies the pages that are written, and both versions share the rest. If the system does not have such files (they are
Linux's), tensors that changed are copied whole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

from modelstore.execute.memory import huge
from modelstore.format.buffers import Bytes

_PAGE = mmap.PAGESIZE
_ALIGN = 64


class Image:
    """Memory for buffers of given sizes, zero-filled; `MemoryError` if there is no room.

    `buffers` must be filled once, and not written to after `overlay` was called. Their memory is freed when nothing refers to
    it any more.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.starts: list[int] = []
        at = 0
        for size in sizes:
            align = _PAGE if size >= _PAGE else _ALIGN
            at = -(-at // align) * align
            self.starts.append(at)
            at += size
        self._size = max(at, 1)
        self._descriptor: int | None = None
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("modelstore", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError:
                raise MemoryError(f"no room for {self._size} bytes: load fewer tensors, or a slice of them") from None
            self._whole = self._map(mmap.MAP_SHARED)
        else:
            self._whole = huge(self._size)
        self.buffers = [self._whole[start : start + size] for start, size in zip(self.starts, sizes, strict=True)]

    def overlay(self) -> Overlay:
        """The image's content, to be changed without a change to the image."""
        return Overlay(self._whole, None if self._descriptor is None else self._map(mmap.MAP_PRIVATE))

    def _map(self, kind: int) -> Bytes:
        assert self._descriptor is not None
        try:
            area = mmap.mmap(self._descriptor, self._size, flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            raise MemoryError(f"no room to map {self._size} bytes: load fewer tensors, or a slice of them") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages for such files: slower, not wrong
                area.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(area, np.uint8)


class Overlay:
    """An image as one later version sees it."""

    def __init__(self, whole: Bytes, private: Bytes | None) -> None:
        self._whole = whole
        self._private = private

    def buffer(self, start: int, size: int) -> Bytes:
        """A writable buffer with the image's bytes from `start`."""
        if self._private is not None:
            return self._private[start : start + size]
        copy = huge(size)
        copy[:] = self._whole[start : start + size]
        return copy
