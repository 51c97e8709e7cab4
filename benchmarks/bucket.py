"""A bucket of the benchmarks' own, on the server that AWS_ENDPOINT_URL names."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PARALLEL = 16
RANGE = 8 << 20


class UnavailableError(Exception):
    """There is no S3 server to measure with."""


def obstore_store(bucket: str) -> Any:
    """A bucket through obstore, settings from the AWS variables."""
    from obstore.store import S3Store

    return S3Store(bucket, client_options={"allow_http": True})


@contextlib.contextmanager
def made(sweep: str | None = None) -> Iterator[str]:
    """A new bucket; it and all in it are gone afterwards. `sweep` is a command that makes the server free the memory."""
    if "AWS_ENDPOINT_URL" not in os.environ:
        raise UnavailableError("AWS_ENDPOINT_URL names no S3 server")
    import boto3

    s3 = boto3.client("s3")
    bucket = f"modelstore-bench-{uuid.uuid4().hex[:8]}"
    s3.create_bucket(Bucket=bucket)
    try:
        yield bucket
    finally:
        empty(bucket, sweep=sweep)
        s3.delete_bucket(Bucket=bucket)


def empty(bucket: str, prefix: str | None = None, sweep: str | None = None) -> None:
    """Remove everything below a prefix."""
    import obstore

    store = obstore_store(bucket)
    for batch in obstore.list(store, prefix, chunk_size=1000):
        obstore.delete(store, [item["path"] for item in batch])
    if sweep:
        subprocess.run(sweep, shell=True, check=True, capture_output=True)


def upload(bucket: str, folder: Path, prefix: str) -> None:
    """A folder's files, multipart and parallel, as fast as obstore can."""
    import obstore

    store = obstore_store(bucket)
    for path in sorted(folder.iterdir()):
        obstore.put(store, f"{prefix}/{path.name}", path, chunk_size=RANGE, max_concurrency=8)


def in_parallel(work: Callable[..., object], items: list[Any], threads: int = PARALLEL) -> None:
    """All items at once, `threads` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda item: work(*item), items))
