"""The clients of an S3 store against each other: s3fs, obstore, obstore's fsspec adapter.

    python benchmarks/storage_backends.py --bucket BUCKET [--json OUT.json]

against the server and credentials that AWS_* name; the bucket is made if it is not there, and what the run wrote is
removed. Every figure is the best of `--repeat` runs, the clients taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

MIB = 1 << 20
RANGE, BIG, SMALL = 8 * MIB, 128 * MIB, 4096
READERS, SMALL_GETS, LISTED = 16, 500, 2000


class Client(Protocol):
    """What is measured of a client; keys are below one prefix."""

    def put(self, key: str, data: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def read(self, key: str, start: int, out: memoryview) -> None: ...
    def list(self, prefix: str) -> int: ...


class Obstore:
    imports = "import obstore, obstore.store"

    def __init__(self, bucket: str, prefix: str) -> None:
        import obstore
        from obstore.store import S3Store

        self.o = obstore
        self.store = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})

    def put(self, key: str, data: bytes) -> None:
        self.o.put(self.store, key, data, chunk_size=RANGE, max_concurrency=8)

    def get(self, key: str) -> bytes:
        return self.o.get(self.store, key).bytes().to_bytes()

    def read(self, key: str, start: int, out: memoryview) -> None:
        out[:] = memoryview(self.o.get_range(self.store, key, start=start, length=out.nbytes))

    def list(self, prefix: str) -> int:
        return sum(len(batch) for batch in self.o.list(self.store, prefix, chunk_size=1000))


class Fsspec:
    """Any fsspec file system."""

    def __init__(self, filesystem: Any, bucket: str, prefix: str) -> None:
        self.fs, self.root = filesystem, f"{bucket}/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{key}", data, **self.put_options)

    put_options: dict[str, Any] = {}  # noqa: RUF012

    def get(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.root}/{key}"))

    def read(self, key: str, start: int, out: memoryview) -> None:
        out[:] = memoryview(self.fs.cat_file(f"{self.root}/{key}", start=start, end=start + out.nbytes))

    def list(self, prefix: str) -> int:
        self.fs.invalidate_cache()
        return len(self.fs.find(f"{self.root}/{prefix}"))


class S3fs(Fsspec):
    imports = "import s3fs"
    put_options = {"chunksize": RANGE, "max_concurrency": 8}  # noqa: RUF012

    def __init__(self, bucket: str, prefix: str) -> None:
        import s3fs

        super().__init__(s3fs.S3FileSystem(max_concurrency=READERS), bucket, prefix)


class ObstoreFsspec(Fsspec):
    imports = "import obstore.fsspec"

    def __init__(self, bucket: str, prefix: str) -> None:
        from obstore.fsspec import FsspecStore

        super().__init__(FsspecStore("s3", client_options={"allow_http": True}), bucket, prefix)


CLIENTS: dict[str, Any] = {"obstore": Obstore, "obstore.fsspec": ObstoreFsspec, "s3fs": S3fs}


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def ranges(client: Client, out: memoryview) -> None:
    with ThreadPoolExecutor(READERS) as pool:
        starts = range(0, BIG, RANGE)
        list(pool.map(lambda at: client.read("big", at, out[at : at + RANGE]), starts))


def small_gets(client: Client) -> None:
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda number: client.get(f"list/{number:05}"), range(SMALL_GETS)))


def typical_get(client: Client) -> float:
    return statistics.median(seconds(lambda: client.get("list/00000")) for _ in range(15))


def fresh(client: str, bucket: str, prefix: str, act: str) -> float:
    """Seconds that a new interpreter takes to import the client (and, where `act` says so, to read a first byte)."""
    code = f"""
import sys, time; started = time.perf_counter()
sys.path.insert(0, {str(Path(__file__).parent)!r})
from storage_backends import CLIENTS
{CLIENTS[client].imports}
make = lambda: CLIENTS[{client!r}]({bucket!r}, {prefix!r})
{act}
print(time.perf_counter() - started, flush=True)
import os; os._exit(0)
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure(bucket: str, repeat: int) -> dict[str, dict[str, float]]:
    prefix, data, out = f"bench-{uuid.uuid4().hex[:8]}", os.urandom(BIG), memoryview(bytearray(BIG))
    clients = {name: kind(bucket, prefix) for name, kind in CLIENTS.items()}
    setup = clients["obstore"]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda number: setup.put(f"list/{number:05}", b"x" * SMALL), range(LISTED)))
    setup.put("big", data)
    best: dict[str, dict[str, float]] = {name: {} for name in clients}

    def keep(name: str, what: str, value: float, better: Callable[[float, float], float]) -> None:
        best[name][what] = better(best[name].get(what, value), value)

    for _ in range(repeat):  # the clients take turns
        for name, client in clients.items():
            keep(
                name, "read 8 MiB ranges, 16 threads (MB/s)", BIG / seconds(lambda c=client: ranges(c, out)) / 1e6, max
            )
            keep(name, "put 128 MiB (MB/s)", BIG / seconds(lambda c=client, n=name: c.put(f"put-{n}", data)) / 1e6, max)
            keep(name, "get 4 KiB, 16 threads (1/s)", SMALL_GETS / seconds(lambda c=client: small_gets(c)), max)
            keep(name, "get 4 KiB, one thread (ms)", typical_get(client) * 1e3, min)
            keep(name, "list 2,000 keys (ms)", seconds(lambda c=client: c.list("list")) * 1e3, min)
            keep(name, "import (ms)", fresh(name, bucket, prefix, "") * 1e3, min)
            keep(name, "import and first byte (ms)", fresh(name, bucket, prefix, "make().get('list/00000')") * 1e3, min)
    assert bytes(out) == data
    for batch in setup.o.list(setup.store, chunk_size=1000):
        setup.o.delete(setup.store, [item["path"] for item in batch])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import boto3

    s3 = boto3.client("s3", endpoint_url=os.environ.get("AWS_ENDPOINT_URL"))
    if arguments.bucket not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=arguments.bucket)
    best = measure(arguments.bucket, arguments.repeat)
    rows = list(best["obstore"])
    print(f"{'':42}" + "".join(f"{name:>16}" for name in best))
    for row in rows:
        print(f"{row:42}" + "".join(f"{values[row]:16,.1f}" for values in best.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(best, indent=2) + "\n")


if __name__ == "__main__":
    main()
