"""One small object that cannot be read: it is named, everything else works, and `repair` mends what it can."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import torch
from msgspec import structs

import modelstore
from modelstore.client import Store
from modelstore.errors import ConflictError, CorruptionError, FormatError, ModelStoreError, NotFoundError
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.sealed import seal
from modelstore.plan.work import Limits, Work
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.store.collect.condemned import VOID, Condemnation
from modelstore.store.compact.compaction import clean
from modelstore.store.manifests import Manifests
from modelstore.store.repo import Repo
from tests.helpers.stores import all_bits, copy_all, keys, open_on, overwrite, shrink, weights

TORN: dict[str, bytes] = {"empty": b"", "garbage": b"\x00\xffgarbage", "another type": b"[1, 2]"}
V1, V2, V3 = (rec.version_key("m", n, 1) for n in (1, 2, 3))
PROD = rec.tag_key("m", "prod", 2)


@pytest.fixture
def storage() -> MemoryStorage:
    """A model of three versions, of which the third has a variant; a tag that was moved; another model."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    for n in (1, 2, 3):
        store.save("m", weights(n))
    store.compress("m@3", "int8", include=["*"])
    store.tag("m@1", "prod")
    store.tag("m@2", "prod")
    store.tag("m@1", "first")
    store.save("other", weights(9))
    return storage


def put(storage: Storage, key: str, data: bytes) -> None:
    storage.put(key, [data], len(data))


def is_sound(storage: Storage) -> None:
    store = open_on(storage)
    report = store.verify(deep=True)
    assert report.ok, report.problems


