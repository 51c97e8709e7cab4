"""Writes a variant as a Zarr v3 group on the local disk: the Zarr view, made solid."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3

from modelstore.errors import ConflictError, StorageError
from modelstore.execute.export_target import sync_folder, writing
from modelstore.execute.reading import Limits, Reader
from modelstore.format import grid, results
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape, slices
from modelstore.integrations.zarr_nodes import METADATA, Node, Nodes
from modelstore.integrations.zarr_values import widen
from modelstore.plan.layout import Share
from modelstore.plan.read import Want

# Beginning with "__", as no node does.
_STATE = "__export.json"
_LOCK = "__lock"
_ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}  # zarr-python's default
_BATCH = 4096  # chunks that are planned at once


@dataclass(frozen=True, slots=True)
class _Array:
    dtype: DType
    shape: Shape
    chunk_shape: Shape


@dataclass(frozen=True, slots=True)
class _Chunk:
    node: Node
    index: Shape
    file: Path
    counts: bool  # whether it is progress: a tied tensor's second copy is not


def export_zarr(
    reader: Reader,
    path: Path,
    *,
    limits: Limits,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> results.Exported:
    """Write every tensor as an array of a Zarr v3 group; `progress` hears of raw bytes as they are written.

    Names, chunks and dtypes are those of the Zarr view (see `docs/zarr.md`), so what Zarr lacks is widened without loss, and
    the attribute `dtype` names the stored dtype; chunks are compressed with zstd. Tied tensors are written under each name.
    The group grows in a hidden folder beside `path` and takes its name when it is whole; an interrupted export goes on
    with the chunks that are missing (after a restart of the machine, from the start: chunks are not synced one by one).
    What is at `path` is a `ConflictError`; with `overwrite` a Zarr group there is replaced.
    """
    started = time.monotonic()
    path = Path(os.path.abspath(path))  # noqa: PTH100  a link at the end stays what it is
    tensors = reader.manifest.by_name
    arrays = {name: _Array(t.kind, t.shape, t.chunk) for name, t in tensors.items()}
    nodes = Nodes(arrays, dict(reader.manifest.metadata), bits=False, consolidated=True)
    _check_free(path, overwrite)
    staging = path.parent / f".{path.name}.partial"
    with writing(path):
        lock = _claim(staging, path, _identity(nodes, reader))
    try:
        with writing(path):
            documents = _write_documents(nodes, staging)
        size = _write_chunks(reader, nodes, staging, limits, progress) + documents
        with writing(path):
            _place(staging, path)
    finally:
        os.close(lock)
    names = tuple(f"{node}/{METADATA}" if node else METADATA for node in (*nodes.children, *nodes.arrays))
    return results.Exported(str(path), names, size, time.monotonic() - started)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ConflictError(f"{path} is a file: give a folder to write", object=str(path))
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ConflictError(
                f"{path} is not empty: give another place, or overwrite it (--overwrite)", object=str(path)
            )
        if not (path / METADATA).is_file() or path.is_symlink():
            raise ConflictError(f"{path} is not a Zarr group: only one is overwritten; remove it", object=str(path))


def _identity(nodes: Nodes, reader: Reader) -> str:
    """Of what is written, and of this run of the machine: a chunk that was not synced may be gone after the next."""
    hasher = blake3(nodes.document("") or b"")
    for node in nodes.arrays.values():
        hasher.update(bytes.fromhex(reader.manifest.by_name[node.name].digest))
    boot = Path("/proc/sys/kernel/random/boot_id")
    hasher.update(boot.read_bytes() if boot.exists() else os.urandom(16))
    return hasher.hexdigest()


def _claim(staging: Path, path: Path, identity: str) -> int:
    """The hidden folder, with what an earlier run of the same export left in it; locked until the answer is closed."""
    if staging.is_symlink():
        raise ConflictError(f"{staging} is a link: remove it", object=str(staging))
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        state = staging / _STATE
        if not state.exists() or state.read_text() != identity:
            for entry in list(staging.iterdir()):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
            state.write_text(identity)
    except BlockingIOError:
        os.close(lock)
        raise ConflictError(f"another export to {path} is at work: wait for it", object=str(path)) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _write_documents(nodes: Nodes, staging: Path) -> int:
    size = 0
    for path in (*nodes.children, *nodes.arrays):
        document: dict[str, Any] = json.loads(nodes.document(path) or b"{}")
        for array in (document, *document.get("consolidated_metadata", {}).get("metadata", {}).values()):
            if array["node_type"] == "array":
                array["codecs"].append(_ZSTD)
        folder = staging / path
        folder.mkdir(parents=True, exist_ok=True)
        size += (folder / METADATA).write_bytes(json.dumps(document, separators=(",", ":")).encode())
    return size


def _chunks(nodes: Nodes, reader: Reader, staging: Path) -> Iterator[_Chunk]:
    for path, node in nodes.arrays.items():
        tensor = reader.manifest.by_name[node.name]
        counts = tensor.name == node.name
        for number in range(grid.count(tensor.shape, tensor.chunk)):
            index = tuple(int(i) for i in np.unravel_index(number, node.grid)) if node.grid else ()
            yield _Chunk(node, index, staging.joinpath(path, "c", *map(str, index)), counts)


def _write_chunks(
    reader: Reader, nodes: Nodes, staging: Path, limits: Limits, progress: Callable[[int], None] | None
) -> int:
    """Write the chunks that are missing; bytes of all of them."""
    size = 0
    room = max(1, limits.memory // 16)  # raw bytes on their way: widened and compressed they are five times as much
    under_way: deque[tuple[Future[int], int, bool]] = deque()
    held = 0

    def finish() -> None:
        nonlocal held, size
        future, nbytes, counts = under_way.popleft()
        size += future.result()
        held -= nbytes
        if progress and counts:
            progress(nbytes)

    chunks = _chunks(nodes, reader, staging)
    threads = limits.threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads, thread_name_prefix="modelstore-zarr") as pool:
        while batch := list(itertools.islice(chunks, _BATCH)):
            missing = []
            for chunk in batch:
                try:
                    size += chunk.file.stat().st_size
                except FileNotFoundError:
                    missing.append(chunk)
                    continue
                if progress and chunk.counts:
                    progress(_raw_size(chunk))
            _check_space(staging, sum(math.prod(c.node.chunks) * c.node.view.dtype.itemsize for c in missing))
            wants = [
                Want(
                    reader.manifest.by_name[c.node.name],
                    Share(tuple((pair,) for pair in c.node.stored_region(c.index))),
                )
                for c in missing
            ]
            for number, buffer in reader.stream(wants, limits):
                while under_way and (held + len(buffer) > room or under_way[0][0].done()):
                    finish()
                held += len(buffer)
                chunk = missing[number]
                under_way.append((pool.submit(_write_chunk, chunk, buffer, staging), len(buffer), chunk.counts))
            while under_way:
                finish()
    return size


def _raw_size(chunk: _Chunk) -> int:
    region = chunk.node.stored_region(chunk.index)
    return math.prod(b - a for a, b in region) * chunk.node.stored.itemsize


def _check_space(folder: Path, need: int) -> None:
    """`StorageError` where the next chunks would not fit if they could not be compressed."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if need > free:
        raise StorageError(
            f"the export needs up to {need:,} bytes more and the disk of {folder.parent} has {free:,} left: "
            "free some and export again, which goes on from there",
            object=str(folder),
        )


