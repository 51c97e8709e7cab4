"""Writes a variant as a Zarr v3 group on the local disk: the Zarr view, made solid."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from modelstore import paths
from modelstore.errors import ConflictError, StorageError
from modelstore.execute.export.replacing import below, check_group, check_staging, not_staged_zarr, refusal
from modelstore.execute.export.target import writing
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.answers import results
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.files.zarr_names import FRESH, LOCK
from modelstore.format.region import Shape
from modelstore.integrations.zarr_nodes import METADATA, Node, Nodes, shown
from modelstore.plan.read import Want
from modelstore.plan.work import Work
from modelstore.storage.pool import ordered

_OLD = ".old"  # after the hidden folder's name: what was there before, for a moment
_ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}  # zarr-python's default
_BATCH = 4096  # chunks that are planned at once


@dataclass(frozen=True, slots=True)
class _WrittenArray:
    dtype: DType
    shape: Shape
    chunk_shape: Shape


@dataclass(frozen=True, slots=True)
class _WrittenChunk:
    node: Node
    index: Shape
    file: str  # below the hidden folder
    counts: bool  # whether it is progress: a tied tensor's second copy is not


def export_zarr(
    reader: Reader,
    path: Path,
    *,
    work: Work,
    overwrite: bool = False,
) -> results.Exported:
    """Write every tensor as an array of a Zarr v3 group; `work` hears of raw bytes as they are written.

    Names, chunks and dtypes are those of the Zarr view (see `docs/zarr.md`), so what Zarr lacks is widened without loss, and
    the attribute `dtype` names the stored dtype; chunks are compressed with zstd. Tied tensors are written under each name.
    The group grows in a hidden folder beside `path` and takes its name when it is whole. An interrupted export goes on: what
    it left is compared with what it should be, and written where it is missing or another. No link is followed below that
    folder. An existing `path` is a `ConflictError`; with `overwrite` a folder that is a Zarr group, and holds nothing else, is
    replaced.
    """
    started = time.monotonic()
    path = Path(os.path.abspath(path))  # noqa: PTH100  links on the way there stay what they are
    path = path.resolve() if path.is_symlink() else path
    tensors = reader.manifest.by_name
    arrays = {name: _WrittenArray(t.kind, t.shape, t.chunk) for name, t in tensors.items()}
    nodes = Nodes(arrays, dict(reader.manifest.metadata), bits=False, consolidated=True)
    staging = path.parent / f".{path.name}.partial"
    with writing(path):
        _check(staging, path, overwrite)
        check_staging(path.parent, staging.name, LOCK, not_staged_zarr)
        lock = _claim(staging, path, nodes)
    try:
        with writing(path):
            documents = _write_documents(nodes, staging)
        size = _write_chunks(reader, nodes, staging, work) + documents
        with writing(path):
            _check(staging, path, overwrite)  # again: what came meanwhile stays, too
            _place(staging, path)
    finally:
        os.close(lock)
    names = tuple(f"{node}/{METADATA}" if node else METADATA for node in (*nodes.children, *nodes.arrays))
    return results.Exported(str(path), names, size, time.monotonic() - started)


def _check(staging: Path, path: Path, overwrite: bool) -> None:
    """`ConflictError` if something is in the way of the group, or of what is put aside for it."""
    check_group(path, overwrite=overwrite)
    aside = f"{staging.name}{_OLD}"
    if strange := not_staged_zarr(below(path.parent, aside)):  # may be removed in part
        raise refusal(str(path.parent / aside), strange)


def _claim(staging: Path, path: Path, nodes: Nodes) -> int:
    """The hidden folder, cleared of anything that is not part of this export; locked until the answer is closed."""
    with paths.folder(path.parent, make=0o777):  # as any other folder; what is hidden in it is not
        pass
    with paths.folder(path.parent, staging.name, make=0o700) as at:
        lock = paths.open_in(at, LOCK, os.O_RDWR | os.O_CREAT, str(staging / LOCK), 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(entry.name != LOCK for entry in paths.entries(path.parent, staging.name)):
                _drop_others(path.parent, staging.name, _files(nodes))
        except BlockingIOError:
            os.close(lock)
            raise ConflictError(f"another export to {path} is at work: wait for it", object=str(path)) from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _files(nodes: Nodes) -> set[str]:
    """Every file of the group, by its path in it."""
    files = {f"{path}/{METADATA}".lstrip("/") for path in (*nodes.children, *nodes.arrays)}
    for path, node in nodes.arrays.items():
        files |= {"/".join((path, "c", *map(str, index))) for index in np.ndindex(*node.grid)}
    return files | {LOCK}


def _drop_others(root: Path, folder: str, files: set[str], inner: str = "") -> None:
    """Remove everything that is not a file of the group."""
    with paths.folder(root, folder) as at:
        for entry in paths.entries(root, folder):
            name = f"{inner}{entry.name}"
            if entry.kind == "folder":
                _drop_others(root, f"{folder}/{entry.name}", files, f"{name}/")
            elif entry.kind != "file" or name not in files:
                paths.remove_in(at, entry.name)


def _write_documents(nodes: Nodes, staging: Path) -> int:
    size = 0
    for path in (*nodes.children, *nodes.arrays):
        document: dict[str, Any] = json.loads(nodes.document(path) or b"{}")
        for array in (document, *document.get("consolidated_metadata", {}).get("metadata", {}).values()):
            if array["node_type"] == "array":
                array["codecs"].append(_ZSTD)
        data = json.dumps(document, separators=(",", ":")).encode()
        _write(staging, f"{path}/{METADATA}".lstrip("/"), data)
        size += len(data)
    return size


def _write(staging: Path, file: str, data: bytes) -> None:
    """Write a file below the hidden folder, whole or not at all."""
    folder, _, name = f"{staging.name}/{file}".rpartition("/")
    fresh = f"{name}{FRESH}"
    with paths.folder(staging.parent, folder, make=0o777, durable=False) as at:
        paths.remove_in(at, fresh)
        opened = paths.open_in(at, fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, str(staging / file))
        with os.fdopen(opened, "wb") as out:
            out.write(data)
        os.replace(fresh, name, src_dir_fd=at, dst_dir_fd=at)


def _same(staging: Path, file: str, data: bytes) -> bool:
    """Whether a file below the hidden folder has these bytes, and no other name."""
    try:
        with os.fdopen(paths.open_file(staging.parent, f"{staging.name}/{file}"), "rb") as there:
            return os.fstat(there.fileno()).st_nlink == 1 and there.read(len(data) + 1) == data
    except OSError:
        return False


def _chunks(nodes: Nodes, reader: Reader) -> Iterator[_WrittenChunk]:
    for path, node in nodes.arrays.items():
        tensor = reader.manifest.by_name[node.name]
        counts = tensor.name == node.name
        for number in range(grid.count(tensor.shape, tensor.chunk)):
            index = tuple(int(i) for i in np.unravel_index(number, node.grid)) if node.grid else ()
            yield _WrittenChunk(node, index, "/".join((path, "c", *map(str, index))), counts)


def _write_chunks(reader: Reader, nodes: Nodes, staging: Path, work: Work) -> int:
    """Write the chunks that are missing; bytes of all of them."""
    size = 0
    room = max(1, work.memory // 16)  # raw bytes on their way: widened and compressed they are five times as much
    chunks = _chunks(nodes, reader)
    threads = work.limits.threads or os.cpu_count() or 1

    def keep(read: tuple[_WrittenChunk, Bytes]) -> tuple[int, int]:
        chunk, buffer = read
        return _keep_chunk(chunk, buffer, staging), len(buffer) if chunk.counts else 0

    while batch := list(itertools.islice(chunks, _BATCH)):
        _check_space(staging, sum(math.prod(c.node.chunks) * c.node.view.dtype.itemsize for c in batch))
        wants = [Want.of(reader.manifest.by_name[c.node.name], c.node.stored_region(c.index)) for c in batch]
        found = ((batch[number], buffer) for number, buffer in reader.stream(wants, work.unheard()))
        kept = ordered(keep, found, threads, "modelstore-zarr", memory=room, cost=lambda read: len(read[1]))
        for written, done in kept:
            size += written
            work.done(done)
    return size


def _check_space(folder: Path, need: int) -> None:
    """`StorageError` if the next chunks would not fit if they could not be compressed."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if need > free:
        raise StorageError(
            f"the export needs up to {need:,} bytes more and the disk of {folder.parent} has {free:,} left: "
            "free some and export again, which goes on from there",
            object=str(folder),
        )


