"""A tier of uint8 tensors on a GPU (or any device of torch): bounded, least recently used first."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from modelstore.cluster.host.file_tier import TierStats
from modelstore.cluster.host.lru import SegmentedLRU
from modelstore.cluster.pieces import check_digest
from modelstore.format.buffers import Bytes
from modelstore.format.digest import matches

if TYPE_CHECKING:
    import torch


class DeviceTier:
    """Pieces in a device's memory. Safe to use from many threads."""

    def __init__(self, device: str, limit: int) -> None:
        import torch

        self._device = torch.device(device)
        self._lru = SegmentedLRU(limit)
        self._tensors: dict[bytes, torch.Tensor] = {}
        self._writing: set[bytes] = set()
        self._lock = threading.Lock()
        self._stats = TierStats(limit=limit)

    def get(self, digest: bytes) -> Bytes | None:
        """A copy of a piece's bytes in host memory, None if it is not held. Counts as a use of it."""
        with self._lock:
            tensor = self._tensors.get(digest)
            if tensor is None:
                return None
            self._lru.touch(digest)
            self._stats.hits += 1
        return _copy(tensor)

    def tensor(self, digest: bytes) -> torch.Tensor | None:
        """The piece on the device itself, uint8, 1-d; not to be written to."""
        with self._lock:
            return self._tensors.get(digest)

    def put(self, digest: bytes, data: Bytes) -> bool:
        """Hold a piece, in the place of others if need be; whether it is held now. Its bytes must have been checked."""
        import torch

        check_digest(digest)
        size = len(data)
        with self._lock:
            if digest in self._lru or digest in self._writing:
                return digest in self._lru
            going = self._lru.reserve(size)
            if going is None:
                self._stats.refused += 1
                return False
            for old in going:
                del self._tensors[old]
                self._stats.evicted += 1
            self._writing.add(digest)
        tensor = None
        try:
            tensor = torch.from_numpy(np.array(data)).to(self._device)  # a copy: torch needs to be able to write
        except RuntimeError:  # the device has no room, though the bound would allow it: others use it, too
            pass
        finally:
            with self._lock:
                self._writing.discard(digest)
                self._lru.release(size)
                if tensor is None:
                    self._stats.refused += 1
                else:
                    self._tensors[digest] = tensor
                    self._lru.add(digest, size)
        return tensor is not None

    def has(self, digest: bytes) -> bool:
        """Whether it is held."""
        with self._lock:
            return digest in self._tensors

    def cost(self, size: int) -> int:
        """Bytes that a piece of `size` bytes takes of the limit."""
        return size

    def check(self, digest: bytes) -> bool:
        """Whether a held piece's bytes are what its name says; a wrong one is removed. True for what is not held."""
        tensor = self.tensor(digest)
        if tensor is None or matches(_copy(tensor), digest):
            return True
        with self._lock:
            self._stats.wrong += 1
        self.evict([digest], pinned=True)
        return False

    def evict(self, digests: Collection[bytes] | None = None, *, pinned: bool = False) -> int:
        """Remove pieces (all, if none are named), pinned ones only if asked; bytes freed."""
        with self._lock:
            chosen = self._lru.digests() if digests is None else [d for d in dict.fromkeys(digests) if d in self._lru]
            going = [digest for digest in chosen if pinned or not self._lru.is_pinned(digest)]
            for digest in going:
                del self._tensors[digest]
            return sum(self._lru.remove(digest) for digest in going)

    def pin(self, digests: Collection[bytes], pin: str) -> None:
        """Keep these, held now or later, until `unpin`."""
        with self._lock:
            self._lru.pin(digests, pin)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        with self._lock:
            self._lru.unpin(pin)

    def stats(self) -> TierStats:
        """The current content, and the counters."""
        with self._lock:
            lru = self._lru
            return msgspec.structs.replace(self._stats, bytes=lru.nbytes, pieces=len(lru), pinned=lru.pinned)


def _copy(tensor: torch.Tensor) -> Bytes:
    """A tensor's bytes in host memory of their own, on whatever device it is."""
    out = np.empty(tensor.numel(), np.uint8)
    import torch

    torch.from_numpy(out).copy_(tensor)
    return out
