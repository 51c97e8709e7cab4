"""Weights as engines take them, from chunks of them: names, the possible slices, and the place of each chunk's entries.

A codec's view (`codecs.weight.EngineView`) unpacks a chunk into arrays of which an entry stands for a cell of the weight: a
code for one number, a scale for a group. Here these are put into arrays of the whole weight, or of a rank's slice of it, which
the view then packs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.weight import EngineTensor, EngineView, WeightCodec, as_weight_codec, is_convolution
from modelstore.errors import FormatError
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.buffers import Buffer
from modelstore.format.locks import Lock
from modelstore.format.objects.manifest import Tensor
from modelstore.format.region import Region, Shape, extent, slices
from modelstore.plan.read import ChunkRead, Want, plan_read

Cells = Mapping[str, tuple[int, int]]


def units(shape: Shape, cells: Cells) -> Shape:
    """For each dimension, what the borders of a slice must be multiples of (the tensor's own end excepted); 0: it is whole."""
    rows, columns = (math.lcm(*(cell[axis] or 1 for cell in cells.values())) for axis in (0, 1))
    if len(shape) < 2:
        return (columns,) * len(shape)
    if is_convolution(shape):
        return (rows, *[0] * (len(shape) - 1))
    lead = [1] * (len(shape) - 2)
    return (*lead, rows, columns)


def check_slice(want: Want, cells: Cells) -> None:
    """`ValueError`, naming the tensor and what would fit, where a slice cuts through what shares a scale."""
    tensor = want.tensor
    for axis, (unit, n, ranges) in enumerate(
        zip(units(tensor.shape, cells), tensor.shape, want.share.ranges, strict=True)
    ):
        last = len(ranges) - 1
        for at, (a, b) in enumerate(ranges):
            if unit == 0 and (a, b) != (0, n):
                raise ValueError(
                    f"tensor {tensor.name!r}: {a}:{b} of dimension {axis} is not the whole of it, {n}, and its numbers lie "
                    f"across it: slice dimension 0, or load with dequantize=True"
                )
            if unit and (a % unit or (b % unit and not (b == n and at == last))):
                raise ValueError(
                    f"tensor {tensor.name!r}: {a}:{b} of dimension {axis} cuts through groups that share a scale: give borders "
                    f"that are multiples of {unit}{_sizes(n, unit)}, or load with dequantize=True"
                )


def _sizes(n: int, unit: int) -> str:
    """Into how many ranks an axis could be cut, as the middle of a sentence."""
    fitting = [str(ways) for ways in (2, 4, 8, 16, 32) if n % (unit * ways) == 0]
    return f" (it divides among {', '.join(fitting)} ranks)" if fitting else ""


@dataclass(frozen=True, slots=True)
class _Matrices:
    """A tensor's regions as those of a stack of matrices, (*stack, rows, columns); the matrix of `weight.matrix`, unrolled."""

    shape: Shape

    def region(self, region: Region) -> Region:
        """A region of the tensor as one of the stack."""
        if len(self.shape) < 2:
            return ((0, 1), *region) if self.shape else ((0, 1), (0, 1))
        if is_convolution(self.shape):
            return (region[0], (0, math.prod(extent(region[1:]))))
        return region


def _entries(region: Region, cell: tuple[int, int]) -> Region:
    """The entries of an array that stand for a region of a stack of matrices."""
    rows, columns = cell
    size = (*[1 if rows else 0] * (len(region) - 2), rows, columns)
    return tuple((a // k, -(-b // k)) if k else (0, 1) for (a, b), k in zip(region, size, strict=True))


class Assembly:
    """One weight, or a rank's slice of it, on its way: chunks are put in from several threads, the last one packs it.

    `parts` are None until then. `ValueError` if the slice cuts through groups.
    """

    def __init__(self, want: Want, view: EngineView) -> None:
        self._want = want
        self._view = view
        self._cells = view.cells(want.tensor.shape)
        check_slice(want, self._cells)
        self._matrices = _Matrices(want.tensor.shape)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._lock = Lock()
        self._left = _touched(want)
        self.parts: Mapping[str, EngineTensor] | None = None

    def put(self, chunk: ChunkRead, planes: Sequence[Buffer]) -> None:
        """Put a chunk's entries to their places. `FormatError` if they are not those of its region."""
        tensor = self._want.tensor
        shape = extent(chunk.region)
        for name, found in self._view.arrays(planes, shape, tensor.kind).items():
            cell = self._cells[name]
            there = extent(_entries(self._stack(tuple((0, n) for n in shape)), cell))
            if math.prod(there) != found.size:
                raise FormatError(
                    f"chunk {chunk.chunk} of tensor {tensor.name!r} has {found.size} {name} where {math.prod(there)} are wanted",
                    tensor=tensor.name,
                    chunk=chunk.chunk,
                )
            whole, entries = self._array(name, found.dtype), found.reshape(there)
            for target in chunk.targets:
                source, place = (_entries(self._stack(region), cell) for region in (target.source, target.place))
                whole[slices(place)] = entries[slices(source)]
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            arrays = {name: array.reshape(-1, array.shape[-1]) for name, array in self._arrays.items()}
            self.parts = self._view.parts(arrays, self._want.shape, tensor.kind)
            self._arrays.clear()

    def _stack(self, region: Region) -> Region:
        return self._matrices.region(region)

    def _array(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The array of all that is wanted, made when its first entries come."""
        with self._lock:
            if name not in self._arrays:
                all_of_it = self._stack(tuple((0, n) for n in self._want.shape))
                self._arrays[name] = np.zeros(extent(_entries(all_of_it, self._cells[name])), dtype)
            return self._arrays[name]


def lossy_codec(reader: Reader, tensor: Tensor) -> WeightCodec | None:
    """The codec that changed a weight's values; None if they are stored exactly, as engines take them."""
    codec = as_weight_codec(reader.codec(tensor))
    return None if codec is None or codec.exact else codec


def read_parts(reader: Reader, tensor: Tensor, view: EngineView, region: Region) -> Mapping[str, EngineTensor]:
    """A region of a weight, whole in memory, as engines take it."""
    want = Want.of(tensor, region)
    assembly = Assembly(want, view)
    for job in plan_read(reader.manifest, [want]):
        for chunk, planes in reader.planes(job, [want]):
            assembly.put(chunk, planes)
    assert assembly.parts is not None, "all chunks of the region were put in"
    return assembly.parts


def _touched(want: Want) -> int:
    """The number of chunks that a want touches."""
    tensor = want.tensor
    found = [grid.touching(tensor.shape, tensor.chunk, region) for region, _ in want.share.pieces()]
    return len(np.unique(np.concatenate(found))) if found else 0