@pytest.mark.parametrize("data", TORN.values(), ids=TORN)
def test_the_newest_record_of_a_model(data: bytes, storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    key = rec.version_key("m", 3, 2)
    put(storage, key, data)
    store = open_on(storage)
    infos = {info.name: info for info in store.models()}
    assert infos["other"].problems == ()
    assert (infos["m"].versions, infos["m"].newest) == (2, 2)
    assert [(p.model, p.object) for p in infos["m"].problems] == [("m", key)]
    assert "version 3 of model 'm' cannot be read" in infos["m"].problems[0].message
    assert [info.version for info in store.versions("m")] == [1, 2]
    assert key in caplog.text
    for ref in ("m", "m@3"):
        with pytest.raises(FormatError, match="version 3 of model 'm'") as caught:
            store.load(ref)  # which one is the newest is not known, and not guessed
        assert caught.value.object == key
        assert ("such as m@2, the newest that can be read" in str(caught.value)) == (ref == "m")
    assert all_bits(store.load("m@2")) == all_bits(weights(2))
    assert all_bits(store.load("m@prod")) == all_bits(weights(2))
    assert store.describe("m@2").tags == ("prod",)
    assert store.save("m", weights(4)).version == 4
    assert all_bits(store.load("m")) == all_bits(weights(4))
    assert [p.object for p in store.verify().problems] == [key]
    report = store.repair()
    assert report.ok
    assert report.repaired == (key,)
    assert "record 2, which was damaged" in report.notes[0]
    assert all_bits(store.load("m@3")) == all_bits(weights(3))
    is_sound(storage)


def test_the_only_record_of_a_version(storage: MemoryStorage) -> None:
    put(storage, V2, b"")
    store = open_on(storage)
    assert all_bits(store.load("m")) == all_bits(weights(3))
    report = store.repair()
    assert [p.object for p in report.problems] == [V2]
    assert "modelstore rm m@2" in report.problems[0].message
    with pytest.raises(ConflictError, match="tagged prod"):
        store.delete("m@2")
    store.untag("m", "prod")
    store.delete("m@2")
    assert [v.version for v in store.versions("m")] == [1, 3]
    assert store.repair().ok
    is_sound(storage)


@pytest.mark.parametrize("key", [V2, PROD])
def test_works_on_other_versions_and_tags(key: str, storage: MemoryStorage) -> None:
    put(storage, key, b"")
    store = open_on(storage)
    store.compress("m@3", "int4", include=["*"])
    assert {one.name for one in store.du("m").versions} == {"m@1", "m@3"} | ({"m@2"} if key == PROD else set())
    assert next(store.watch("m")).version == 3
    store.tag("m@1", "best")
    source = open_on(MemoryStorage(uuid.uuid4().hex))
    for n in (5, 6, 7, 8):
        source.save("m", weights(n), tag=f"t{n}")
    assert [one.version for one in source.copy("m@1", store, tags=True).versions] == [4]  # its number is another's
    assert [one.version for one in source.copy("m@1", store, tags=True).versions] == [4]


@pytest.mark.parametrize("key", [V2, rec.version_key("m", 3, 2), PROD, rec.STORE_KEY])
def test_a_copy_of_the_store_has_it(key: str, storage: MemoryStorage) -> None:
    good = MemoryStorage(uuid.uuid4().hex)
    copy_all(storage, good)
    put(storage, key, b"")
    report = open_on(storage).repair(source=good.url)
    assert report.ok
    assert report.repaired == (key,)
    assert report.notes == ()
    assert storage.get(key) == good.get(key)
    put(storage, key, b"")
    assert open_on(storage, mirrors=[good]).repair().ok
    assert storage.get(key) == good.get(key)


def test_a_store_that_lost_its_own_record_says_so_and_gets_it_again(storage: MemoryStorage) -> None:
    before = all_bits(open_on(storage).load("m@1"))
    storage.delete(rec.STORE_KEY)
    for act in (
        lambda: open_on(storage).load("m"),
        lambda: open_on(storage).models(),
        lambda: open_on(storage).gc(),
        lambda: open_on(storage).save("m", weights(9)),
    ):
        with pytest.raises(CorruptionError, match=r"has models and no modelstore\.json.*run 'modelstore repair'"):
            act()
    assert [p.object for p in open_on(storage).verify().problems] == [rec.STORE_KEY]
    report = open_on(storage).repair()
    assert report.ok
    assert report.repaired == (rec.STORE_KEY,)
    assert all_bits(open_on(storage).load("m@1")) == before


def test_where_there_is_no_store_none_is_made_by_repair() -> None:
    empty = MemoryStorage(uuid.uuid4().hex)
    put(empty, "packs/ab/x", b"of another program")
    with pytest.raises(NotFoundError, match="there is no store"):
        open_on(empty).repair()
    assert keys(empty) == {"packs/ab/x"}


def test_a_tag(storage: MemoryStorage) -> None:
    put(storage, PROD, b"")
    store = open_on(storage)
    with pytest.raises(FormatError, match="tag 'prod' of model 'm'") as caught:
        store.load("m@prod")
    assert caught.value.object == PROD
    assert all_bits(store.load("m@first")) == all_bits(weights(1))
    assert [info.tags for info in store.versions("m")] == [("first",), (), ()]
    with pytest.raises(FormatError):
        store.delete("m@3")  # which the tag may name
    store.tag("m@3", "prod")  # sets it anew
    assert all_bits(store.load("m@prod")) == all_bits(weights(3))
    put(storage, rec.tag_key("m", "prod", 3), b"")
    report = store.repair()
    assert report.ok
    assert "names version 1" in report.notes[0]  # as the record before both says
    assert all_bits(store.load("m@prod")) == all_bits(weights(1))
    is_sound(storage)


def test_a_whole_model_can_be_deleted_whatever_is_torn(storage: MemoryStorage) -> None:
    put(storage, V2, b"")
    put(storage, rec.version_key("m", 3, 2), b"")
    put(storage, PROD, b"")
    store = open_on(storage)
    store.delete("m", all=True)
    assert [info.name for info in store.models() if info.versions or info.problems] == ["other"]
    store.gc(dry_run=False, grace=0)
    assert not [key for key in keys(storage) if key.startswith("models/m/manifests/")]


def test_garbage_collection_keeps_what_a_torn_record_may_name_and_sweeps_the_rest(storage: MemoryStorage) -> None:
    key = rec.version_key("m", 3, 2)
    store = open_on(storage)
    variant = store.repo.catalog.version("m", 3).variants["int8"]
    store.save("gone", weights(7))
    store.delete("gone", all=True)
    good = storage.get(key)
    put(storage, key, b"")
    storage.delete(rec.manifest_key("m", variant.manifest))  # only its copy is left, which only the torn record names
    swept = open_on(storage).gc(dry_run=False, grace=0)
    assert swept.bytes > 0
    assert all("models/gone/" in one.key or one.key.startswith("packs/") for one in swept.objects)
    assert [p.object for p in swept.problems] == [key]
    put(storage, key, good)
    assert open_on(storage).repair().ok
    is_sound(storage)
    assert open_on(storage).load("m:int8").keys() == weights(3).keys()


@pytest.mark.parametrize("data", [b"", b'{"format":1,"blake3":"' + b"0" * 64 + b'"}'])
def test_a_torn_page_of_a_work_under_way_keeps_every_pack(data: bytes, storage: MemoryStorage) -> None:
    old = rec.pack_key("0" * 64)
    put(storage, old, b"x")
    put(storage, f"{rec.JOBS}{'ab' * 16}/page.json", data)
    swept = open_on(storage).gc(dry_run=False, grace=-0.0)
    assert old in {one.key for one in swept.objects}  # with no grace the work counts as given up
    put(storage, old, b"x")
    storage._shelf.objects[old] = (b"x", 0.0)
    put(storage, f"{rec.JOBS}{'ab' * 16}/page.json", data)
    swept = open_on(storage).gc(dry_run=False, grace=60)
    assert swept.objects == ()
    assert len(swept.problems) == 1


def test_the_record_of_the_store(storage: MemoryStorage) -> None:
    put(storage, rec.STORE_KEY, b"")
    with pytest.raises(FormatError, match="modelstore repair") as caught:
        open_on(storage).load("m")
    assert caught.value.object == rec.STORE_KEY
    assert [p.object for p in open_on(storage).verify().problems] == [rec.STORE_KEY]
    assert open_on(storage).repair().repaired == (rec.STORE_KEY,)
    is_sound(storage)


def test_a_journal(storage: MemoryStorage) -> None:
    key = f"{rec.JOBS}{'ab' * 16}/page.json"
    put(storage, key, b'{"tensors":{},"chunks":[],"blake3":"' + b"0" * 64 + b'"}')
    assert [p.object for p in open_on(storage).verify().problems] == [key]
    assert open_on(storage).repair().repaired == (key,)
    is_sound(storage)


def test_a_manifest_that_is_lost_does_not_stop_saves(storage: MemoryStorage) -> None:
    for key in keys(storage, "models/m/manifests/"):
        put(storage, key, b"")
    store = open_on(storage)
    saved = store.save("m", weights(4))
    assert all_bits(store.load(f"m@{saved.version}")) == all_bits(weights(4))
    assert store.repair().ok
    assert all_bits(store.load("m@1")) == all_bits(weights(1))


STRANGERS = ["0.json", "0-readme.txt", "00000000/00000000.txt", "00000000.json.bak", "x/y"]


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("folder", ["models/m/versions/99999996/", "models/m/versions/", "models/m/tags/prod/"])
def test_strange_objects_among_records(folder: str, name: str, storage: MemoryStorage) -> None:
    put(storage, folder + name, b"whatever")
    store = open_on(storage)
    is_sound(storage)
    assert all_bits(store.load("m")) == all_bits(weights(3))
    assert all_bits(store.load("m@prod")) == all_bits(weights(2))
    assert store.save("m", weights(4)).version == 4
    store.tag("m@4", "prod")
    assert all_bits(store.load("m@prod")) == all_bits(weights(4))


@pytest.mark.parametrize("key", [V2, rec.version_key("m", 3, 2), PROD, rec.STORE_KEY])
def test_every_flipped_bit_is_found_by_verify(key: str, storage: MemoryStorage) -> None:
    good = storage.get(key)
    for at in range(0, len(good), 7):
        overwrite(storage, key, lambda data, at=at: data.__setitem__(at, data[at] ^ 4))  # type: ignore[misc]
        assert [p.object for p in open_on(storage).verify("m" if key != rec.STORE_KEY else None).problems] == [key]
        put(storage, key, good)


@pytest.mark.parametrize("what", ["pipe", "link", "large"])
def test_what_is_no_file_or_too_large_in_the_place_of_a_record(what: str, tmp_path: Path) -> None:
    store = modelstore.open(tmp_path)
    store.save("m", weights(1))
    store.save("m", weights(2))
    store.save("other", weights(3))
    place = tmp_path / V2
    place.unlink()
    if what == "pipe":
        os.mkfifo(place)
    elif what == "link":
        place.symlink_to("/dev/zero")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)
    store = modelstore.open(tmp_path)
    assert {info.name: len(info.problems) for info in store.models()} == {"m": 1, "other": 0}
    assert all_bits(store.load("m@1")) == all_bits(weights(1))
    with pytest.raises(ModelStoreError, match="version 2 of model 'm'"):
        store.load("m")
    assert store.save("m", weights(4)).version == 3
    assert isinstance(store, Store)