def _write_chunk(chunk: _Chunk, raw: Bytes, staging: Path) -> int:
    """Compress and write one chunk, whole or not at all; its bytes. Runs in a worker."""
    data = zstandard.ZstdCompressor().compress(shown(chunk.node, chunk.index, raw).data)
    with writing(staging):
        chunk.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = chunk.file.with_name(f"{chunk.file.name}.partial")
        fresh.write_bytes(data)
        fresh.replace(chunk.file)
    return len(data)


def shown(node: Node, index: Shape, raw: Bytes) -> Bytes:
    """A chunk's bytes as Zarr wants them: widened, and at the edges of the array padded with zeros to the full shape."""
    if node.view.widened:
        raw = widen(raw, node.stored).view(np.uint8)
    part = tuple(min((i + 1) * c, n) - i * c for i, c, n in zip(index, node.chunks, node.shape, strict=True))
    if part == node.chunks:
        return raw
    padded = np.zeros(node.chunks, dtype=node.view.dtype)
    padded[slices(tuple((0, n) for n in part))] = raw.view(node.view.dtype).reshape(part)
    return padded.reshape(-1).view(np.uint8)


def _place(staging: Path, path: Path) -> None:
    """Give the group its name; what is there goes first."""
    for folder, _, names in os.walk(staging):
        for name in names:
            if name.endswith(".partial"):  # of a run that was killed, at a chunk that was then written
                (Path(folder) / name).unlink()
    old = path.parent / f".{path.name}.partial.old"
    if old.is_dir():
        shutil.rmtree(old)
    if path.is_dir() and any(path.iterdir()):
        path.rename(old)
    (staging / _STATE).unlink()
    (staging / _LOCK).unlink()
    staging.replace(path)
    sync_folder(path.parent)
    if old.is_dir():
        shutil.rmtree(old)
