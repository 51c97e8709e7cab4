"""Bytes that results report are those that were read or written, as a storage that counts them, or the disk, tells."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import modelstore
from modelstore.client import Store
from modelstore.format.buffers import Buffer
from modelstore.format.names import parse_reference
from modelstore.format.objects.record import PACKS, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import open_on, pack_sizes, shrink, weights

Places = dict[tuple[str, int], int]  # pack and offset: length


class Watched(CountingStorage):
    """Also notes which ranges of packs are read, and which packs are written."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.ranges: list[tuple[str, int, int]] = []
        self.packs: dict[str, int] = {}

    def read(self, key: str, start: int, out: memoryview) -> None:
        self.ranges.append((key, start, start + out.nbytes))
        super().read(key, start, out)

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        if key.startswith(PACKS):
            self.packs[key] = size
        super().put(key, pieces, size)

    def covers(self, places: Places) -> bool:
        """Whether each of these was read by some range."""
        return all(
            any(key == at and start <= offset and offset + length <= stop for key, start, stop in self.ranges)
            for (at, offset), length in places.items()
        )


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A store of two versions, of which the second shares most with the first."""
    shrink(monkeypatch)
    storage = Watched(MemoryStorage(uuid.uuid4().hex))
    store = open_on(storage)
    store.save("m", weights(1))
    store.save("m", weights(1) | {"norm": torch.zeros(8)})
    storage.reset()
    storage.ranges.clear()
    return storage


def chunks(store: Store, *refs: str) -> Places:
    """Where the distinct chunks of variants lie."""
    places: Places = {}
    for ref in refs:
        manifest = store[ref].opened().manifest
        packs = [pack_key(manifest.packs[i]) for i in manifest.pack.tolist()]
        at = zip(packs, manifest.offset.tolist(), strict=True)
        places |= dict(zip(at, manifest.length.tolist(), strict=True))
    return places


def copies(store: Store, *refs: str) -> set[str]:
    """The packs of the copies of manifests."""
    return {pack_key(store.repo.catalog.entry(parse_reference(ref))[1].copy) for ref in refs}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("refs", [("m@1",), ("m@1", "m@2")])
def test_a_verification(storage: Watched, deep: bool, refs: tuple[str, ...]) -> None:
    store = open_on(storage)
    report = store.verify(refs[0] if len(refs) == 1 else None, deep=deep)
    read = storage.bytes["read"]
    places = chunks(store, *refs)
    assert (report.chunks, report.bytes) == (len(places), sum(places.values()))
    assert storage.covers(places)
    beside = sum(pack_sizes(storage).values()) - sum(chunks(store, "m@1", "m@2").values())  # headers, manifests' copies
    again = 0 if not deep else sum(sum(chunks(store, ref).values()) for ref in refs) - report.bytes
    assert report.bytes <= read <= report.bytes + again + beside * (1 + deep)  # deep, with what lies between two ranges


def test_a_difference(storage: Watched) -> None:
    store = open_on(storage)
    found = store.diff("m@1", "m@2")
    assert storage.bytes["read"] == 0
    before, after = chunks(store, "m@1"), chunks(store, "m@2")
    assert found.bytes_total == sum(after.values())
    assert found.bytes_changed == sum(n for place, n in after.items() if place not in before) > 0


def test_a_copy(storage: Watched) -> None:
    store, target = open_on(storage), Watched(MemoryStorage(uuid.uuid4().hex))
    for ref in ("m@1", "m@2", "m@1"):
        target.packs.clear()
        storage.reset()
        before = pack_sizes(target)
        done = store.copy(ref, open_on(target))
        sent = {key: n for key, n in target.packs.items() if key not in copies(open_on(target), ref)}
        assert (done.sent, done.packs) == (sum(sent.values()), len(sent))
        assert storage.bytes["read"] == done.sent
        kept = {
            key for key, _ in chunks(store, ref)
        } & before.keys()  # looked at, also where the version is there whole
        assert done.there == sum(before[key] for key in kept)
    assert not done.versions[0].variants  # the last one was there whole


def test_a_save(storage: Watched) -> None:
    saved = open_on(storage).save("m", weights(1) | {"head": torch.zeros(60, 100)})
    new = {key: n for key, n in storage.packs.items() if key not in copies(open_on(storage), "m@1", "m@2", "m@3")}
    before = {key for key, _ in chunks(open_on(storage), "m@1", "m@2")}
    assert saved.stored == sum(n for key, n in new.items() if key not in before) > 0
    places = chunks(open_on(storage), "m@3")
    assert saved.reused == sum(n for (key, _), n in places.items() if key in before)


@pytest.mark.parametrize("format", ["hf", "safetensors", "zarr"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_export(tmp_path: Path, format: str, remote: bool) -> None:
    store = modelstore.open(tmp_path / "store")
    store.save("m", weights(1))
    path = tmp_path / ("out.safetensors" if format == "safetensors" else "out")
    url = f"file://{path}" if not remote else f"memory://{uuid.uuid4().hex}/{path.name}"
    for _ in range(2):
        done = store.export("m", url, format=format, overwrite=True)  # type: ignore[arg-type]
        if remote:
            import fsspec

            files = fsspec.filesystem("memory").find(url, detail=True).values()
            assert done.bytes == sum(file["size"] for file in files)
        else:
            files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
            assert done.bytes == sum(one.stat().st_size for one in files)
