"""The contract of a codec for weights: codecs that compress work on matrices of numbers, in groups, and need not be exact.

A tensor is looked at as a matrix, whose rows are output channels and whose columns are inputs; see `matrix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.base import Codec
from modelstore.codecs.look import Look
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent

Encode = Callable[[Bytes, Region], tuple[Buffer, ...]]  # a region's raw bytes, and where it lies → its planes
EncodeOn = Callable[[Bytes, Shape, DType, str], tuple[Buffer, ...]]  # as `Codec.encode`, on a device of torch

FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
_PART = "weight"  # the first part of the names of a weight's parts
_KERNEL = 11  # a last dimension up to this, of three or more, is a convolution's kernel


def matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor, or of a region of one whose borders respect the codec's group.

    A convolution [out, in, *kernel] is [out, in * kernel]; anything else has its last dimension as columns and all others,
    such as the experts of [experts, out, in], as rows. A 1-d tensor is one row, a 0-d one a single number.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    if is_convolution(shape):
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def has_whole_rows(region: Region, shape: Shape) -> bool:
    """Whether a region holds rows of the tensor's matrix from end to end."""
    first = 1 if is_convolution(shape) else max(0, len(shape) - 1)
    return all(pair == (0, n) for pair, n in zip(region[first:], shape[first:], strict=True))


def is_convolution(shape: Shape) -> bool:
    """Whether a shape is that of a convolution's weights: [out, in, *kernel]."""
    return len(shape) > 2 and (len(shape) > 3 or shape[-1] <= _KERNEL)


def group_of(shape: Shape, columns: int, rows: int = 1) -> Shape:
    """The group of a codec that works on blocks of `rows` × `columns` of the matrix, as multiples for each dimension.

    0 stands for the whole extent. Convolutions, and matrices in a stack whose columns are not a multiple, are never cut along
    their columns, so that the shape of a region still shows what it is.
    """
    if not shape:
        return ()
    if is_convolution(shape):
        return (min(rows or shape[0], shape[0]), *shape[1:])
    whole = columns == 0 or (len(shape) > 2 and shape[-1] % columns != 0)
    last = max(1, shape[-1] if whole else columns)
    if len(shape) == 1:
        return (last,)
    if rows == 0 or (rows > 1 and len(shape) > 2):  # rows of several matrices never share a block: each is whole
        return (*[1] * (len(shape) - 2), max(1, shape[-2]), last) if rows else (*[max(1, n) for n in shape[:-1]], last)
    return (*[1] * (len(shape) - 2), rows, last)


def part_name(tensor: str, part: str) -> str:
    """The name of a weight's part: `a.weight` and `weight_scale` are `a.weight_scale`, as is `a` and `weight_scale` `a_scale`."""
    if tensor.endswith(_PART):
        return tensor.removesuffix(_PART) + part
    return tensor + part.removeprefix(_PART)


