"""The arithmetic of rendezvous hashing: every key against every member, in integers and plain float64 operations.

A member's score for a key is share / -ln(u), u being a hash of both in (0, 1) ("weighted rendezvous hashing", Schindler
and others, after Thaler and Ravishankar 1998): the highest score is the home. The logarithm is made here of additions,
multiplications and one division in a fixed order, so that scores have the same bits on every machine. As -ln(u) is at
least 1 - u, a score is at most share / (1 - u): the logarithm is taken only of those whose bound beats the best so far, a
few of a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from modelstore.codecs.kernels import jit


def _place(keys, seeds, shares, zones, nodes, equal, out, scratch):  # type: ignore[no-untyped-def]
    """The holders of each key, into `out` (int32 [keys, replicas], filled with -1).

    keys, seeds: uint64; shares: float64 [members]; zones, nodes: int32 [members], numbered from 0; `equal`: all shares are
    the same, so that the hash itself is the score. scratch: float64 [2, members].
    """
    members, replicas = len(seeds), out.shape[1]
    zones_in_all, nodes_in_all = 0, 0
    for m in range(members):
        zones_in_all = max(zones_in_all, zones[m] + 1)
        nodes_in_all = max(nodes_in_all, nodes[m] + 1)
    bounds, hashes = scratch[0], scratch[1]
    for k in range(len(keys)):
        key = keys[k]
        if k and key == keys[k - 1]:  # chunks of one section follow each other
            out[k] = out[k - 1]
            continue
        for m in range(members):
            h = key ^ seeds[m]
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
            bounds[m] = (np.float64(h >> np.uint64(12)) + 0.5) * 2.220446049250313e-16  # 52 bits: (0, 1), never 0 or 1
        if not equal:
            for m in range(members):
                hashes[m] = bounds[m]
                bounds[m] = 1.000000001 * shares[m] / (1.0 - bounds[m])  # the excess is for rounding
        for r in range(min(replicas, members)):
            # 2: in a zone of its own, 1: on a node of its own, 0: any other member. One of that kind is left.
            kind = 2 if r < zones_in_all else (1 if r < nodes_in_all else 0)
            best, top = -1, 0.0
            for m in range(members):
                if bounds[m] <= top:
                    continue
                apart = True
                for before in range(r):
                    other = out[k, before]
                    if (
                        other == m
                        or (kind == 1 and nodes[other] == nodes[m])
                        or (kind == 2 and zones[other] == zones[m])
                    ):
                        apart = False
                        break
                if not apart:
                    continue
                score = bounds[m]
                if not equal:
                    u = hashes[m]
                    halvings = 0.0
                    while u < 0.7071067811865476:
                        u = u * 2.0
                        halvings += 1.0
                    t = (u - 1.0) / (u + 1.0)  # ln(u) = 2 atanh(t) with |t| < 0.172: good to 1e-12
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
                    score = shares[m] / (halvings * 0.6931471805599453 - 2.0 * t * series)
                if score > top:
                    best, top = m, score
            out[k, r] = best


@cache
def place() -> Callable[..., None]:
    """`_place`, compiled."""
    import numba as nb

    u8, f8, i4 = nb.uint64[::1], nb.float64[::1], nb.int32[::1]
    signature = nb.void(u8, u8, f8, i4, i4, nb.boolean, nb.int32[:, ::1], nb.float64[:, ::1])
    return jit.compiled(_place, signature)
