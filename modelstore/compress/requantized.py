"""A quantized checkpoint read as the weights that it stands for, so that they can be compressed otherwise.

Codes and scales are read region by region where a weight is, and multiplied in float32; nothing of it is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from modelstore.architecture.config import Config
from modelstore.architecture.dequantized import POWERS, Dequantized, dequantized, plain
from modelstore.architecture.described import described
from modelstore.architecture.quantized import method
from modelstore.codecs.floating.fp4 import E2M1
from modelstore.codecs.numeric.numbers import Floats, from_float32, to_float32
from modelstore.compress.parent import Parent
from modelstore.errors import UnsupportedError
from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes
from modelstore.format.files.checkpoint import CONFIG
from modelstore.format.objects.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.objects.record import VersionRecord
from modelstore.format.region import Region, extent
from modelstore.plan.write import plan_tensor

_NO_NUMBER = 255
_GROUP = 32  # numbers of mxfp4 that share a scale
_E2M1 = np.array(E2M1.levels, np.float32)


@dataclass(frozen=True)
class Requantized:
    """A checkpoint as its weights: their manifest, what reads them, and the config that says nothing of quantization.

    `stored`: bytes in which each weight's codes and scales are stored now. `by`: the method, for people.
    """

    manifest: Manifest
    reader: Reader
    config: Config | None
    stored: Mapping[str, int]
    by: str

    @property
    def config_file(self) -> bytes | None:
        """The config.json of what is made."""
        return None if self.config is None else json.dumps(self.config, indent=2, ensure_ascii=False).encode() + b"\n"


def requantized(reader: Reader, config: Config | None) -> Requantized:
    """The weights of a quantized checkpoint. `UnsupportedError` if it is none, or its values cannot be computed here."""
    manifest = reader.manifest
    described = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.tensors}
    made, members = dequantized(described, config)
    if (alias := next((name for name, of in manifest.aliases.items() if of in members), None)) is not None:
        raise UnsupportedError(
            f"tensor {alias!r} is tied to one that is quantized: it cannot be requantized", tensor=alias
        )
    tensors, stored = [], {}
    for tensor in manifest.tensors:
        one = made.get(tensor.name)
        if one is not None:
            parts = (manifest.by_name[name] for name in (one.codes, one.scales))
            stored[one.name] = sum(int(manifest.length[manifest.rows(part)].sum()) for part in parts)
            tensors.append(_tensor(one, tensor))
        elif tensor.name not in members:
            tensors.append(tensor)
    whole = msgspec.structs.replace(manifest, tensors=tuple(tensors))
    names = {one.name: one for one in made.values()}
    dense = None if config is None else plain(config)
    return Requantized(whole, RequantizedReader(reader, names), dense, stored, method(config) or "another tool")


def parent_of(
    record: VersionRecord, digest: str, reader: Reader, config: Config | None, requantize: bool
) -> tuple[Parent, Requantized | None]:
    """The parent of a variant: an original as it is stored, or with `requantize` as the weights that it stands for."""
    if not requantize:
        known = described(reader.manifest, config)
        return Parent(record, digest, reader.manifest, reader, config, known), None
    made = requantized(reader, config)
    files = {} if made.config_file is None else {CONFIG: made.config_file}
    known = described(msgspec.structs.replace(made.manifest, architecture=None), made.config)
    parent = Parent(record, digest, made.manifest, made.reader, made.config, known, reader.manifest, made.by, files)
    return parent, made


def _tensor(one: Dequantized, codes: Tensor) -> Tensor:
    """The entry of a weight that is made of others: without planes, and of no digest, since it is stored nowhere."""
    chunk = plan_tensor(one.name, one.dtype, one.shape, CodecSpec("raw")).chunk
    return Tensor(one.name, one.dtype, one.shape, chunk, codes.codec, "", ())


class RequantizedReader(Reader):
    """Reads weights that are made of others; all else as it is stored."""

    def __init__(self, original: Reader, made: Mapping[str, Dequantized]) -> None:
        super().__init__(original.fetcher, original.base)
        self._original, self._made = original, made

    def read_into(self, tensor: Tensor, region: Region, out: Bytes) -> None:
        """As `Reader.read_into`."""
        one = self._made.get(tensor.name)
        if one is None:
            super().read_into(tensor, region, out)
            return
        numbers = self._fp8(one, region) if one.scheme == "fp8" else self._mxfp4(one, region)
        from_float32(numbers, tensor.kind, out)

    def _fp8(self, one: Dequantized, region: Region) -> Floats:
        """Codes times the scales of their blocks."""
        (top, bottom), (left, right) = region
        high, wide = one.block
        codes = self.manifest.by_name[one.codes]
        numbers = to_float32(self._original.region(codes, region), codes.kind).reshape(extent(region))
        down, across = np.arange(top, bottom) // high, np.arange(left, right) // wide
        scales = self._scales(one, (-(-one.shape[0] // high), -(-one.shape[1] // wide)))
        numbers *= scales[down[:, None], across[None, :]]
        return numbers

    def _scales(self, one: Dequantized, shape: tuple[int, int]) -> Floats:
        tensor = self.manifest.by_name[one.scales]
        stored = self._original.region(tensor, tuple((0, n) for n in tensor.shape))
        if tensor.dtype not in POWERS:
            return to_float32(stored, tensor.kind).reshape(shape)
        powers = stored.reshape(shape).astype(np.int32)
        found: Floats = np.where(powers < _NO_NUMBER, np.ldexp(np.float32(1), powers - 127), np.float32(np.nan))
        return found

    def _mxfp4(self, one: Dequantized, region: Region) -> Floats:
        """Numbers of four bits, the lower ones first, times a power of two for each 32 along a row, transposed."""
        experts, (left, right), rows = region
        groups = (left // _GROUP, -(-right // _GROUP))
        codes, scales = (self.manifest.by_name[name] for name in (one.codes, one.scales))
        box = (experts, rows, groups)
        packed = self._original.region(codes, (*box, (0, _GROUP // 2))).reshape(*extent(box), _GROUP // 2)
        powers = self._original.region(scales, box).reshape(extent(box)).astype(np.int32) - 127
        numbers = np.empty((*packed.shape, 2), np.float32)
        numbers[..., 0], numbers[..., 1] = _E2M1[packed & 15], _E2M1[packed >> 4]
        values: NDArray[np.float32] = np.ldexp(numbers.reshape(*packed.shape[:3], _GROUP), powers[..., None])
        flat = values.reshape(*packed.shape[:2], -1)[:, :, left - groups[0] * _GROUP : right - groups[0] * _GROUP]
        return np.ascontiguousarray(flat.transpose(0, 2, 1))
