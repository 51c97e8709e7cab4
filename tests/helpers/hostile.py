"""What an attacker could put into a store, and everything that a reader could then do with it."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
import zstandard
from blake3 import blake3

from modelstore.client import Store
from modelstore.errors import ModelStoreError
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key
from modelstore.storage.base import Storage
from tests.helpers.stores import open_on

ROOM = 1 << 30  # bytes of address space that reading something small may take, threads and their stacks included


@contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Within, allocations beyond `room` more bytes fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def manifest_of(store: Store, model: str) -> Any:
    """A model's manifest as plain data."""
    digest = store.repo.catalog.newest(model).variants["original"].manifest
    stored = store.repo.storage.get(manifest_key(model, digest))
    return msgspec.json.decode(zstandard.ZstdDecompressor().decompress(stored))


def plant(storage: Storage, manifest: Any, *, model: str = "bad", stored: bytes | None = None) -> VersionRecord:
    """Publish a manifest, given as data or as bytes of JSON, under its true digest; `stored` is put in its place."""
    text = manifest if isinstance(manifest, bytes) else msgspec.json.encode(manifest)
    digest = blake3(text).hexdigest()
    data = zstandard.ZstdCompressor().compress(text) if stored is None else stored
    storage.put(manifest_key(model, digest), [data], len(data))
    entry = VariantEntry(digest, "0" * 64, 1, 1, 1, "lossless", 0.0)
    catalog = open_on(storage).repo.catalog
    record = VersionRecord(FORMAT, model, catalog.highest(model) + 1, 1, "attacker", time.time(), {"original": entry})
    catalog.open(create=True)
    assert catalog._create_version(record)  # unlike a save, without a look at what it names
    return record


def readings(store: Store, ref: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Every way to read what a reference names."""
    names = ["embed", "large", "norm", "none"]
    return {
        "load": lambda: store.load(ref),
        "stream": lambda: list(store.stream(ref)),
        "slice": lambda: [store.tensor(ref, name)[...] for name in names],
        "shard": lambda: store.load(ref, shard=dict.fromkeys(names)),
        "map": lambda: store.load(ref, mmap=True),
        "file": lambda: store.file(ref, "config.json"),
        "describe": lambda: store.describe(ref),
        "diff": lambda: store.diff(ref, "good"),
        "export": lambda: store.export(ref, folder / "export", overwrite=True),
        "parent": lambda: store.save("child", {"one": torch.ones(1)}, parent=ref),
    }


def read_all(store: Store, ref: str) -> dict[str, ModelStoreError]:
    """The errors of every way to read; any other kind of error is raised, and so is a file outside the target."""
    errors: dict[str, ModelStoreError] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "inner", "most")
        folder.mkdir(parents=True)
        for name, read in readings(store, ref, folder).items():
            try:
                read()
            except ModelStoreError as error:
                errors[name] = error
        assert all(0 < len(str(error)) < 3000 for error in errors.values())
        outside = [path for path in Path(parent).rglob("*") if path.is_file() and folder not in path.parents]
        assert not outside
    with suppress(ModelStoreError):
        store.verify(ref)
    with suppress(ModelStoreError):
        store.verify(ref, deep=True)
    return errors
