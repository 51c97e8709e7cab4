"""Versions as reinforcement learning makes them: 1 % of the elements moved by one unit, in every chunk, followed one by one."""

from __future__ import annotations

import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file

from benchmarks.load import prepare, store
from benchmarks.measure import Row, Setting, Timer, fresh, prime, seconds, turns
from benchmarks.peers import files

VERSIONS = 8
SHARES = (0.001, 0.01, 0.03)
CHUNK = 4 << 20  # words of the chunk that the codec is measured on
TIMES = 7


def step(values: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """16-bit values, a share of them moved by one unit up or down."""
    rng = np.random.default_rng(seed)
    lanes = values.contiguous().view(torch.int16).numpy().copy()
    changed = rng.random(lanes.shape, np.float32) < share
    lanes[changed] += rng.choice(np.array([-1, 1], np.int16), int(changed.sum()))
    return torch.from_numpy(lanes).view(values.dtype)


def read_so_far() -> int:
    """Bytes that this process has read, from wherever."""
    return int(
        next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1]
    )


def prepare_deltas() -> None:
    """As `prepare`, with the kernel that applies deltas."""
    import modelstore as ms

    prepare()
    store, values = ms.open("memory://deltas"), torch.randn(1 << 20).to(torch.bfloat16)
    store.save("bench", {"w": values})
    store.save("bench", {"w": step(values, 0.01, 1)}, codec="delta", parent="bench@1")
    store.load("bench")


def follow(url: str) -> dict[str, Any]:
    """All versions, one after the other: of each the bytes read, said to be read, and the seconds; and those of the swaps."""
    import modelstore as ms

    prepare_deltas()
    live = ms.open(url).follow("bench@1")
    steps, swaps = [], []
    for version in range(2, VERSIONS + 1):
        prime(sum(tensor.nbytes for tensor in live.tensors.values()), url)
        before = read_so_far()
        with Timer() as timer:
            done = live.prepare(version)
        steps.append({"read": read_so_far() - before, "said": done.bytes, "seconds": timer.seconds, **timer.found})
        began = time.perf_counter()
        live.swap_to(version)
        swaps.append(time.perf_counter() - began)
    last = steps[-1]
    return {**last, "steps": steps, "swaps": swaps, "seconds": statistics.median(s["seconds"] for s in steps)}


def late(url: str) -> dict[str, Any]:
    """A follower of the first version goes to the last one at once."""
    import modelstore as ms

    prepare_deltas()
    live = ms.open(url).follow("bench@1")
    before = read_so_far()
    with Timer() as timer:
        live.swap_to(VERSIONS)
    return {**timer.found, "read": read_so_far() - before}


def reload(url: str) -> dict[str, Any]:
    """`load` of the first version, which is stored in full, while another copy of it is held."""
    import modelstore as ms

    prepare()
    opened = ms.open(url)
    held = opened.load("bench@1")
    prime(sum(tensor.nbytes for tensor in held.values()), url)
    before = read_so_far()
    with Timer() as timer:
        opened.load("bench@1")
    return {**timer.found, "read": read_so_far() - before}


def rows(setting: Setting) -> list[Row]:
    """Bytes and time of each step against a full load; the codec against entropy and memory."""
    url = str(setting.folder / "store-steps")
    shutil.rmtree(url, ignore_errors=True)
    try:
        stored = versions(setting, url)
        runs = turns(
            setting,
            {name: partial(fresh, f"benchmarks.steps:{name}", url=url) for name in ("follow", "late", "reload")},
        )
    finally:
        shutil.rmtree(url, ignore_errors=True)
    return [*followed(runs, stored), *codec()]


