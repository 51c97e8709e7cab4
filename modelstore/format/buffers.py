"""Values that count as bytes: anything with the buffer protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Buffer: TypeAlias = bytes | bytearray | memoryview | Bytes


class Pieces:
    """An object's pieces, made again each time they are taken, so that a write that failed half-way can be repeated."""

    def __init__(self, make: Callable[[], Iterator[Buffer]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Buffer]:
        return self._make()


def as_bytes(buffer: Buffer) -> Bytes:
    """Any contiguous buffer as a flat array of its bytes, without a copy."""
    return np.frombuffer(buffer, dtype=np.uint8)


def view(buffer: Bytes) -> memoryview:
    """An array of bytes as a memoryview, writable if the array is."""
    return memoryview(buffer)  # type: ignore[arg-type]  # typeshed knows ndarray as a buffer from Python 3.12 on
