"""A stored model, as the Zarr view reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.execute.read.loading import Variant
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape


@dataclass(frozen=True, slots=True)
class _ReadArray:
    dtype: DType
    shape: Shape
    chunk_shape: Shape


class ModelReader:
    """One open variant; called from several threads in parallel."""

    def __init__(self, model: Variant) -> None:
        self._model = model
        self._tensors = {
            name: _ReadArray(tensor.kind, tensor.shape, tensor.chunk) for name, tensor in model.manifest.by_name.items()
        }

    @property
    def tensors(self) -> Mapping[str, _ReadArray]:
        return self._tensors

    @property
    def attributes(self) -> Mapping[str, Any]:
        return {"model": self._model.name, **self._model.manifest.metadata}

    def read(self, name: str, region: Region) -> bytes:
        return self._model.reader.region(self._model.tensor(name), region).tobytes()