def test_a_record_whose_objects_were_collected_does_not_stand_in_for_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink(monkeypatch)
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", weights(1))
    store.save("m", {**weights(2), "head": weights(1)["head"]})
    store.delete("m@1")
    clean(Repo.on(storage), dry_run=False, grace=0, bound=1.0, work=Work(Limits(6 << 20)))
    first = rec.parse_version(storage.get(V2), V2).variants["original"]
    key, manifest = rec.version_key("m", 2, 2), rec.manifest_key("m", first.manifest)
    good = storage.get(key)
    assert storage.info(manifest) is None, "only the newest record tells what this version needs"
    put(storage, key, b"")
    report = open_on(storage).repair()
    assert report.repaired == ()
    assert [p.object for p in report.problems] == [key]
    for word in ("version 2 of model 'm'", key, manifest, "its record 1", "modelstore repair m --from URL", "rm m@2"):
        assert word in report.problems[0].message
    assert storage.get(key) == b""  # it is damaged still, and a collection keeps what it may name
    open_on(storage).gc(dry_run=False, grace=0)
    assert not keys(storage, "intents/")
    put(storage, key, good)
    is_sound(storage)


@pytest.mark.parametrize("how", ["lost", "cut"])
def test_the_newest_record_that_is_whole_stands_in(how: str, storage: MemoryStorage) -> None:
    store = open_on(storage)
    store.compress("m@3", "ternary", include=["*"])
    key, entries = rec.version_key("m", 3, 3), store.repo.catalog.version("m", 3).variants
    put(storage, key, b"")
    original, int8 = (set(Manifests(storage).entry("m", entries[name]).packs) for name in ("original", "int8"))
    pack = rec.pack_key((int8 - original).pop())
    if how == "lost":
        storage.delete(pack)
    else:
        put(storage, pack, storage.get(pack)[:-1])
    report = open_on(storage).repair()
    assert report.ok
    assert "what its record 1 says" in report.notes[0]
    assert list(open_on(storage).versions("m")[-1].variants) == ["original"]
    is_sound(storage)


