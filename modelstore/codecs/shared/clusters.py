"""Codebooks for one-dimensional numbers, found in their histogram: k-means, and entropy-constrained quantization.

The numbers are sorted, so that every cluster is a run of them: sums over a cluster are differences of running sums, and a
round of Lloyd's takes microseconds however large the tensor is. Everything is float64 and the same in every run.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Doubles: TypeAlias = NDArray[np.float64]
LevelsAndBounds = tuple[Doubles, Doubles]  # levels, ascending; the bounds between them

ROUNDS = 200  # of Lloyd's: it has converged long before, but for ties in rounding
# Levels of an entropy-constrained codebook, by its rate: at low rates several indices must share a byte, since bytes of less
# than two bits or so repeat by accident, and zstd then takes for matches what is cheaper without.
_MOST = ((2.7, 255), (1.5, 15), (0.0, 4))
_TABLES = 1.008  # what tables of codes, and codes of at most 11 bits, add to the length of Huffman's
_STEPS = 16  # halvings of the interval in which its step lies


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers, ascending and distinct, and running sums of how much each counts, of them, and of their squares.

    `often`: running sums of how often they occur, which is what each counts, unless weights are given.
    """

    values: Doubles
    count: Doubles
    total: Doubles
    square: Doubles
    often: Doubles

    @classmethod
    def of(cls, values: Doubles, counts: NDArray[np.int64], weights: Doubles | None = None) -> Numbers:
        """Out of sorted numbers and how often each occurs, scaled so that squares cannot overflow."""
        often = counts.astype(np.float64)
        heavy = often if weights is None else weights
        columns = (heavy, heavy * values, heavy * values * values, often)
        return cls(values, *(np.concatenate([[0.0], np.cumsum(column)]) for column in columns))

    def shares(self, book: LevelsAndBounds) -> Doubles:
        """How many of all numbers each cluster has, as a share."""
        ends = np.concatenate([[0], np.searchsorted(self.values, book[1], "right"), [self.values.size]])
        return np.asarray(np.diff(self.often[ends]) / self.often[-1], np.float64)

    def error(self, book: LevelsAndBounds) -> float:
        """The sum of squared errors."""
        counts, totals, squares = self.sums(book)
        return float((squares - 2 * book[0] * totals + book[0] ** 2 * counts).sum())

    def sums(self, book: LevelsAndBounds) -> tuple[Doubles, Doubles, Doubles]:
        """For each cluster: the count, the sum, the sum of squares. A number at a bound is below it."""
        ends = np.concatenate([[0], np.searchsorted(self.values, book[1], "right"), [self.values.size]])
        return np.diff(self.count[ends]), np.diff(self.total[ends]), np.diff(self.square[ends])


def kmeans(numbers: Numbers, levels: int, known: Doubles | None = None) -> LevelsAndBounds:
    """At most `levels` numbers of least squared error: Lloyd's rounds from several beginnings, of which the best is kept.

    known: levels that are one more start.
    """
    if numbers.values.size <= levels:
        return numbers.values, _middles(numbers.values)
    starts = [*_starts(numbers, levels), *([] if known is None else [known])]
    books = [_lloyd(numbers, start) for start in starts]
    return min(books, key=numbers.error)


def _starts(numbers: Numbers, levels: int) -> Iterator[Doubles]:
    """Linear over the range (Han et al.), and where the cube root of the density has its quantiles (Panter and Dite)."""
    low, high = float(numbers.values[0]), float(numbers.values[-1])
    places = (np.arange(levels) + 0.5) / levels
    yield low + (high - low) * places
    for bins in (512, 8192):  # coarse, and fine for numbers with outliers
        edges = np.linspace(low, high, bins + 1)
        ends = np.searchsorted(numbers.values, edges[1:-1], "right")
        counts = np.diff(numbers.count[np.concatenate([[0], ends, [numbers.values.size]])])
        root = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
        yield np.interp(places * root[-1], root, edges)


