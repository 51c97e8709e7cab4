"""Which stored version is nearest to what is saved, by sketches of both. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelstore.format.objects.sketch import Sketch, Words

FAR = 0.75  # from here on a version is no parent; strangers are at 0.9 to 1
RENAMED = 0.5  # below it a tensor of another name is the same one: the nearest of 256 strangers' tensors is at 0.7
AS_NEAR = 1.03  # times the least distance: a sample of 2,048 words tells no more


class Candidate(NamedTuple):
    """A version that may be a parent, and its sketch."""

    model: str
    version: int
    created: float
    sketch: Sketch


class Likeness(NamedTuple):
    """The distance of a version: 0 if it is the same, 1 if it has nothing in common."""

    distance: float
    candidate: Candidate


class _Group(NamedTuple):
    """Tensors of one dtype and shape: names, words as rows, what each counts, the bits that its words need alone."""

    names: NDArray[np.uint32]
    words: Words
    weights: NDArray[np.float64]
    alone: NDArray[np.float64]


def nearest(own: Sketch, weights: Sequence[int], candidates: Iterable[Candidate]) -> list[Likeness]:
    """Versions by their distance from what a sketch is of, the nearest first.

    If several are equally near, the oldest comes first: the others were made of it. weights: the bytes of each of
    the sketch's tensors.
    """
    groups = {int(form): _group(own, int(form), np.array(weights, np.float64)) for form in np.unique(own.forms)}
    whole = sum(float(group.alone @ group.weights) for group in groups.values())
    if not whole:
        return []
    apart = [(1 - _common(groups, one.sketch) / whole, one) for one in candidates]
    found = sorted((Likeness(*one) for one in apart), key=lambda one: (one.distance, one.candidate.created))
    near = [one for one in found if one.distance <= AS_NEAR * found[0].distance]
    return sorted(near, key=lambda one: one.candidate.created) + found[len(near) :]


def _group(own: Sketch, form: int, weights: NDArray[np.float64]) -> _Group:
    rows, words = own.rows(form)
    return _Group(
        own.names[rows], words, weights[rows], _bits(words, np.roll(words, max(1, words.shape[1] // 2), axis=1))
    )


def _common(groups: dict[int, _Group], other: Sketch) -> float:
    """Bits of its own words that a version need not store beside another one, of all tensors."""
    shared = 0.0
    for form in np.intersect1d(list(groups), other.forms).tolist():
        group = groups[form]
        rows, words = other.rows(form)
        shared += float((group.alone - _matched(group, other.names[rows], words)) @ group.weights)
    return shared


def _matched(own: _Group, names: NDArray[np.uint32], words: Words) -> NDArray[np.float64]:
    """Bits of the difference of each tensor to the one of its name, at most those that it needs alone.

    Without one of its name, to the nearest of its dtype and shape, if that is near: one of many is always somewhat near.
    """
    n = min(own.words.shape[1], words.shape[1])
    mine, theirs = own.words[:, :n], words[:, :n]
    if np.array_equal(names, own.names):
        return np.minimum(_bits(mine, theirs), own.alone)
    order = np.argsort(names, kind="stable")
    at = order[np.searchsorted(names, own.names, sorter=order).clip(max=len(order) - 1)]
    bits = np.minimum(_bits(mine, theirs[at]), own.alone)
    for row in np.flatnonzero(names[at] != own.names).tolist():
        least = float(_bits(mine[row], theirs).min())
        bits[row] = least if least < RENAMED * own.alone[row] else own.alone[row]
    return bits


def _bits(one: Words, other: Words) -> NDArray[np.float64]:
    """Mean bits of the differences of ordinals in each row, modulo the word."""
    differences = np.ascontiguousarray(one - other).view(f"i{one.dtype.itemsize}").astype(np.float32)
    found: NDArray[np.float64] = np.log2(1 + np.abs(differences)).mean(axis=-1, dtype=np.float64)
    return found
