"""What is referred to stays, what is not goes, and nobody at work loses anything."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import modelstore.client
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.keys import TEMPORARY
from modelstore.storage.wrapping import ReadOnlyStorage, Verb, WrappingStorage
from modelstore.store.collect import garbage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.store.helpers import Small, cut, weights

T = TypeVar("T")
JUNK, JOB = pack_key("0" * 64), "0" * 32


def two_versions() -> Small:
    """Version 1, and version 2 with other values."""
    small = Small.new()
    small.store.save("org/m", weights(1))
    small.store.save("org/m", weights(2))
    return small


def packs(small: Small, ref: str) -> set[str]:
    """Keys of the packs of a variant, its copy included."""
    return {pack_key(d) for d in (*small.manifest(ref).packs, small.entry(ref).copy)}


def records(keys: set[str]) -> set[str]:
    """Keys that are no packs, manifests or jobs."""
    return {k for k in keys if "/manifests/" not in k and not k.startswith(("packs/", "jobs/"))}


def test_what_is_live_stays() -> None:
    small = two_versions()
    small.age(1e6)
    before = small.objects()
    swept = small.sweep(grace=0)
    assert swept.objects == ()
    assert swept.kept == len(before) - len(records(before))
    assert small.objects() == before


def test_a_deleted_version_goes_when_its_deletion_is_older_than_the_grace_period() -> None:
    small = two_versions()
    first = packs(small, "org/m@1") | {manifest_key("org/m", small.entry("org/m@1").manifest)}
    second = packs(small, "org/m@2")
    small.age(1e6)
    small.store.delete("org/m@1")
    assert small.sweep().objects == (), "deleted just now: readers may be at work"
    small.age(101)
    would = small.sweep(dry_run=True)
    assert {one.key for one in would.objects} == first - second
    assert would.bytes == sum(one.size for one in would.objects) > 0
    assert first <= small.objects()
    before = records(small.objects())
    swept = small.sweep()
    assert set(swept.objects) == set(would.objects)
    assert not small.objects() & (first - second)
    assert records(small.objects()) == before, "records are kept, so that numbers are not used twice"
    small.check("org/m@2", weights(2))
    assert small.store.save("org/m", weights(3)).version == 3


def test_a_deleted_variant_goes_by_the_same_rule() -> None:
    small = two_versions()
    other = small.entry("org/m@2")
    catalog = small.store.repo.catalog
    catalog.publish_variants("org/m", 1, {"twin": other}, "w")
    catalog.delete("org/m", 2, None, "w")
    small.age(101)
    assert small.sweep().objects == ()
    catalog.delete("org/m", 1, "twin", "w")
    assert small.sweep().objects == (), "the superseded record is looked at, too"
    small.age(101)
    assert len(small.sweep().objects) >= 2
    small.check("org/m@1", weights(1))


def test_a_delta_keeps_what_it_is_stored_against_also_of_another_model() -> None:
    small = Small.new()
    small.store.save("base", weights(1))
    small.store.save("tuned", {**weights(1), "mlp.bias": weights(2)["mlp.bias"]}, codec="delta", parent="base")
    copy = pack_key(small.entry("base").copy)
    small.store.delete("base@1")
    small.age(1e6)
    small.sweep(grace=0)
    assert copy in small.objects()
    small.check("tuned", {**weights(1), "mlp.bias": weights(2)["mlp.bias"]})
    small.store.delete("tuned@1")
    small.age(1e6)
    small.sweep(grace=0)
    assert not [k for k in small.objects() if k.startswith("packs/") or "/manifests/" in k]


def test_what_a_killed_save_left_goes_with_its_journal_when_it_is_old() -> None:
    small = two_versions()
    stale = {
        f"jobs/{JOB}/1.json": b"{}",
        f"packs/00/{'0' * 64}.safetensors": b"x",
        f"models/new/manifests/{'0' * 64}.json.zst": b"y",
    }
    for key, data in stale.items():
        small.storage.put(key, [data], len(data))
    assert small.sweep().objects == ()
    small.age(101)
    assert {one.key for one in small.sweep().objects} == set(stale)


OTHERS = [
    "notes.txt",
    ".tmp-notes",
    "packs/notes.txt",
    "packs/ab/model.safetensors",
    f"packs/ab/{'0' * 64}.safetensors",
    "models/bert/checkpoints/1.pt",
    "models/bert/manifests/1.json",
    "models/org/m/manifests/notes.json.zst",
    "jobs/train.json",
    "jobs/1/log.json",
    "intents/greet.json",
    "condemned/1/verdict.json",
    "condemned/1/candidates.json",
]


def test_what_others_keep_in_its_folders_is_left_alone_and_holds_nothing_up(tmp_path: Path) -> None:
    store = modelstore.client.open(str(tmp_path), memory="64MiB", threads=2)
    store.save("org/m", weights(1))
    for name in OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    store.save("org/m", weights(2))
    store.delete("org/m@1")
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    swept = store.gc(dry_run=False, grace=0)
    assert swept.objects
    assert not swept.problems
    assert store.verify().ok
    assert store.repair().ok
    assert [(tmp_path / name).read_text() for name in OTHERS] == ["mine"] * len(OTHERS)


def test_a_work_that_goes_on_keeps_its_old_pages_and_all_that_they_name() -> None:
    small = two_versions()
    pack = pack_key("a" * 64)
    for key, data in {f"jobs/{JOB}/1.json": b'["' + b"a" * 64 + b'"]', f"jobs/{JOB}/2.json": b"{}", pack: b"x"}.items():
        small.storage.put(key, [data], len(data))
    small.age(1000, f"jobs/{JOB}/1.json", pack)
    assert small.sweep().objects == ()
    small.age(1000, f"jobs/{JOB}/2.json")
    assert {one.key for one in small.sweep().objects} == {f"jobs/{JOB}/1.json", f"jobs/{JOB}/2.json", pack}


@pytest.mark.parametrize("grace", [-1, -1e-9, math.nan])
def test_grace_must_be_a_time(grace: float) -> None:
    with pytest.raises(ValueError, match="grace"):
        Small.new().sweep(grace=grace)


class Shifted(WrappingStorage):
    """A storage whose clock is an hour behind this machine's."""

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def info(self, key: str) -> ObjectInfo | None:
        info = super().info(key)
        return info and info._replace(modified=info.modified - 3600)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, limit=limit, after=after):
            yield info._replace(modified=info.modified - 3600)


