"""Damage at rest: found, named, never handed out; mended from a mirror on the way, or by `repair`."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import CorruptionError, ModelStoreError
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import all_bits, bits, copy_all, overwrite, pack_sizes, shrink, weights

MODEL = weights(1)
HOW = {"lossless": {}, "raw": {"codec": "raw"}, "whole": {"codec": "raw", "grid": "whole"}}


class Place:
    """A saved model, and a sound copy of its store."""

    def __init__(self, storage: Storage, **how: str) -> None:
        self.storage = storage
        self.copy = MemoryStorage(uuid.uuid4().hex)
        self.store.save("acme/m", MODEL, files={"config.json": b"{}"}, **how)  # type: ignore[arg-type]
        copy_all(self.storage, self.copy)
        entry = self.store.repo.catalog.newest("acme/m").variants["original"]
        self.manifest_key = manifest_key("acme/m", entry.manifest)
        self.copy_key = pack_key(entry.copy)
        self.manifest: Manifest = self.store["acme/m"].opened().manifest

    @property
    def store(self) -> Store:
        """The store, opened anew."""
        return ms.open(self.storage.url, memory="64MiB", threads=2)

    @property
    def mirrored(self) -> Store:
        """The same, with the copy as its mirror."""
        return ms.open(self.storage.url, memory="64MiB", threads=2, mirrors=[self.copy.url])

    def chunks(self) -> Iterator[tuple[int, str, int]]:
        """Row of the chunk table, tensor, and index in its grid, of every chunk of a tensor."""
        for tensor in self.manifest.tensors:
            for plane in tensor.planes:
                yield from ((plane.first + chunk, tensor.name, chunk) for chunk in range(tensor.chunks))

    def where(self, row: int) -> tuple[str, int, int]:
        """Pack's key, offset and length."""
        manifest = self.manifest
        return pack_key(manifest.packs[manifest.pack[row]]), int(manifest.offset[row]), int(manifest.length[row])

    def largest_pack(self) -> str:
        """The key of the pack with the most bytes."""
        sizes = pack_sizes(self.storage)
        return max(sizes, key=lambda key: sizes[key])

    def check_sound(self) -> None:
        """Nothing is wrong, and every object is what it was."""
        assert self.store.verify(deep=True).ok
        assert all_bits(self.store.load("acme/m")) == all_bits(MODEL)
        assert {i.key: self.storage.get(i.key) for i in self.storage.list("")} == {
            i.key: self.copy.get(i.key) for i in self.copy.list("")
        }


