"""Reads a model's chunks through a cluster: from the node's shared memory, from holders, at last from the storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelstore.cluster.pieces import Piece, StoreAddress, pieces
from modelstore.execute.read.fetcher import Fetcher
from modelstore.format.buffers import Bytes
from modelstore.format.digest import matches
from modelstore.format.objects.manifest import Manifest
from modelstore.plan.read import ReadJob, Want, read_job
from modelstore.storage.base import Storage


class Holding(Protocol):
    """The members that can be asked for pieces."""

    def read(self, source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """The pieces among these that holders have or could get, by digest; unchecked."""

    def wrong(self, part: Piece) -> None:
        """A holder gave wrong bytes: every copy of the piece must be checked."""

    def passed(self, nbytes: int) -> None:
        """So many bytes had to be read from the storage instead."""


@dataclass(frozen=True)
class ClusterFetcher:
    """Chunks of one manifest from a cluster's hosts; what they do not have, or have wrong, as `stored` has it."""

    stored: Fetcher
    holding: Holding
    source: StoreAddress

    def __reduce__(self) -> tuple[Any, ...]:
        """Hosts are asked by this process: what is unpickled elsewhere reads the storage."""
        return self.stored.__reduce__()

    @property
    def model(self) -> str:
        return self.stored.model

    @property
    def manifest(self) -> Manifest:
        return self.stored.manifest

    @property
    def bytes_read(self) -> int:
        return self.stored.bytes_read

    @property
    def local(self) -> bool:
        return False

    @property
    def elsewhere(self) -> bool:
        return True

    def over(self, manifest: Manifest) -> ClusterFetcher:
        """The same for another manifest of the model."""
        return ClusterFetcher(self.stored.over(manifest), self.holding, self.source)

    def direct(self, row: int, out: Bytes, tensor: str, chunk: int) -> None:
        """One row's bytes, from the storage: hosts are asked for jobs."""
        self.stored.direct(row, out, tensor, chunk)

    def ranges(self, job: ReadJob, wants: Sequence[Want]) -> dict[int, Bytes]:
        """As `Fetcher.ranges`, each row checked."""
        rows = [row for chunk in job.chunks for row in chunk.rows]
        parts = pieces(self.manifest, rows)
        given = self.holding.read(self.source, list({part.digest: part for part in parts if part.length}.values()))
        self.stored.count(sum(len(data) for data in given.values()))
        found: dict[int, Bytes] = {}
        for row, part in zip(rows, parts, strict=True):
            data = given.get(part.digest)
            if data is None:
                continue
            if matches(data, part.digest):
                found[row] = data
            else:
                self.holding.wrong(part)
        left = [chunk for chunk in job.chunks if any(row not in found for row in chunk.rows)]
        if left:
            rest = read_job(self.manifest, left, job.nbytes)
            self.holding.passed(rest.fetched)
            found |= self.stored.ranges(rest, wants)
        return found


@dataclass(frozen=True)
class ClusterFetching:
    """Makes fetchers of a store's models that ask a cluster."""

    holding: Holding
    source: StoreAddress

    def __call__(self, model: str, manifest: Manifest, storage: Storage, mirrors: Sequence[Storage]) -> ClusterFetcher:
        """A fetcher of one manifest."""
        return ClusterFetcher(Fetcher(model, manifest, storage, mirrors), self.holding, self.source)
