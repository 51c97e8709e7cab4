"""The smaller model as a source to save: regions of the original's tensors, read from its chunks as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Tensor
from modelstore.format.region import Region, extent, slices
from modelstore.restructure.cut import CutTensor
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.reading import Files

_SPREAD = 4  # a read takes at most so many times the memory of what is kept of it


class CutModel:
    """Tensors cut out of a stored model; see `sources.base.Source`. `solved`: those whose values were solved again.

    `metrics` are kept in the manifest of what is saved.
    """

    def __init__(
        self,
        reader: Reader,
        cut: Sequence[CutTensor],
        solved: Mapping[str, NDArray[Any]],
        *,
        aliases: Mapping[str, str],
        files: Mapping[str, Path | bytes],
        metrics: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self._reader, self._solved = reader, solved
        self.opened = Files()
        self._cut = {one.name: one for one in cut}
        self.aliases, self.files, self.metrics, self.fingerprint = aliases, files, metrics, fingerprint
        self.metadata: Mapping[str, str] = reader.manifest.metadata

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """As `Source.tensors`."""
        return tuple(TensorSpec(one.name, DTYPES[one.source.dtype], one.shape) for one in self._cut.values())

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """As `Source.read`."""
        one = self._cut[name]
        words = np.dtype(f"V{DTYPES[one.source.dtype].itemsize}")
        into = out.view(words).reshape(extent(region))
        if one.source.name in self._solved:
            np.copyto(into, self._solved[one.source.name][slices(region)])
        elif one.axis is None or one.index is None:
            self._reader.read_into(one.source, region, out)
        else:
            start, stop = region[one.axis]
            self._gather(one.source, region, one.axis, one.index[start:stop], into)

    def _gather(self, tensor: Tensor, region: Region, axis: int, index: NDArray[np.int64], into: NDArray[Any]) -> None:
        """The numbers `index` along an axis, ascending within each part: halved if they are far apart."""
        first, last = int(index.min()), int(index.max()) + 1
        if last - first > _SPREAD * len(index):
            half = len(index) // 2
            before, after = (slice(None),) * axis + (slice(half),), (slice(None),) * axis + (slice(half, None),)
            self._gather(tensor, region, axis, index[:half], into[before])
            self._gather(tensor, region, axis, index[half:], into[after])
            return
        wider = (*region[:axis], (first, last), *region[axis + 1 :])
        read = self._reader.region(tensor, wider).view(into.dtype).reshape(extent(wider))
        np.copyto(into, np.take(read, index - first, axis=axis))

    def close(self) -> None:
        """As `Source.close`."""
        self.opened.close()
