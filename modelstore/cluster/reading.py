"""Reads a model's chunks through a cluster: from the node's shared memory, from holders, at last from the storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blake3 import blake3

from modelstore.cluster.pieces import Piece, Source, pieces
from modelstore.execute.fetch import Fetcher
from modelstore.format.buffers import Bytes, view
from modelstore.format.manifest import Manifest
from modelstore.plan.read import ReadJob, Want, read_job
from modelstore.storage.base import Storage


class Holding(Protocol):
    """Who can be asked for pieces."""

    def read(self, source: Source, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """What holders have of these or could get, by digest; unchecked."""

    def wrong(self, part: Piece) -> None:
        """A holder gave wrong bytes: every copy of the piece is to be checked."""

    def passed(self, nbytes: int) -> None:
        """So many bytes had to be read from the storage instead."""


@dataclass
class ClusterFetcher(Fetcher):
    """Chunks of one manifest from a cluster's hosts; what they do not have, or have wrong, from the storage as without."""

    holding: Holding | None = None
    source: Source | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Hosts are asked by this process: what is unpickled elsewhere reads the storage."""
        return Fetcher, (self.model, self.manifest, self.storage, self.mirrors)

    @property
    def local(self) -> bool:
        return False

    @property
    def elsewhere(self) -> bool:
        return True

    def over(self, manifest: Manifest) -> Fetcher:
        return ClusterFetcher(
            self.model, manifest, self.storage, self.mirrors, holding=self.holding, source=self.source
        )

    def ranges(self, job: ReadJob, wants: Sequence[Want]) -> dict[int, Bytes]:
        """As `Fetcher.ranges`, each row checked."""
        assert self.holding is not None
        assert self.source is not None
        rows = [row for chunk in job.chunks for row in chunk.rows]
        parts = pieces(self.manifest, rows)
        given = self.holding.read(self.source, list({part.digest: part for part in parts if part.length}.values()))
        self.count(sum(len(data) for data in given.values()))
        found: dict[int, Bytes] = {}
        for row, part in zip(rows, parts, strict=True):
            data = given.get(part.digest)
            if data is None:
                continue
            if blake3(view(data)).digest() == part.digest:
                found[row] = data
            else:
                self.holding.wrong(part)
        left = [chunk for chunk in job.chunks if any(row not in found for row in chunk.rows)]
        if left:
            rest = read_job(self.manifest, left, job.nbytes)
            self.holding.passed(rest.fetched)
            found |= super().ranges(rest, wants)
        return found


@dataclass(frozen=True)
class ClusterFetching:
    """Makes fetchers of a store's models that ask a cluster."""

    holding: Holding
    source: Source

    def __call__(self, model: str, manifest: Manifest, storage: Storage, mirrors: Sequence[Storage]) -> Fetcher:
        """A fetcher of one manifest."""
        return ClusterFetcher(model, manifest, storage, mirrors, holding=self.holding, source=self.source)
