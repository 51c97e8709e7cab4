"""Reads and encodes one step of a write plan; and, if a codec must be proved or loses something, decodes it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs.base import Codec
from modelstore.codecs.loss import Loss, loss_of
from modelstore.execute.memory import huge
from modelstore.format import boxes, grid
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.digest import digest_of
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import Region, extent, intersect, rows, shift, size
from modelstore.plan.write import ReadStep, Step, TensorPlan

ReadRegion = Callable[[Region, Bytes], None]
EncodeRegion = Callable[[Bytes, Region], tuple[Buffer, ...]]  # a region's raw bytes, and where it lies → its planes
Encoder = Callable[
    [Region, Bytes], EncodeRegion
]  # a part of a tensor, and its raw bytes → how chunks in it are encoded
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor to write: its plan, its codec, how its bytes are read, and how a region of them is encoded.

    `encoder` gives, for a part of the tensor and its raw bytes, how chunks in it are encoded: by the codec, unless that
    needs more than a chunk's values, such as a base's, or what was found in whole rows or in the whole tensor.
    `views` are codecs that read what is stored, or some planes of it: each decodes every chunk again before it is
    stored, for the digest and the loss of the values that its readers will get. `instead` gives what is stored in place of what
    is read, which is read all the same, to be digested.
    """

    plan: TensorPlan
    codec: Codec
    read: ReadRegion
    encoder: Encoder | None = None
    views: tuple[Codec, ...] = ()
    instead: Callable[[Region], Bytes] | None = None

    def meant(self, region: Region, raw: Bytes) -> Bytes:
        """The raw bytes of a region that are stored, of those that were read."""
        return raw if self.instead is None else self.instead(region)

    def encode_in(self, part: Region, raw: Bytes) -> EncodeRegion:
        """How chunks in a part of the tensor are encoded."""
        if self.encoder is not None:
            return self.encoder(part, raw)
        return lambda values, region: self.codec.encode(values, extent(region), DTYPES[self.plan.dtype])


@dataclass(frozen=True, slots=True)
class Encoded:
    """A part of a tensor, read and encoded.

    `values` are the part's, then as each view reads them; none where the part advances no digest. `chunks` are the
    indices in the grid with each plane's digest and bytes. `losses` has one for each view, none where there are no chunks.
    """

    part: ReadStep
    values: tuple[Bytes, ...]
    chunks: tuple[tuple[int, tuple[tuple[bytes, Buffer], ...]], ...]
    losses: tuple[Loss, ...]


def encode_step(step: Step, inputs: Sequence[Input]) -> list[Encoded]:
    """Read and encode one step's parts; runs in a worker."""
    buffer = huge(step.nbytes + _ALIGN * len(step.parts))
    encoded = []
    at = 0
    for part in step.parts:
        encoded.append(_encode_part(part, inputs[part.tensor], buffer[at : at + part.nbytes]))
        at += -(-part.nbytes // _ALIGN) * _ALIGN  # the codecs look at the bytes as words
    return encoded


def _encode_part(part: ReadStep, item: Input, raw: Bytes) -> Encoded:
    item.read(part.region, raw)
    meant = item.meant(part.region, raw)
    decoded = tuple(np.empty_like(raw) for _ in item.views)
    encode = item.encode_in(part.region, meant)
    chunks = []
    for chunk in part.chunks:
        region = grid.chunk_region(item.plan.shape, item.plan.chunk, chunk)
        planes = _encode_chunk(item, encode, region, part.region, meant, decoded)
        chunks.append((chunk, tuple((digest_of(as_bytes(plane)), plane) for plane in planes)))
    if decoded and not part.chunks:
        _decode_band(part.region, item, decoded)
    kind = DTYPES[item.plan.dtype]
    losses = tuple(loss_of(meant, values, kind) for values in decoded) if part.chunks else ()
    return Encoded(part, (raw, *decoded) if part.hashed else (), tuple(chunks), losses)


def _encode_chunk(
    item: Input, encode: EncodeRegion, region: Region, around: Region, raw: Bytes, decoded: Sequence[Bytes]
) -> tuple[Buffer, ...]:
    """The planes of a chunk, out of the values of a region around it; decoded again into its place in each of `decoded`."""
    kind = DTYPES[item.plan.dtype]
    place = shift(region, around)
    values = boxes.cut(raw, extent(around), kind.itemsize, place)
    planes = encode(values, region)
    named = dict(zip(item.codec.planes(kind), planes, strict=True))
    for codec, buffer in zip(item.views, decoded, strict=True):
        wanted = [named[name] for name in codec.planes(kind)]
        out = rows(buffer, extent(around), kind.itemsize, place)
        if out is not None:
            codec.decode(wanted, extent(region), kind, out)
            continue
        apart = np.empty((1, values.size), np.uint8)
        codec.decode(wanted, extent(region), kind, apart)
        boxes.paste(apart.reshape(-1), buffer, extent(around), kind.itemsize, place)
    return planes


def _decode_band(band: Region, item: Input, decoded: Sequence[Bytes]) -> None:
    """The values for views of a band that is not whole chunks: its chunks are encoded and decoded, one after another."""
    plan, itemsize = item.plan, item.plan.itemsize
    for chunk in grid.touching(plan.shape, plan.chunk, band).tolist():
        region = grid.chunk_region(plan.shape, plan.chunk, chunk)
        raw = np.empty(size(region) * itemsize, np.uint8)
        apart = [np.empty_like(raw) for _ in item.views]
        item.read(region, raw)
        raw = item.meant(region, raw)
        _encode_chunk(item, item.encode_in(region, raw), region, region, raw, apart)
        both = intersect(region, band)
        assert both is not None, "a chunk that touches the band shares elements with it"
        for values, buffer in zip(apart, decoded, strict=True):
            inner, place = shift(both, region), shift(both, band)
            boxes.copy(values, extent(region), inner, buffer, extent(band), place, itemsize)
