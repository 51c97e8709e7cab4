"""Deltas of deltas: how long a chain may become before a version is stored in full again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_CHAIN = 64  # each link is a manifest, and some more requests
SHARE = 0.5  # of the size of the full version: so a reader of the last one reads at most half as much again


@dataclass(frozen=True, slots=True)
class Chain:
    """The deltas under a version: their number, their bytes, and those of the full version that they start at."""

    full: int
    links: int = 0
    deltas: int = 0

    def then(self, stored: int) -> Chain:
        """The chain with one more delta, of so many stored bytes."""
        return Chain(self.full, self.links + 1, self.deltas + stored)

    @property
    def may_grow(self) -> bool:
        """Whether another delta may be stored against its end."""
        return self.links < LONGEST_CHAIN and self.deltas <= SHARE * self.full
