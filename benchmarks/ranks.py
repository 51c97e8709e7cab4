"""Tensor-parallel ranks that load their shares from S3 for the first time: through a cluster, and each the whole file.

Every rank is a process, ready and waiting when the clock starts; it stops when the last one has its tensors.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from benchmarks import bucket as buckets
from benchmarks.measure import Row, Setting, busy, fresh, rate, seconds, skipped, turns

if TYPE_CHECKING:
    import torch

RANKS = 8
WORK = f"{RANKS} tensor-parallel ranks, cold from S3"
PEERS = {
    "s3fs": f"{RANKS} × s3fs cat_file of every safetensors file, and cut",
    "ranges": f"{RANKS} × parallel ranged reads of every safetensors file, and cut",
}
GOAL = 4.0
COLUMNS = ("o_proj", "down_proj")  # cut along their inputs; every other matrix along its outputs
THREADS = 4  # of each peer that reads ranges
_PIPE = 1 << 18


class Proxy:
    """Counts what a server sends, on a port of its own in front of it. Used in runs that are not timed."""

    def __init__(self, url: str) -> None:
        server = urlparse(url)
        self._server = (server.hostname or "", server.port or 80)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.sent = 0  # bytes from the server, headers included
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._server) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(_PIPE)
                    if not data:
                        return
                    (server if source is client else client).sendall(data)
                    if source is server:
                        with self._lock:
                            self.sent += len(data)


def clustered(rank: int, url: str, address: str) -> Callable[[], dict[str, torch.Tensor]]:
    """A rank whose store is opened with a cluster."""
    import ray

    import modelstore as ms
    from benchmarks.load import prepare

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="modelstore")
    prepare()
    store = ms.open(url, cluster="auto")
    return lambda: store.load("bench", shard=ms.TensorParallel(rank=rank, size=RANKS))


def s3fs(rank: int, bucket: str, sizes: dict[str, int]) -> Callable[[], dict[str, torch.Tensor]]:
    """A rank that downloads the files whole, one after another, and keeps its share of each."""
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.info(f"{bucket}/raw/{next(iter(sizes))}")

    def load() -> dict[str, torch.Tensor]:
        return {
            name: tensor for file in sizes for name, tensor in cut(fs.cat_file(f"{bucket}/raw/{file}"), rank).items()
        }

    return load


def ranges(rank: int, bucket: str, sizes: dict[str, int]) -> Callable[[], dict[str, torch.Tensor]]:
    """The same by the quickest plain reader: ranges of 8 MiB in parallel, into memory that is there."""
    import obstore

    store = buckets.obstore_store(bucket)
    out = bytearray(max(sizes.values()))

    def load() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file, size in sizes.items():

            def read(start: int, key: str = f"raw/{file}", size: int = size) -> None:
                stop = min(start + buckets.RANGE, size)
                out[start:stop] = memoryview(obstore.get_range(store, key, start=start, end=stop))

            buckets.in_parallel(read, [(start,) for start in range(0, size, buckets.RANGE)], THREADS)
            found |= cut(memoryview(out)[:size], rank)
        return found

    return load


def cut(data: bytes | memoryview, rank: int) -> dict[str, torch.Tensor]:
    """A rank's share, in memory of its own, of every tensor of a Llama's safetensors file."""
    import json

    import torch

    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        (first, last), shape = entry["data_offsets"], entry["shape"]
        whole = torch.frombuffer(data, dtype=torch.bfloat16, offset=start + first, count=(last - first) // 2)
        whole = whole.view(shape)
        if len(shape) == 2:
            axis = int(name.split(".")[-2] in COLUMNS)
            part = shape[axis] // RANKS
            whole = whole.narrow(axis, rank * part, part)
        found[name] = whole.clone(memory_format=torch.contiguous_format)
    return found


def _rank(who: str, rank: int, arguments: dict[str, Any], barrier: Any, answer: Any, check: bool) -> None:
    """One rank's process."""
    import warnings

    import torch
    from blake3 import blake3

    warnings.simplefilter("ignore")  # torch's, of buffers that cannot be written
    torch.set_num_threads(1)
    load: Callable[[], dict[str, torch.Tensor]] = globals()[who](rank, **arguments)
    barrier.wait()
    tensors = load()
    ended = time.monotonic()
    hasher = blake3()
    for name in sorted(tensors) if check else ():
        hasher.update(name.encode())
        hasher.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    answer.put((rank, ended, sum(tensor.nbytes for tensor in tensors.values()), hasher.hexdigest()))
    answer.close()
    answer.join_thread()
    barrier.wait()  # a rank that leaves the cluster is none that others wait for
    os._exit(0)


