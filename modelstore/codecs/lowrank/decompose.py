"""Truncated singular value decomposition of a matrix that is read in bands of rows, in memory that is known before.

If the shorter side is short, or the rank not far from it, the eigenvectors of the smaller Gram matrix in float64 are the
answer. Else it is looked for in a space of somewhat more dimensions than the rank: a random one, multiplied by the Gram matrix
and made orthonormal again some times (Halko, Martinsson and Tropp 2011), whose squared error is within 0.3 % (0.02 dB) of the
least one, and takes a quarter of the memory or less. Which of both depends on shape and rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.numeric.numbers import Floats
from modelstore.format.buffers import Bytes

Doubles: TypeAlias = NDArray[np.float64]
Reals: TypeAlias = NDArray[Any]  # float64, or float32 where the space was looked for
Narrow = Callable[[Reals], Bytes]  # rows of a factor, as they are stored

BAND = 4 << 20  # bytes of the tensor that are read at once
_SHORT = 1024  # up to this side the Gram matrix is small
_MORE = 64  # dimensions beyond the rank
_AT_ONCE = 2048  # columns of a wide matrix whose products are held at once
_TIMES = 8  # that the space is multiplied by the Gram matrix
_BLOCK = 64  # columns that are made orthonormal at once
_WIDE = 256  # columns of the space that are multiplied at once: each time the matrix is read, which costs a tenth of it


@dataclass(frozen=True)
class Bands:
    """A matrix: its size, how many rows are read together, and the reader of rows [a, b) as float32."""

    rows: int
    columns: int
    step: int
    read: Callable[[int, int], Floats]

    @property
    def tall(self) -> bool:
        """Whether it has at least as many rows as columns."""
        return self.columns <= self.rows

    @property
    def short(self) -> int:
        """The shorter side."""
        return min(self.rows, self.columns)

    def __iter__(self) -> Iterator[tuple[int, int, Floats]]:
        for a in range(0, self.rows, self.step):
            b = min(self.rows, a + self.step)
            yield a, b, self.read(a, b)


def memory(rows: int, columns: int, rank: int) -> int:
    """Bytes that the decomposition holds together, beside bands and its result. `rank`: 0 if it is not known."""
    short, wide = min(rows, columns), columns > rows
    if not _searches(short, rank):
        return max(5 * 8 * short**2, 8 * short * (rank or short) + 8 * (rank or short) * columns * wide)
    size = min(short, rank + _MORE)
    part = 2 * 4 * (columns if wide else short) * min(size, _WIDE)
    within = 12 * size**2 + (2 * 4 * min(columns, _AT_ONCE) * size if wide else 0)
    return 4 * size * short + max(part, within, 40 * size**2)  # NumPy finds eigenvectors in float64


def enough(bands: Bands, energy: float) -> int:
    """The smallest rank that keeps that share of the sum of squares."""
    squares = np.linalg.eigvalsh(_gram(bands))
    found = np.cumsum(np.maximum(squares[::-1], 0))
    return int(np.searchsorted(found, energy * found[-1])) + 1 if found[-1] > 0 else 1


def factors(bands: Bands, rank: int, narrow: Narrow) -> tuple[Bytes, Bytes]:
    """(left, right) of that rank, each with the square roots of the singular values."""
    squares, vectors = _searched(bands, rank) if _searches(bands.short, rank) else _exact(bands, rank)
    for j in range(0, rank, _BLOCK):  # eigenvectors have no sign of their own
        part = vectors[:, j : j + _BLOCK]
        largest = np.abs(part).argmax(axis=0)
        part *= np.where(part[largest, np.arange(part.shape[1])] < 0, -1, 1)
    roots = (np.maximum(squares, 0) ** 0.25).astype(vectors.dtype)
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > roots[:1] * 1e-5)
    parts = range(0, rank, _BLOCK)
    if bands.tall:
        left = ((band.astype(vectors.dtype, copy=False) @ vectors) * inverse for _, _, band in bands)
        right = ((vectors[:, j : j + _BLOCK] * roots[j : j + _BLOCK]).T for j in parts)
        return _joined(left, bands.rows, narrow), _joined(right, rank, narrow)
    left = (vectors[a : a + 256] * roots for a in range(0, bands.rows, 256))
    wide = range(0, rank, _WIDE)
    right = (_other(bands, vectors[:, j : j + _WIDE]) * inverse[j : j + _WIDE, None] for j in wide)
    return _joined(left, bands.rows, narrow), _joined(right, rank, narrow)


def _other(bands: Bands, vectors: Reals) -> Reals:
    """A wide matrix applied to vectors of its rows."""
    made = np.zeros((vectors.shape[1], bands.columns), vectors.dtype)
    for a, b, band in bands:
        made += vectors[a:b].T @ band.astype(vectors.dtype, copy=False)
    return made


def _joined(parts: Iterable[Reals], rows: int, narrow: Narrow) -> Bytes:
    """Rows of a factor as they are stored, written to one place as they come."""
    at, made = 0, None
    for part in parts:
        stored = narrow(part)
        if made is None:
            made = np.empty((rows, stored.shape[1]), np.uint8)
        made[at : at + len(stored)] = stored
        at += len(stored)
    assert made is not None, "a matrix has rows"
    return made


def _searches(short: int, rank: int) -> bool:
    """Whether the space is looked for, rather than told by all eigenvectors."""
    return short > _SHORT and 0 < rank <= short // 3


def _exact(bands: Bands, rank: int) -> tuple[Doubles, Reals]:
    """The largest squared singular values and their vectors on the shorter side."""
    squares, vectors = np.linalg.eigh(_gram(bands))
    return squares[::-1][:rank], np.ascontiguousarray(vectors[:, ::-1][:, :rank])


def _gram(bands: Bands) -> Doubles:
    """A · Aᵀ or Aᵀ · A, whichever is smaller."""
    gram: Doubles = np.zeros((bands.short, bands.short))
    for a, b, found in bands:
        band = found.astype(np.float64)
        if bands.tall:
            gram += band.T @ band
            continue
        for c, d, other in bands:
            if c >= a:
                gram[a:b, c:d] = band @ other.astype(np.float64).T
                gram[c:d, a:b] = gram[a:b, c:d].T
    return gram


def _searched(bands: Bands, rank: int) -> tuple[Doubles, Reals]:
    """As `_exact`, within a space that holds nearly all of them, in float32."""
    size = min(bands.short, rank + _MORE)
    most = max((float(np.abs(band).max(initial=0)) for _, _, band in bands), default=0.0)
    over = np.float32(1.0 if 1e-12 < most < 1e12 or not most else 1 / most)  # squares are numbers then
    space = np.random.default_rng(0).standard_normal((bands.short, size), np.float32)
    for _ in range(_TIMES):
        _make_orthonormal(space)
        for j in range(0, size, _WIDE):
            _multiply(bands, space[:, j : j + _WIDE], over)
    _make_orthonormal(space)
    squares, vectors = np.linalg.eigh(_within(bands, space, over))
    chosen = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    del vectors
    for a in range(0, len(space), 256):  # in place: no second space is made
        space[a : a + 256, :rank] = space[a : a + 256] @ chosen
    return squares[::-1][:rank].astype(np.float64) / float(over) ** 2, space[:, :rank]


def _scaled(bands: Bands, over: np.float32) -> Iterator[tuple[int, int, Floats]]:
    for a, b, band in bands:
        yield a, b, band if over == 1 else band * over


def _multiply(bands: Bands, space: Floats, over: np.float32) -> None:
    """The Gram matrix of the shorter side times some columns of a space, in their place."""
    if bands.tall:
        made = np.zeros(space.shape, np.float32)
        for _, _, band in _scaled(bands, over):
            made += band.T @ (band @ space)
        space[:] = made
        return
    across = _across(bands, space, over, 0, bands.columns)
    for a, b, band in _scaled(bands, over):
        space[a:b] = band @ across


def _across(bands: Bands, space: Floats, over: np.float32, first: int, last: int) -> Floats:
    """Aᵀ times a space of its shorter side, its rows: these columns of A."""
    across = np.zeros((last - first, space.shape[1]), np.float32)
    for a, b, band in _scaled(bands, over):
        across += band[:, first:last].T @ space[a:b]
    return across


def _within(bands: Bands, space: Floats, over: np.float32) -> Floats:
    """The Gram matrix as it is within an orthonormal space."""
    gram: Doubles = np.zeros((space.shape[1], space.shape[1]))
    if bands.tall:
        for _, _, band in _scaled(bands, over):
            part = band @ space
            gram += part.T @ part
    else:
        for first in range(0, bands.columns, _AT_ONCE):
            part = _across(bands, space, over, first, min(bands.columns, first + _AT_ONCE))
            gram += part.T @ part
    return gram.astype(np.float32)


def _make_orthonormal(space: Floats) -> None:
    """Gram-Schmidt by blocks of columns, in place; twice each, so that rounding leaves nothing of those before."""
    for j in range(0, space.shape[1], _BLOCK):
        before = space[:, :j]
        block: Reals = space[:, j : j + _BLOCK].astype(np.float64)
        for _ in range(2):
            block -= before @ (before.T @ block.astype(np.float32))
            block, _ = np.linalg.qr(block)
        space[:, j : j + _BLOCK] = block
