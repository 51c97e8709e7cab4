"""Samples what is saved: out of the bytes that are read for it anyway, and before, where a parent is looked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from modelstore.codecs.exact.byteplanes import words_of
from modelstore.codecs.exact.changes import ordinals
from modelstore.execute.write.encoding import Input, ReadRegion
from modelstore.format.boxes import cut
from modelstore.format.buffers import Bytes
from modelstore.format.objects.sketch import SampledRun, Sketch, Words, encode, places, sketch
from modelstore.format.region import Region, extent, intersect, shift, size
from modelstore.sources.base import Source
from modelstore.storage.pool import REQUESTS, ordered


class Sampler:
    """Makes the sketch of a source's tensors, but those `without`. Many threads may read through it."""

    def __init__(self, source: Source, without: Iterable[str] = ()) -> None:
        left_out = frozenset(without)
        self._source = source
        self._places = places((t.name, t.dtype, t.shape) for t in source.tensors if t.name not in left_out)
        self._by_name = {place.name: place for place in self._places}
        self._found: dict[str, Words] = {}

    @property
    def weights(self) -> list[int]:
        """The bytes of each tensor of the sketch."""
        return [place.nbytes for place in self._places]

    def watching(self, inputs: Sequence[Input]) -> list[Input]:
        """The inputs, sampled when they are read."""
        return [
            replace(item, read=self._watched(self._by_name[item.plan.name], item.read))
            if item.plan.name in self._by_name
            else item
            for item in inputs
        ]

    def sketch(self) -> Sketch:
        """The sketch of all tensors; what was not read yet is read now."""
        missing = [place for place in self._places if place.name not in self._found]
        shares = [missing[first::REQUESTS] for first in range(min(REQUESTS, len(missing)))]
        for _ in ordered(self._read, shares, REQUESTS, "modelstore-sample"):
            pass
        return sketch([(place, self._found[place.name]) for place in self._places])

    def kept(self) -> bytes:
        """The sketch as a version keeps it; empty if no tensor can be sampled."""
        return encode(self.sketch()) if self._places else b""

    def _watched(self, place: SampledRun, read: ReadRegion) -> ReadRegion:
        def watched(region: Region, out: Bytes) -> None:
            read(region, out)
            if place.name not in self._found and intersect(place.region, region) == place.region:
                self._note(place, cut(out, extent(region), place.dtype.itemsize, shift(place.region, region)))

        return watched

    def _read(self, missing: Sequence[SampledRun]) -> None:
        for place in missing:
            out = np.empty(size(place.region) * place.dtype.itemsize, np.uint8)
            self._source.read(place.name, place.region, out)
            self._note(place, out)

    def _note(self, place: SampledRun, raw: Bytes) -> None:
        how = words_of(place.dtype)
        words = np.ascontiguousarray(raw).reshape(-1).view(how.dtype)
        self._found[place.name] = ordinals(words, how.magnitude).copy()
