"""Reading boxes of arrays out of files: positioned reads into the caller's memory, threads sharing descriptors.

Files are read, not mapped: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.errors import FormatError, NotFoundError, StorageError
from modelstore.format.buffers import Bytes
from modelstore.format.locks import Lock
from modelstore.format.region import Region, extent
from modelstore.sources.local.states import State, changed, same_bytes, samples, states_of

SPAN = 4 << 20  # the most that one read fetches only to pick parts of it
SPARSE_GAP = 64 << 10  # a gap longer than this is skipped rather than read
OPEN_FILES = 200  # descriptors kept; beyond, a file is opened for one read (the usual limit of a process is 1024)


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """The place of an array in a file: the first element's byte offset, and each dimension's stride in bytes (≥ 0)."""

    path: Path
    start: int
    strides: tuple[int, ...]


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a dense row-major array."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; `FormatError` if it is a pipe, a device or a directory.

    A pipe is opened without waiting for who writes to it, so that none holds the reader.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error}", object=str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file: leave it out, or give a file in its place", object=str(path))
    return descriptor


def beginning(path: Path) -> bytes:
    """The first 4096 bytes of a regular file, which show its format; as `open_regular`."""
    descriptor = open_regular(path)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def require_file(path: Path) -> None:
    """`NotFoundError` if there is no such file; `FormatError` if there is a pipe, a device or a folder in its place."""
    if path.is_file():
        return
    if not path.exists():
        raise NotFoundError(f"{path} does not exist: check the path", object=str(path))
    what = (
        "a folder: give the file"
        if path.is_dir()
        else "a pipe or a device, where a file is needed: write it to one first"
    )
    raise FormatError(f"{path} is {what}", object=str(path))


def read_whole(path: Path, limit: int) -> bytes:
    """A regular file's bytes; `FormatError` if it has more than `limit`."""
    descriptor = open_regular(path)
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(min(os.fstat(descriptor).st_size, limit) + 1)  # memory for what there is
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}", object=str(path)) from error
    if len(data) > limit:
        size = path.stat().st_size
        raise FormatError(f"{path} has {size} bytes, where {limit} is the limit", object=str(path))
    return data


class Files:
    """Open files for positioned reads, all in the state in which they were first seen; safe for threads.

    Threads share the descriptors. `states` are those of files to be read, else a file's first opening counts. A file that is
    found in another state is a `ConflictError`; `check` looks at all of them.
    """

    def __init__(self, states: Mapping[Path, State] | None = None) -> None:
        self._states = dict(states or {})
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()
        self._closed = False

    def read(self, path: Path, start: int, out: Bytes) -> None:
        """Fill `out` (1-d, contiguous) with the file's bytes from `start` on.

        `FormatError` if the file ends before, `StorageError` if it cannot be read.
        """
        with self._opened(path) as descriptor:
            view = out.data
            done = 0
            while done < len(view):
                try:
                    got = os.preadv(descriptor, [view[done:]], start + done)
                except OSError as error:
                    raise StorageError(f"cannot read {path}: {error}", object=str(path)) from error
                if got == 0:
                    raise FormatError(
                        f"{path} ends at byte {start + done}, where {len(view) - done} more were expected: it was "
                        "changed since it was opened, or cut short",
                        object=str(path),
                    )
                done += got

    def watch(self, files: Sequence[Path]) -> None:
        """Count these among the files that must stay as they are now."""
        fresh = states_of(file for file in files if file not in self._states)
        with self._lock:
            self._states = {**fresh, **self._states}

    def check(self) -> None:
        """`ConflictError` if a file is not as it was when it was first seen: what was read may be of two states."""
        with self._lock:
            for path, state in self._states.items():
                if not same_bytes(state, self._descriptors.get(path), path):
                    raise changed(path)

    def sample(self, path: Path) -> tuple[State, bytes]:
        """A file's state, and some of its bytes."""
        with self._opened(path) as descriptor:
            state = self._states[path]
            return state, samples(path, descriptor, state.size)

    def bytes(self, path: Path, start: int, length: int) -> bytes:
        """A copy of `length` bytes from `start` on."""
        out = np.empty(length, np.uint8)
        self.read(path, start, out)
        return out.tobytes()

    def box(self, placed: ArrayPlace, itemsize: int, region: Region, out: NDArray[np.uint8]) -> None:
        """Write a region of the placed array into `out`: uint8, the region's shape plus a last axis of `itemsize`."""
        start = placed.start + sum(a * stride for (a, _), stride in zip(region, placed.strides, strict=True))
        if out.size:
            self._gather(placed.path, start, placed.strides, itemsize, out)

    def close(self) -> None:
        """Close every file; reads fail from now on. Not to be called while a thread reads."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        descriptor, kept = self._descriptor(path)
        try:
            yield descriptor
        finally:
            if not kept:
                os.close(descriptor)

    def _descriptor(self, path: Path) -> tuple[int, bool]:
        with self._lock:
            if self._closed:
                raise ValueError(f"the source of {path} is closed: open it again")
            found = self._descriptors.get(path)
            if found is not None:
                return found, True
            descriptor = open_regular(path)
            state = State.of(os.fstat(descriptor))
            if self._states.setdefault(path, state) != state:
                os.close(descriptor)
                raise changed(path)
            kept = len(self._descriptors) < OPEN_FILES
            if kept:
                self._descriptors[path] = descriptor
            return descriptor, kept

    def _gather(self, path: Path, start: int, strides: tuple[int, ...], itemsize: int, out: NDArray[np.uint8]) -> None:
        shape = out.shape[:-1]
        axes = [i for i, n in enumerate(shape) if n > 1]
        span = itemsize + sum((shape[i] - 1) * strides[i] for i in axes)
        dense = row_major(shape, itemsize)
        if out.flags.c_contiguous and all(strides[i] == dense[i] for i in axes):
            self.read(path, start, out.reshape(-1))
            return
        widest = max(axes, key=lambda i: strides[i], default=None)
        if widest is None:  # one element, into memory that is not contiguous
            self._pick(path, start, span, strides, out)
            return
        step = strides[widest]
        one = span - (shape[widest] - 1) * step  # what one index along the widest dimension spans
        sparse = step - one > SPARSE_GAP
        if span <= SPAN and not sparse:
            self._pick(path, start, span, strides, out)
            return
        # Rows at a time: as many as one read may span, or one by one where the gaps are not worth reading.
        rows = 1 if sparse or one > SPAN or step == 0 else 1 + (SPAN - one) // step
        index: list[Any] = [slice(None)] * out.ndim
        for i in range(0, shape[widest], rows):
            index[widest] = slice(i, i + rows)
            self._gather(path, start + i * step, strides, itemsize, out[tuple(index)])

    def _pick(self, path: Path, start: int, span: int, strides: tuple[int, ...], out: NDArray[np.uint8]) -> None:
        buffer = np.empty(span, np.uint8)
        self.read(path, start, buffer)
        out[...] = np.lib.stride_tricks.as_strided(buffer, out.shape, (*strides, 1), writeable=False)


def boxed(out: Bytes, region: Region, itemsize: int) -> NDArray[np.uint8]:
    """`out` as the array that `Files.box` fills; `ValueError` if its length is not the region's."""
    shape = (*extent(region), itemsize)
    if out.dtype != np.uint8 or out.ndim != 1 or out.size != int(np.prod(shape, dtype=object)):
        raise ValueError(f"out has {out.size} bytes of {out.dtype}, where region {region} takes shape {shape} of uint8")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out must be contiguous and writable")
    return out.reshape(shape)
