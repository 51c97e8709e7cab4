"""Writes the files of an export: blocks of tensors are read in parallel, and each goes to its place when it is ready."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from modelstore.execute.export.layout import OutFile, PlacedTensor, block_limit
from modelstore.execute.export.target import Done, Target, writing
from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes, view
from modelstore.format.region import Region, extent, is_contiguous, offset
from modelstore.plan.read import Want
from modelstore.plan.work import Work
from modelstore.storage.pool import Pool, ordered

CHECKPOINT = 512 << 20  # bytes of one file after which what is written of it is made durable and recorded
_SIZES = 16  # of buffers: multiples of this part of the largest
_UNSYNCED = 8  # finished files that wait to be made durable


@dataclass(slots=True)
class _Open:
    """A file being written: its blocks, and which of them are there."""

    output: OutFile
    first: int  # blocks that an earlier run wrote
    count: int
    descriptor: int = -1
    written: set[int] = field(default_factory=set)
    reached: int = 0  # all blocks below are written
    since: int = 0  # bytes since the last checkpoint


@dataclass(frozen=True, slots=True)
class _Block:
    file: int
    number: int
    placed: PlacedTensor
    region: Region


def write(reader: Reader, outputs: Sequence[OutFile], target: Target, work: Work) -> None:
    """Write all files to where they are staged, going on from what an earlier run left."""
    limit = block_limit(work.memory)
    found = [(output, target.done(output, limit)) for output in outputs]
    _write_all(reader, found, target, work, limit)
    # The content from an earlier run was trusted so far: it is checked now that it is whole.
    left = [output for output, done in found if done.whole or done.blocks]
    wrong = [(output, Done(output.digest, False)) for output in left if not target.verify(output)]
    if wrong:
        _write_all(reader, wrong, target, work.unheard(), limit)


def _write_all(
    reader: Reader,
    outputs: Sequence[tuple[OutFile, Done]],
    target: Target,
    work: Work,
    limit: int,
) -> None:
    writer = _Writer(target, limit)
    wanted: list[_Block] = []
    for output, done in outputs:
        found = [(placed, region) for placed in output.tensors for region in placed.regions(limit)]
        first = len(found) if done.whole else done.blocks
        file = writer.add(output, first, len(found), whole=done.whole)
        for number, (placed, region) in enumerate(found):
            if number >= first:
                wanted.append(_Block(file, number, placed, region))
            elif placed.counts:
                work.done(_nbytes(placed, region))
    try:
        writer.start()
        for formed, run in itertools.groupby(wanted, lambda block: block.placed.form is not None):
            for block in (_formed if formed else _plain)(reader, list(run), work, limit, writer):
                if block.placed.counts:
                    work.done(_nbytes(block.placed, block.region))
    finally:
        writer.close()
    writer.check()


def _plain(reader: Reader, wanted: Sequence[_Block], work: Work, limit: int, writer: _Writer) -> Iterator[_Block]:
    """Write blocks whose bytes are the store's; each, when it is written."""
    wants = [Want.of(b.placed.tensor, b.region) for b in wanted]
    buffers = _Buffers(limit)
    for index, buffer in reader.stream(wants, work.unheard(), allocate=buffers.take):
        block = wanted[index]
        writer.put(block, partial(_write_region, block.placed, block.region, buffer), len(buffer))
        buffers.give_back(index)
        yield block