def test_the_clock_is_the_storages() -> None:
    small = two_versions()
    small.storage.put(JUNK, [b"x"], 1)
    assert small.sweep(on=Shifted(small.storage)).objects == ()
    small.age(101)
    assert [one.key for one in small.sweep(on=Shifted(small.storage)).objects] == [JUNK]


def test_a_dry_run_on_a_store_open_for_reading_only() -> None:
    small = two_versions()
    small.storage.put(JUNK, [b"x"], 1)
    small.age(1000)
    swept = small.sweep(dry_run=True, on=ReadOnlyStorage(small.storage))
    assert [one.key for one in swept.objects] == [JUNK]


def test_a_lost_manifest_is_read_from_its_copy_and_without_one_all_packs_are_kept() -> None:
    small = two_versions()
    small.storage.put(JUNK, [b"x"], 1)
    small.age(1000)
    entry = small.entry("org/m@1")
    small.storage.delete(manifest_key("org/m", entry.manifest))
    assert [one.key for one in small.sweep().objects] == [JUNK]
    small.damage(pack_key(entry.copy), cut)
    small.storage.put(JUNK, [b"x"], 1)
    small.age(1000)
    before = small.objects()
    swept = small.sweep()
    assert swept.objects == ()
    assert [one.object for one in swept.problems] == [manifest_key("org/m", entry.manifest)]
    assert small.objects() == before


def test_of_a_damaged_record_all_is_kept_that_it_may_name() -> None:
    small = two_versions()
    small.storage.put(JUNK, [b"x"], 1)
    small.age(1000)
    key = next(k for k in sorted(small.objects()) if "/versions/" in k)
    small.damage(key, cut)
    swept = small.sweep()
    assert [one.key for one in swept.objects] == [JUNK]
    assert [one.object for one in swept.problems] == [key]


def test_killed_at_any_write_it_leaves_the_store_whole_and_a_rerun_finishes() -> None:
    for after in (False, True):
        for at in range(1, 100):
            small = two_versions()
            live = packs(small, "org/m@2") | {manifest_key("org/m", small.entry("org/m@2").manifest)}
            small.store.delete("org/m@1")
            small.age(1000)
            faulty = FaultyStorage(small.storage, kill_at=at, kill_after=after)
            with contextlib.suppress(Killed):
                small.sweep(on=faulty)
            small.check("org/m@2", weights(2))
            small.age(1000)
            small.sweep()
            assert {k for k in small.objects() if k not in records(small.objects())} == live
            if not faulty.dead:
                break
        assert at > 4


