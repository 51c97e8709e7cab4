"""What placement costs as clusters grow, how even it is, and what a node's loss moves: real arithmetic on made chunks.

    python -m benchmarks.placement                # the tables of docs/scaling.md

Chunks of 2-4 MiB lie in packs of 128 MiB, as saves cut them; nothing is stored or sent.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Row, Setting, Timer, fresh, seconds, turns, wait_for_quiet

MEMBERS, CHUNKS, REPLICAS, ZONES = 1_000, 1_000_000, 2, 3
MIB = 1 << 20
SECONDS, MOVED, EVEN = 5, 1.1, 1.1


def packed(chunks: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack number, offset and length of each chunk: lengths of 2-4 MiB, packs filled up to 128 MiB."""
    lengths = np.random.default_rng(seed).integers(2 * MIB, 4 * MIB, chunks)
    ends = np.cumsum(lengths)
    pack = np.empty(chunks, np.int64)
    offset = np.empty(chunks, np.int64)
    at = number = 0
    while at < chunks:
        first = int(ends[at] - lengths[at])
        stop = max(at + 1, int(np.searchsorted(ends, first + 128 * MIB, "right")))
        pack[at:stop], offset[at:stop] = number, ends[at:stop] - lengths[at:stop] - first
        at, number = stop, number + 1
    return pack, offset, lengths