def _formed(reader: Reader, wanted: Sequence[_Block], work: Work, limit: int, writer: _Writer) -> Iterator[_Block]:
    """Write blocks that are made into something else in the threads that read them; each, when it is written."""
    threads = work.limits.reading_threads(reader.local)
    # A block is held raw, as float32 or as codes, and as what is written: about four times its size.
    ahead = max(1, min(2 * threads, work.memory // (4 * limit)))

    def read(block: _Block) -> list[tuple[int, Bytes]]:
        form = block.placed.form
        assert form is not None
        places, found = form.places(block.region), form.read(reader, block.region)
        return [(at, data) for (at, _), data in zip(places, found, strict=True)]

    made = ordered(read, wanted, threads, "modelstore-export", ahead=ahead)
    for block, pieces in zip(wanted, made, strict=True):
        writer.put(block, partial(_write_pieces, pieces), sum(len(data) for _, data in pieces))
        yield block


class _Buffers:
    """Buffers that are used again, because fresh memory costs more than what is written to it. For one thread."""

    def __init__(self, limit: int) -> None:
        self._unit = limit // _SIZES
        self._free: dict[int, list[Bytes]] = {}
        self._taken: dict[int, Bytes] = {}
        self._spare = 2 * limit  # bytes of free ones that are kept, at most

    def take(self, index: int, nbytes: int) -> Bytes:
        """A buffer for the block of that number; what it holds is undefined."""
        size = -(-nbytes // self._unit) * self._unit
        if size == self._unit:
            return np.empty(nbytes, np.uint8)
        free = self._free.get(size)
        if free:
            buffer = free.pop()
            self._spare += size
        else:
            buffer = np.empty(size, np.uint8)
        self._taken[index] = buffer
        return buffer[:nbytes]

    def give_back(self, index: int) -> None:
        """The block was written; its buffer may be taken by another."""
        buffer = self._taken.pop(index, None)
        if buffer is not None and len(buffer) <= self._spare:
            self._spare -= len(buffer)
            self._free.setdefault(len(buffer), []).append(buffer)


class _Writer:
    """Open files, used by one thread; another makes them durable."""

    def __init__(self, target: Target, limit: int) -> None:
        self._target = target
        self._limit = limit
        self._files: list[_Open] = []
        self._whole: list[bool] = []
        self._keeper = Pool(1, thread_name_prefix="modelstore-sync")
        self._waiting: deque[Future[None]] = deque()

    def add(self, output: OutFile, first: int, count: int, *, whole: bool) -> int:
        """Announce a file with so many blocks; its number."""
        self._files.append(_Open(output, first, count, reached=first))
        self._whole.append(whole)
        return len(self._files) - 1

    def start(self) -> None:
        """Write the files that have no block to wait for."""
        for number, file in enumerate(self._files):
            if not self._whole[number] and file.first == file.count:
                self._finish(number)

    def put(self, block: _Block, fill: Callable[[int], None], nbytes: int) -> None:
        """Write one block to its place: `fill` writes its bytes, so many, to the open file."""
        file = self._files[block.file]
        with writing(self._target.path):
            fill(self._descriptor(file))
        file.written.add(block.number)
        while file.reached in file.written:
            file.written.remove(file.reached)
            file.reached += 1
        file.since += nbytes
        if file.reached == file.count:
            self._finish(block.file)
        elif file.since >= CHECKPOINT and not self._waiting:
            done = Done(file.output.digest, False, file.reached, self._limit)
            self._waiting.append(self._keeper.submit(self._keep, file, done))
            file.since = 0
        while self._waiting and (len(self._waiting) > _UNSYNCED or self._waiting[0].done()):
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait for what is being made durable, and close everything."""
        self._keeper.shutdown(wait=True)
        for file in self._files:
            if file.descriptor >= 0:
                os.close(file.descriptor)
                file.descriptor = -1

    def check(self) -> None:
        """Raise what went wrong in the other thread."""
        for future in self._waiting:
            future.result()
        assert all(self._whole), "a file was not finished"

    def _descriptor(self, file: _Open) -> int:
        """The open file, made at its full size if nothing of it is there."""
        if file.descriptor < 0:
            file.descriptor = self._target.open_staged(file.output, fresh=not file.first)
            os.ftruncate(file.descriptor, file.output.size)
            _write(file.descriptor, memoryview(file.output.header), 0)
        return file.descriptor

    def _finish(self, number: int) -> None:
        file = self._files[number]
        with writing(self._target.path):
            self._descriptor(file)
        self._whole[number] = True
        done = Done(file.output.digest, True, file.count, self._limit)
        self._waiting.append(self._keeper.submit(self._keep, replace(file), done))
        file.descriptor = -1

    def _keep(self, file: _Open, done: Done) -> None:
        """Make a file durable, then say so; runs in the keeper's thread."""
        with writing(self._target.path):
            try:
                os.fsync(file.descriptor)
                if done.whole:
                    self._target.whole(file.output, file.descriptor)
            finally:
                if done.whole:
                    os.close(file.descriptor)
            self._target.note(file.output, done)


def _nbytes(placed: PlacedTensor, region: Region) -> int:
    nbytes = placed.tensor.kind.itemsize
    for n in extent(region):
        nbytes *= n
    return nbytes


def _write_region(placed: PlacedTensor, region: Region, buffer: Bytes, descriptor: int) -> None:
    """Write a region's bytes to their places in the file: in one step, or run by run."""
    shape, itemsize = placed.tensor.shape, placed.tensor.kind.itemsize
    data = view(buffer)
    if is_contiguous(region, shape):
        _write(descriptor, data, placed.offset + offset(region, shape) * itemsize)
        return
    # The dimensions before `inner` are walked; from there on each row of the region is one run of the tensor.
    inner = len(shape) - 1
    while region[inner] == (0, shape[inner]):
        inner -= 1
    run = len(data)
    for n in extent(region)[:inner]:
        run //= n
    for number, index in enumerate(np.ndindex(*extent(region)[:inner])):
        corner = [(a + i, a + i + 1) for (a, _), i in zip(region, index, strict=False)]
        at = placed.offset + offset((*corner, *region[inner:]), shape) * itemsize
        _write(descriptor, data[number * run : (number + 1) * run], at)


def _write_pieces(pieces: Sequence[tuple[int, Bytes]], descriptor: int) -> None:
    for at, data in pieces:
        _write(descriptor, view(data), at)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
