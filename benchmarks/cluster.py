"""A store through a Ray cluster on this machine: maps, cold reads by several, bytes between nodes, jobs on workers."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.measure import Row, Setting, fresh
from benchmarks.quantize import source

MEMORY = 6 << 30  # bytes of shared memory a node may take for chunks, and for decoded models
PIECE = 32 << 20  # bytes at which Ray moves objects between nodes best


@contextmanager
def nodes(cpus: list[int], replicas: int = 1) -> Iterator[None]:
    """Ray nodes with a host each, on this machine; this process is connected to the first."""
    from modelstore.cluster.control import runtime
    from modelstore.cluster.control.nodes import NODE

    os.environ.update({"RAY_AUTH_MODE": "disabled", **NODE})
    import ray
    from ray.cluster_utils import Cluster

    first = {"num_cpus": cpus[0], "object_store_memory": 1 << 30, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    for count in cpus[1:]:
        cluster.add_node(num_cpus=count, object_store_memory=1 << 30)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
    try:
        runtime.deploy(runtime.default_settings(memory=MEMORY, images=MEMORY, replicas=replicas), hosts=len(cpus))
        yield
    finally:
        runtime.undeploy()
        ray.shutdown()
        cluster.shutdown()


def _median(act: Callable[[], Any], repeat: int) -> float:
    took = []
    for _ in range(repeat):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _touch(tensors: dict[str, Any]) -> None:
    """Read every byte, at the speed of memory."""
    import numpy as np
    import torch

    for tensor in tensors.values():
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        np.bitwise_xor.reduce(data[: data.size // 8 * 8].view(np.uint64))


def mapped(model: str, url: str, repeat: int) -> dict[str, float]:
    """Seconds to open a decoded model that the node holds, and to open it and read every byte; the same of the checkpoint."""
    from safetensors.torch import load_file

    import modelstore as ms
    from benchmarks.peers import files
    from modelstore.execute.memory import FAULT_AHEAD

    def theirs() -> dict[str, Any]:
        return {name: tensor for path in files(model) for name, tensor in load_file(path).items()}

    def opening() -> float:
        began = time.perf_counter()
        held = store.load("bench", mmap=True)
        took = time.perf_counter() - began
        for thread in threading.enumerate():
            if thread.name == FAULT_AHEAD:
                thread.join()
        assert held
        return took

    with nodes([1]):
        store = ms.open(url, cluster="auto")
        _touch(store.load("bench", mmap=True))
        _touch(theirs())
        found = {
            "open": statistics.median(opening() for _ in range(repeat)),
            "ours": _median(lambda: _touch(store.load("bench", mmap=True)), repeat),
            "theirs_open": _median(theirs, repeat),
            "theirs": _median(lambda: _touch(theirs()), repeat),
        }
        return found | {"bytes": float(sum(t.nbytes for t in theirs().values()))}


def cold(url: str) -> dict[str, float]:
    """Bytes that leave the storage when four readers load a model at once on three nodes, beside what is stored."""
    import modelstore as ms

    with nodes([1, 1, 1]):
        stores = [ms.open(url, cluster="auto") for _ in range(4)]
        threads = [threading.Thread(target=lambda s=store: [None for _ in s.stream("bench")]) for store in stores]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        hosts = stores[0].cluster_status().hosts
        by_hosts = sum(host.stats["from_storage"] for host in hosts if host.stats)
        by_readers = sum(s.cluster.session.counts.bytes.get("storage", 0) for s in stores if s.cluster)
        return {"fetched": by_hosts + by_readers, "stored": stores[0].describe("bench").stored, "seconds": took}


def between(url: str, repeat: int) -> dict[str, float]:
    """Seconds in which the bytes of a model go from another node's host to a reader; and by Ray's own objects."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import modelstore as ms
    from modelstore.cluster.host.protocol import Host
    from modelstore.cluster.pieces import pieces

    with nodes([1, 1]):
        store = ms.open(url, cluster="auto")
        assert store.cluster is not None
        session, source = store.cluster.session, store.cluster.source
        here = ray.get_runtime_context().get_node_id()
        store.prefetch("bench")
        manifest = store["bench"].opened().manifest
        other = next(m for m in session.view().members if m.node != here)
        parts = list({p.digest: p for p in pieces(manifest, range(len(manifest.pack)))}.values())
        held = session.peers.ask(other.id, Host.read, source, parts, fetch=False).result()
        away = [part for part, data in zip(parts, held, strict=True) if data is not None][:400]
        del held
        nbytes = sum(part.length for part in away)

        @ray.remote(num_cpus=1)
        class Holder:
            def __init__(self, nbytes: int) -> None:
                self._data = np.ones(nbytes, np.uint8)

            def read(self, at: int) -> Any:
                return self._data[at : at + PIECE]

        there = NodeAffinitySchedulingStrategy(other.node, soft=False)
        holder = Holder.options(scheduling_strategy=there).remote(nbytes)  # type: ignore[attr-defined]
        ray.get(holder.read.remote(0))

        def ours() -> None:
            for at in range(0, len(away), 12):
                assert session.read(source, away[at : at + 12])

        def theirs() -> None:
            for at in range(0, nbytes, PIECE):
                ray.get(holder.read.remote(at))

        ours()
        return {"bytes": nbytes, "ours": _median(ours, repeat), "theirs": _median(theirs, repeat)}