class Beside(WrappingStorage):
    """Runs `act` once, just before the first operation that `when` chooses."""

    def __init__(self, inner: Storage, when: Callable[[Verb, str], bool], act: Callable[[], object]) -> None:
        super().__init__(inner)
        self._when = when
        self._act = act
        self.done = False

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if not self.done and self._when(verb, key):
            self.done = True
            self._act()
        return act()


WHENS: dict[str, Callable[[Verb, str], bool]] = {
    "before it begins": lambda verb, _: verb == "create",
    "while it marks": lambda verb, key: verb == "list" and "/versions/" in key,
    "before it lists jobs": lambda verb, key: verb == "list" and key == "jobs/",
    "before it lists manifests": lambda verb, key: verb == "list" and key.endswith("/manifests/"),
    "before it lists packs": lambda verb, key: verb == "list" and key == "packs/",
    "before it looks at a pack again": lambda verb, key: verb == "info" and key.startswith("packs/"),
}


@pytest.mark.parametrize("when", WHENS.values(), ids=WHENS)
def test_a_whole_save_at_any_moment_of_it_loses_nothing(when: Callable[[Verb, str], bool]) -> None:
    small = two_versions()
    small.store.delete("org/m@1")
    small.age(1e6)
    # The very values that are about to be swept: their packs are there, and must not be relied upon.
    beside = Beside(small.storage, when, lambda: modelstore.client.open(small.store.url).save("org/m", weights(1)))
    small.sweep(on=beside)
    assert beside.done
    small.check("org/m@3", weights(1))
    small.check("org/m@2", weights(2))


class Sweeping(WrappingStorage):
    """Collects garbage before every operation of a writer."""

    def __init__(self, small: Small) -> None:
        super().__init__(small.storage)
        self._small = small
        self.sweeps = 0

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        self.sweeps += 1
        self._small.sweep()
        return act()


def test_a_save_with_a_collection_before_each_of_its_steps() -> None:
    small = two_versions()
    small.store.delete("org/m@1")
    small.age(1e6)
    sweeping = Sweeping(small)
    modelstore.client.Store(sweeping, memory="64MiB", threads=2).save("org/m", weights(1))
    assert sweeping.sweeps > 5
    small.check("org/m@3", weights(1))


def test_a_failure_to_remove_is_told() -> None:
    small = two_versions()
    small.store.delete("org/m@1")
    small.age(1000)

    class Stubborn(WrappingStorage):
        def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
            if verb == "delete" and key.startswith("packs/"):
                raise PermissionError(key)
            return act()

    with pytest.raises(PermissionError):
        small.sweep(on=Stubborn(small.storage))
    small.check("org/m@2", weights(2))


def test_many_packs_are_listed_folder_by_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    small = two_versions()
    small.storage.put(JUNK, [b"x"], 1)
    small.age(1000)
    monkeypatch.setattr(garbage, "_ONE_LISTING", 2)
    assert [one.key for one in small.sweep().objects] == [JUNK]


def test_temporary_files_of_killed_writers_go(tmp_path: Path) -> None:
    store = modelstore.client.open(tmp_path / "s", memory="64MiB")
    store.save("m", weights(1))
    folder = next((tmp_path / "s" / "packs").iterdir())
    temporary = folder / f"{TEMPORARY}1-{16 * 'a'}"
    temporary.write_bytes(b"12345")
    assert store.gc(dry_run=False, grace=3600).objects == ()

    os.utime(temporary, (1, 1))
    assert [(o.key, o.size) for o in store.gc(dry_run=True, grace=3600).objects] == [
        (temporary.relative_to(tmp_path / "s").as_posix(), 5)
    ]
    assert temporary.exists()
    store.gc(dry_run=False, grace=3600)
    assert not temporary.exists()
    assert list(store.load("m"))


def test_every_copy_of_a_manifest_stays_that_a_record_names() -> None:
    small = Small.new()
    small.store.save("a", weights(1))
    small.store.rename("a", "d")
    small.store.save("d", weights(1))  # the same manifest, whose copy says another name
    small.sweep(grace=0)
    assert small.store.verify().ok
    small.store.delete("d@2")
    small.sweep(grace=0)
    assert small.store.verify().ok
