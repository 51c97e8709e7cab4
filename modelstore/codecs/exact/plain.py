"""Byte planes put together by NumPy: for what a process decodes first, and little of it.

Numba and compiled kernels take half a second to load, longer than NumPy takes for a million words. So a process that reads a few
small tensors never loads them; one that reads more does so with its first large chunk, or after `FIRST`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelstore.format.buffers import Bytes

FIRST = 1 << 20  # words that a process decodes so; 10 to 20 ms
CALL = 1 << 13  # words that a call counts as, beside its own: NumPy's calls take as long


class Allowance:
    """How much is still done without kernels, for all threads of the process."""

    def __init__(self, words: int) -> None:
        self._left = words
        self._lock = threading.Lock()

    def takes(self, words: int) -> bool:
        """Whether so many words are still allowed; if so, they are taken."""
        cost = words + CALL
        if cost > self._left:
            return False
        with self._lock:
            self._left -= cost
        return True


first = Allowance(FIRST)


def merge(pieces: Sequence[Bytes], top: int) -> NDArray[np.unsignedinteger]:
    """Words of their planes, the most significant first; their signs are moved back where `top` is the mask of the top byte."""
    width = len(pieces)
    kind = np.dtype(f"<u{width}")
    planes = np.empty((pieces[0].size, width), np.uint8)
    for place, piece in zip(range(width - 1, -1, -1), pieces, strict=True):
        planes[:, place] = piece
    words: NDArray[np.unsignedinteger] = planes.reshape(-1).view(kind)
    if not top:
        return words
    above, moved = kind.type(top), kind.type(top >> 1 & ~top)
    rest = kind.type(~(top | top >> 1) & (1 << 8 * width) - 1)
    changed: NDArray[np.unsignedinteger] = (
        (words & above) >> kind.type(1) | (words & moved) << kind.type(8) | words & rest
    )
    return changed