def delivered(url: str, repeat: int) -> dict[str, float]:
    """Seconds in which two actors of one node get a model that its host holds: delivered, or each loading it."""
    import ray

    import modelstore as ms

    class Worker:
        def __init__(self) -> None:
            self.weights: dict[str, Any] = {}

        def take(self, tensors: dict[str, Any]) -> None:
            self.weights.update(tensors)

        def load(self) -> None:
            self.weights = {}
            self.weights = ms.open(url, cluster="auto").load("bench")

        def forget(self) -> int:
            count = len(self.weights)
            self.weights = {}
            return count

    with nodes([2]):
        store = ms.open(url, cluster="auto")
        store.prefetch("bench")
        about = store.describe("bench")
        tensors = len(about.tensors) + len(about.aliases)
        workers = [ray.remote(num_cpus=0, enable_tensor_transport=True)(Worker).remote() for _ in range(2)]

        def timed(act: Callable[[], Any]) -> float:
            began = time.perf_counter()
            act()
            took = time.perf_counter() - began
            assert ray.get([worker.forget.remote() for worker in workers]) == [tensors] * 2
            return took

        ways: dict[str, Callable[[], Any]] = {
            "object_store": lambda: store.deliver("bench", workers, "take", transport="object_store"),
            "gloo": lambda: store.deliver("bench", workers, "take", transport="gloo"),
            "load": lambda: ray.get([worker.load.remote() for worker in workers]),
        }
        took = {name: [timed(act) for _ in range(1 + repeat)][1:] for name, act in ways.items()}
        return {name: statistics.median(seconds) for name, seconds in took.items()} | {"bytes": 2.0 * about.bytes}


def job(url: str, folder: str, workers: int, threads: int | None = None) -> dict[str, float]:
    """Seconds of an int8 job on so many workers (0: so many threads of this process) that have worked before."""
    import modelstore as ms

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(url, folder, copy_function=os.link)

    def timed(cluster: str | None) -> float:
        store = ms.open(folder, cluster=cluster, memory="1GiB", threads=threads)
        store.compress("bench", "int4-rtn", variant="first")
        os.sync()
        return store.compress("bench", "int8").seconds

    try:
        if not workers:
            return {"seconds": timed(None)}
        with nodes([1] * workers):
            return {"seconds": timed("auto")}
    finally:
        shutil.rmtree(folder)


def rows(setting: Setting) -> list[Row]:
    """Maps, cold reads, bytes between nodes, jobs."""
    model, store = source(setting, setting.gb)
    url, scratch = str(store), str(setting.folder / "scratch")
    gigabyte = 1e9
    made = []
    found = fresh("benchmarks.cluster:mapped", model=str(model), url=url, repeat=setting.repeat)
    ratio, size = found["theirs"] / found["ours"], found["bytes"] / gigabyte
    cells = (f"{size / found[side]:.2f} GB/s" for side in ("ours", "theirs"))
    work = f"{size:.2g} GB held by the node, mapped, every byte read"
    made.append(Row(work, "safetensors load_file", *cells, ratio, "≥ 0.9×", ratio >= 0.9, detail=found))
    ms_, peer = 1e3 * found["open"], f"{1e3 * found['theirs_open']:.1f} ms"
    made.append(Row("the same, opening alone", "—", f"{ms_:.1f} ms", peer, ms_ / 5, "≤ 5 ms", ms_ <= 5))
    found = fresh("benchmarks.cluster:cold", url=url)
    ratio = found["fetched"] / found["stored"]
    cells = (f"{found[key] / 1e6:.1f} MB" for key in ("fetched", "stored"))
    work = "4 readers on 3 nodes, cold: bytes read from the storage"
    made.append(Row(work, "bytes of the model as stored", *cells, ratio, "≤ 1.02×", ratio <= 1.02, detail=found))
    found = fresh("benchmarks.cluster:between", url=url, repeat=setting.repeat)
    ratio = found["theirs"] / found["ours"]
    cells = (f"{found['bytes'] / found[side] / gigabyte:.2f} GB/s" for side in ("ours", "theirs"))
    made.append(
        Row("bytes from another node's host", "ray.get of the same", *cells, ratio, "≥ 1×", ratio >= 1, detail=found)
    )
    found = fresh("benchmarks.cluster:delivered", url=url, repeat=setting.repeat)
    rate = {name: f"{found['bytes'] / found[name] / gigabyte:.2f} GB/s" for name in ("object_store", "gloo", "load")}
    for way in ("object_store", "gloo"):
        work = f"delivered to 2 actors of one node, {way}"
        made.append(
            Row(work, "each loads it", rate[way], rate["load"], found["load"] / found[way], "—", None, detail=found)
        )
    return made + _jobs(setting, url, scratch)


def _jobs(setting: Setting, url: str, scratch: str) -> list[Row]:
    """int8 on workers, and on threads of one process, which is what two cores and one disk give without a cluster."""
    contenders = {"1 worker": (1, None), "2 workers": (2, None), "1 thread": (0, 1), "2 threads": (0, 2)}
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(setting.repeat):
        for name, (workers, threads) in contenders.items():
            found = fresh("benchmarks.cluster:job", url=url, folder=scratch, workers=workers, threads=threads)
            took[name].append(found["seconds"])
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    rows = []
    for ours, peer, goal, least in (
        ("2 workers", "1 worker", "≥ 1.7×", 1.7),
        ("2 threads", "1 thread", "—", None),
        ("2 workers", "2 threads", "≥ 0.87×", 0.87),
    ):
        ratio = median[peer] / median[ours]
        met = ratio >= least if least is not None else None
        cells = (f"{median[ours]:.2f} s", f"{median[peer]:.2f} s")
        rows.append(Row(f"int8 job, {ours}", peer, *cells, ratio, goal, met, detail=took))
    return rows
