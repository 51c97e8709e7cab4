"""Memory: budgets, and host buffers in huge pages (fresh 4 KiB pages cost more than filling them)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from modelstore.format.buffers import Bytes
from modelstore.format.units import Size, parse_size

MAX_DEFAULT = 4 << 30
FAULT_AHEAD = "modelstore-fault-ahead"  # the name of threads
_ALIGN = 64
_HUGE = 2 << 20
_ARENA = 32 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ


def free_memory() -> int:
    """Bytes of memory that are free now: of the machine, or of the container where that is less."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                pages = int(line.split()[1]) << 10
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            pages = min(pages, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup v2: what sysconf says stands
    return max(pages, 1)


def budget(memory: Size | None) -> int:
    """Working memory in bytes: what was asked for, else a quarter of what is free and at most 4 GiB."""
    if memory is not None:
        asked = parse_size(memory)
        if asked < 64 << 20:
            raise ValueError(f"memory={memory!r} is below the 64 MiB that any work needs")
        return asked
    return max(64 << 20, min(MAX_DEFAULT, free_memory() // 4))


class Arena:
    """Hands out zero-filled byte buffers aligned to 64 bytes, cut from maps that ask for huge pages.

    Small buffers share maps, each twice as large as the one before, up to 32 MiB; a map is freed when the last buffer in
    it is. So a few bytes that are kept hold little more than themselves. Not for use by several threads.
    """

    def __init__(self, area: Callable[[int], Bytes] | None = None) -> None:
        """`area`: where maps come from, in place of `huge`; buffers then have whatever content theirs have."""
        self._area = area or huge
        self._map = np.empty(0, np.uint8)
        self._at = 0

    def allocate(self, nbytes: int) -> Bytes:
        """A writable buffer of `nbytes` bytes; `MemoryError` if there is no room for it."""
        if nbytes >= _ARENA // 4:
            return self._area(nbytes)
        if self._at + nbytes > len(self._map):
            wanted = max(nbytes, min(2 * len(self._map), _ARENA))
            self._map, self._at = self._area(wanted) if wanted >= _HUGE else _aligned(wanted), 0
        buffer = self._map[self._at : self._at + nbytes]
        self._at += -(-nbytes // _ALIGN) * _ALIGN
        return buffer


def _aligned(nbytes: int) -> Bytes:
    buffer = np.zeros(nbytes + _ALIGN, np.uint8)
    start = -buffer.ctypes.data % _ALIGN
    return buffer[start : start + nbytes]


def huge(nbytes: int) -> Bytes:
    """A zero-filled buffer in a map of its own that asks for huge pages; `MemoryError` if there is no room."""
    return within(np.frombuffer(huge_map(nbytes), np.uint8), nbytes)


def huge_map(nbytes: int) -> mmap.mmap:
    """A map of its own, with room for `within`; `MemoryError` if there is none."""
    try:
        area = mmap.mmap(
            -1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # shared maps get no huge pages
    except (OSError, OverflowError, ValueError):
        raise MemoryError(f"no room for {nbytes} bytes: load fewer tensors at once, or a slice of them") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            area.madvise(mmap.MADV_HUGEPAGE)
    return area


def within(area: Bytes, nbytes: int) -> Bytes:
    """The buffer in such a map, which starts with a huge page."""
    start = -area.ctypes.data % _HUGE
    return area[start : start + nbytes]


def trim() -> None:
    """Give the system back what the allocator holds of freed memory, between large pieces of work; where it can."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def fault_ahead(buffers: Sequence[Bytes]) -> threading.Thread:
    """Map the pages of buffers in a thread of its own, ahead of their reader. For maps of memory.

    Each page of a map costs a fault when it is first read; shared memory has the smallest pages, so that a reader waits for
    them as long as for the bytes. A buffer that nobody refers to any more is left alone. If the kernel cannot do it (before
    Linux 5.14), nothing is changed.
    """

    # The second half first: an in-order reader maps the first one meanwhile. Small steps: maps and unmaps wait for one.
    steps = [(weakref.ref(buffer), at) for buffer in buffers for at in range(0, len(buffer), _HUGE)]

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for held, at in steps[len(steps) // 2 :] + steps[: len(steps) // 2]:
            buffer = held()
            if buffer is None:
                continue
            start = (buffer.ctypes.data + at) // mmap.PAGESIZE * mmap.PAGESIZE
            end = buffer.ctypes.data + min(at + _HUGE, len(buffer))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _POPULATE_READ):
                return

    thread = threading.Thread(target=run, daemon=True, name=FAULT_AHEAD)
    if sys.platform == "linux":
        thread.start()
    return thread
