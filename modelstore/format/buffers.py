"""What counts as bytes: anything with the buffer protocol."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Buffer: TypeAlias = bytes | bytearray | memoryview | Bytes


def as_bytes(buffer: Buffer) -> Bytes:
    """Any contiguous buffer as a flat array of its bytes, without a copy."""
    return np.frombuffer(buffer, dtype=np.uint8)
