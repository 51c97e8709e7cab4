"""int4 codes from elsewhere, such as GPTQ's: a compressed-tensors directory, the same saved as a model, or a stored variant.

Directories are those of GPTQ and AWQ (see `codes_rows`), or of format pack-quantized, 4 bits, symmetric, in groups: for each
weight `x.weight` it has `x.weight_packed`, int32 (rows, columns / 8), least significant code first, 8 above what it stands for;
`x.weight_scale` (rows, groups); and `x.weight_shape`. The codes must be of the same model:
every tensor that was left as it was must be the model's own, since methods that scale weights and the norms before them (AWQ,
SmoothQuant) change these too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from modelstore.codecs.look import ReadCodes, Statistics
from modelstore.codecs.numeric.numbers import to_float32
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes, view
from modelstore.format.digest import name_of_pieces
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Manifest
from modelstore.format.region import Region, Shape, size
from modelstore.sources.base import Source, TensorSpec

_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"
_WORD = 8  # codes of an int32
_GROUPS = (128, 64, 32)  # if rows are not whole groups
_BAND = 8 << 20  # bytes that are read at once to be digested

ReadInto = Callable[[str, Region, Bytes], None]  # a tensor's name, a region of it, where its raw bytes go


@dataclass(frozen=True, slots=True)
class Given:
    """That a weight has codes: its shape (rows, columns), the dtype of its scales, the columns that share one."""

    shape: Shape
    dtype: str
    group_size: int


class Codes(Protocol):
    """int4 codes with their scales, by the names of the weights they stand for. Threads may read in parallel."""

    @property
    def origin(self) -> str:
        """The place of the codes, for errors."""

    @property
    def given(self) -> Mapping[str, Given]:
        """The weights that have codes."""

    def check(self, manifest: Manifest) -> str:
        """A digest of all codes and scales, after what comes with them was compared with the model they are to go under.

        `FormatError` if a scale is not finite, `ValueError` if a tensor is not the model's.
        """

    def read(self, name: str, region: Region) -> tuple[NDArray[np.int8], Bytes]:
        """Codes, int8 (rows, columns) from -8 to 7, of a region of a weight, and the raw bytes of their scales (rows, groups)."""

    def close(self) -> None:
        """Let go of files."""


class CheckpointCodes:
    """Codes as a checkpoint of some layout has them: of each weight the tensors that `members` names."""

    def __init__(self, origin: str, tensors: Mapping[str, TensorSpec], read: ReadInto, weights: Iterable[str]) -> None:
        """`tensors` by name; `read` reads regions of them. `weights`: those that have codes. Only their shapes are read."""
        self._origin, self._tensors, self._read = origin, tensors, read
        self.source: Source | None = None  # closed with this
        self._given = {name: self.parse(name) for name in weights}

    def parse(self, name: str) -> Given:
        """The layout of a weight's codes, as its tensors have it. `FormatError` if they contradict each other."""
        raise NotImplementedError

    def members(self, name: str) -> tuple[str, ...]:
        """The tensors of a weight: its codes first, its scales second."""
        raise NotImplementedError

    def is_nothing(self, name: str) -> bool:  # noqa: ARG002
        """Whether a tensor that the model does not have says nothing."""
        return False

    def check_values(self, name: str) -> None:
        """`FormatError` where the values of a weight's tensors other than codes and scales are not fit."""

    def read(self, name: str, region: Region) -> tuple[NDArray[np.int8], Bytes]:
        """As `Codes.read`."""
        raise NotImplementedError

    @property
    def origin(self) -> str:
        return self._origin

    @property
    def given(self) -> Mapping[str, Given]:
        return self._given

    def check(self, manifest: Manifest) -> str:
        parts = {part for name in self._given for part in self.members(name)}
        for name in sorted(self._tensors.keys() - parts):
            there = manifest.by_name.get(name)
            spec = self._tensors[name]
            same = there is not None and (there.dtype, there.shape) == (spec.dtype.name, spec.shape)
            if there is None and self.is_nothing(name):
                continue
            if there is None or not same or there.digest != name_of_pieces(self._bands(name)):
                why = "is not in the model" if there is None else "is not what the model has under that name"
                raise ValueError(
                    f"tensor {name!r} of {self._origin} {why}: the codes were made of another model (AWQ and SmoothQuant "
                    f"change norms and weights; save what they were made of, and compress that)"
                )
        whole = blake3()
        for name, given in sorted(self._given.items()):
            whole.update(f"{name}\0{given}\0".encode())
            codes, scales, *_ = self.members(name)
            self.check_values(name)
            for band in self._bands(codes):
                whole.update(view(band))
            for band in self._bands(scales):
                if not np.isfinite(to_float32(band, DTYPES[given.dtype])).all():
                    raise self.bad(name, "has a scale that is not finite")
                whole.update(view(band))
        return whole.hexdigest()

    def close(self) -> None:
        """Let go of the source."""
        if self.source is not None:
            self.source.close()

    def bad(self, name: str, what: str) -> FormatError:
        """The error for a weight whose codes are other ones than these."""
        return FormatError(
            f"weight {name!r} of {self._origin} {what}: quantize it with a symmetric int4 scheme in groups of 32, 64 or 128",
            tensor=name,
            object=self._origin,
        )

    def region(self, name: str, region: Region) -> Bytes:
        """Raw bytes of a region of a tensor."""
        out = np.empty(size(region) * self._tensors[name].dtype.itemsize, np.uint8)
        self._read(name, region, out)
        return out

    def _bands(self, name: str) -> Iterator[Bytes]:
        """A tensor's raw bytes in their order, a few rows at a time."""
        spec = self._tensors[name]
        shape = spec.shape
        if not shape:
            yield self.region(name, ())
            return
        rest: Region = tuple((0, n) for n in shape[1:])
        step = max(1, _BAND // max(1, size(rest) * spec.dtype.itemsize))
        for a in range(0, shape[0], step):
            yield self.region(name, ((a, min(a + step, shape[0])), *rest))


class PackedCodes(CheckpointCodes):
    """Codes as a directory of compressed-tensors has them. `FormatError` where it has other ones, or none."""

    def __init__(self, origin: str, tensors: Mapping[str, TensorSpec], read: ReadInto) -> None:
        weights = [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]
        if not weights:
            raise FormatError(
                f"{origin} has no codes, *.weight_packed or *.qweight: give a directory in compressed-tensors' layout "
                f"pack-quantized, or in that of GPTQ or AWQ",
                object=origin,
            )
        super().__init__(origin, tensors, read, weights)

    def members(self, name: str) -> tuple[str, ...]:
        return name + _PACKED, name + _SCALE, name + _SHAPE

    def read(self, name: str, region: Region) -> tuple[NDArray[np.int8], Bytes]:
        given = self._given[name]
        rows, (a, b) = region
        words = (a // _WORD, -(-b // _WORD))
        packed = self.region(name + _PACKED, (rows, words)).reshape(rows[1] - rows[0], -1)
        codes = unpacked(packed)[:, a - words[0] * _WORD : b - words[0] * _WORD]
        groups = (a // given.group_size, -(-b // given.group_size))
        return np.ascontiguousarray(codes), self.region(name + _SCALE, (rows, groups))

    def parse(self, name: str) -> Given:
        """The layout of a weight's codes, as its tensors have it."""
        for part, what in (
            ("_zero_point", "is asymmetric, and zero points"),
            ("_g_idx", "is in groups by activation, which"),
        ):
            if name + part in self._tensors:
                raise self.bad(name, f"{what} cannot be put under a ladder")
        packed, scale, shape = (self._tensors.get(name + part) for part in (_PACKED, _SCALE, _SHAPE))
        if packed is None or scale is None or shape is None:
            raise self.bad(name, f"lacks its {_SCALE.removeprefix('_') if scale is None else _SHAPE.removeprefix('_')}")
        if shape.dtype.name not in ("int64", "int32") or shape.shape != (2,):
            raise self.bad(name, f"has a shape of {shape.dtype.name} {list(shape.shape)} where two int64 are due")
        stored = self.region(name + _SHAPE, ((0, 2),)).view(f"<i{shape.dtype.itemsize}")
        rows, columns = int(stored[0]), int(stored[1])
        if rows < 1 or columns < 1 or packed.dtype.name != "int32" or packed.shape != (rows, -(-columns // _WORD)):
            eight = packed.shape == (rows, -(-columns // 4))
            what = "8 bits" if eight else f"{packed.dtype.name} {list(packed.shape)}"
            raise self.bad(name, f"has codes of {what} where 4 bits of {rows} x {columns} are due")
        if (
            scale.dtype.name not in ("bfloat16", "float16", "float32")
            or len(scale.shape) != 2
            or scale.shape[0] != rows
        ):
            raise self.bad(name, f"has scales of {scale.dtype.name} {list(scale.shape)}, which are none of {rows} rows")
        group = group_size(columns, scale.shape[1])
        if not group:
            raise self.bad(
                name, f"has {scale.shape[1]} scales for {columns} columns, which are not groups of an even number"
            )
        return Given((rows, columns), scale.dtype.name, group)


def statistics_of(codes: Codes, name: str) -> Statistics | None:
    """The statistics of a weight that has given codes; None if it has none."""
    given = codes.given.get(name)
    if given is None:
        return None

    def read(bits: int, group_size: int) -> ReadCodes:
        assert (bits, group_size) == (4, given.group_size), "a plan asks for the codes as they are"
        return partial(codes.read, name)

    return Statistics(codes=read)


def group_size(columns: int, groups: int) -> int:
    """The columns of a group, an even number, 0 if there is none that gives so many groups."""
    if groups < 1:
        return 0
    if columns % groups == 0:
        return columns // groups if columns // groups % 2 == 0 and columns // groups <= 1 << 16 else 0
    return next((n for n in _GROUPS if -(-columns // n) == groups), 0)


def unpacked(packed: Bytes) -> NDArray[np.int8]:
    """int8 (rows, 8 * words) of raw words (rows, 4 * words): the codes, the first in the least significant bits."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, ::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    codes -= 8
    return codes.view(np.int8)
