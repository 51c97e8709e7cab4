"""Records, tags, journals and strange objects in a store: one error that names the object, or no notice taken."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import save_file

from modelstore.client import Store
from modelstore.errors import ConflictError, FormatError, ModelStoreError, UnsupportedError
from modelstore.format.objects import record as rec
from modelstore.storage.memory import MemoryStorage
from tests.helpers.hostile import little_memory
from tests.helpers.stores import all_bits, contents, keys, open_on, overwrite, weights

VERSION = rec.version_key("acme/m", 1, 1)
TAG = rec.tag_key("acme/m", "prod", 1)


@pytest.fixture
def storage() -> MemoryStorage:
    """Two models; one of them has a tag."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("acme/m", weights(1), tag="prod")
    store.save("other", weights(2))
    return storage


def put(storage: MemoryStorage, key: str, data: bytes) -> None:
    storage.put(key, [data], len(data))


def edited(storage: MemoryStorage, key: str, **fields: Any) -> bytes:
    """A record as an earlier release would have written it, so that what it says is looked at, and not its digest."""
    before = msgspec.json.decode(storage.get(key))
    del before["blake3"]
    return msgspec.json.encode(before | fields)


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1000),
    "no UTF-8": b"\xff\xfe\xfa",
    "no UTF-8 within": b'{"format":1,"model":"\xff"}',
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "deep": b'{"variants":' * 50_000,
    "digits": b'{"format":' + b"1" * 50_000 + b"}",
    "large": b'{"format":"' + b"x" * 10_000_000 + b'"}',
}


def check_one_error(error: ModelStoreError, key: str) -> None:
    assert isinstance(error, (FormatError, UnsupportedError))
    assert error.object == key
    assert key in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_version_record_of_garbage(data: bytes, storage: MemoryStorage) -> None:
    put(storage, VERSION, data)
    before = keys(storage)
    store = open_on(storage)
    with little_memory():
        for act in (
            lambda: store.load("acme/m"),
            lambda: store.load("acme/m@1"),
            lambda: store.load("acme/m@prod"),
            lambda: store.versions("acme/m"),
            lambda: store.describe("acme/m"),
            lambda: store.tag("acme/m@1", "x"),
        ):
            with pytest.raises(ModelStoreError) as caught:
                act()
            check_one_error(caught.value, VERSION)
        with pytest.raises(ConflictError, match="tagged prod"):
            store.delete("acme/m@1")
        assert [[p.object for p in info.problems] for info in store.models()] == [[VERSION], []]
        assert [p.object for p in store.gc(dry_run=False, grace=0).problems] == [VERSION]
    assert keys(storage) == before  # above all, nothing was collected
    assert [p.object for p in store.verify().problems] == [VERSION]
    assert all_bits(store.load("other")) == all_bits(weights(2))


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_tag_of_garbage(data: bytes, storage: MemoryStorage) -> None:
    put(storage, TAG, data)
    store = open_on(storage)
    with little_memory(), pytest.raises(ModelStoreError) as caught:
        store.load("acme/m@prod")
    check_one_error(caught.value, TAG)
    assert all_bits(store.load("acme/m@1")) == all_bits(weights(1))


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_store_of_garbage(data: bytes, storage: MemoryStorage) -> None:
    put(storage, rec.STORE_KEY, data)
    before = keys(storage)
    for act in (lambda s: s.load("acme/m"), lambda s: s.save("acme/m", weights(3)), lambda s: s.gc(dry_run=False)):
        with little_memory(), pytest.raises(ModelStoreError) as caught:
            act(open_on(storage))
        check_one_error(caught.value, rec.STORE_KEY)
    assert keys(storage) == before


@pytest.mark.parametrize("key", [VERSION, TAG, rec.STORE_KEY])
def test_a_format_of_the_future(key: str, storage: MemoryStorage) -> None:
    put(storage, key, edited(storage, key, format=2))
    with pytest.raises(UnsupportedError, match="newer modelstore") as caught:
        open_on(storage).load("acme/m@prod")
    check_one_error(caught.value, key)


MOVES: dict[str, tuple[str, str, Callable[[Store], object]]] = {
    "to another version": (VERSION, rec.version_key("acme/m", 2, 1), lambda s: s.load("acme/m")),
    "to another number": (VERSION, rec.version_key("acme/m", 1, 7), lambda s: s.load("acme/m@1")),
    "to another model": (VERSION, rec.version_key("other", 2, 1), lambda s: s.load("other")),
    "to a model that is none": (VERSION, rec.version_key("third", 1, 1), lambda s: s.load("third")),
    "a tag to another": (TAG, rec.tag_key("acme/m", "next", 1), lambda s: s.load("acme/m@next")),
    "a tag to another model": (TAG, rec.tag_key("other", "prod", 1), lambda s: s.load("other@prod")),
    "a tag to another number": (TAG, rec.tag_key("acme/m", "prod", 9), lambda s: s.load("acme/m@prod")),
    "a version to a tag": (VERSION, rec.tag_key("acme/m", "prod", 2), lambda s: s.load("acme/m@prod")),
    "a tag to a version": (TAG, rec.version_key("acme/m", 2, 1), lambda s: s.load("acme/m")),
}


@pytest.mark.parametrize(("source", "target", "act"), MOVES.values(), ids=MOVES)
def test_a_record_that_was_moved(
    source: str, target: str, act: Callable[[Store], object], storage: MemoryStorage
) -> None:
    put(storage, target, storage.get(source))
    with pytest.raises(FormatError) as caught:
        act(open_on(storage))
    check_one_error(caught.value, target)


