"""Files of an export that are not written: any bytes of them are made of the chunks that these bytes touch.

An `OutFile` gives the place of everything in a file. Here a range of it becomes runs, in the file's order: bytes that are
known, a part of a tensor as it is stored, or a part of what a form makes of a tensor. Each run is made by itself, in a bounded
memory.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from modelstore.execute.export.layout import OutFile, PlacedTensor, block_limit
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.buffers import Bytes, as_bytes, view
from modelstore.format.objects.manifest import Tensor
from modelstore.format.region import Region, Shape, full, offset, size
from modelstore.plan.work import Limits
from modelstore.storage.pool import ordered


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a file that come from one tensor: all of it as it is, or what its form makes of a region."""

    start: int
    stop: int
    placed: PlacedTensor
    region: Region | None = None  # of a form


@dataclass(frozen=True, slots=True)
class _Run:
    """The file's bytes [start, stop): of a span, `data` of the header, or zeros between tensors."""

    start: int
    stop: int
    span: _Span | None = None
    region: Region | None = None  # what is read for them; of a tensor that is stored as it is, a box around them
    data: Bytes | None = None
    beside: bool = False  # they are made beside those of an earlier run

    def of(self, data: Bytes) -> Bytes:
        """The run's bytes, of those of its span."""
        assert self.span is not None
        return data[self.start - self.span.start : self.stop - self.span.start]


