"""Parts of tensors in a safetensors file: a rank's share is written under the tensor's name, in the share's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.execute.export.layout import Form, Packing, blocks
from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Region, Shape, extent, intersect, is_contiguous, offset, shift
from modelstore.plan.layout import Share, whole


@dataclass(frozen=True)
class TensorShare:
    """A tensor of which only a share goes into a file."""

    tensor: Tensor
    share: Share

    def parts(self, name: str) -> list[tuple[str, str, Shape]]:
        """The share, under the tensor's name."""
        return [(name, self.tensor.dtype, self.share.shape)]

    def form(self, offsets: Sequence[int]) -> Form:
        """How the share is written."""
        return _Shared(self.tensor, self.share, offsets[0])


@dataclass(frozen=True)
class _Shared:
    tensor: Tensor
    share: Share
    offset: int

    @property
    def key(self) -> str:
        return repr(self.share.ranges)

    def regions(self, limit: int) -> Iterator[Region]:
        """The share's part of each block of the tensor, so that no chunk is read for two of them."""
        boxes = [source for source, _ in self.share.pieces()]
        for block in blocks(self.tensor, limit):
            for box in boxes:
                region = intersect(block, box)
                if region is not None:
                    yield region

    def places(self, region: Region) -> list[tuple[int, int]]:
        """As `Form.places`."""
        runs: list[tuple[int, int]] = []
        for source, target in self.share.pieces():
            if intersect(source, region) == region:
                runs += self._runs(shift(region, _moved(source, target)))
        return runs

    def read(self, reader: Reader, region: Region) -> list[Bytes]:
        """As `Form.read`; a region that is at several places of the share is read once."""
        data, at, found = reader.region(self.tensor, region), 0, []
        for _, length in self.places(region):
            found.append(data[at : at + length])
            at = (at + length) % max(1, len(data))
        return found

    def _runs(self, placed: Region) -> Iterator[tuple[int, int]]:
        """A region of the share as runs of bytes in the file."""
        shape, itemsize = self.share.shape, self.tensor.kind.itemsize
        # The dimensions before `inner` are walked; from there on the region is one run.
        inner = next(i for i in range(len(shape) + 1) if is_contiguous(placed[i:], shape[i:]))
        lead = extent(placed)[:inner]
        run = math.prod(extent(placed)[inner:]) * itemsize
        for index in np.ndindex(*lead):
            corner = tuple((a + i, a + i + 1) for (a, _), i in zip(placed, index, strict=False))
            at = self.offset + offset((*corner, *placed[inner:]), shape) * itemsize
            yield at, run


def cuts(manifest: Manifest, shares: Mapping[str, Share]) -> dict[str, Packing | None]:
    """How each tensor to write goes into a file: as it is (None), or cut."""
    tensors = {name: manifest.by_name[name] for name in shares}
    return {
        name: None if shares[name] == whole(tensor.shape) else TensorShare(tensor, shares[name])
        for name, tensor in tensors.items()
    }


def _moved(source: Region, target: Region) -> Region:
    """The argument of `shift` that brings regions of `source` to `target`."""
    return tuple((a - c, 0) for (a, _), (c, _) in zip(source, target, strict=True))
