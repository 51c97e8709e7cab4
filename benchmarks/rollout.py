"""A trainer of two ranks and two followers, each a process of its own: 50 steps of which each changes 1 % of the elements.

The ranks save their halves of every tensor as deltas to the step before, and rank 0 publishes. The followers watch, read each
new version beside the one in use, and swap. The peer of a swap is a process that loads a version whole and waits for that.
"""

from __future__ import annotations

import datetime
import shutil
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from benchmarks.load import store
from benchmarks.measure import Row, Setting, Timer, fresh
from benchmarks.peers import files
from benchmarks.steps import mb, ms_, prepare_deltas, read_so_far, step

if TYPE_CHECKING:
    from modelstore.store.watch import Watch

STEPS = 50
RANKS = 2
FOLLOWERS = 2
SHARE = 0.01
POLL = 0.05  # seconds between two looks of a follower
PATIENCE = 120.0  # seconds after which a process gives the others up


def trainer(url: str, model: str, rank: int, meeting: str, steps: int = STEPS) -> dict[str, Any]:
    """One rank: it changes its half of every matrix, saves that, and rank 0 publishes; seconds of each step."""
    import torch.distributed as dist

    import modelstore as ms

    prepare_deltas()
    opened = ms.open(url)
    held = {name: tensor for path in files(model) for name, tensor in load_file(path).items()}
    parts = {name: part(tensor, rank) for name, tensor in held.items() if rank == 0 or len(tensor) >= RANKS}
    del held
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=limit)
    saves, publications = [], []
    with Timer() as timer:
        for number in range(2, steps + 2):
            parts = {name: changed(one, number * RANKS + rank) for name, one in parts.items()}
            dist.barrier()
            began = time.perf_counter()
            opened.save_part(
                *("bench", parts),
                **{"session": f"step-{number}", "rank": rank, "ranks": RANKS},  # type: ignore[arg-type]
                codec="delta",
                parent=f"bench@{number - 1}",
            )
            saves.append(time.perf_counter() - began)
            dist.barrier()
            if rank == 0:
                began = time.perf_counter()
                opened.publish("bench", f"step-{number}", ranks=RANKS)
                publications.append(time.perf_counter() - began)
    return {**timer.found, "saves": saves, "publications": publications}


def part(tensor: torch.Tensor, rank: int) -> Any:
    """A rank's rows of a tensor; one with fewer rows than ranks is rank 0's."""
    import modelstore as ms

    if tensor.dim() == 0 or len(tensor) < RANKS:
        return tensor
    border = len(tensor) // RANKS
    rows = slice(rank * border, len(tensor) if rank == RANKS - 1 else (rank + 1) * border)
    offset = (rows.start, *[0] * (tensor.dim() - 1))
    return ms.Slice(tensor[rows].clone(), offset=offset, shape=tuple(tensor.shape))


def changed(held: Any, seed: int) -> Any:
    """A rank's values after a step."""
    import modelstore as ms

    if isinstance(held, ms.Slice):
        return ms.Slice(changed(held.tensor, seed), offset=held.offset, shape=held.shape)
    return step(held, SHARE, seed) if held.dtype in (torch.bfloat16, torch.float16) else held


def follower(url: str, last: int) -> dict[str, Any]:
    """Takes each version as it appears; of each the bytes, the seconds to read it, and those in which nobody could read."""
    import modelstore as ms

    prepare_deltas()
    opened = ms.open(url)
    live = opened.follow("bench@1")
    reads, prepared, pauses, versions = [], [], [], []
    with Timer() as timer, opened.watch("bench", poll=POLL, since=1) as watch:
        given_up = patience(watch)
        for found in watch:
            given_up.cancel()
            before = read_so_far()
            prepared.append(live.prepare(found.version).seconds)
            reads.append(read_so_far() - before)
            began = time.perf_counter()
            live.swap_to(found.version)
            pauses.append(time.perf_counter() - began)
            versions.append(found.version)
            if found.version == last:
                break
            given_up = patience(watch)
    if versions[-1:] != [last]:
        raise RuntimeError(f"no version came after {versions[-1:] or 1} for {PATIENCE:.0f} s")
    same = all(torch.equal(bits(live.tensors[name]), bits(t)) for name, t in opened.load(f"bench@{last}").items())
    return {**timer.found, "read": reads, "prepared": prepared, "pauses": pauses, "versions": versions, "same": same}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: a zero that a step moves down is a NaN, which equals nothing."""
    return tensor.reshape(-1).view(torch.uint8)


def patience(watch: Watch) -> threading.Timer:
    """Ends a watch when no version comes any more: a trainer that failed would otherwise be waited for without end."""
    timer = threading.Timer(PATIENCE, watch.close)
    timer.daemon = True
    timer.start()
    return timer


def processes(url: str, model: str, folder: Path, steps: int = STEPS) -> dict[str, list[dict[str, Any]]]:
    """All of them at once; if one fails, its error is raised when the others have ended."""
    meeting = folder / f"meeting-{time.time_ns()}"
    ranks = [
        partial(fresh, "benchmarks.rollout:trainer", url=url, model=model, rank=rank, meeting=str(meeting), steps=steps)
        for rank in range(RANKS)
    ]
    followers = [partial(fresh, "benchmarks.rollout:follower", url=url, last=steps + 1)] * FOLLOWERS
    with ThreadPoolExecutor(RANKS + FOLLOWERS) as pool:
        running = [pool.submit(case) for case in (*ranks, *followers)]
    found = [one.result() for one in running]
    return {"trainers": found[:RANKS], "followers": found[RANKS:]}


def rows(setting: Setting) -> list[Row]:
    """Bytes of a step and the pause of a swap, against full reloads."""
    url = str(setting.folder / "store-rollout")
    shutil.rmtree(url, ignore_errors=True)
    try:
        shutil.copytree(store(setting, "lossless"), url)
        with setting.alone():
            runs = processes(url, str(setting.model), setting.folder)
            whole = [fresh("benchmarks.steps:reload", url=url) for _ in range(setting.repeat)]
    finally:
        shutil.rmtree(url, ignore_errors=True)
    return compared(runs, whole)


def compared(runs: dict[str, list[dict[str, Any]]], whole: list[dict[str, Any]]) -> list[Row]:
    """The rows of the table."""
    followers = runs["followers"]
    full, took = whole[0]["read"], statistics.median(run["seconds"] for run in whole)
    read = max(sum(one["read"]) for one in followers) / STEPS
    pauses = [pause for one in followers for pause in one["pauses"]]
    usual = statistics.median(seconds for one in followers for seconds in one["prepared"])
    swaps = " and ".join(str(len(one["versions"])) for one in followers)
    right = all(one["same"] for one in followers)
    work = f"a trainer of {RANKS} ranks and {FOLLOWERS} followers, {STEPS} steps, 1 % of the elements changed"
    said = f"{swaps} swaps; the last version is as loaded: {'yes' if right else 'NO'}"
    trainer = runs["trainers"][0]
    cost = f"save_part {ms_(statistics.median(trainer['saves']))}, publish {ms_(statistics.median(trainer['publications']))}"
    return [
        Row(f"{work}: bytes read a step", "full load", mb(read), mb(full), read / full, "≤ 0.01×",
            right and read <= 0.01 * full, said, {**runs, "whole": whole}),
        Row(f"{work}: pause, slowest", "full load", ms_(max(pauses)), ms_(took), max(pauses) / took, "≤ 0.1×",
            max(pauses) <= 0.1 * took, f"beside it, a follower reads a step in {ms_(usual)}; {cost}"),
    ]  # fmt: skip
