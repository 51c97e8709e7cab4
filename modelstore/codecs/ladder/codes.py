"""Which planes a ladder's variants are made of, and how codes are read from them.

Its int4 codes are the high nibbles of its int8 codes; or they are given, by GPTQ or AWQ, which look at more than the weights.
Then `high` holds the given ones and `scale` theirs, `own_scale` the ladder's own, and `correction` what leads from the given
codes to the high nibbles (`kernels/corrections`), in pieces of nibbles. int8 and the original are what they would be without.

Were the scale of the given codes that of int8 too, a plane would be saved; but such scales are often clipped for the least
error of int4, and int8 would be clipped with them: 29 dB instead of 43 on SmolLM2's weights, for 0.1 bit a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.ladder import corrections, kernels
from modelstore.codecs.ladder.planes import NibbleReader, NibbleWriter, packed_nibbles, scratch
from modelstore.codecs.numeric.numbers import Floats, from_float32, to_float32
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType

PLANES = {
    "original": ("scale", "high", "low", "residual"),
    "int8": ("scale", "high", "low"),
    "int4": ("scale", "high"),
}
GIVEN_PLANES = {  # each a prefix of the one before, too
    "original": ("scale", "high", "own_scale", "correction", "low", "residual"),
    "int8": ("scale", "high", "own_scale", "correction", "low"),
    "int4": ("scale", "high"),
}


def eighth(s4: Bytes, dtype: DType) -> Floats:
    """s8 of raw s4: a sixteenth, rounded to the dtype, as float32."""
    s8 = np.empty(s4.size, np.uint8)
    with np.errstate(invalid="ignore"):  # a NaN that damage made
        from_float32(to_float32(s4, dtype) / np.float32(16), dtype, s8.reshape(1, -1))
    return to_float32(s8, dtype)


class CodeReader:
    """A region's codes, block after block. `FormatError` if the planes are not those of `rows` x `columns`.

    Eight-bit codes where there is a plane `low`, else int4 ones. `raw` are the raw s4 of the codes read, `scale` is what they
    are multiplied with, float32 (rows * groups,), and `group` the columns of a group.
    """

    def __init__(
        self, planes: Mapping[str, Bytes], rows: int, columns: int, group: int, given: int, dtype: DType
    ) -> None:
        eight = "low" in planes
        self._columns, count = columns, rows * columns
        first = _scales(planes, "scale", rows, columns, given or group, dtype)
        self._high = NibbleReader(planes["high"], count, "high")
        self._low = NibbleReader(planes["low"], count, "low") if eight else None
        self._corrections: NibbleReader | None = None
        self.raw, self.group = first, given or group
        if given and eight:
            self._given, self._theirs = given, to_float32(first, dtype)
            self.raw, self.group = _scales(planes, "own_scale", rows, columns, group, dtype), group
            self._ours = to_float32(self.raw, dtype)
            self._corrections = NibbleReader(planes["correction"], count, "correction")
        self.scale = eighth(self.raw, dtype) if eight else to_float32(self.raw, dtype)

    def block(self, index: int, first: int, codes: Bytes) -> None:
        """The codes of a block, whose first is element `first`, into `codes`: bytes as kernels take them."""
        unpack, none = kernels.kernels(2).unpack, codes[:0]
        high = self._high.piece(index)
        low = self._low.piece(index) if self._low else none
        if self._corrections is None:
            unpack(high, low, codes)
            return
        given, wrong = scratch.symbols[: codes.size], scratch.streams[: codes.size]
        unpack(high, none, given)
        unpack(low, none, codes)
        unpack(self._corrections.piece(index), none, wrong)
        grid = (self._ours, self.group, self._theirs, self._given, first, self._columns)
        corrections.correct()(True, given, *grid, codes, wrong)


class GivenCodes:
    """Codes from elsewhere for the blocks of a region, on their way to planes."""

    def __init__(self, codes: NDArray[np.int8], raw: Bytes, given: int, ours: Bytes, group: int, dtype: DType) -> None:
        """codes: int8 (rows, columns), -8..7; raw: the bytes of their scales; ours: those of the ladder's own s4."""
        self._codes = (np.ascontiguousarray(codes).reshape(-1) + np.int8(8)).view(np.uint8)
        self._grid = (to_float32(ours, dtype), group, to_float32(raw, dtype), given)
        self._columns = codes.shape[1]
        self._raw, self._ours = raw, ours
        self._high, self._corrections = NibbleWriter(), NibbleWriter()

    def block(self, first: int, codes: Bytes) -> None:
        """The block whose first element is `first`, and its own eight-bit codes."""
        given, wrong = self._codes[first : first + codes.size], scratch.streams[: codes.size]
        corrections.correct()(False, given, *self._grid, first, self._columns, codes, wrong)
        self._high.add(packed_nibbles(given))
        self._corrections.add(packed_nibbles(wrong))

    def planes(self) -> tuple[Bytes, ...]:
        """scale, high, own_scale and correction."""
        return self._raw, self._high.plane(), self._ours, self._corrections.plane()


def _scales(planes: Mapping[str, Bytes], name: str, rows: int, columns: int, group: int, dtype: DType) -> Bytes:
    """The raw scales in a plane."""
    groups = -(-columns // group)
    raw = np.ascontiguousarray(planes[name])
    if raw.size != rows * groups * dtype.itemsize:
        raise FormatError(f"the plane {name!r} has {raw.size} bytes where {rows} x {groups} numbers are due")
    return raw