def _lloyd(numbers: Numbers, start: Doubles) -> LevelsAndBounds:
    """Means of clusters and the middles between them, in turn, until nothing moves; empty clusters are dropped."""
    points = start
    for _ in range(ROUNDS):
        counts, totals, _ = numbers.sums((points, _middles(points)))
        full = counts > 0
        means = totals[full] / counts[full]
        if np.array_equal(means, points):
            break
        points = means
    return points, _middles(points)


def _middles(points: Doubles) -> Doubles:
    return np.asarray(points[:-1] / 2 + points[1:] / 2, np.float64)


def entropy_constrained(numbers: Numbers, rate: float) -> LevelsAndBounds:
    """A codebook of least squared error whose indices take at most `rate` bits each, to about 1 %, once coded.

    Chou, Lookabaugh, Gray, "Entropy-Constrained Vector Quantization" (1989): squared error + slope * length of the code. The
    slope belongs to the step of the initial uniform quantizer, which is halved in on.
    """
    spread = float(np.sqrt(numbers.square[-1] / numbers.count[-1])) or 1.0
    low, high = np.log2(spread) - 9, np.log2(spread) + 4  # log2 of the step
    most = next(levels for least, levels in _MOST if rate >= least)
    best: LevelsAndBounds | None = None
    for _ in range(_STEPS):
        step = 2.0 ** float((low + high) / 2)
        book, length = _constrained(numbers, step, most)
        if length <= rate:
            best, high = book, (low + high) / 2
        else:
            low = (low + high) / 2
    return best if best is not None else kmeans(numbers, 1)


def _constrained(numbers: Numbers, step: float, most: int) -> tuple[LevelsAndBounds, float]:
    """The codebook that a uniform quantizer of that step leads to, and how many bits its indices take."""
    slope = step * step * 0.11552453  # ln 2 / 6: what a bit is worth where steps are small
    points = _uniform(numbers, step, most)
    bounds = _middles(points)
    for _ in range(40):
        counts, totals, _ = numbers.sums((points, bounds))
        full = counts > 0
        share = numbers.shares((points, bounds))[full]
        points = totals[full] / counts[full]
        lengths = np.round(-64 * np.log2(share)) / 64  # robust against the last bits of a machine's logarithm
        moved = _middles(points) + slope * np.diff(lengths) / (2 * np.diff(points))
        moved = np.clip(np.maximum.accumulate(moved), numbers.values[0], numbers.values[-1])
        if np.array_equal(moved, bounds):
            break
        bounds = moved
    counts, totals, _ = numbers.sums((points, bounds))
    full = counts > 0
    if not full.all():  # a bound belongs to the last cluster before it that is left
        ends = np.flatnonzero(full)
        points, bounds = points[ends], bounds[ends[:-1]]
    return (points, bounds), coded_length(numbers.shares((points, bounds)))


def coded_length(share: Doubles) -> float:
    """Bits that an index takes where each occurs in that share: of Huffman codes as `indices` has them, and their tables."""
    together = 8 // max(1, (len(share) - 1).bit_length())  # indices in a byte
    symbols = share
    for _ in range(together - 1):
        symbols = np.outer(symbols, share).reshape(-1)
    heap = sorted(symbols.tolist())
    total = 0.0
    while len(heap) > 1:  # the length of a Huffman code is the sum of its inner nodes
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return _TABLES * total / together


def _uniform(numbers: Numbers, step: float, most: int) -> Doubles:
    """Multiples of the step over the range; where those are too many, the outer ones grow apart towards its ends."""
    low, high = float(numbers.values[0]), float(numbers.values[-1])
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    if last - first < most:
        return np.arange(first, last + 1).astype(np.float64) * step
    outer = max(1, most // 8)
    half = (most - 1 - 2 * outer) // 2
    inner = np.arange(-half, half + 1) * step
    start = (half + 1) * step
    above = np.geomspace(start, max(high, start + step), outer)
    below = -np.geomspace(start, max(-low, start + step), outer)[::-1]
    return np.concatenate([below, inner, above]).astype(np.float64, copy=False)
