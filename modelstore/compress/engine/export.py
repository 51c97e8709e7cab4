"""Compressed variants as directories in the layout of compressed-tensors, which transformers and vLLM load as they are.

Linear layers whose codec has an engine's view are written in its parts; everything else is written dense, and named in the
config as not quantized. The parts of a weight are known before it is read, and made band by band of its rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelstore.architecture.classes.places import modules_of
from modelstore.architecture.quantized import method
from modelstore.codecs.integer.view import beside_int8
from modelstore.codecs.weight import EngineTensor, EngineView, part_name
from modelstore.compress.engine.assembly import lossy_codec, read_parts, units
from modelstore.compress.engine.choice import choose
from modelstore.errors import UnsupportedError
from modelstore.execute.export.layout import Packing
from modelstore.execute.model_files import without_config
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import dtype
from modelstore.format.objects.manifest import Tensor
from modelstore.format.region import Region, Shape, extent, nbytes
from modelstore.plan.read import Want, plan_read

_WORD = (
    32  # rows of codes that are packed down the columns fill whole words of 32 bits after so many, whatever their width
)
_SHAPE = "weight_shape"
_DENSE = "export it with dequantize=True"


@dataclass(frozen=True)
class EngineLayout:
    """How each part of a variant is written: the packed weights by name, and the config that says so."""

    packed: Mapping[str, Packing]
    config: bytes


def engine_layout(
    reader: Reader, config: Mapping[str, Any] | None, activations: Literal["int8"] | None = None
) -> EngineLayout | None:
    """The layout of a compressed variant for engines; None if none of its codecs has one, and it is exported dense.

    `activations`: "int8" for weights of 8 bits that engines multiply with activations rounded to int8, token by token.
    Weights that engines do not take packed, such as experts in some schemes, are dense, and a warning says so. `UnsupportedError`
    where nothing is left to pack, or engines would not load what is written: a model without a config, quantized when it came, or
    whose weights transformers splits; for "int8" also weights that are compressed otherwise than to 8 bits, symmetric, with a
    scale a channel.
    """
    plain = {t.name: view for t in reader.manifest.tensors if (view := _view(reader, t)) is not None}
    views = plain if activations is None else dict(_beside_int8(reader, plain))
    if not views:
        return None
    if config is None:
        raise UnsupportedError(
            f"engines read how weights are packed from config.json, and the model {without_config(reader)}: {_DENSE}"
        )
    how = method(config)
    if how is not None:
        raise UnsupportedError(
            f"the model was quantized before it was saved ({how[:80]}), and its config.json can speak of one scheme only: "
            f"{_DENSE}"
        )
    choice = choose(reader.manifest, views, config, modules_of(config, len(reader.manifest.tensors)), plain)
    packed: dict[str, Packing] = {}
    kinds: dict[
        tuple[int, str], Mapping[str, np.dtype[Any]]
    ] = {}  # what a codec unpacks a dtype into: read of one weight
    for name, view in choice.packed.items():
        tensor = reader.manifest.by_name[name]
        same = (tensor.codec, tensor.dtype)
        if same not in kinds:
            kinds[same] = _kinds(reader, tensor, view)
        packed[name] = PackedTensor(reader, tensor, view, kinds[same])
    made = {**config, "quantization_config": choice.quantization}
    return EngineLayout(packed, json.dumps(made, indent=2, ensure_ascii=False).encode() + b"\n")


def _beside_int8(reader: Reader, views: Mapping[str, EngineView]) -> Iterator[tuple[str, EngineView]]:
    """The views of weights for int8 activations; all that is compressed must have one."""
    compressed = [t for t in reader.manifest.tensors if not reader.codec(t).exact]
    if not compressed:
        raise UnsupportedError(
            "activations='int8' is for a variant of 8 bits, and nothing is compressed here: name one"
        )
    for tensor in compressed:
        view = views.get(tensor.name)
        beside = beside_int8(view) if view is not None else None
        if beside is None:
            raise UnsupportedError(
                f"activations='int8' is for weights of 8 bits, symmetric, with a scale a channel, and tensor {tensor.name!r} is "
                f"stored otherwise (codec {reader.codec(tensor).name!r}): compress with the preset int8, or leave it out",
                tensor=tensor.name,
            )
        yield tensor.name, beside


class PackedTensor:
    """A weight [rows, columns] as the parts that engines take; see `EngineView.parts`."""

    def __init__(self, reader: Reader, tensor: Tensor, view: EngineView, kinds: Mapping[str, np.dtype[Any]]) -> None:
        self.tensor = tensor
        self.view = view
        self.unit = math.lcm(units(tensor.shape, view.cells(tensor.shape))[0], _WORD)
        self._codec = json.dumps([reader.codec(tensor).name, view.format, view.scheme()])
        rows = tensor.shape[0]
        one, two = (self._parts(min(rows, n * self.unit), kinds) for n in (1, 2))
        rest = self._parts(rows % self.unit, kinds) if rows % self.unit else {}
        self.specs: dict[str, tuple[str, Shape]] = {}
        self.steps: dict[str, int] = {}  # bytes by which a part grows with each unit of rows; 0: it does not
        for name, part in one.items():
            grown = two[name].shape[:1] != part.shape[:1]
            high = (
                part.shape[0] * (rows // self.unit) + (rest[name].shape[0] if rest else 0) if grown else part.shape[0]
            )
            self.specs[name] = (part.dtype, (high, *part.shape[1:]))
            self.steps[name] = nbytes(part.shape, dtype(part.dtype).itemsize) if grown else 0

    def parts(self, name: str) -> list[tuple[str, str, Shape]]:
        """As `Packing.parts`."""
        return [(part_name(name, part), kind, shape) for part, (kind, shape) in self.specs.items()]

    def form(self, offsets: Sequence[int]) -> _Bands:
        """As `Packing.form`."""
        return _Bands(self, dict(zip(self.specs, offsets, strict=True)), self._codec)

    def _parts(self, rows: int, kinds: Mapping[str, np.dtype[Any]]) -> dict[str, EngineTensor]:
        """The parts of so many rows of zeros."""
        columns = self.tensor.shape[1]
        arrays: dict[str, NDArray[Any]] = {}
        for name, (high, wide) in self.view.cells(self.tensor.shape).items():
            arrays[name] = np.zeros((-(-rows // high) if high else 1, -(-columns // wide) if wide else 1), kinds[name])
        return self.view.parts(arrays, (rows, columns), self.tensor.kind)


@dataclass(frozen=True)
class _Bands:
    """A packed weight written in bands of its rows."""

    packed: PackedTensor
    offsets: Mapping[str, int]
    key: str

    def regions(self, limit: int) -> Iterator[Region]:
        """Whole rows, in multiples of what shares a scale or a word, and of chunks where these are not too large.

        Before them no rows at all, for what is known before any are read.
        """
        tensor, step = self.packed.tensor, self.packed.unit
        rows = tensor.shape[0]
        yield ((0, 0), (0, tensor.shape[1]))
        across = max(1, tensor.nbytes // rows)
        chunk = math.lcm(step, tensor.chunk[0])
        step = chunk if chunk * across <= limit else step
        step *= max(1, limit // (step * across))
        for start in range(0, rows, step):
            yield ((start, min(rows, start + step)), (0, tensor.shape[1]))

    def places(self, region: Region) -> list[tuple[int, int]]:
        """As `Form.places`: each part's rows; with the first of them the parts that do not grow with rows; before, the shape."""
        return [(self.offsets[name] + at, length) for name, at, length in self._spans(region)]

    def read(self, reader: Reader, region: Region) -> list[Bytes]:
        """As `Form.read`."""
        tensor = self.packed.tensor
        if not extent(region)[0]:
            return [np.array(tensor.shape, "<i8").view(np.uint8) for _ in self._spans(region)]
        parts = read_parts(reader, tensor, self.packed.view, region)
        return [parts[name].data for name, _, _ in self._spans(region)]

    def _spans(self, region: Region) -> Iterator[tuple[str, int, int]]:
        """The bytes of each part that a region of rows makes: where they start, and how many they are."""
        packed, (start, stop) = self.packed, region[0]
        for name, (kind, shape) in packed.specs.items():
            size, step = nbytes(shape, dtype(kind).itemsize), packed.steps[name]
            first = start // packed.unit * step
            last = size if stop == packed.tensor.shape[0] or not step else stop // packed.unit * step
            if (name == _SHAPE) == (start == stop) and (step or start == 0):
                yield name, first, last - first


def _kinds(reader: Reader, tensor: Tensor, view: EngineView) -> dict[str, np.dtype[Any]]:
    """The dtypes of a weight's arrays, from its first chunk; the same for each of its codec and dtype."""
    region = grid.chunk_region(tensor.shape, tensor.chunk, 0)
    want = Want.of(tensor, region)
    for job in plan_read(reader.manifest, [want]):
        for _, planes in reader.planes(job, [want]):
            shape = tuple(b - a for a, b in region)
            return {name: array.dtype for name, array in view.arrays(planes, shape, tensor.kind).items()}
    raise AssertionError("a tensor has no chunk")


def _view(reader: Reader, tensor: Tensor) -> EngineView | None:
    codec = lossy_codec(reader, tensor)
    return codec.view if codec is not None else None
