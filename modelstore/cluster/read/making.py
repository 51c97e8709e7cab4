"""Precisions made where the chunks are: of a variant that is not stored, hosts send its few bytes, not the original's many."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec
import numpy as np

from modelstore.cluster.pieces import StoreAddress, pieces, section_keys
from modelstore.cluster.read.models import opened
from modelstore.cluster.read.reader import Holding
from modelstore.codecs.registry import codec as make_codec
from modelstore.codecs.weight import as_weight_codec
from modelstore.compress.on_the_fly import OnTheFlyReader, unstored
from modelstore.errors import NotFoundError
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.digest import digest_of
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.recipe import Recipe, recipe
from modelstore.format.region import Region
from modelstore.plan.placement import View, holders

_KEPT = 8  # variants that a host keeps open
_SECONDS = 30.0  # that a host may take for a chunk, before the reader makes it itself

MadePlanes = Sequence[tuple[bytes, Bytes]]  # each plane's digest and bytes


class Unstored(msgspec.Struct, frozen=True):
    """A variant that is not stored: its original's manifest, and the recipe as JSON."""

    source: StoreAddress
    model: str
    digest: str
    recipe: bytes


class Makers(Protocol):
    """The hosts that can make chunks."""

    def view(self, *, fresh: bool = False) -> View:
        """The members."""

    def ask_to_make(self, member: str, variant: Unstored, tensor: str, region: Region) -> Future[MadePlanes]:
        """Begin to have a member make a chunk's planes."""

    def made(self, member: str, nbytes: int) -> None:
        """So many bytes came from a member."""


class HostMaker:
    """Has the hosts at home with the original's chunks make those of a variant; what they do not give, the reader makes."""

    def __init__(self, manifest: Manifest, original: Manifest, makers: Makers, variant: Unstored) -> None:
        self._manifest = manifest
        self._original = original
        self._makers = makers
        self._variant = variant
        self._codecs = [make_codec(spec.name, spec.params) for spec in manifest.codecs]

    def made(self, tensor: Tensor, region: Region) -> list[Bytes] | None:
        """The planes of a chunk, checked; None if no host gave them."""
        member = self._home(tensor, region)
        if member is None:
            return None
        # A host that is slow, or died, or sent other bytes: what it would have sent is made by the reader.
        with contextlib.suppress(Exception):
            planes = self._makers.ask_to_make(member, self._variant, tensor.name, region).result(timeout=_SECONDS)
            found = [np.frombuffer(data, np.uint8) for _, data in planes]
            wanted = len(self._codecs[tensor.codec].planes(tensor.kind))
            digests = [digest for digest, _ in planes]
            if len(found) == wanted and [digest_of(data) for data in found] == digests:
                self._makers.made(member, sum(map(len, found)))
                return found
        return None

    def _home(self, tensor: Tensor, region: Region) -> str | None:
        """The home of the original's chunk, or for codecs that look at more than a chunk, of the tensor's first one."""
        members = self._makers.view().members
        source = self._original.by_name[tensor.name]
        if not members or not source.planes:
            return None
        chunk = 0
        codec = as_weight_codec(self._codecs[tensor.codec])
        if codec is None or not codec.looks_ahead:
            chunk = int(grid.touching(source.shape, source.chunk, region)[0])
        parts = pieces(self._original, [source.planes[0].first + chunk])
        at = int(holders(View(0, members), section_keys(parts), 1)[0, 0])
        return members[at].id


class Making:
    """A host's part: the variants that it makes chunks of. Safe to use from many threads."""

    def __init__(self, holding: Callable[[], Holding]) -> None:
        self._holding = holding
        self._open: OrderedDict[bytes, OnTheFlyReader] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, variant: Unstored, tensor: str, region: Region) -> MadePlanes:
        """The planes of a chunk with their digests. `NotFoundError` if the model does not have such a tensor."""
        reader = self._reader(variant)
        found = reader.manifest.by_name.get(tensor)
        if found is None:
            raise NotFoundError(f"model {variant.model!r} has no tensor {tensor!r}", model=variant.model, tensor=tensor)
        return [(digest_of(plane), plane) for plane in reader.encoded(found, region)]

    def _reader(self, variant: Unstored) -> OnTheFlyReader:
        key = msgspec.json.encode(variant)
        with self._lock:
            if key not in self._open:
                model = opened(self._holding(), variant.source, variant.model, variant.digest)
                reader = unstored(model, recipe(msgspec.json.decode(variant.recipe))).reader
                assert isinstance(reader, OnTheFlyReader)
                self._open[key] = reader
                while len(self._open) > _KEPT:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]


def variant_of(source: StoreAddress, model: str, digest: str, chosen: Recipe) -> Unstored:
    """The facts about a variant that hosts need."""
    return Unstored(source, model, digest, msgspec.json.encode(chosen))