def test_what_another_copy_of_the_store_has_is_there(storage: MemoryStorage) -> None:
    other = MemoryStorage(uuid.uuid4().hex)
    copy_all(storage, other)
    key = rec.version_key("m", 3, 2)
    for at in (storage, other):
        put(at, key, b"")
    for pack in keys(storage, rec.PACKS):
        storage.delete(pack)
    assert not open_on(storage).repair("m@3").ok
    assert open_on(storage).repair(source=other.url).ok
    is_sound(storage)


def test_what_a_collection_is_removing_is_not_relied_on(storage: MemoryStorage) -> None:
    key = rec.version_key("m", 3, 2)
    entry = rec.parse_version(storage.get(V3), V3).variants["original"]
    pack = rec.pack_key(Manifests(storage).entry("m", entry).packs[0])
    put(storage, key, b"")
    condemned = Condemnation(storage, {pack})
    assert condemned.pronounce({pack})
    assert f"object {pack} is missing, too short, or being removed" in open_on(storage).repair().problems[0].message
    condemned.withdraw()
    assert open_on(storage).repair().ok


def test_a_tag_does_not_come_to_name_a_version_that_is_gone(storage: MemoryStorage) -> None:
    store = open_on(storage)
    store.untag("m", "first")
    store.delete("m@1")
    put(storage, PROD, b"")
    report = open_on(storage).repair()
    assert [p.object for p in report.problems] == [PROD]
    assert "its record 1 names version 1, which is not there any more" in report.problems[0].message
    assert "set it anew with 'modelstore tag'" in report.problems[0].message
    store.tag("m@2", "prod")
    assert open_on(storage).repair().ok
    assert all_bits(store.load("m@prod")) == all_bits(weights(2))