@pytest.fixture(params=[*HOW, "local-lossless", "local-raw"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """The model, stored in each way; raw chunks of a local store are read straight into their place."""
    shrink(monkeypatch)
    kind, _, how = request.param.rpartition("-")
    return Place(LocalStorage(tmp_path / "store") if kind else MemoryStorage(uuid.uuid4().hex), **HOW[how])


def check_named(error: ModelStoreError, place: Place, row: int, tensor: str, chunk: int) -> None:
    """The error says which model, tensor, chunk, pack and range, and what to do."""
    key, start, n = place.where(row)
    assert (error.model, error.tensor, error.chunk, error.object) == ("acme/m", tensor, chunk, key)
    for part in ("acme/m", tensor, f"chunk {chunk}", f"{start} to {start + n}", key, "modelstore repair"):
        assert part in str(error)


def test_a_flipped_bit_in_a_chunk(place: Place) -> None:
    chance = random.Random(7)
    for row, tensor, chunk in chance.sample(list(place.chunks()), 6):
        key, start, n = place.where(row)
        at, bit = start + chance.randrange(n), 1 << chance.randrange(8)

        def flip(data: bytearray, at: int = at, bit: int = bit) -> None:
            data[at] ^= bit

        overwrite(place.storage, key, flip)
        for read in (
            lambda: place.store.load("acme/m"),
            lambda name=tensor: place.store.tensor("acme/m", name)[...],
            lambda: list(place.store.stream("acme/m")),
        ):
            with pytest.raises(CorruptionError) as caught:
                read()
            check_named(caught.value, place, row, tensor, chunk)
        others = [name for name in MODEL if name != tensor]
        assert all_bits(place.store.load("acme/m", names=others)) == {name: bits(MODEL[name]) for name in others}

        (problem,) = place.store.verify("acme/m").problems
        assert (problem.kind, problem.model, problem.tensor, problem.chunk, problem.object) == (
            "corruption",
            "acme/m",
            tensor,
            chunk,
            key,
        )
        deep = place.store.verify(deep=True).problems
        assert [(p.kind, p.tensor, p.object) for p in deep] == [("corruption", tensor, key)]
        unmended = place.store.repair()
        assert not unmended.ok
        assert not unmended.repaired

        assert all_bits(place.mirrored.load("acme/m")) == all_bits(MODEL)
        place.check_sound()  # reading through the mirror has healed it


def test_a_flipped_bit_in_a_file(place: Place) -> None:
    (file,) = place.manifest.files
    key, start, _ = place.where(file.planes[0].first)

    def flip(data: bytearray) -> None:
        data[start] ^= 1

    overwrite(place.storage, key, flip)
    with pytest.raises(CorruptionError, match=r"config\.json"):
        place.store.file("acme/m", "config.json")
    assert [p.tensor for p in place.store.verify().problems] == ["config.json"]
    assert place.mirrored.file("acme/m", "config.json") == b"{}"
    place.check_sound()


DAMAGES: dict[str, Callable[[bytearray], None]] = {
    "truncated": lambda data: data.__delitem__(slice(len(data) // 2, None)),
    "emptied": lambda data: data.clear(),
    "zeroed": lambda data: data.__setitem__(slice(None), bytes(len(data))),
    "shifted": lambda data: data.insert(0, 0),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_pack(damage: str, place: Place) -> None:
    key = place.largest_pack()

    def harm() -> None:
        if damage == "missing":
            place.storage.delete(key)
        else:
            overwrite(place.storage, key, DAMAGES[damage])

    harm()
    hit = {(name, chunk) for row, name, chunk in place.chunks() if place.where(row)[0] == key}
    with pytest.raises(CorruptionError) as caught:
        place.store.load("acme/m")
    assert caught.value.object == key
    assert caught.value.model == "acme/m"
    assert (caught.value.tensor, caught.value.chunk) in hit

    problems = place.store.verify().problems
    assert problems
    assert {p.object for p in problems} == {key}
    if damage == "missing":
        assert [p.kind for p in problems] == ["not_found"]
    elif damage != "truncated":
        assert {(p.tensor, p.chunk) for p in problems} == hit

    assert all_bits(place.mirrored.load("acme/m")) == all_bits(MODEL)
    place.check_sound()

    harm()
    report = place.store.repair(source=place.copy.url)
    assert report.ok
    assert report.repaired == (key,)
    place.check_sound()
    assert not place.store.repair(source=place.copy.url).repaired


def test_a_flipped_bit_in_a_header(place: Place) -> None:
    key = place.largest_pack()

    def flip(data: bytearray) -> None:
        data[20] ^= 4

    overwrite(place.storage, key, flip)
    # No chunk is wrong, so that what is read is right; but the pack is not what its name says any more.
    assert all_bits(place.store.load("acme/m")) == all_bits(MODEL)
    report = place.store.repair(source=place.copy.url)
    assert report.ok
    assert report.repaired == (key,)
    place.check_sound()


def test_swapped_chunks(place: Place) -> None:
    """Two chunks of one length exchange their places: each is sound by itself, and in the wrong place."""
    by_place: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
    for row, name, chunk in place.chunks():
        key, _, n = place.where(row)
        by_place.setdefault((key, n), []).append((row, name, chunk))
    swaps = [rows[:2] for rows in by_place.values() if len({place.where(row) for row, _, _ in rows}) > 1]
    if not swaps:  # compressed chunks have lengths of their own: the longer keeps its tail
        key = place.largest_pack()
        swaps = [[row for row in place.chunks() if place.where(row[0])[0] == key][:2]]
    (one, *_), (other, *_) = swaps[0]
    (key, a, n), (_, b, m) = place.where(one), place.where(other)
    n = min(n, m)

    def swap(data: bytearray) -> None:
        data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]

    overwrite(place.storage, key, swap)
    with pytest.raises(CorruptionError) as caught:
        place.store.load("acme/m")
    assert (caught.value.tensor, caught.value.chunk) in {(name, chunk) for _, name, chunk in swaps[0]}
    assert {(p.tensor, p.chunk) for p in place.store.verify().problems} == {(n, c) for _, n, c in swaps[0]}
    assert all_bits(place.mirrored.load("acme/m")) == all_bits(MODEL)
    place.check_sound()


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_manifest(damage: str, place: Place) -> None:
    def harm() -> None:
        if damage == "missing":
            place.storage.delete(place.manifest_key)
        else:
            overwrite(place.storage, place.manifest_key, DAMAGES[damage])

    harm()
    with pytest.raises(CorruptionError) as caught:
        place.store.load("acme/m")
    assert (caught.value.model, caught.value.object) == ("acme/m", place.manifest_key)
    assert "modelstore repair acme/m" in str(caught.value)
    assert {p.object for p in place.store.verify().problems} == {place.manifest_key}
    assert all_bits(place.mirrored.load("acme/m")) == all_bits(MODEL)

    report = place.store.repair()  # from its copy among the packs: no other store is needed
    assert report.ok
    assert report.repaired == (place.manifest_key,)
    place.check_sound()

    harm()
    place.storage.delete(place.copy_key)  # the copy is gone too
    assert not place.store.repair().ok
    swept = place.store.gc(dry_run=False, grace=0)
    assert (swept.objects, [p.object for p in swept.problems]) == (
        (),
        [place.manifest_key],
    )  # what it needs is not known
    report = place.store.repair(source=place.copy.url)
    assert report.ok
    assert set(report.repaired) == {place.manifest_key, place.copy_key}
    place.check_sound()


def test_a_mirror_that_is_damaged_too(place: Place) -> None:
    key = place.largest_pack()
    for storage in (place.storage, place.copy):
        overwrite(storage, key, DAMAGES["zeroed"])
    with pytest.raises(CorruptionError) as caught:
        place.mirrored.load("acme/m")
    assert place.copy.url in str(caught.value)  # it says where it looked
    assert not place.store.repair(source=place.copy.url).ok
    assert not place.store.verify().ok


def test_what_is_damaged_in_one_place_each(place: Place) -> None:
    """Neither the store nor its mirror is sound, but every chunk is in one of them."""
    rows = [row for row, _, _ in place.chunks()]
    for storage, row in ((place.storage, rows[0]), (place.copy, rows[-1])):
        key, start, _ = place.where(row)

        def flip(data: bytearray, start: int = start) -> None:
            data[start] ^= 128

        overwrite(storage, key, flip)
    assert all_bits(place.mirrored.load("acme/m")) == all_bits(MODEL)


def test_a_delta_whose_base_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    place = Place(MemoryStorage(uuid.uuid4().hex))
    place.store.save("acme/tuned", {n: t + 0.01 for n, t in MODEL.items()}, codec="delta", parent="acme/m@1")
    tuned = all_bits(place.store.load("acme/tuned"))
    place.store.delete("acme/m", all=True)
    place.store.gc(dry_run=False, grace=0)
    assert all_bits(place.store.load("acme/tuned")) == tuned  # what it is stored against is kept
    row, tensor, chunk = next(place.chunks())
    key, start, _ = place.where(row)

    def flip(data: bytearray) -> None:
        data[start] ^= 1

    overwrite(place.storage, key, flip)
    with pytest.raises(CorruptionError) as caught:
        place.store.load("acme/tuned", names=[tensor])
    check_named(caught.value, place, row, tensor, chunk)
    assert key in {p.object for p in place.store.verify().problems}
    assert all_bits(place.mirrored.load("acme/tuned", names=[tensor])) == {tensor: tuned[tensor]}


def test_a_mapped_tensor_beyond_a_cut_pack(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("store")
    store = ms.open(root)
    store.save("m", MODEL, codec="raw", grid="whole")
    pack = max((path for path in root.rglob("*.safetensors")), key=lambda path: path.stat().st_size)
    data = pack.read_bytes()
    pack.unlink()
    pack.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptionError, match="reaches beyond the end"):
        ms.open(root).load("m", mmap=True)


def test_a_pack_whose_header_is_damaged_is_named(place: Place) -> None:
    key = place.largest_pack()
    overwrite(place.storage, key, lambda data: data.__setitem__(slice(100), bytes(100)))
    for deep in (False, True):
        (problem,) = place.store.verify(deep=deep).problems
        assert (problem.kind, problem.object) == ("format", key)
        assert "the header of pack" in problem.message
    assert place.store.repair(source=place.copy.url).ok
    place.check_sound()
