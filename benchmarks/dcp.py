"""A sharded state through `torch.distributed.checkpoint`: saved by four ranks, loaded by two and three, against torch's files.

Every rank is a process on this machine, over gloo. A rank's time runs from one barrier to the next. The state is made of bf16
matrices, sharded by rows as FSDP2 does it; both sides read what the system has in its cache.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Row, Setting
from benchmarks.versions import emptied

SAVERS, LOADERS = 4, (2, 3)
CODECS = ("packed", "raw")
MATRIX = (4096, 4096)
SPAWN = multiprocessing.get_context("spawn")


def rows(setting: Setting) -> list[Row]:
    """The save, and a load into each number of ranks, for every codec."""
    size = sum(path.stat().st_size for path in setting.model.glob("*.safetensors"))
    count = max(1, size // (MATRIX[0] * MATRIX[1] * 2))
    with emptied(setting.folder / "dcp") as folder:
        folder.mkdir(parents=True)
        runs = {
            what: [_together(_save, SAVERS, folder, what, count, run)[0] for run in range(setting.repeat)]
            for what in ("torch", *CODECS)
        }
        made = [
            _row(f"DCP save by {SAVERS} ranks, {codec}", count, runs[codec], runs["torch"], 1, "") for codec in CODECS
        ]
        for ranks in LOADERS:
            loads = {
                what: [_together(_load, ranks, folder, what, count, run) for run in range(setting.repeat)]
                for what in ("torch", *CODECS)
            }
            peer = [seconds for seconds, _ in loads["torch"]]
            for codec in CODECS:
                seconds, needed = [one for one, _ in loads[codec]], loads[codec][0][1]
                note = f"{needed:.3f} of the stored bytes read"
                made.append(_row(f"DCP load into {ranks} ranks, {codec}", count, seconds, peer, 2, note))
    return made


def _row(work: str, count: int, ours: list[float], peer: list[float], goal: float, note: str) -> Row:
    size, mine, theirs = count * MATRIX[0] * MATRIX[1] * 2, median(ours), median(peer)
    ratio = theirs / mine
    speeds = f"{size / mine / 1e9:.2f} GB/s", f"{size / theirs / 1e9:.2f} GB/s"
    return Row(work, "torch FileSystemWriter, FileSystemReader", *speeds, ratio, f"≥ {goal}×", ratio >= goal, note)


def _together(target: Callable[..., None], ranks: int, folder: Path, what: str, count: int, run: int) -> Any:
    """Run a function in so many processes; what the first one found."""
    (folder / "found").unlink(missing_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    started = [SPAWN.Process(target=target, args=(folder, what, count, run, meeting, r, ranks)) for r in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"{target.__name__} of {what} by {ranks} ranks failed")
    return json.loads((folder / "found").read_text())


def _state(count: int, meeting: Path, rank: int, ranks: int, *, filled: bool) -> dict[str, Any]:
    """Join the others; this rank's part of the state."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    random = torch.Generator().manual_seed(rank)
    made = {}
    whole = MATRIX[0]
    n = -(-whole // ranks)
    for number in range(count):
        shape = min(n, whole - rank * n), MATRIX[1]
        local = torch.randn(shape, generator=random) * 0.02 if filled else torch.zeros(shape)
        made[f"layers.{number}.weight"] = DTensor.from_local(
            local.bfloat16(), mesh, [Shard(0)], run_check=False, shape=torch.Size(MATRIX), stride=(MATRIX[1], 1)
        )
    return made


def _timed(act: Callable[[], object]) -> float:
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - begun


def _save(folder: Path, what: str, count: int, run: int, meeting: Path, rank: int, ranks: int) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import modelstore as ms

    state = _state(count, meeting, rank, ranks, filled=True)
    if what == "torch":
        writer: Any = dcp.FileSystemWriter(folder / f"torch-{run}")
    else:
        writer = ms.dcp.Writer(ms.open(folder / f"{what}-{run}", memory="256MiB", threads=1), "run", codec=what)  # type: ignore[arg-type]
        ms.open(folder / f"warm-{rank}-{run}-{what}").save("m", {"w": state["layers.0.weight"].to_local()}, codec=what)
    seconds = _timed(lambda: dcp.save(state, storage_writer=writer))
    if rank == 0:
        (folder / "found").write_text(json.dumps([seconds]))
    dist.destroy_process_group()


def _load(folder: Path, what: str, count: int, run: int, meeting: Path, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import modelstore as ms
    from modelstore.client import Store
    from modelstore.storage.local import LocalStorage
    from modelstore.testing.faults import CountingStorage

    state = _state(count, meeting, rank, ranks, filled=False)
    counted = CountingStorage(LocalStorage(str(folder / f"{what}-{run}")))
    if what == "torch":
        reader: Any = dcp.FileSystemReader(folder / f"torch-{run}")
    else:
        reader = ms.dcp.Reader(Store(counted, memory="256MiB", threads=1), "run")
        name = next(iter(state))
        store = ms.open(folder / f"{what}-{run}")  # kernels are loaded before
        store["run"].fill([(name, ((0, 1), (0, MATRIX[1])), torch.empty(1, MATRIX[1], dtype=torch.bfloat16))])
    seconds = _timed(lambda: dcp.load(state, storage_reader=reader))
    read = torch.tensor(float(counted.bytes["read"]))
    dist.all_reduce(read)
    if rank == 0:
        stored = 0 if what == "torch" else ms.open(folder / f"{what}-{run}")["run"].describe().stored
        (folder / "found").write_text(json.dumps([seconds, float(read) / stored if stored else 0.0]))
    dist.destroy_process_group()
