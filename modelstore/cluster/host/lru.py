"""Which pieces of a bounded tier go first: segmented LRU, so that one long scan does not flush what is read again and again.

New pieces are on probation; those asked for again are protected (up to four fifths of the bytes), and fall back on probation
when others take their place (Karedla, Love and Wherry 1994). Pinned pieces never go. Not for use by several threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

_PROTECTED = 0.8


class SegmentedLRU:
    """Sizes of what is held, by digest, in the order in which it goes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.pinned = 0  # bytes
        self.reserved = 0  # bytes that are being written
        self._probation: OrderedDict[bytes, int] = OrderedDict()
        self._protected: OrderedDict[bytes, int] = OrderedDict()
        self._protected_bytes = 0
        self._pins: dict[bytes, set[str]] = {}

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._probation or digest in self._protected

    def digests(self) -> list[bytes]:
        """All held digests, the next to be evicted first."""
        return [*self._probation, *self._protected]

    def touch(self, digest: bytes) -> None:
        """Note that it was asked for."""
        if digest in self._protected:
            self._protected.move_to_end(digest)
        elif digest in self._probation:
            size = self._probation.pop(digest)
            self._protected[digest] = size
            self._protected_bytes += size
            while self._protected_bytes > _PROTECTED * self.limit and len(self._protected) > 1:
                old, size = self._protected.popitem(last=False)
                self._protected_bytes -= size
                self._probation[old] = size

    def room(self, size: int) -> list[bytes] | None:
        """The entries to evict so that `size` bytes more fit; None if they cannot. Nothing is removed yet."""
        if size > self.limit - self.pinned - self.reserved:
            return None
        going, free = [], self.limit - self.nbytes - self.reserved
        for digest, held in self._candidates():
            if free >= size:
                break
            going.append(digest)
            free += held
        return going if free >= size else None

    def reserve(self, size: int) -> list[bytes] | None:
        """Set `size` bytes aside for a piece that is about to be written, until `release`. The entries to evict for it are
        forgotten here, and returned to be removed; None if there is no room.
        """
        going = self.room(size)
        if going is not None:
            for old in going:
                self.remove(old)
            self.reserved += size
        return going

    def release(self, size: int) -> None:
        """A reservation was written and added, or was given up."""
        self.reserved -= size

    def add(self, digest: bytes, size: int) -> None:
        """Note that it is held now."""
        if digest not in self:
            self._probation[digest] = size
            self.nbytes += size
            if digest in self._pins:
                self.pinned += size

    def remove(self, digest: bytes) -> int:
        """Note that it is gone; its size, 0 if it was not there."""
        size = self._probation.pop(digest, None)
        if size is None:
            size = self._protected.pop(digest, 0)
            self._protected_bytes -= size
        self.nbytes -= size
        if digest in self._pins:
            self.pinned -= size
        return size

    def pin(self, digests: Iterable[bytes], pin: str) -> None:
        """Keep these, held now or later, until `unpin`."""
        for digest in digests:
            pins = self._pins.setdefault(digest, set())
            if not pins:
                self.pinned += self.size(digest)
            pins.add(pin)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        for digest, pins in list(self._pins.items()):
            pins.discard(pin)
            if not pins:
                del self._pins[digest]
                self.pinned -= self.size(digest)

    def is_pinned(self, digest: bytes) -> bool:
        """Whether it is kept."""
        return digest in self._pins

    def size(self, digest: bytes) -> int:
        """Bytes of what is held, 0 of anything else."""
        return self._probation.get(digest) or self._protected.get(digest) or 0

    def _candidates(self) -> Iterable[tuple[bytes, int]]:
        for segment in (self._probation, self._protected):
            for digest, size in segment.items():
                if digest not in self._pins:
                    yield digest, size
