"""The arithmetic of rendezvous hashing: every key against every member, in integers and plain float64 operations.

A member's score for a key is weight / -log2(u), u being a hash of both in (0, 1) ("weighted rendezvous hashing", Schindler
and others, after Thaler and Ravishankar 1998): the highest score is the home. The logarithm is made here of additions,
multiplications and one division in a fixed order, so that scores have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from modelstore.codecs.kernels import jit


def _place(keys, seeds, weights, zones, nodes, equal, out, scores):  # type: ignore[no-untyped-def]
    """The holders of each key, into `out` (int32 [keys, replicas], filled with -1).

    keys, seeds: uint64; weights: float64 [members]; zones, nodes: int32 [members]; `equal`: all weights are the same, so that
    the hash itself is the score. scores: float64 [members], scratch.
    """
    members = len(seeds)
    for k in range(len(keys)):
        key = keys[k]
        for m in range(members):
            h = key ^ seeds[m]
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
            u = (np.float64(h >> np.uint64(12)) + 0.5) * 2.220446049250313e-16  # 52 bits: (0, 1), never 0 or 1
            scores[m] = u
        if not equal:
            for m in range(members):
                u = scores[m]
                exponent = 0.0
                while u < 0.7071067811865476:
                    u = u * 2.0
                    exponent += 1.0
                t = (u - 1.0) / (u + 1.0)  # log(u) = 2 atanh(t) with |t| < 0.172: good to 1e-12
                s = t * t
                series = 1.0 / 17.0
                series = series * s + 1.0 / 15.0
                series = series * s + 1.0 / 13.0
                series = series * s + 1.0 / 11.0
                series = series * s + 1.0 / 9.0
                series = series * s + 1.0 / 7.0
                series = series * s + 1.0 / 5.0
                series = series * s + 1.0 / 3.0
                series = series * s + 1.0
                bits = exponent - 2.8853900817779268 * t * series
                scores[m] = weights[m] / max(bits, 1e-300)
        for r in range(out.shape[1]):
            best, class_, top = -1, -1, 0.0
            for m in range(members):
                # 2: a zone of its own, 1: a node of its own, 0: another member, -1: chosen already
                kind = 2
                for before in range(r):
                    other = out[k, before]
                    if other == m:
                        kind = -1
                        break
                    if nodes[other] == nodes[m]:
                        kind = 0
                    elif zones[other] == zones[m] and kind == 2:
                        kind = 1
                if kind < 0:
                    continue
                if kind > class_ or (kind == class_ and scores[m] > top):
                    best, class_, top = m, kind, scores[m]
            if best < 0:
                break
            out[k, r] = best


@cache
def place() -> Callable[..., None]:
    """`_place`, compiled."""
    import numba as nb

    u8, f8, i4 = nb.uint64[::1], nb.float64[::1], nb.int32[::1]
    signature = nb.void(u8, u8, f8, i4, i4, nb.boolean, nb.int32[:, ::1], f8)
    return jit.compiled(_place, signature)