def _keep_chunk(chunk: _WrittenChunk, raw: Bytes, staging: Path) -> int:
    """Compress one chunk, and write it unless it is there; its bytes. Runs in a worker."""
    data = zstandard.ZstdCompressor().compress(shown(chunk.node, chunk.index, raw).data)
    if not _same(staging, chunk.file, data):
        _write_chunk(staging, chunk.file, data)
    return len(data)


def _write_chunk(staging: Path, file: str, data: bytes) -> None:
    with writing(staging):
        _write(staging, file, data)


def _place(staging: Path, path: Path) -> None:
    """Give the group its name; what is there goes first."""
    old = f"{staging.name}{_OLD}"
    with paths.folder(path.parent) as at:
        paths.remove_in(at, old)
        if paths.kind_in(at, path.name) == "folder":
            os.rename(path.name, old, src_dir_fd=at, dst_dir_fd=at)
        with paths.folder(path.parent, staging.name) as inner:
            os.fchmod(inner, 0o777 & ~_umask())
            os.rename(staging.name, path.name, src_dir_fd=at, dst_dir_fd=at)
            os.unlink(LOCK, dir_fd=inner)  # last: it tells that the hidden folder is an export's
        paths.sync(at)
        paths.remove_in(at, old)


def _umask() -> int:
    """The permissions that new folders of this process are denied; found by asking the kernel, as setting it would be seen by
    other threads.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
