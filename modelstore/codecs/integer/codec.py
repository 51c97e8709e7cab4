"""`int`: integers of 2, 3, 4 or 8 bits with a scale, and a zero point if wanted, for each group of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.integer.affine import IntAffine
from modelstore.codecs.integer.planes import IntLayout
from modelstore.codecs.integer.view import PackedView
from modelstore.codecs.look import Look, ReadCodes, ReadValues, Statistics
from modelstore.codecs.numeric import levels, scaled
from modelstore.codecs.numeric.numbers import Floats, from_float32, limit, with_nan
from modelstore.codecs.weight import (
    AffineCodes,
    Encode,
    EncodeOn,
    EngineView,
    WeightCodec,
    group_of,
    is_convolution,
    matrix,
)
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.grid import bands
from modelstore.format.region import Region, Shape, extent, full, slices

_GRANULARITIES = ("tensor", "channel", "group", "block")
_METHODS = {"minmax": 0, "mse": 1, "hqq": 2}
_GIVEN = -1  # to the kernel: scales are given
_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}  # the kernels' own; other dtypes go by way of float32
_BAND = 4 << 20  # bytes of a tensor that are looked at at a time
_TILE = 64 << 10  # numbers that are converted at a time
_WIDTH = 4096  # numbers of a row that are encoded at a time where the scale is given
_COLUMNS = 128  # regions are cut at multiples of so many columns, though no group asks for it: matrices stay such
_STEPS, _PATIENCE = 21, 5  # of the search for the best clip


@dataclass(frozen=True, slots=True)
class Int(WeightCodec):
    """Planes `codes`, `scale` and, unless symmetric, `zero`; a number is (code - zero point) * scale.

    bits            of a code: 2, 3, 4 or 8
    symmetric       whether there is no zero point, and 0 is in the middle of the codes
    granularity     numbers that share a scale: "tensor", "channel" (a row of the matrix), "group" (of a row's columns) or
                    "block" (a square); those at the end are smaller
    group_size      columns of a group, or the side of a block
    method          how the scale is found:
        "minmax"    from the range of the numbers: max|w| / ((2^bits - 1) / 2), or (max - min) / (2^bits - 1)
        "mse"       the range is shrunk by 0 to 20 % in steps of 1 %, to what loses least in the norm 2.4; the search ends
                    after five steps that are no better. Without zero points the longer side of the range is turned below
                    zero, where there is one more code, by a scale that is negative where it was above
        "hqq"       half-quadratic quantization (Badri and Shaji, 2023: 20 steps, p = 0.7, beta = 10, kappa = 1.01), for
                    groups and blocks. It solves for the scale and keeps the zero point an integer, where the original
                    solves for a zero point that is none: so engines take it, and the error is less (2 bits, groups of 128
                    normal numbers: 8.7 dB against 6.3, and 6.0 of minmax)

    `codes`: code + 2^(bits - 1), rows of the matrix packed into whole bytes, the first code in the lowest bits.
    `scale`: row-major, in float16 and bfloat16 for tensors of these, else in float32. `zero`: a byte for each scale, zero
    point + 2^(bits - 1). All is computed with the scale as it is stored; zeros alone have scale 1. The formulas, of codes,
    scales, zero points and numbers, are those of compressed-tensors, computed in float32.
    """

    bits: int = 4
    symmetric: bool = True
    granularity: str = "group"
    group_size: int = 128
    method: str = "minmax"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits!r}; allowed are 2, 3, 4 and 8")
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric is {self.symmetric!r}; allowed are true and false")
        if self.granularity not in _GRANULARITIES:
            raise ValueError(f"granularity {self.granularity!r} is not known; known are {', '.join(_GRANULARITIES)}")
        if type(self.group_size) is not int or not 16 <= self.group_size <= 4096 or self.group_size % 8:
            raise ValueError(f"group_size {self.group_size!r} is not a multiple of 8 from 16 to 4096")
        if self.granularity == "block" and self.group_size > 512:
            raise ValueError(f"blocks have at most 512 columns, not {self.group_size}")
        if self.method not in _METHODS:
            raise ValueError(f"method {self.method!r} is not known; known are {', '.join(_METHODS)}")
        if self.method == "hqq" and self.granularity in ("tensor", "channel"):
            raise ValueError(f"hqq works on groups and blocks, not on a whole {self.granularity}; take mse")

    @property
    def name(self) -> str:
        return "int"

    @property
    def layout(self) -> IntLayout:
        """The places of codes and scales in the planes."""
        return IntLayout(self.bits, self.symmetric, self.granularity, self.group_size)

    @property
    def view(self) -> EngineView | None:
        """pack-quantized; engines know no blocks."""
        return None if self.granularity == "block" else PackedView(self.layout)

    @property
    def affine(self) -> IntAffine:
        return IntAffine(self.layout)

    @property
    def by_rows(self) -> bool:
        return self.granularity == "channel"

    @property
    def looks_ahead(self) -> bool:
        return self.granularity in ("tensor", "channel")

    @property
    def on_device(self) -> EncodeOn | None:
        """Groups that are searched for their best clip: what a GPU finds much sooner."""
        return self._encode_on if self.granularity == "group" and self.method == "mse" else None

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return self.layout.names

    def group(self, shape: Shape) -> Shape:
        if self.granularity == "block":
            return group_of(shape, self.group_size, self.group_size)
        return group_of(shape, self.group_size if self.granularity == "group" else _COLUMNS)

    def size(self, shape: Shape, dtype: DType) -> int:
        return sum(self.layout.sizes(shape, dtype))

    def fit(self, look: Look) -> Encode:
        """Tensors and channels are looked at whole, in bands of 4 MiB, once, for "mse" twice; groups and blocks are not.

        Symmetric groups use the codes, or the importance of columns, that statistics have.
        """
        shape, dtype = look.shape, look.dtype
        if look.statistics and self.symmetric and self.granularity == "group":
            read = self._known(look, look.statistics)
            if read is not None:
                return self._given(read, dtype)
        if self.granularity in ("group", "block"):
            return lambda values, region: self.encode(values, extent(region), dtype)
        scales, zeros = self._search(look.read, shape, dtype)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            mine = slices(region[: scales.ndim]) if self.granularity == "channel" and shape[:-1] else ()
            given = scales[mine].reshape(-1, 1), zeros[mine].reshape(-1, 1)
            return self._encode(values, extent(region), dtype, given)

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        if self.granularity in ("group", "block"):
            return self._encode(values, shape, dtype, None)
        return self.fit(Look(partial(boxes.cut, values, shape, dtype.itemsize), shape, dtype))(values, full(shape))

    def _known(self, look: Look, statistics: Statistics) -> ReadCodes | None:
        """The codes and scales that statistics lead to; None where they say nothing of them."""
        if statistics.codes is not None:
            return statistics.codes(self.bits, self.group_size)
        if look.importance is None:
            return None
        from modelstore.codecs.integer.weighted import weighted

        codes, scales = (found.numpy() for found in weighted(look, look.importance, self.bits, self.group_size))
        return self.codes_in(codes, scales, look.dtype)

    def codes_in(self, codes: NDArray[np.int8], scales: Floats, dtype: DType) -> ReadCodes:
        """Regions of codes (rows, columns), and of scales (rows, groups), float32 that the stored dtype holds."""
        stored = DTYPES[scaled.scale_dtype(dtype)]

        def read(region: Region) -> tuple[NDArray[np.int8], Bytes]:
            rows, columns = slices(region)
            groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
            return codes[rows, columns], levels.narrowed(np.ascontiguousarray(scales[rows, groups]), stored)

        return read

    def _given(self, read: ReadCodes, dtype: DType) -> Encode:
        stored = scaled.scale_dtype(dtype)

        def encode(_: Bytes, region: Region) -> tuple[Buffer, ...]:
            codes, raw = read(region)
            shape = extent(region)
            scales = scaled.unplane(raw, self.layout.grid(shape), stored, "scale")
            return self.encode_with(codes, scales, shape, dtype)

        return encode

    def encode_with(self, codes: NDArray[np.int8], scales: Floats, shape: Shape, dtype: DType) -> tuple[Buffer, ...]:
        """A region's planes of given codes (rows, columns) and scales (rows, groups), float32 that the stored dtype holds.

        `ValueError` unless the codec is symmetric, and the codes are of its bits and its matrix.
        """
        half = 1 << (self.bits - 1)
        if not self.symmetric or codes.shape != matrix(shape) or scales.shape != self.layout.grid(shape):
            raise ValueError(f"codes {codes.shape} and scales {scales.shape} are not those of {shape}")
        if codes.size and not (-half <= int(codes.min()) and int(codes.max()) < half):
            raise ValueError(f"there are codes beyond {self.bits} bits")
        given = AffineCodes(self.bits, (1, self.group_size), scales, np.zeros_like(scales))
        return self.affine.planes(codes, given, dtype)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        packed, scales, zeros = self.layout.unplane(planes, shape, dtype)
        rows, columns = matrix(shape)
        line = columns * dtype.itemsize
        if not out.flags.c_contiguous and out.shape[1] != line:  # rows of another length: by way of memory
            whole = np.empty((rows, line), np.uint8)
            self._decode(packed, scales, zeros, shape, dtype, whole)
            out[:] = whole.reshape(out.shape)
        else:
            self._decode(packed, scales, zeros, shape, dtype, out.reshape(rows, line, copy=False))

    def _decode(
        self, packed: Bytes, scales: Floats, zeros: Floats, shape: Shape, dtype: DType, out: NDArray[np.uint8]
    ) -> None:
        """Into rows of the matrix, contiguous in themselves."""
        from modelstore.codecs.integer import kernels as integers

        columns = matrix(shape)[1]
        kind = _KINDS.get(dtype.name, 2)
        kernel = integers.kernels(2 if kind < 2 else 4).decode
        word = np.uint16 if kind < 2 else np.uint32
        direct = out.flags.c_contiguous and dtype.name in _KINDS
        for start, stop, where in self._bands(shape, whole=direct):
            height, width = self.layout.cell(shape)
            args = packed[start:stop], kind, self.bits, height, width, scales[where], zeros[where]
            if direct:
                kernel(*args, out[start:stop].view(word))
                continue
            tile = np.empty((stop - start, columns), word)
            kernel(*args, tile)
            if dtype.name in _KINDS:
                out[start:stop] = tile.view(np.uint8)
            else:
                from_float32(tile.view(np.float32), dtype, out[start:stop])

    def _encode(
        self, values: Bytes, shape: Shape, dtype: DType, given: tuple[Floats, Floats] | None
    ) -> tuple[Buffer, ...]:
        """A region's planes, with these scales and zero points, float32 (rows or 1, 1), or with its own."""
        from modelstore.codecs.integer import kernels as integers

        rows, columns = matrix(shape)
        height, width = self.layout.cell(shape)
        packed = np.empty((rows, self.layout.line(columns)), np.uint8)
        if given is None:
            method = _METHODS[self.method]
            scales, zeros = np.empty((2, *self.layout.grid(shape)), np.float32)
        else:
            method, height, width = _GIVEN, 1, min(columns, _WIDTH)
            scales, zeros = given
        kind = _KINDS.get(dtype.name, 2)
        kernel = integers.kernels(2 if kind < 2 else 4).encode
        line = columns * dtype.itemsize
        for start, stop, where in self._bands(shape, whole=dtype.name in _KINDS):
            words = _words(values[start * line : stop * line], dtype).reshape(-1, columns)
            how = (kind, self.bits, self.symmetric, method, height, width, limit(dtype))
            kernel(words, *how, scales[where], zeros[where], packed[start:stop])
        return self.layout.plane(packed, scales, zeros, dtype)

    def _encode_on(self, values: Bytes, shape: Shape, dtype: DType, device: str) -> tuple[Buffer, ...]:
        import torch

        from modelstore.codecs.integer.torch import quantize

        check.values(values, shape, dtype)
        weight = torch.from_numpy(values).view(getattr(torch, dtype.name)).reshape(matrix(shape)).to(device)
        found = quantize(weight, self.bits, self.symmetric, self.group_size, self.method)
        scales, zeros = (x.to(torch.float32).cpu().numpy() for x in (found.scale, found.zero))
        return self.affine.planes(
            found.codes.cpu().numpy(), AffineCodes(self.bits, self.layout.cell(shape), scales, zeros), dtype
        )

    def _bands(self, shape: Shape, whole: bool) -> Iterator[tuple[int, int, slice]]:
        """Rows that are worked on at a time, and where their scales are: all rows of a matrix, or a tile of them."""
        rows, columns = matrix(shape)
        each, height = self.layout.each(shape), self.layout.cell(shape)[0]
        unit = 1 if self.granularity == "tensor" else height
        step = each if whole else max(1, _TILE // (columns * unit)) * unit
        for first in range(0, rows, each):
            for start in range(first, first + each, step):
                stop = min(start + step, first + each)
                at = first // each * -(-each // height) + (start - first) // height
                yield start, stop, slice(at, at + max(1, -(-(stop - start) // height)))

    def _search(self, read: ReadValues, shape: Shape, dtype: DType) -> tuple[Floats, Floats]:
        """Scales and zero points of all channels, in the shape of the dimensions that count them; or of the tensor, (1,)."""
        from modelstore.codecs.integer import kernels as integers

        kind = _KINDS.get(dtype.name, 2)
        kernels = integers.kernels(2 if kind < 2 else 4)
        lead = 1 if is_convolution(shape) else max(0, len(shape) - 1)
        channels = shape[:lead] if lead else (1,)
        each = self.granularity == "channel"

        def tiles() -> Iterator[tuple[NDArray[np.unsignedinteger], tuple[slice, ...]]]:
            for region in bands(full(shape), dtype.itemsize, _BAND):
                there = slices(region[:lead]) or (slice(0, 1),)
                count = int(np.prod([s.stop - s.start for s in there]))
                yield _words(read(region), dtype).reshape(count, -1), there

        low, high = np.zeros((2, *channels), np.float32)
        for words, there in tiles():
            least, most = (np.ascontiguousarray(x[there]).reshape(-1) for x in (low, high))
            kernels.extremes(words, kind, least, most)
            low[there], high[there] = least.reshape(low[there].shape), most.reshape(low[there].shape)
        if not each:
            low, high = low.min(keepdims=True).reshape(1), high.max(keepdims=True).reshape(1)
        steps = _STEPS if self.method == "mse" else 1
        scales, zeros = np.empty((2, low.size, steps), np.float32)
        kernels.candidates(low.reshape(-1), high.reshape(-1), self.bits, self.symmetric, kind, scales, zeros)
        if steps == 1:
            return scales.reshape(low.shape), zeros.reshape(low.shape)
        losses = np.zeros((*low.shape, steps), np.float64)
        for words, there in tiles():
            mine = there if each else ()
            s, z = (np.ascontiguousarray(x.reshape(losses.shape)[mine]).reshape(-1, steps) for x in (scales, zeros))
            if not each:
                s, z = s.repeat(len(words), 0), z.repeat(len(words), 0)
            part = np.zeros((len(words), steps), np.float64)
            kernels.losses(words, kind, self.bits, limit(dtype), s, z, part)
            if each:
                losses[there] += part.reshape(losses[there].shape)
            else:
                losses += np.add.reduce(part, axis=0)
        best = _first_best(losses.reshape(-1, steps))[:, None]
        scale, zero = (np.take_along_axis(x, best, 1).reshape(low.shape) for x in (scales, zeros))
        return scale, zero


def _words(values: Bytes, dtype: DType) -> NDArray[np.unsignedinteger]:
    """Raw bytes as the kernels' words: their own, or of the float32 numbers that they stand for."""
    if dtype.name in _KINDS:
        return values.view(np.uint16 if dtype.itemsize == 2 else np.uint32)
    return with_nan(values, dtype).view(np.uint32)


def _first_best(losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each row's losses, the index of the least, up to where five are no better than the least before them."""
    best = np.zeros(len(losses), np.intp)
    least = losses[:, 0].copy()
    worse = np.zeros(len(losses), np.intp)
    for i in range(1, losses.shape[1]):
        better = (losses[:, i] < least) & (worse < _PATIENCE)
        worse = np.where(better, 0, worse + 1)
        best[better] = i
        least = np.where(better, losses[:, i], least)
    return best
