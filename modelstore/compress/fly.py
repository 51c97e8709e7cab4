"""Variants that are not stored, made of the original while it is read: the same bits as `compress` would store.

A manifest is made for such a variant whose compressed tensors have chunks, but no rows in the chunk table. Its reader reads
the original's region of a chunk instead of its planes, and encodes them; everything else is as for a stored variant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from modelstore.codecs.weight import Encode
from modelstore.compress.plan import plan_compression, tensor_plan, weight_codec
from modelstore.errors import UnsupportedError
from modelstore.execute.fetch import Fetcher
from modelstore.execute.loading import Model
from modelstore.execute.reading import Limits, Reader
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.manifest import Manifest, Tensor
from modelstore.format.recipe import Recipe
from modelstore.format.region import Region
from modelstore.plan.layout import axes
from modelstore.plan.read import ChunkRead, ReadJob, Want

T = TypeVar("T")
_LADDER = "ladder"


def unstored(original: Model, recipe: Recipe) -> Model:
    """A variant of a model, opened for reading though it is not stored.

    `UnsupportedError` for a recipe that needs the whole model before its first chunk, or that stores the original anew;
    `ValueError` where it compresses nothing.
    """
    names = {rule.codec.name for rule in recipe.rules if rule.codec}
    if recipe.prune is not None or _LADDER in names:
        why = "stores the original itself anew" if _LADDER in names else "looks at all weights before it prunes any"
        raise UnsupportedError(
            f"variant {recipe.name!r} of model {original.name!r} is not stored, and cannot be made while it is read, since "
            f"it {why}: make it with compress({original.name!r}, {recipe.name!r})",
            model=original.name,
        )
    return original.variant(FlyReader(planned(original.manifest, original.config(), recipe), original.reader))


def planned(original: Manifest, config: Mapping[str, Any] | None, recipe: Recipe) -> Manifest:
    """The manifest of a variant as `compress` would cut and encode it; compressed tensors have no planes, for none are stored."""
    axis = axes(config) if config else None
    chosen = {choice.name: choice for choice in plan_compression(original, config, recipe).compressed}
    codecs, tensors = list(original.codecs), []
    for tensor in original.tensors:
        choice = chosen.get(tensor.name)
        if choice is None or choice.codec is None:
            tensors.append(tensor)
            continue
        if choice.codec not in codecs:
            codecs.append(choice.codec)
        chunk = tensor_plan(tensor, choice.codec, axis).chunk
        tensors.append(msgspec.structs.replace(tensor, chunk=chunk, codec=codecs.index(choice.codec), planes=()))
    return msgspec.structs.replace(original, codecs=tuple(codecs), tensors=tuple(tensors))


class FlyReader(Reader):
    """Reads a variant that is not stored, of a manifest that `planned` made. `original` reads what it is made of."""

    def __init__(self, manifest: Manifest, original: Reader) -> None:
        source = original._fetcher
        super().__init__(Fetcher(source.model, manifest, source.storage, source.mirrors), original._base)
        self._original = original
        self._fits: dict[str, _Fit] = {}
        self._lock = threading.Lock()

    def flow(
        self,
        wants: list[Want],
        limits: Limits,
        begin: Callable[[int], T],
        run: Callable[[ReadJob, dict[int, T]], None],
        *,
        bounded: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """As `Reader.flow`. What codecs found in whole tensors is let go tensor by tensor, except where one is read alone."""
        halved = replace(limits, memory=limits.memory // 2)  # a thread has the original's chunks to hold, too
        for index, target in super().flow(wants, halved, begin, run, bounded=bounded, progress=progress):
            if len(wants) > 1:
                self._fits.pop(wants[index].tensor.name, None)
            yield index, target

    def planes(self, job: ReadJob, wants: Sequence[Want]) -> Iterator[tuple[ChunkRead, list[Bytes]]]:
        """As `Reader.planes`; made here where they are not stored."""
        for chunk, planes in super().planes(job, wants):
            tensor = wants[chunk.want].tensor
            yield chunk, planes if tensor.planes else self._encoded(tensor, chunk.region)

    def _encoded(self, tensor: Tensor, region: Region) -> list[Bytes]:
        with self._lock:
            fit = self._fits.setdefault(tensor.name, _Fit())
        source = self._original.manifest.by_name[tensor.name]
        encode = fit.get(lambda: self._fitted(tensor, source))
        return [as_bytes(plane) for plane in encode(self._original.region(source, region), region)]

    def _fitted(self, tensor: Tensor, source: Tensor) -> Encode:
        codec = weight_codec(self.manifest.codecs[tensor.codec])
        return codec.fit(lambda region: self._original.region(source, region), tensor.shape, tensor.kind)


class _Fit:
    """What a codec found in one tensor; looked for by the first thread that asks, while the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._encode: Encode | None = None

    def get(self, make: Callable[[], Encode]) -> Encode:
        with self._lock:
            if self._encode is None:
                self._encode = make()
            return self._encode
