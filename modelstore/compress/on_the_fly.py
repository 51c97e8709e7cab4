"""Variants that are not stored, made of the original while it is read: the same bits as `compress` would store.

A manifest is made for such a variant whose compressed tensors have chunks, but no rows in the chunk table. Its reader reads
the original's region of a chunk instead of its planes, and encodes them; everything else is as for a stored variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from modelstore.architecture.ranks.parallel import axes
from modelstore.codecs.look import Look
from modelstore.compress.budget import check_memory, look_memory
from modelstore.compress.job import encoder
from modelstore.compress.plan import plan_compression, tensor_plan, weight_codec
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Encoder
from modelstore.format import boxes
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.locks import Lock
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.recipe import Recipe
from modelstore.format.region import Region, extent, shift, size
from modelstore.plan.read import ChunkRead, ReadJob, Want
from modelstore.plan.work import Work

T = TypeVar("T")
_SLAB = 32 << 20  # bytes of a tensor that are kept while a codec looks at it, at most


def unstored(original: Variant, recipe: Recipe, maker: Callable[[Manifest, Manifest], Maker] | None = None) -> Variant:
    """A variant of a model, opened for reading though it is not stored.

    `maker`, of its manifest and the original's, says who else makes its chunks.

    `UnsupportedError` for a recipe that needs the whole model before its first chunk, or that stores the original again;
    `ValueError` if it compresses nothing.
    """
    anew = any(weight_codec(rule.codec).views for rule in recipe.rules if rule.codec)
    if recipe.prune is not None or anew:
        why = "stores the original itself anew" if anew else "looks at all weights before it prunes any"
        raise UnsupportedError(
            f"variant {recipe.name!r} of model {original.name!r} is not stored, and cannot be made while it is read, since "
            f"it {why}: make it with compress({original.name!r}, {recipe.name!r})",
            model=original.name,
        )
    manifest = planned(original.manifest, original.config(), recipe)
    return original.read_by(
        OnTheFlyReader(manifest, original.reader, maker(manifest, original.manifest) if maker is not None else None)
    )


def planned(original: Manifest, config: Mapping[str, Any] | None, recipe: Recipe) -> Manifest:
    """The manifest of a variant as `compress` would cut and encode it; compressed tensors have no planes, for none are stored."""
    axis = axes(config, known=original.architecture) if config else None
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


class Maker(Protocol):
    """A maker of the chunks of a variant that is not stored, such as a cluster."""

    def made(self, tensor: Tensor, region: Region) -> list[Bytes] | None:
        """The planes of a chunk, checked; None if they must be made here."""


class OnTheFlyReader(Reader):
    """Reads a variant that is not stored, of a manifest that `planned` made.

    `original` reads what it is made of; `maker` is asked for each chunk first.
    """

    def __init__(self, manifest: Manifest, original: Reader, maker: Maker | None = None) -> None:
        super().__init__(original.fetcher.over(manifest), original._base)
        self._original = original
        self._maker = maker
        self._slab = _SLAB
        self._memory: int | None = None  # that codecs may hold
        self._encoders: dict[str, Encoder] = {}
        self._lock = Lock()

    def schedule(
        self,
        wants: list[Want],
        work: Work,
        begin: Callable[[int], T],
        run: Callable[[ReadJob, dict[int, T]], None],
        *,
        bounded: bool = True,
    ) -> Iterator[tuple[int, T]]:
        """As `Reader.schedule`. The codecs' findings on whole tensors are released tensor by tensor, except if one is read
        alone.
        """
        made = [want.tensor for want in wants if not want.tensor.planes and want.tensor.nbytes]
        held = check_memory(((tensor, self.manifest.codecs[tensor.codec]) for tensor in made), work.memory)
        self._memory = look_memory(held, work.memory)
        less = work.within(
            work.memory // 3, work.limits.threads
        )  # a thread holds the original's chunks, and a slab of it, too
        self._slab = min(_SLAB, less.memory)
        for index, target in super().schedule(wants, less, begin, run, bounded=bounded):
            if len(wants) > 1:
                self._encoders.pop(wants[index].tensor.name, None)
            yield index, target

    def planes(self, job: ReadJob, wants: Sequence[Want]) -> Iterator[tuple[ChunkRead, list[Bytes]]]:
        """As `Reader.planes`; made here where they are not stored."""
        for chunk, planes in super().planes(job, wants):
            tensor = wants[chunk.want].tensor
            yield chunk, planes if tensor.planes else self.encoded(tensor, chunk.region)

    def encoded(self, tensor: Tensor, region: Region) -> list[Bytes]:
        """The planes of a chunk: as the job encodes it, that makes variants which are stored."""
        given = self._maker.made(tensor, region) if self._maker is not None else None
        return given if given is not None else self._made_here(tensor, region)

    def _made_here(self, tensor: Tensor, region: Region) -> list[Bytes]:
        source = self._original.manifest.by_name[tensor.name]
        with self._lock:
            encode = self._encoders.get(tensor.name)
            if encode is None:
                codec = weight_codec(self.manifest.codecs[tensor.codec])
                slabs = _Slabs(self._original, source, self._slab)
                look = Look(slabs.read, tensor.shape, tensor.kind, self._memory)
                encode = encoder(codec, look, -1)  # no chunk is the last: `schedule` lets go
                self._encoders[tensor.name] = encode
        values = self._original.region(source, region)
        return [as_bytes(plane) for plane in encode(region, values)(values, region)]


class _Slabs:
    """A tensor read region after region, by one thread, in the order of its rows: no chunk is read again for the next rows."""

    def __init__(self, reader: Reader, tensor: Tensor, limit: int) -> None:
        self._reader = reader
        self._tensor = tensor
        self._limit = limit
        self._held: tuple[Region, Bytes] | None = None

    def read(self, region: Region) -> Bytes:
        """A region's raw bytes; of the chunks that it touches, if these are at most `limit` bytes, the others are kept."""
        tensor = self._tensor
        around = tuple(
            (a // c * c, min(n, -(-b // c) * c))
            for (a, b), c, n in zip(region, tensor.chunk, tensor.shape, strict=True)
        )
        if around == region or size(around) * tensor.kind.itemsize > self._limit:
            return self._reader.region(tensor, region)
        if self._held is None or self._held[0] != around:
            self._held = None  # before the next one is read
            self._held = (around, self._reader.region(tensor, around))
        found = boxes.cut(self._held[1], extent(around), tensor.kind.itemsize, shift(region, around))
        if all(b == n for (_, b), n in zip(region, tensor.shape, strict=True)):
            self._held = None  # that was the end of the tensor
        return found