EDITS: dict[str, dict[str, Any]] = {
    "another model": {"model": "other"},
    "no model": {"model": "../../other"},
    "a model that is none": {"model": ""},
    "version negative": {"version": -1},
    "version huge": {"version": 2**62},
    "version of text": {"version": "1"},
    "number huge": {"number": 2**62},
    "no variants": {"variants": {}},
    "no original": {"variants": {"int8": None}},
    "variants of paths": {"variants": {"original": {"manifest": "../../../x"}}},
}


@pytest.mark.parametrize("fields", EDITS.values(), ids=EDITS)
def test_a_record_that_says_other_things(fields: dict[str, Any], storage: MemoryStorage) -> None:
    put(storage, VERSION, edited(storage, VERSION, **fields))
    store = open_on(storage)
    for act in (
        lambda: store.load("acme/m"),
        lambda: store.versions("acme/m"),
    ):
        with pytest.raises(ModelStoreError) as caught:
            act()
        check_one_error(caught.value, VERSION)
    assert [p.object for p in store.gc(dry_run=False, grace=0).problems] == [VERSION]
    assert [[p.object for p in info.problems] for info in store.models()] == [[VERSION], []]
    assert [p.object for p in store.verify().problems] == [VERSION]


def test_an_original_under_another_name_only(storage: MemoryStorage) -> None:
    variants = msgspec.json.decode(storage.get(VERSION))["variants"]
    put(storage, VERSION, edited(storage, VERSION, variants={"int8": variants["original"]}))
    for act in (lambda s: s.load("acme/m"), lambda s: s.versions("acme/m")):
        with pytest.raises(ModelStoreError):
            act(open_on(storage))


def test_a_tag_of_a_version_that_never_was(storage: MemoryStorage) -> None:
    put(storage, TAG, edited(storage, TAG, version=77))
    with pytest.raises(ModelStoreError, match="no version 77"):
        open_on(storage).load("acme/m@prod")


STRANGERS = [
    "README.txt",
    "models/README.txt",
    "models/.git/config",
    "models/a b/versions/99999998/99999998.json",
    "models/acme/m/versions/readme.txt",
    "models/acme/m/versions/latest/99999998.json",
    "models/acme/m/versions/²²²²²²²²/99999998.json",
    "models/acme/m/manifests/readme.txt",
    "models/acme/m/notes/1.txt",
    "models/tags/versions/99999998/99999998.json",
    "packs/README.txt",
    "packs/zz/strange.safetensors",
    "jobs/strange.txt",
    "jobs/strange/0.json",
]


@pytest.mark.parametrize("key", STRANGERS)
def test_objects_that_are_none_of_ours(key: str, storage: MemoryStorage) -> None:
    before = contents(open_on(storage))
    put(storage, key, b"whatever")
    store = open_on(storage)
    assert contents(store) == before
    assert store.verify(deep=True).ok
    store.save("acme/m", weights(3))
    assert all_bits(store.load("acme/m@1")) == all_bits(weights(1))
    store.gc(dry_run=False, grace=0)
    assert all_bits(store.load("acme/m@2")) == all_bits(weights(3))
    assert key in keys(storage)


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_journal_of_garbage_is_no_notice_taken_of(data: bytes, storage: MemoryStorage, tmp_path: Path) -> None:
    save_file(weights(5), tmp_path / "model.safetensors")
    pages: list[str] = []

    class Watched(MemoryStorage):
        def create(self, key: str, content: Any) -> bool:
            if key.startswith(rec.JOBS) and "probe" not in key:
                pages.append(key)
            return super().create(key, content)

    open_on(Watched(uuid.uuid4().hex)).save("acme/m", tmp_path / "model.safetensors")
    put(storage, pages[0], data)
    with little_memory():
        open_on(storage).save("acme/m", tmp_path / "model.safetensors")
    assert all_bits(open_on(storage).load("acme/m")) == all_bits(weights(5))
    assert pages[0] not in keys(storage)


PACKS: dict[str, bytes] = {
    "nothing": b"",
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 99 MB": (99_000_000).to_bytes(8, "little") + b"{}",
    "a deep header": (200_000).to_bytes(8, "little") + b'{"a":' * 40_000,
    "a copy that is none": (72).to_bytes(8, "little")
    + b'{"__metadata__":{"kind":"manifest","manifest":"x","model":"acme/m"}}'.ljust(72),
    "a manifest that is none": (135).to_bytes(8, "little")
    + b'{"__metadata__":{"kind":"manifest"},"manifest":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(135)
    + b"abcd",
}


@pytest.mark.parametrize("data", PACKS.values(), ids=PACKS)
def test_a_lost_manifest_is_found_among_strange_packs(data: bytes, storage: MemoryStorage) -> None:
    entry = open_on(storage).repo.catalog.newest("acme/m").variants["original"]
    put(storage, rec.pack_key("ab" * 32), data)
    storage.delete(rec.manifest_key("acme/m", entry.manifest))
    variants = msgspec.json.decode(storage.get(VERSION))["variants"]
    variants["original"]["copy"] = "ab" * 32  # the record says that the strange one is the copy
    put(storage, VERSION, edited(storage, VERSION, variants=variants))
    with little_memory():
        report = open_on(storage).repair()
    assert report.ok
    assert all_bits(open_on(storage).load("acme/m")) == all_bits(weights(1))
    assert open_on(storage).verify(deep=True).ok


def test_a_record_of_many_variants(storage: MemoryStorage) -> None:
    """Large, and sound: it is read."""
    variants = msgspec.json.decode(storage.get(VERSION))["variants"]
    many = variants | {f"v{i}": variants["original"] for i in range(2_000)}
    put(storage, VERSION, edited(storage, VERSION, variants=many))
    assert len(open_on(storage).variants("acme/m")) == 2_001
    overwrite(storage, VERSION, lambda data: data.extend(b" "))
    assert all_bits(open_on(storage).load("acme/m:v7")) == all_bits(weights(1))
