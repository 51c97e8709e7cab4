"""A tier of uint8 tensors on a GPU (or any device of torch): bounded, least recently used first."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from modelstore.cluster.file_tier import TierStats
from modelstore.cluster.lru import SegmentedLRU
from modelstore.format.buffers import Bytes

if TYPE_CHECKING:
    import torch


class DeviceTier:
    """Pieces in a device's memory. Safe to use from many threads."""

    def __init__(self, device: str, limit: int) -> None:
        import torch

        self._device = torch.device(device)
        self._lru = SegmentedLRU(limit)
        self._tensors: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._stats = TierStats(limit=limit)

    def get(self, digest: bytes) -> Bytes | None:
        """A copy of a piece's bytes in host memory, None where it is not held."""
        with self._lock:
            tensor = self._tensors.get(digest)
            if tensor is None:
                return None
            self._lru.touch(digest)
            self._stats.hits += 1
        return np.asarray(tensor.cpu().numpy())

    def tensor(self, digest: bytes) -> torch.Tensor | None:
        """The piece on the device itself, uint8, 1-d."""
        with self._lock:
            return self._tensors.get(digest)

    def put(self, digest: bytes, data: Bytes) -> bool:
        """Hold a piece, in the place of others if need be; whether there was room."""
        import torch

        with self._lock:
            if digest in self._lru:
                return True
            going = self._lru.room(len(data))
            if going is None:
                self._stats.refused += 1
                return False
            for old in going:
                self._lru.remove(old)
                del self._tensors[old]
                self._stats.evicted += 1
            try:
                self._tensors[digest] = torch.from_numpy(np.array(data)).to(self._device)
            except RuntimeError:  # the device has no room, though the bound would allow it
                self._stats.refused += 1
                return False
            self._lru.add(digest, len(data))
        return True

    def has(self, digest: bytes) -> bool:
        """Whether it is held."""
        return digest in self._tensors

    def remove(self, digests: Iterable[bytes]) -> int:
        """Let pieces go; bytes freed."""
        freed = 0
        with self._lock:
            for digest in digests:
                if self._tensors.pop(digest, None) is not None:
                    freed += self._lru.remove(digest)
        return freed

    def unpinned(self) -> list[bytes]:
        """What is held and may go."""
        with self._lock:
            return [digest for digest in self._lru.digests() if not self._lru.is_pinned(digest)]

    def pin(self, digests: Iterable[bytes], pin: str) -> None:
        """Keep these until `unpin`."""
        with self._lock:
            self._lru.pin(digests, pin)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        with self._lock:
            self._lru.unpin(pin)

    def stats(self) -> TierStats:
        """What is held now, and what was done so far."""
        with self._lock:
            return msgspec.structs.replace(
                self._stats, bytes=self._lru.nbytes, pieces=len(self._lru), pinned=self._lru.pinned
            )
