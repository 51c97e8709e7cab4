"""Opens int4 codes: those of a local directory, of a model that was saved from one, or of a variant that was made here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from modelstore.architecture.config import MAX_CONFIG, parse
from modelstore.codecs.numeric.numbers import to_float32
from modelstore.codecs.weight import EngineView
from modelstore.compress.codes import CheckpointCodes, Codes, Given, PackedCodes, ReadInto, unpacked
from modelstore.compress.codes_rows import RowCodes
from modelstore.compress.engine.assembly import lossy_codec, read_parts
from modelstore.errors import FormatError
from modelstore.execute.read.loading import Variant
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Manifest
from modelstore.format.region import Region
from modelstore.sources import safetensors
from modelstore.sources.base import TensorSpec

_CONFIGS = ("config.json", "quantize_config.json")  # AutoGPTQ's own says the same beside


def of_directory(root: Path) -> Codes:
    """The codes of a directory: of compressed-tensors, GPTQ or AWQ."""
    source = safetensors.open_directory(root)
    try:
        content = next((found for name in _CONFIGS if (found := _config(root / name)) is not None), None)
        made = _of_checkpoint(str(root), {spec.name: spec for spec in source.tensors}, source.read, content)
    except BaseException:
        source.close()
        raise
    made.source = source
    return made


def _of_checkpoint(
    origin: str, tensors: Mapping[str, TensorSpec], read: ReadInto, config: Mapping[str, Any] | None
) -> CheckpointCodes:
    if RowCodes.are_in(tensors):
        return RowCodes(origin, tensors, read, config)
    return PackedCodes(origin, tensors, read)


def _config(path: Path) -> Mapping[str, Any] | None:
    """What a file of JSON says of codes; None where there is none that does."""
    try:
        with path.open("rb") as file:
            content = parse(file.read(MAX_CONFIG + 1))
    except OSError:
        return None
    return said(content) or (content if content and "bits" in content else None)


def said(config: Any) -> Mapping[str, Any] | None:
    """The `quantization_config` of a model's config; None where it has none."""
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    return found if isinstance(found, Mapping) else None


class VariantCodes:
    """The codes of a variant that `compress` made, of any codec whose engine view is packed, symmetric int4 in groups."""

    def __init__(self, origin: str, model: Variant) -> None:
        self._origin, self._model = origin, model
        self._views: dict[str, EngineView] = {}
        self._given: dict[str, Given] = {}
        for tensor in model.manifest.tensors:
            codec = lossy_codec(model.reader, tensor)
            if codec is None:
                continue
            view = codec.view
            scheme = view.scheme() if view is not None and view.format == "pack-quantized" else {}
            wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
            if view is None or len(tensor.shape) != 2 or any(scheme.get(key) != value for key, value in wanted.items()):
                raise FormatError(
                    f"tensor {tensor.name!r} of {origin} is stored by codec {codec.name!r} with other codes than symmetric "
                    f"int4 of a matrix in groups: give another variant",
                    tensor=tensor.name,
                )
            self._views[tensor.name] = view
            self._given[tensor.name] = Given(tensor.shape, tensor.dtype, int(scheme["group_size"]))

    @property
    def origin(self) -> str:
        return self._origin

    @property
    def given(self) -> Mapping[str, Given]:
        return self._given

    def check(self, manifest: Manifest) -> str:
        own = self._model.manifest
        for tensor in own.tensors:
            there = manifest.by_name.get(tensor.name)
            if tensor.name not in self._given and (there is None or there.digest != tensor.digest):
                raise ValueError(
                    f"tensor {tensor.name!r} of {self._origin} is not the model's: the codes were made of another model"
                )
        whole = blake3()
        for name in sorted(self._given):
            tensor = own.by_name[name]
            spec = own.codecs[tensor.codec]
            whole.update(f"{name}\0{self._given[name]}\0{tensor.chunk}\0{spec}\0".encode())
            for plane in tensor.planes:
                for row in range(plane.first, plane.first + tensor.chunks):
                    whole.update(own.digest(row))
        return whole.hexdigest()

    def read(self, name: str, region: Region) -> tuple[NDArray[np.int8], Bytes]:
        tensor, given = self._model.manifest.by_name[name], self._given[name]
        parts = read_parts(self._model.reader, tensor, self._views[name], region)
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if scale.dtype != given.dtype or not np.isfinite(to_float32(scale.data, DTYPES[given.dtype])).all():
            raise FormatError(f"tensor {name!r} of {self._origin} has a scale that is not finite", tensor=name)
        words = packed.data.view(np.uint8).reshape(packed.shape[0], -1)
        columns = region[1][1] - region[1][0]
        return np.ascontiguousarray(unpacked(words)[:, :columns]), scale.data

    def close(self) -> None:
        """Nothing is held here."""


def of_model(origin: str, model: Variant) -> Codes:
    """The codes that a stored variant holds: its own, or those of packed tensors that were saved as they are."""
    made = VariantCodes(origin, model)
    if made.given:
        return made
    specs = {t.name: TensorSpec(t.name, t.kind, t.shape) for t in model.manifest.tensors}
    by_name = model.manifest.by_name
    read: ReadInto = lambda name, region, out: model.reader.read_into(by_name[name], region, out)  # noqa: E731
    return _of_checkpoint(origin, specs, read, said(model.config()))
