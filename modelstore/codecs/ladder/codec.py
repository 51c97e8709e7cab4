"""`ladder`: one set of planes that serves the original, to the last bit, and its int8 and int4 versions.

The idea, int8 and what is missing for the original, is that of QStore (VLDB 2025). Here int4 is below int8, the missing part
is counted in representable numbers, and its streams go by the size of the code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.ladder import kernels
from modelstore.codecs.ladder.codes import GIVEN_PLANES, PLANES, CodeReader, GivenCodes, eighth
from modelstore.codecs.ladder.kernels import ZERO
from modelstore.codecs.ladder.planes import (
    BLOCK,
    HEADER,
    KINDS,
    NibbleWriter,
    ResidualReader,
    ResidualWriter,
    Split,
    Words,
    is_values,
    scratch,
)
from modelstore.codecs.ladder.view import LadderView
from modelstore.codecs.look import Look
from modelstore.codecs.numeric.numbers import from_float32, numpy_dtype, to_float32
from modelstore.codecs.weight import Encode, WeightCodec, group_of, matrix
from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent

VIEWS = ("original", "int8", "int4")  # what one encoding serves, the longest first
_BITS = {  # of high, low and residual, a weight, as measured on real weights
    "bfloat16": (3.4, 4.0, 3.6),
    "float16": (3.4, 4.0, 6.9),
    "float32": (3.4, 4.0, 19.6),
}
_CORRECTION = 0.8  # bits a weight, of codes such as GPTQ's
_SHORTEST = 32  # columns; for shorter rows the scales outweigh what is gained
_MOST = 1 << 16  # columns of a group


@dataclass(frozen=True, slots=True)
class Ladder(WeightCodec):
    """Weights as a scale, the high and the low nibble of an eight-bit code, and a residual. bfloat16, float16 and float32.

    Each `group_size` consecutive columns have a scale s4 in the tensor's dtype; s8 is s4 / 16 in that dtype. `variant` says
    what decode reads: `int4` gives high * s4, `int8` (16 * high + low) * s8, with high in -8..7 and low in -8..7, each
    rounded once to the dtype, as compressed-tensors does for a symmetric pack-quantized weight; `original` is exact,
    whatever the bits. Encode makes all planes for any variant. `kernels` has the numbers, `planes` the layout.

    With `codes_group_size`, int4's codes come from elsewhere (`encode_with`), each so many columns with a scale of theirs;
    see `codes`. int8 and the original stay what they are without.
    """

    variant: str = "original"
    group_size: int = 128
    codes_group_size: int = 0

    def __post_init__(self) -> None:
        if self.variant not in PLANES:
            raise ValueError(f"variant {self.variant!r} is not one of {', '.join(PLANES)}")
        if not 2 <= self.group_size <= _MOST or self.group_size % 2:
            raise ValueError(f"group_size {self.group_size} is not an even number from 2 to {_MOST}")
        if not 0 <= self.codes_group_size <= _MOST or self.codes_group_size % 2:
            raise ValueError(f"codes_group_size {self.codes_group_size} is not an even number from 0 to {_MOST}")

    @property
    def name(self) -> str:
        return "ladder"

    @property
    def exact(self) -> bool:
        return self.variant == "original"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return self._planes[self.variant]

    @property
    def _planes(self) -> Mapping[str, tuple[str, ...]]:
        return GIVEN_PLANES if self.codes_group_size else PLANES

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS

    @property
    def looks_ahead(self) -> bool:
        return False

    @property
    def view(self) -> LadderView | None:
        if self.variant == "original":
            return None
        return LadderView(4 if self.variant == "int4" else 8, self.group_size, self.codes_group_size)

    def refuses(self, shape: Shape, dtype: DType) -> str | None:
        if dtype.name not in KINDS:
            return f"is {dtype.name}"
        if not math.prod(shape):
            return "is empty"
        if len(shape) < 2:
            return f"has {len(shape)} dimensions"
        columns = matrix(shape)[1]
        return f"has rows of {columns} numbers only" if columns < _SHORTEST else None

    def group(self, shape: Shape) -> Shape:
        return group_of(shape, math.lcm(self.group_size, self.codes_group_size or 1))

    def size(self, shape: Shape, dtype: DType) -> int:
        rows, columns = matrix(shape)
        high, low, residual = _BITS[dtype.name]
        costs = {"high": high, "low": low, "residual": residual, "correction": _CORRECTION}
        groups = {"scale": self.codes_group_size or self.group_size, "own_scale": self.group_size}
        names = self.planes(dtype)
        scales = sum(self._groups(columns, groups[name]) for name in names if name in groups)
        bits = sum(costs[name] for name in names if name in costs)
        return int(rows * columns * bits / 8) + rows * scales * dtype.itemsize + 64

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        kind, words = _words(values, dtype)
        rows, columns = matrix(shape)
        if not self.codes_group_size:
            return self._encode(words, columns, dtype, self._own(words, rows, columns, kind, dtype), None)
        near = Ladder("int4", self.codes_group_size)  # no codes are given: those next to the values
        assert near.view is not None, "int4 has one"
        arrays = near.view.arrays(near.encode(values, shape, dtype)[:2], shape, dtype)
        scale = np.ascontiguousarray(arrays["scales"]).reshape(-1).view(np.uint8)
        return self.encode_with(values, shape, dtype, arrays["codes"], scale)

    def fit(self, look: Look) -> Encode:
        """Nothing is looked at; with `codes_group_size` the codes are those that statistics know."""
        if not (self.codes_group_size and look.statistics and look.statistics.codes):
            return WeightCodec.fit(self, look)
        read = look.statistics.codes(4, self.codes_group_size)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            return self.encode_with(values, extent(region), look.dtype, *read(region))

        return encode

    def encode_with(
        self, values: Bytes, shape: Shape, dtype: DType, codes: NDArray[np.int8], scale: Bytes
    ) -> tuple[Buffer, ...]:
        """The planes of `values` with int4 codes that are not a function of them, such as GPTQ's: `int4` is codes * scale.

        codes: int8 (rows, columns) of the matrix, -8..7; scale: raw bytes of the dtype (rows, groups), finite. `ValueError` if
        they are not, or if the codec does not have `codes_group_size`.
        """
        check.values(values, shape, dtype)
        kind, words = _words(values, dtype)
        rows, columns = matrix(shape)
        size = self.codes_group_size
        if not size:
            raise ValueError("codes are given to a ladder that has no codes_group_size")
        if (
            codes.dtype != np.int8
            or codes.shape != (rows, columns)
            or codes.min(initial=0) < -8
            or codes.max(initial=0) > 7
        ):
            raise ValueError(f"codes: int8 ({rows}, {columns}) from -8 to 7 are wanted, not {codes.dtype}{codes.shape}")
        check.values(scale, (rows, self._groups(columns, size)), dtype, "scale")
        raw = np.ascontiguousarray(scale)
        if not np.isfinite(to_float32(raw, dtype)).all():
            raise ValueError("scale: a number is not finite")
        own = self._own(words, rows, columns, kind, dtype)
        return self._encode(words, columns, dtype, own, GivenCodes(codes, raw, size, own, self.group_size, dtype))

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        kind = _kind(dtype)
        names = self.planes(dtype)
        if len(planes) != len(names):
            raise FormatError(f"{len(planes)} planes are stored where there are {len(names)}: {', '.join(names)}")
        data = {name: as_bytes(plane) for name, plane in zip(names, planes, strict=True)}
        for plane in data.values():
            plane.flags.writeable = False  # of this view; the kernels are compiled for it
        rows, columns = matrix(shape)
        count = rows * columns
        reader = CodeReader(data, rows, columns, self.group_size, self.codes_group_size, dtype)
        left = data.get("residual")
        if left is not None and is_values(left):
            byteplanes.decode(left[HEADER.size :], dtype, out)
            return
        residual = ResidualReader(left, kind, dtype, count) if left is not None else None
        zero = ZERO if "low" in data else 8
        work = kernels.kernels(kind.width)
        direct = out.reshape(-1).view(kind.dtype) if out.flags.c_contiguous else None
        none = np.empty(0, np.uint8)
        for b in range(-(-count // BLOCK)):
            first, n = b * BLOCK, min(BLOCK, count - b * BLOCK)
            codes = scratch.codes[:n]
            reader.block(b, first, codes)
            words = scratch.of(kind, n) if direct is None else direct[first : first + n]
            grid = (kind.number, first, columns, reader.group, reader.scale)
            if residual is None:
                work.join(codes, none, words[:0], *grid, 0, zero, 0, words)
            else:
                residual.block(b, codes, words, grid)
            if direct is None:
                _place(words.view(np.uint8), first * kind.width, out)
        if residual is not None:
            residual.end()

    @staticmethod
    def _groups(columns: int, size: int) -> int:
        return -(-columns // size)

    def _own(self, words: Words, rows: int, columns: int, kind: Split, dtype: DType) -> Bytes:
        """The ladder's own s4, raw."""
        most = np.empty(rows * self._groups(columns, self.group_size), kind.dtype)
        kernels.kernels(kind.width).largest(words, kind.magnitude, kind.infinity, columns, self.group_size, most)
        return _scales(most, dtype)

    def _encode(
        self, words: Words, columns: int, dtype: DType, s4: Bytes, given: GivenCodes | None
    ) -> tuple[Buffer, ...]:
        kind = KINDS[dtype.name]
        work = kernels.kernels(kind.width)
        scale = eighth(s4, dtype)
        high, low, residual = NibbleWriter(), NibbleWriter(), ResidualWriter(kind, words)
        for first in range(0, words.size, BLOCK):
            block = words[first : first + BLOCK]
            n = block.size
            codes, symbols, rests = scratch.codes[:n], scratch.symbols[:n], scratch.of(kind, n)
            places, patches = scratch.places[: n // 8], np.empty(n // 8, kind.dtype)
            grid = (kind.number, first, columns, self.group_size, scale)
            kept = work.split(
                block, *grid, kind.shift, kind.bias, residual.drop, codes, symbols, rests, places, patches
            )
            residual.patches(places, patches, first, kept)
            nibbles = np.empty((2, -(-n // 2)), np.uint8)
            work.pack(codes, nibbles[0], nibbles[1])
            if given is None:
                high.add(nibbles[0])
            else:
                given.block(first, codes)
            low.add(nibbles[1])
            if not residual.hopeless:
                residual.block(codes, symbols, rests, block)
        base = (s4, high.plane()) if given is None else given.planes()
        return *base, low.plane(), residual.plane(words.view(np.uint8), dtype)


def _kind(dtype: DType) -> Split:
    if dtype.name not in KINDS:
        raise UnsupportedError(f"a tensor of {dtype.name} has no ladder; there is one for {', '.join(KINDS)}")
    return KINDS[dtype.name]


def _words(values: Bytes, dtype: DType) -> tuple[Split, Words]:
    kind = _kind(dtype)
    return kind, np.ascontiguousarray(values).view(kind.dtype)


def _scales(most: Words, dtype: DType) -> Bytes:
    """s4 of groups of these largest magnitudes (words), as raw bytes: 16 times s8.

    s8 is a 119th of the magnitude, or the next larger number where that would not reach it (a subnormal), and at most what
    leaves 128 * s8 finite. Groups of zeros have the s4 1.
    """
    largest = to_float32(most.view(np.uint8), dtype)
    s8 = np.empty(most.size, most.dtype)
    from_float32(largest / np.float32(119), dtype, s8.view(np.uint8).reshape(1, -1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        s8 += np.rint(largest / to_float32(s8.view(np.uint8), dtype)) > 119
    top = np.array([_limit(dtype)], np.float32)
    s4 = np.float32(16) * np.minimum(to_float32(s8.view(np.uint8), dtype), top)
    s4[most == 0] = 1
    out = np.empty(most.nbytes, np.uint8)
    from_float32(s4, dtype, out.reshape(1, -1))
    return out


def _limit(dtype: DType) -> float:
    """The largest number of which 128 times is finite: as all bits of the largest are set, a power of two below it."""
    import ml_dtypes

    return float(ml_dtypes.finfo(numpy_dtype(dtype)).max) / 128  # type: ignore[no-untyped-call]


def _place(data: Bytes, at: int, out: Bytes) -> None:
    """Bytes to the place in `out`, rows some way apart, that starts with its byte `at` in row-major order."""
    width = out.shape[1]
    row, column = divmod(at, width)
    head = min(data.size, width - column) if column else 0
    out[row, column : column + head] = data[:head]
    row += bool(head)
    rows, tail = divmod(data.size - head, width)
    out[row : row + rows] = data[head : head + rows * width].reshape(rows, width)
    if tail:
        out[row + rows, :tail] = data[data.size - tail :]
