"""Keys of dicts and items of sets whose hashes an author can choose: what making the dict costs is bounded before it is made.

A dict compares a key with every other of the same hash. Hashes of texts and bytes are secret; those of numbers and tuples
can be chosen, so that a file of some megabytes could ask for days of comparisons.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

_SECRET = (str, bytes, type(None))
_MOST = 1000  # comparisons for each part of a key


def check_hashes(keys: Sequence[Any]) -> None:
    """`ValueError` if a dict of these keys takes more than a thousand comparisons for each part of them.

    `TypeError` if a key is not hashable.
    """
    found = sorted((hash(key), i) for i, key in enumerate(keys) if not isinstance(key, _SECRET))
    work = 0
    for _, group in itertools.groupby(found, lambda one: one[0]):
        alike = [keys[i] for _, i in group]
        if len(alike) > 1:
            work += (len(alike) - 1) * _parts(alike)
    if work > _MOST and work > _MOST * _parts(keys):
        raise ValueError(f"a dict or set has very many keys of the same hash, among {len(keys)}")


def _parts(keys: Iterable[Any]) -> int:
    """The cost of comparing keys: their numbers and words of memory, all together."""
    return sum(map(_part, keys))


def _part(key: Any) -> int:
    if isinstance(key, (tuple, frozenset)):
        return 1 + _parts(key)
    if isinstance(key, int):
        return 1 + (key.bit_length() >> 6)
    return 1 + (len(key) >> 3) if isinstance(key, (str, bytes)) else 1