def versions(setting: Setting, url: str) -> list[int]:
    """Save them, each against the one before; stored bytes of each."""
    import modelstore as ms

    shutil.copytree(store(setting, "lossless"), url)
    opened = ms.open(url)
    tensors = {name: tensor for path in files(str(setting.model)) for name, tensor in load_file(path).items()}
    stored = [opened.describe("bench@1").stored]
    for version in range(2, VERSIONS + 1):
        tensors = {name: step(t, 0.01, version) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
        stored.append(opened.save("bench", tensors, codec="delta", parent=f"bench@{version - 1}").stored)
    return stored


def followed(runs: dict[str, list[dict[str, Any]]], stored: list[int]) -> list[Row]:
    """The rows of following."""
    first = runs["follow"][0]["steps"]
    full = runs["reload"][0]["read"]
    most, least = max(s["read"] for s in first), min(s["read"] for s in first)
    said = max(abs(s["said"] / s["read"] - 1) for s in first)
    took, whole = seconds(runs["follow"]), seconds(runs["reload"])
    swap = max(max(run["swaps"]) for run in runs["follow"])
    behind, deltas = runs["late"][0]["read"], sum(stored[1:])
    work = f"{VERSIONS} versions, 1 % of the elements changed, one by one"
    return [
        Row(f"{work}: bytes read a step", "full load", mb(most), mb(full), most / full, "≤ 0.02×", most <= 0.02 * full,
            f"{least / most:.3f} of that where least; said to be read: within {said:.1%}", runs),
        Row(f"{work}: time a step", "full load", ms_(took), ms_(whole), took / whole, "≤ 0.6×", took <= 0.6 * whole),
        Row(f"{work}: the swap itself, slowest", "—", ms_(swap), "—", None, "≤ 5 ms", swap <= 0.005),
        Row(f"a follower {VERSIONS - 1} versions behind: bytes read", "sum of the deltas", mb(behind), mb(deltas),
            behind / deltas, "≤ 1.1×", behind <= 1.1 * deltas),
    ]  # fmt: skip


def codec() -> list[Row]:
    """Size and speed of `delta` on one chunk, by the time of the thread."""
    from modelstore.codecs.exact.delta import Delta
    from modelstore.format.dtypes import DTYPES

    coder, kind = Delta(), DTYPES["bfloat16"]
    base = (torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    under = base.view(torch.uint8).numpy()
    made = []
    for share in SHARES:
        values = step(base, share, 1).view(torch.uint8).numpy()
        (plane,) = coder.encode(values, (CHUNK,), kind, under)
        size = memoryview(plane).nbytes
        bits = share - share * np.log2(share) - (1 - share) * np.log2(1 - share)
        entropy = bits * CHUNK / 8
        others = len(zstandard.ZstdCompressor(level=1).compress((values ^ under).tobytes()))
        what = f"delta, {share:.1%} of a bf16 chunk moved by one: stored"
        made += [
            Row(what, "entropy", kb(size), kb(entropy), size / entropy, "≤ 1.10×", bool(size <= 1.10 * entropy)),
            Row(what, "XOR + zstd-1", kb(size), kb(others), size / others, "≤ 0.5×", size <= 0.5 * others),
        ]
        if share == 0.01:
            made.append(applied(partial(coder.decode, (plane,), (CHUNK,), kind), under))
    return made


def applied(decode: Any, under: np.ndarray[Any, np.dtype[np.uint8]]) -> Row:
    """A delta applied to a copy of its base, against the copy alone."""
    out = np.empty((1, under.size), np.uint8)

    def timed(work: Any) -> float:
        took = []
        for _ in range(TIMES):
            began = time.thread_time()
            work()
            took.append(time.thread_time() - began)
        return statistics.median(took)

    ours = timed(lambda: decode(out, under))
    copy = timed(lambda: np.copyto(out, under.reshape(out.shape)))
    return Row(
        "delta, 1 % of a bf16 chunk: applied by a core, without digests",
        "copy",
        f"{under.size / ours / 1e9:.1f} GB/s",
        f"{under.size / copy / 1e9:.1f} GB/s",
        copy / ours,
        "≥ 3 GB/s",
        under.size / ours >= 3e9,
    )


def mb(count: float) -> str:
    """Megabytes, for the table."""
    return f"{count / 1e6:.2f} MB"


def kb(count: float) -> str:
    """Kilobytes, for the table."""
    return f"{count / 1e3:.1f} kB"


def ms_(took: float) -> str:
    """Milliseconds, for the table."""
    return f"{took * 1e3:.1f} ms"