def keyed(
    pack: NDArray[np.int64], offset: NDArray[np.int64], section: int, seed: int = 0
) -> tuple[list[str], NDArray[np.uint64]]:
    """Names of the packs, and each chunk's key with sections of that many bytes; the rule of `section_keys`."""
    rng = np.random.default_rng(seed + 1)
    names = [rng.bytes(32).hex() for _ in range(int(pack[-1]) + 1)]
    bases = np.array([int(name[:16], 16) for name in names], np.uint64)
    return names, bases[pack] + (offset // section).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def view_of(members: int) -> Any:
    """That many hosts of equal weight, each on a node of its own, in three zones."""
    from modelstore.plan.placement import Member, View

    made = [Member(f"{i:012x}-1700000000000", f"{i:056x}", f"zone-{i % ZONES}") for i in range(members)]
    return View(1, tuple(made))


def planned(members: int, chunks: int) -> dict[str, Any]:
    """From pieces to the holders of each, two a piece; then a node's loss, a reader's request, the view's size."""
    from modelstore.cluster.pieces import SECTION, Piece, section_keys
    from modelstore.plan.placement import holders, left, moved

    pack, offset, lengths = packed(chunks)
    names, fast = keyed(pack, offset, SECTION)
    columns = zip(pack.tolist(), offset.tolist(), lengths.tolist(), strict=True)
    parts = [Piece(b"", names[p], o, n) for p, o, n in columns]
    view = view_of(members)
    holders(view_of(3), fast[:10], REPLICAS)  # the kernel is loaded
    with Timer() as timer:
        keys = section_keys(parts)
        table = holders(view, keys, REPLICAS)
    assert (keys == fast).all()
    assert table.min() >= 0
    found = {**timer.found, "keys": len(np.unique(keys)), "view_bytes": len(pickle.dumps(view))}
    steps: dict[str, Callable[[], object]] = {
        "holders": lambda: holders(view, keys, REPLICAS),
        "distinct": lambda: holders(view, keys ^ np.arange(chunks, dtype=np.uint64), REPLICAS),
        "moved": lambda: moved(view, left(view, [view.members[0].id]), keys, REPLICAS),
        "request": lambda: holders(view, keys[:64], REPLICAS),  # about 200 MB
    }
    for name, work in steps.items():
        began = time.perf_counter()
        work()
        found[name] = time.perf_counter() - began
    return found


def simulated(members: int, chunks: int, section: int = 8 * MIB, *, even: bool = True) -> dict[str, Any]:
    """How full the fullest host is, against the mean, by chance and with corrections; what its loss moves.

    `homes`: of the bytes that one copy of everything has, each at its home. `copies`: of both copies of everything.
    """
    from modelstore.plan.placement import balanced, holders, left, loads, moved

    pack, offset, lengths = packed(chunks)
    _, keys = keyed(pack, offset, section)
    found: dict[str, Any] = {"members": members, "keys": len(np.unique(keys))}
    total = int(lengths.sum())
    began = view_of(members)
    for name, replicas in (("homes", 1), ("copies", REPLICAS)):
        start = time.perf_counter()
        evened = balanced(began, keys, lengths, replicas) if even else began
        took = time.perf_counter() - start
        for kind, view in (("chance", began), ("balanced", evened)):
            held = loads(view, keys, lengths, replicas)
            worst = int(held.argmax())
            moves = moved(view, left(view, [view.members[worst].id]), keys, replicas)
            again = holders(view, keys, replicas)
            assert (again[moves.key] == worst).any(axis=1).all()  # nothing moves but what it held
            sent = int(lengths[moves.key].sum())
            assert members <= replicas or sent == int(held[worst])
            found[f"{name}_{kind}"] = {
                "largest": float(held.max() / held.mean()),
                "smallest": float(held.min() / held.mean()),
                "lost_share": sent / (total * replicas) * members,  # times 1/members
            }
        others, more = packed(chunks, seed=9), keyed(*packed(chunks, seed=9)[:2], section, seed=9)[1]
        after = loads(evened, more, others[2], replicas)  # of models that came later
        found[f"{name}_later"] = float(after.max() / after.mean())
        found[f"{name}_seconds"] = took
        found[f"{name}_changed"] = float((holders(began, keys, 1) != holders(evened, keys, 1)).mean())
    return found


def rows(setting: Setting) -> list[Row]:
    """A plan's seconds, and what a simulation of the whole cluster says."""
    work = f"placement of {CHUNKS:,} chunks on {MEMBERS:,} nodes"
    case = partial(fresh, "benchmarks.placement:planned", members=MEMBERS, chunks=CHUNKS)
    runs = turns(setting, {"plan": case})["plan"]
    took = seconds(runs)
    note = (
        f"{REPLICAS} holders each; {runs[0]['keys']:,} sections; {runs[0]['distinct']:.2f} s if each chunk had its own"
    )
    made = [Row(work, "—", f"{took:.2f} s", "—", None, f"≤ {SECONDS} s", took <= SECONDS, note, {"ours": runs})]
    found = fresh("benchmarks.placement:simulated", members=MEMBERS, chunks=CHUNKS)
    for kind, label in (("chance", "by chance"), ("balanced", "balanced")):
        homes, copies = found[f"homes_{kind}"], found[f"copies_{kind}"]
        for what, key, goal in (
            ("bytes that the fullest node's loss moves", "lost_share", MOVED),
            ("fullest node, bytes", "largest", EVEN),
        ):
            unit = f"/{MEMBERS:,} of all" if key == "lost_share" else "× the mean"
            made.append(
                Row(
                    *(f"{work}, {label}: {what}", "an equal share", f"{homes[key]:.3f}{unit}", "1"),
                    *(homes[key], f"≤ {goal}", homes[key] <= goal),
                    f"one holder a chunk; with {REPLICAS}: {copies[key]:.3f}; simulated",
                    found,
                )
            )
    return made


def main() -> None:
    """Print both tables, as Markdown."""
    print(
        "| nodes | plan, s | `holders`, s | a key a chunk, s | `moved`, s | request of 64, ms | view, KB | memory, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for members in (10, 100, 1_000, 10_000):
        wait_for_quiet(60)
        it = fresh("benchmarks.placement:planned", members=members, chunks=CHUNKS)
        print(
            f"| {members:,} | {it['seconds']:.2f} | {it['holders']:.2f} | {it['distinct']:.2f} | {it['moved']:.2f}"
            f" | {it['request'] * 1e3:.2f} | {it['view_bytes'] / 1e3:.1f} | {it['peak_rss'] / 2**30:.2f} |",
            flush=True,
        )
    print(
        "\n| nodes | chunks | section, MiB | sections a node | fullest / mean: homes, copies | balanced | s | changed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases = [(10, CHUNKS, 8), (100, CHUNKS, 8), (1_000, CHUNKS, 8), (10_000, CHUNKS, 8)]
    cases += [(1_000, CHUNKS, 4), (1_000, CHUNKS, 1), (1_000, 4 * CHUNKS, 8), (1_000, 16 * CHUNKS, 8)]
    for members, chunks, section in cases:
        case = partial(fresh, "benchmarks.placement:simulated", members=members, chunks=chunks)
        it = case(section=section * MIB, even=chunks <= CHUNKS)
        chance, even = (
            ", ".join(f"{it[f'{what}_{kind}']['largest']:.3f}" for what in ("homes", "copies"))
            for kind in ("chance", "balanced")
        )
        best = f"{even} | {it['homes_seconds']:.1f} | {it['homes_changed']:.1%} | {it['homes_later']:.3f}"
        best = best if chunks <= CHUNKS else "– | – | – | –"
        print(f"| {members:,} | {chunks:,} | {section} | {it['keys'] / members:,.0f} | {chance} | {best} |", flush=True)


if __name__ == "__main__":
    main()
