"""The plan of a write: for each tensor its codec, its chunks, and the steps in which its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from modelstore.format import grid
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import CodecSpec
from modelstore.format.region import Region, Shape, full

STEP = 8 << 20  # raw bytes that one step reads and encodes, at least, where there is that much
FILE_CODEC = CodecSpec("lossless")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor will be stored. `whole` keeps it in one piece in its pack, under its own name and dtype."""

    name: str
    dtype: str
    shape: Shape
    chunk: Shape
    codec: CodecSpec
    whole: bool = False

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class ReadStep:
    """A region of a tensor to read in one step; the chunks in it to encode; whether it advances the tensor's digest."""

    tensor: int
    region: Region
    chunks: tuple[int, ...]
    hashed: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Parts that one worker reads and encodes in one go."""

    parts: tuple[ReadStep, ...]
    nbytes: int


def plan_tensor(
    name: str,
    dtype: str,
    shape: Shape,
    codec: CodecSpec,
    *,
    whole: bool = False,
    axis: Callable[[str], int | None] | None = None,
    like: Shape | None = None,
    units: Shape | None = None,
) -> TensorPlan:
    """The plan of one tensor.

    `axis` says along which dimension ranks will slice it. `like` is the chunk shape of the tensor that it may equal in
    part, in an earlier version: chunks can only be the same where they are cut the same.
    `units` is the codec's group: all cuts are at multiples of it.
    """
    whole = whole and DTYPES[dtype].safetensors is not None and bool(shape or dtype != "float4_e2m1fn_x2")
    if like is not None and not whole:
        return TensorPlan(name, dtype, shape, like, codec)
    along = axis(name) if axis else None
    if along is not None and not -len(shape) <= along < len(shape):
        along = None
    chunk = grid.chunk_shape(
        shape, DTYPES[dtype].itemsize, axis=None if along is None else along % len(shape), units=units, rows_only=whole
    )
    return TensorPlan(name, dtype, shape, chunk, codec, whole)


def plan_steps(tensors: Iterable[tuple[int, TensorPlan]], slab_limit: int) -> Iterator[Step]:
    """The reading and encoding of tensors, in order, in steps of about `STEP` bytes.

    A slab above `slab_limit` bytes is read twice, in bands to digest it and chunk by chunk to encode it, so that
    memory does not grow with the tensor.
    """
    parts: list[ReadStep] = []
    nbytes = 0
    for index, tensor in tensors:
        for part in _parts(index, tensor, slab_limit):
            if parts and nbytes + part.nbytes > STEP:
                yield Step(tuple(parts), nbytes)
                parts, nbytes = [], 0
            parts.append(part)
            nbytes += part.nbytes
    if parts:
        yield Step(tuple(parts), nbytes)


def _parts(index: int, tensor: TensorPlan, slab_limit: int) -> Iterator[ReadStep]:
    size = tensor.itemsize
    if grid.is_one_chunk(tensor.shape, tensor.chunk) and size * math.prod(tensor.shape) <= STEP:
        yield ReadStep(index, full(tensor.shape), (0,), True, size * math.prod(tensor.shape))
        return
    for slab in grid.slabs(tensor.shape, tensor.chunk):
        touched = tuple(grid.touching(tensor.shape, tensor.chunk, slab).tolist())
        nbytes = _nbytes(slab, size)
        if nbytes <= max(slab_limit, STEP):
            yield ReadStep(index, slab, touched, True, nbytes)
        else:
            for band in grid.bands(slab, size, STEP):
                yield ReadStep(index, band, (), True, _nbytes(band, size))
            for chunk in touched:
                region = grid.chunk_region(tensor.shape, tensor.chunk, chunk)
                yield ReadStep(index, region, (chunk,), False, _nbytes(region, size))


def _nbytes(region: Region, itemsize: int) -> int:
    size = itemsize
    for a, b in region:
        size *= b - a
    return size