def test_a_folder_in_the_place_of_a_manifest_or_a_record(tmp_path: Path) -> None:
    store = modelstore.open(tmp_path)
    store.save("m", weights(1))
    store.save("other", weights(2))
    key = next(iter(keys(store.repo.storage, "models/m/manifests/")))
    other = next(iter(keys(store.repo.storage, "models/other/manifests/")))
    good = (tmp_path / key).read_bytes()
    (tmp_path / other).write_bytes(b"")
    (tmp_path / key).unlink()
    (tmp_path / key / "x").mkdir(parents=True)
    what = f"{key!r} in file://{tmp_path}: a folder lies in its place; move it away, then run 'modelstore repair'"
    with pytest.raises(ModelStoreError) as caught:
        modelstore.open(tmp_path).load("m")
    assert f"no object {what}" in str(caught.value)
    report = modelstore.open(tmp_path).repair()
    assert [(p.object, p.message) for p in report.problems] == [(key, f"of model 'm': cannot write {what}")]
    assert report.repaired == (other,)
    (tmp_path / key / "x").rmdir()
    (tmp_path / key).rmdir()
    assert modelstore.open(tmp_path).repair().ok
    assert (tmp_path / key).read_bytes() == good
    (tmp_path / V2).mkdir(parents=True)  # where the next version's record will lie
    assert modelstore.open(tmp_path).save("m", weights(3)).version == 3  # the number is taken, and no more


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_in_the_place_of_the_newest_record_is_damage(tmp_path: Path, inside: bool) -> None:
    store = modelstore.open(tmp_path)
    for n in (1, 2):
        store.save("m", weights(n))
        store.tag(f"m@{n}", "prod")
    store.save("other", weights(3))
    of_other = rec.version_key("other", 1, 1)
    good = {key: (tmp_path / key).read_bytes() for key in (V2, PROD, of_other)}
    for key in good:
        (tmp_path / key).unlink()
        (tmp_path / key).mkdir()
        if inside:
            (tmp_path / key / "x").write_bytes(b"")
    store = modelstore.open(tmp_path)
    for ref in ("m", "m@2", "m@prod", "other"):
        with pytest.raises(CorruptionError, match="a folder lies in its place; move it away"):
            store.load(ref)
    assert all_bits(store.load("m@1")) == all_bits(weights(1))
    assert {info.name: bool(info.problems) for info in store.models()} == {"m": True, "other": True}
    for report in (store.verify(), store.repair()):
        assert {p.object for p in report.problems} == set(good)
    assert store.gc(dry_run=False, grace=0).problems
    assert store.save("m", weights(4)).version == 3
    for key, data in good.items():
        for left in (tmp_path / key).iterdir():
            left.unlink()
        (tmp_path / key).rmdir()
        (tmp_path / key).write_bytes(data)
    store = modelstore.open(tmp_path)
    assert store.verify(deep=True).ok
    assert all_bits(store.load("m@2")) == all_bits(weights(2))
    assert all_bits(store.load("m@prod")) == all_bits(weights(2))


ABSURD = (rec.LAST, rec.LAST + 1, rec.LAST - 5)


@pytest.mark.parametrize("version", ABSURD)
@pytest.mark.parametrize("kind", ["damaged", "moved", "deleted unread", "voided"])
def test_an_absurd_number_that_is_no_version_s_does_not_end_the_numbering(
    storage: MemoryStorage, version: int, kind: str
) -> None:
    good = rec.parse_version(storage.get(V1), V1)
    planted = {
        "damaged": b"garbage",
        "moved": storage.get(V1),
        "deleted unread": seal(structs.replace(good, version=version, variants={}, deleted=True)),
        "voided": seal(structs.replace(good, version=version, deleted=True, writer=f"{VOID}x")),
    }[kind]
    put(storage, rec.version_key("m", version, 1), planted)
    store = open_on(storage)
    assert [store.save("m", weights(n)).version for n in (4, 5)] == [4, 5]
    assert all_bits(store.load("m@5")) == all_bits(weights(5))
    for rank in range(2):
        store.save_part("m", {f"part{rank}": torch.ones(3)}, session="s", rank=rank, ranks=2)
    assert store.publish("m", "s", ranks=2).version == 6
    if version <= rec.LAST and kind in ("damaged", "moved"):
        store.delete(f"m@{version}")
        assert store.save("m", weights(7)).version == 7
        assert all_bits(store.load("m")) == all_bits(weights(7))