class WeightCodec:
    """Base of the codecs that compress; subclasses are frozen dataclasses, with `Codec`'s methods and these.

    They decode to the dtype they encoded from, always to the same bits, on every machine. NaN counts as 0 and an infinity
    as the largest finite number of its sign, unless a codec says otherwise.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """As `Codec.name`."""
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """As `Codec.exact`."""
        return False

    @property
    def needs_base(self) -> bool:
        """As `Codec.needs_base`."""
        return False

    def planes(self, dtype: DType) -> tuple[str, ...]:
        """As `Codec.planes`."""
        raise NotImplementedError

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:
        """As `Codec.encode`; where a codec looks at whole tensors, the region is taken to be one."""
        raise NotImplementedError

    def decode(
        self, planes: Sequence[Buffer], shape: Shape, dtype: DType, out: Bytes, base: Bytes | None = None
    ) -> None:
        """As `Codec.decode`."""
        raise NotImplementedError

    def refuses(self, shape: Shape, dtype: DType) -> str | None:
        """Why a tensor is not encoded so, as the end of "it …"; None if it is."""
        if dtype.name not in FLOATS:
            return f"is {dtype.name}"
        if not math.prod(shape):
            return "is empty"
        return None

    def group(self, shape: Shape) -> Shape:
        """For each dimension, what the borders of regions are multiples of (the tensor's own end excepted)."""
        return (1,) * len(shape)

    @property
    def by_rows(self) -> bool:
        """Whether `fit` finds for a run of whole rows of the matrix what it finds for them in the whole tensor."""
        return False

    def size(self, shape: Shape, dtype: DType) -> int:
        """Bytes that a tensor is stored in: exact, or where planes are entropy-coded an estimate."""
        raise NotImplementedError

    def memory(self, shape: Shape, dtype: DType) -> int:  # noqa: ARG002
        """Bytes that `fit` and what it returns hold for a tensor, bands of some MiB aside, where these are many."""
        return 0

    def fit(self, look: Look) -> Encode:
        """Look at a whole tensor, region by region, before it is encoded; how its regions are then.

        Codecs that encode each region by itself look at nothing. The memory that they hold stays within `look.memory`,
        where `memory` says that it can. A codec that reads `look.statistics` stores what these say; any other one makes
        nothing of them.
        """
        return lambda values, region: self.encode(values, extent(region), look.dtype)

    @property
    def looks_ahead(self) -> bool:
        """Whether `fit` looks at more of a tensor than the region that is encoded next, or may."""
        return type(self).fit is not WeightCodec.fit

    @property
    def on_device(self) -> EncodeOn | None:
        """Encodes a region of floats of 16 bits and more on a device of torch: the planes of `encode`, bit for bit, and sooner.

        None if nothing is gained by it.
        """
        return None

    @property
    def views(self) -> tuple[str, ...]:
        """The variants that one encoding serves, each decoded with its name as parameter `variant`; () where it is one alone."""
        return ()

    @property
    def affine(self) -> AffineView | None:
        """How training rounds as this codec does; None if what is stored is not whole codes with scales."""
        return None

    @property
    def view(self) -> EngineView | None:
        """How engines take what is stored, without dequantizing it; None if none does."""
        return None


def as_weight_codec(codec: Codec) -> WeightCodec | None:
    """The codec as one that compresses weights; None if it stores bytes of any kind."""
    return codec if isinstance(codec, WeightCodec) else None


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """One tensor as an engine takes it: dtype (torch's name), shape, and its raw little-endian bytes."""

    dtype: str
    shape: Shape
    data: Bytes


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """The scales and zero points of a matrix whose numbers are (code - zero) * scale, computed in float32.

    `cell`: the rows and columns that share a scale; `scales`, `zeros`: float32 (rows / cell's, columns / cell's).
    """

    bits: int
    cell: tuple[int, int]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]

    def within(self, rows: tuple[int, int], columns: tuple[int, int]) -> AffineCodes:
        """Those of a part of the matrix whose borders respect the cells."""
        (high, wide), where = self.cell, []
        for (start, stop), each in ((rows, high), (columns, wide)):
            where.append(slice(start // each, -(-stop // each)))
        there = tuple(where)
        scales, zeros = np.ascontiguousarray(self.scales[there]), np.ascontiguousarray(self.zeros[there])
        return AffineCodes(self.bits, self.cell, scales, zeros)


class AffineView(Protocol):
    """A codec's planes as whole codes, and what turns them into numbers."""

    def scales(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> AffineCodes:
        """The scales and zero points that planes hold, of a tensor or a region of it."""

    def planes(self, codes: NDArray[np.int8], found: AffineCodes, dtype: DType) -> tuple[Buffer, ...]:
        """The planes of codes (rows, columns), -2^(bits - 1) to 2^(bits - 1) - 1, with these scales and zero points."""


class EngineView(Protocol):
    """A codec's planes, in the names and packing of compressed-tensors. Planes are unpacked, placed, then packed."""

    @property
    def format(self) -> str:
        """compressed-tensors' name of the format, such as "pack-quantized"."""

    def scheme(self) -> dict[str, Any]:
        """compressed-tensors' description of the weights: num_bits, type, symmetric, strategy, group_size, …"""

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:
        """For each unpacked array, the rows and columns of the weight matrix that one entry stands for (0: all of them)."""

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """A region's planes unpacked: 2-d arrays by name, such as codes (rows, columns) and scales (rows, groups)."""

    def parts(self, arrays: Mapping[str, NDArray[Any]], shape: Shape, dtype: DType) -> dict[str, EngineTensor]:
        """The tensors of a weight, or of a rank's slice of it, of that shape: by the end of their names ("weight_packed", …)."""
