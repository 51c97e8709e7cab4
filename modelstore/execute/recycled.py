"""Memory that is used again for the next version as soon as nobody holds it: fresh pages cost as much as filling them twice."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque

import numpy as np

from modelstore.execute.memory import huge_map, within
from modelstore.format.buffers import Bytes


class Recycled:
    """Buffers in maps of their own, of undefined content. Many threads may use it.

    A map is kept for the next buffer of its size when no view of it is left, and freed with this object. The system may take
    its pages meanwhile, where memory is short.
    """

    def __init__(self) -> None:
        self._spare: dict[int, deque[mmap.mmap]] = {}

    def take(self, nbytes: int) -> Bytes:
        """A writable buffer of `nbytes` bytes, all of which must be written; `MemoryError` if there is no room."""
        spare = self._spare.setdefault(nbytes, deque())
        try:
            area = spare.pop()
        except IndexError:
            area = huge_map(nbytes)
        # Views of views refer to this array, tensors among them: it ends with the last of them.
        whole = np.frombuffer(area, np.uint8)
        weakref.finalize(whole, _keep, area, weakref.ref(spare)).atexit = False
        return within(whole, nbytes)


def _keep(area: mmap.mmap, spare: weakref.ref[deque[mmap.mmap]]) -> None:
    """Nobody holds a map any more. This runs wherever the last view ends: it takes no locks."""
    kept = spare()
    if kept is None:
        return
    if hasattr(mmap, "MADV_FREE"):
        with contextlib.suppress(OSError):  # the pages stay where they are
            area.madvise(mmap.MADV_FREE)
    kept.append(area)