def group(who: str, check: bool = False, **arguments: Any) -> dict[str, Any]:
    """All ranks at once, from the moment when all are ready; `check`: what each has got, as a digest."""
    context = multiprocessing.get_context("spawn")
    barrier, answer = context.Barrier(RANKS + 1), context.Queue()
    ranks = [
        context.Process(target=_rank, args=(who, rank, arguments, barrier, answer, check)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        barrier.wait(timeout=300)
        began, worked = time.monotonic(), busy()
        found = sorted(answer.get(timeout=600) for _ in ranks)
        worked = busy() - worked
        barrier.wait(timeout=60)
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    ended = sorted(end - began for _, end, _, _ in found)
    return {
        "seconds": ended[-1],
        "first": ended[0],
        "core_seconds": worked,  # of everything on this machine
        "others": 0.0,
        "nbytes": sum(nbytes for _, _, nbytes, _ in found),
        "digests": [digest for *_, digest in found] if check else None,
    }


def through_cluster(url: str, check: bool = False) -> dict[str, Any]:
    """The ranks on one node whose host holds nothing."""
    import ray

    import modelstore as ms
    from benchmarks.cluster import nodes

    with nodes([2]):
        address = ray.get_runtime_context().gcs_address
        found = group("clustered", check, url=url, address=address)
        store = ms.open(url, cluster="auto")
        hosts = [host.stats for host in store.cluster_status().hosts if host.stats]
        reads = {key: sum(stats[key] for stats in hosts) for key in ("from_storage", "requests")}
        return {**found, **reads, "stored": store.describe("bench").stored}


@contextlib.contextmanager
def counted() -> Iterator[tuple[dict[str, str], Callable[[], int]]]:
    """What to set so that processes speak to the server through a proxy, and bytes that it has sent since."""
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    try:
        yield {"AWS_ENDPOINT_URL": proxy.url}, lambda: proxy.sent
    finally:
        proxy.close()


def rows(setting: Setting) -> list[Row]:
    """The time against both peers, and what leaves the server."""
    try:
        with buckets.made(setting.sweep) as bucket:
            return _rows(setting, bucket)
    except buckets.UnavailableError as why:
        return [skipped(WORK, words, f"≥ {GOAL:g}×", str(why)) for words in PEERS.values()]


def _rows(setting: Setting, bucket: str) -> list[Row]:
    import modelstore as ms

    model = sorted(setting.model.glob("*.safetensors"))
    sizes = {path.name: path.stat().st_size for path in model}
    buckets.upload(bucket, Path(setting.model), "raw")
    url = f"s3://{bucket}/store"
    ms.open(url).save("bench", setting.model)
    cases = {"ours": partial(fresh, "benchmarks.ranks:through_cluster", url=url)}
    for peer in PEERS:
        cases[peer] = partial(fresh, "benchmarks.ranks:group", who=peer, bucket=bucket, sizes=sizes)
    sent, digests, runs = {}, {}, {}
    for name, case in cases.items():
        with counted() as (environment, bytes_sent):
            runs[name] = case(environment=environment, check=True)
            sent[name], digests[name] = bytes_sent(), runs[name]["digests"]
        print(f"    {name}: {sent[name]:,} bytes from the server", file=sys.stderr, flush=True)
    if any(found != digests["ours"] for found in digests.values()):
        raise RuntimeError(f"the ranks disagree about the bytes: {digests}")
    found = turns(setting, cases, alone=False)
    took = {name: seconds(each) for name, each in found.items()}
    made = []
    for peer, words in PEERS.items():
        ratio = took[peer] / took["ours"]
        ours, theirs = (f"{took[name]:.2f} s" for name in ("ours", peer))
        note = f"{rate(setting.nbytes, took['ours'])} of the model; {sent[peer] / 1e9:.2f} GB from the server"
        detail = {"ours": found["ours"], "peer": found[peer], "sent": sent}
        made.append(Row(WORK, words, ours, theirs, ratio, f"≥ {GOAL:g}×", ratio >= GOAL, note, detail))
    stored = runs["ours"]["stored"]
    ratio = sent["ours"] / stored
    note = f"{runs['ours']['requests']} requests by the host; counted by a proxy, manifests and headers included"
    left, whole = (f"{count / 1e6:.1f} MB" for count in (sent["ours"], stored))
    work = f"{WORK}: bytes that leave the server"
    made.append(
        Row(work, "bytes of the model as stored", left, whole, ratio, "≤ 1.02×", ratio <= 1.02, note, runs["ours"])
    )
    return made