@pytest.mark.parametrize("whole", [True, False])
def test_an_intent_of_an_absurd_version_does_not_end_the_numbering(storage: MemoryStorage, whole: bool) -> None:
    good = structs.replace(rec.parse_version(storage.get(V1), V1), version=rec.LAST)
    claim = hs.Claim("m", rec.LAST, 1, good.variants)
    data = hs.encode(hs.Intent(FORMAT, (), claim)) if whole else b"garbage"
    put(storage, hs.intent_key("ab" * 16, good), data)
    store = open_on(storage)
    store.gc(dry_run=False, grace=0)
    assert store.save("m", weights(4)).version == 4
    assert all_bits(store.load("m")) == all_bits(weights(4))


def test_after_the_last_number_there_is_none(storage: MemoryStorage) -> None:
    good = rec.parse_version(storage.get(V1), V1)
    put(storage, rec.version_key("m", rec.LAST, 1), seal(structs.replace(good, version=rec.LAST)))
    before = keys(storage, "intents/")
    with pytest.raises(ConflictError, match="the last that there can be: save it under another name"):
        open_on(storage).save("m", weights(4))
    assert keys(storage, "intents/") == before
    assert all_bits(open_on(storage).load("m")) == all_bits(weights(1))


@pytest.mark.parametrize("torn", TORN)
def test_a_version_that_is_lost_is_told_of_precisely_and_nothing_else_is(storage: MemoryStorage, torn: str) -> None:
    put(storage, V2, TORN[torn])  # its one record
    store = open_on(storage)
    assert [model.name for model in store.models()] == ["m", "other"]
    assert [info.version for info in store.versions("m")] == [1, 3]
    assert [entry.version for entry in store.log("m")] == [3, 1]
    (problem,) = store.repair("m").problems
    for part in (
        "version 2 of model 'm' is lost",
        V2,
        "other versions are as they were",
        "'modelstore repair m --from URL'",
        "save the model again",
        "after 'modelstore untag m prod' with 'modelstore rm m@2'",
    ):
        assert part in problem.message
    saved = store.save("m", weights(2))
    assert (saved.version, saved.stored) == (4, 0)
    assert all_bits(store.load("m")) == all_bits(weights(2))
    store.untag("m", "prod")
    store.delete("m@2")
    assert store.repair().ok
    assert store.verify().ok
    assert [info.version for info in store.versions("m")] == [1, 3, 4]


def test_a_tag_of_a_deleted_version_is_told_of_and_removed(storage: MemoryStorage) -> None:
    """As one that was set by who was killed while the version was deleted."""
    store = open_on(storage)
    store.untag("m", "prod")
    store.delete("m@2")
    key = rec.tag_key("m", "prod", 4)
    put(storage, key, seal(rec.TagRecord(FORMAT, "m", "prod", 4, "killed", 0.0, 2)))
    (problem,) = store.verify().problems
    assert "tag 'prod' of model 'm' names version 2, which was deleted: run 'modelstore repair m'" in problem.message
    assert problem.object == key
    report = store.repair()
    assert report.ok
    assert report.notes == ("tag 'prod' of model 'm' is gone: it named version 2, which was deleted",)
    assert store.verify().ok
    assert store.models()[0].tags == {"first": 1}


def test_a_tag_of_a_deleted_version_is_set_back_to_what_it_named_before(storage: MemoryStorage) -> None:
    """As who sets a tag does where he lives on."""
    store = open_on(storage)
    store.untag("m", "prod")
    store.delete("m@2")
    put(storage, rec.tag_key("m", "first", 2), seal(rec.TagRecord(FORMAT, "m", "first", 2, "killed", 0.0, 2)))
    report = store.repair()
    assert report.ok
    assert report.notes == ("tag 'first' of model 'm' names version 1 again: it named version 2, which was deleted",)
    assert store.verify().ok
    assert store.models()[0].tags == {"first": 1}
