"""The input of a codec for weights before it encodes a tensor: how to read it, the memory to stay within, statistics of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape

ReadValues = Callable[[Region], Bytes]  # a region of the tensor → its raw bytes, 1-d
ReadCodes = Callable[
    [Region], tuple[NDArray[np.int8], Bytes]
]  # a region → codes (rows, columns), raw bytes of their scales
FactorPair = tuple[NDArray[np.float32], NDArray[np.float32]]  # left (rows, rank), right (rank, columns)

_HELD = 4 << 20  # bytes that are read at once where nobody says how many may be
_SHARE = 4  # of the memory that may be held: what is read has copies as numbers
_LEAST = 64 << 10


@dataclass(frozen=True, slots=True)
class Statistics:
    """Knowledge of one tensor beside its values, such as sums of its layer's inputs on a text. None: not known.

    importance    float32 (columns,): the mean square of what comes through each column, in any unit
    codes         (bits, group_size) → symmetric codes, and the scales of their groups in the dtype that the codec stores
    kept          the tensor's values with those that can be missed set to 0, in its dtype
    factors       (rank, energy), as `lowrank` has them → factors in float32 that the dtype of stored factors holds

    The functions are computed when a codec asks for them: from second moments of the inputs (GPTQ, SparseGPT, SVD-LLM), or read
    from where somebody else left it.
    """

    importance: NDArray[np.float32] | None = None
    codes: Callable[[int, int], ReadCodes] | None = None
    kept: Callable[[], ReadValues] | None = None
    factors: Callable[[int, float], FactorPair] | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """A tensor that is going to be encoded.

    read          gives any region of it, raw bytes
    memory        bytes that `fit` and what it returns may hold; None where that is not limited
    statistics    what is known of it beside its values; None where nothing is
    """

    read: ReadValues
    shape: Shape
    dtype: DType
    memory: int | None = None
    statistics: Statistics | None = None

    @property
    def importance(self) -> NDArray[np.float32] | None:
        """The weight of each column of a matrix, None if it is not known."""
        return self.statistics.importance if self.statistics and len(self.shape) == 2 else None

    @property
    def band(self) -> int:
        """Bytes of the tensor to read in one piece: 4 MiB, or fewer if less memory is given."""
        return _HELD if self.memory is None else max(_LEAST, min(_HELD, self.memory // _SHARE))