class ExportedFile:
    """A file as `export` would write it, read without being written. May be used from many threads.

    The bytes are those that `export` writes, whatever the ranges in which they are read, and each time the same. Only the
    chunks of the model that a range touches are read, and each is checked.

    Example:
        >>> file = store["acme/llama:int4"].exported()["model.safetensors"]
        >>> file.read(0, 8), file.size
    """

    def __init__(self, reader: Reader, output: OutFile, limits: Limits) -> None:
        self._reader = reader
        self._output = output
        self._limits = limits
        self._limit = block_limit(limits.memory)
        # Rows of chunks are made as a whole where they fit: a part of them decodes all of their chunks too.
        self._rows = max(self._limit, limits.memory // 4)

    def __repr__(self) -> str:
        return f"ExportedFile({self.path!r}, {self.size} bytes)"

    @property
    def path(self) -> str:
        """The file's path within the export, such as "model-00001-of-00002.safetensors"."""
        return self._output.path

    @property
    def size(self) -> int:
        """The file's bytes."""
        return self._output.size

    @property
    def digest(self) -> str:
        """Equal for files of equal bytes at the same path, and known without making them: 64 hexadecimal digits."""
        return self._output.digest

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of the file into memory.

        Args:
            start: The first byte.
            stop: The byte after the last one (default: the end of the file).

        Returns:
            The bytes.

        Raises:
            ValueError: The range is not within the file.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> store["acme/llama"].exported()["config.json"].read()
        """
        return b"".join(self.stream(start, stop))

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """Read bytes [start, stop) of the file in pieces, in order, however many they are.

        Bytes made ahead stay within the memory budget of the store.

        Args:
            start: The first byte.
            stop: The byte after the last one (default: the end of the file).

        Returns:
            An iterator of the bytes in pieces of some MiB. A consumer that stops taking them reads no more.

        Raises:
            ValueError: The range is not within the file.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> for piece in store["acme/llama"].exported()["model.safetensors"].stream():
            ...     connection.send(piece)
        """
        end = self.size if stop is None else stop
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"bytes [{start}, {end}) do not lie within {self.path}, which has {self.size}")
        return self._stream(start, end)

    def sha256(self) -> str:
        """Make the whole file once, in pieces, for its digest, as the Hugging Face Hub names files by it.

        Returns:
            The SHA-256 in hexadecimal.

        Raises:
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> store["acme/llama"].exported()["model.safetensors"].sha256()
        """
        made = hashlib.sha256()
        for piece in self.stream():
            made.update(piece)
        return made.hexdigest()

    def _stream(self, start: int, stop: int) -> Iterator[memoryview]:
        beside = _Beside(stop, self._limits.memory // 4)
        threads = self._limits.reading_threads(self._reader.local)
        runs = (beside.expect(run) for run in self._runs(start, stop))
        memory = self._limits.memory // 2
        for found in ordered(self._made, runs, threads, "modelstore-export", memory=memory, cost=self._cost):
            yield view(beside.take(*found)).toreadonly()

    def _cost(self, run: _Run) -> int:
        """Bytes that are held while a run is made."""
        if run.span is None or run.region is None or run.beside:
            return run.stop - run.start
        tensor = run.span.placed.tensor
        raw = size(run.region) * tensor.kind.itemsize
        if run.span.placed.form is None:
            return raw + min(math.prod(tensor.chunk) * tensor.kind.itemsize, tensor.nbytes)
        return 4 * raw  # as it was, as float32 or as codes, and as what is written

    @cached_property
    def _spans(self) -> Sequence[_Span]:
        """All bytes after the header that come from tensors, in the file's order."""
        found = []
        for placed in self._output.tensors:
            if placed.form is None:
                found.append(_Span(placed.offset, placed.offset + placed.tensor.nbytes, placed))
                continue
            for region in placed.regions(self._limit):
                found += [_Span(at, at + n, placed, region) for at, n in placed.form.places(region)]
        return sorted((span for span in found if span.start < span.stop), key=lambda span: span.start)

    @cached_property
    def _starts(self) -> Sequence[int]:
        return [span.start for span in self._spans]

    def _runs(self, start: int, stop: int) -> Iterator[_Run]:
        """Bytes [start, stop) of the file as runs, one after the other."""
        header = self._output.header
        if start < len(header):
            end = min(stop, len(header))
            yield _Run(start, end, data=as_bytes(header[start:end]))
            start = end
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            while index < len(self._spans) and self._spans[index].stop <= start:
                index += 1
            span = self._spans[index] if index < len(self._spans) else None
            if span is None or span.start > start:  # between tensors
                end = min(stop, start + self._limit, span.start if span is not None else stop)
                yield _Run(start, end)
            else:
                end = min(stop, span.stop)
                yield from self._of(span, start, end)
            start = end

    def _of(self, span: _Span, start: int, stop: int) -> Iterator[_Run]:
        """A part of a span as runs: a form's in one step, a stored tensor's in blocks."""
        if span.region is not None:
            yield _Run(start, stop, span, span.region)
            return
        tensor = span.placed.tensor
        for a, b, box in boxes_of(tensor, start - span.start, stop - span.start, self._rows):
            yield _Run(span.start + a, span.start + b, span, box)

    def _made(self, run: _Run) -> tuple[_Run, Bytes | None, Mapping[int, Bytes]]:
        """A run with its bytes, and what else was made on the way, by its offset in the file."""
        if run.data is not None or run.beside:
            return run, run.data, {}
        if run.span is None or run.region is None:
            return run, np.zeros(run.stop - run.start, np.uint8), {}
        tensor, form = run.span.placed.tensor, run.span.placed.form
        if form is None:
            box = self._reader.region(tensor, run.region)
            at = run.start - run.span.start - offset(run.region, tensor.shape) * tensor.kind.itemsize
            return run, box[at : at + run.stop - run.start], {}
        places, made = form.places(run.region), form.read(self._reader, run.region)
        found = {at: as_bytes(data) for (at, length), data in zip(places, made, strict=True) if length}
        return run, run.of(found.pop(run.span.start)), found


class _Beside:
    """Bytes that forms make beside the requested ones, until it is their turn: scales, beside codes. For one thread."""

    def __init__(self, stop: int, room: int) -> None:
        self._stop = stop
        self._room = room
        self._expected: set[int] = set()
        self._held: dict[int, Bytes] = {}

    def expect(self, run: _Run) -> _Run:
        """The run, which is made next: with an earlier one, or so that what it makes beside is kept, if there is room."""
        if run.span is None or run.region is None or run.span.placed.form is None:
            return run
        if run.span.start in self._expected:
            return replace(run, beside=True)
        for at, length in run.span.placed.form.places(run.region):
            if run.start < at < self._stop and 0 < length <= self._room and at not in self._expected:
                self._expected.add(at)
                self._room -= length
        return run

    def take(self, run: _Run, wanted: Bytes | None, others: Mapping[int, Bytes]) -> Bytes:
        """The bytes of a run that was made; runs are taken in the order in which they were expected."""
        self._held.update((at, data) for at, data in others.items() if at in self._expected and at > run.start)
        if wanted is not None:
            return wanted
        assert run.span is not None, "only what a form makes is kept"
        self._expected.remove(run.span.start)
        data = self._held.pop(run.span.start)
        self._room += len(data)
        return run.of(data)


def boxes_of(tensor: Tensor, start: int, stop: int, limit: int) -> Iterator[tuple[int, int, Region]]:
    """Bytes [start, stop) of a tensor as runs of at most `limit` bytes (or of one chunk), each with a box that has these bytes.

    Runs end where rows of chunks do, so that who reads on reads no chunk twice, as far as `limit` lets them. A box is one run
    of the tensor's bytes too, and at most twice as large as what is wanted of it.
    """
    itemsize = tensor.kind.itemsize
    period, slab = grid.slab_sizes(tensor.shape, tensor.chunk)
    step = min(slab, max(limit // itemsize, math.prod(tensor.chunk)))
    at, last = start // itemsize, -(-stop // itemsize)  # elements
    while at < last:
        begin = at - at % period % slab
        end = min(last, begin + slab, at - at % period + period, at - (at - begin) % step + step)
        for a, b, box in _boxes(tensor.shape, at, end):
            yield max(start, a * itemsize), min(stop, b * itemsize), box
        at = end


def _boxes(shape: Shape, first: int, last: int) -> Iterator[tuple[int, int, Region]]:
    """Elements [first, last) in row-major order, each run with the box around it; in two where that has too much beside them."""
    low, high = _index(first, shape), _index(last - 1, shape)
    lead = next((i for i, (one, other) in enumerate(zip(low, high, strict=True)) if one != other), len(shape))
    box = tuple((a, b + 1) for a, b in zip(low[: lead + 1], high[: lead + 1], strict=True)) + full(shape[lead + 1 :])
    if size(box) <= 2 * (last - first):
        yield first, last, box
        return
    row = math.prod(shape[lead + 1 :])
    middle = (first // row + 1) * row
    yield from _boxes(shape, first, middle)
    yield from _boxes(shape, middle, last)


def _index(element: int, shape: Shape) -> Shape:
    """The place of an element in a tensor, of its number in row-major order."""
    found: list[int] = []
    for n in reversed(shape):
        element, at = divmod(element, n)
        found.append(at)
    return tuple(reversed(found))
