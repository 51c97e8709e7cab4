"""What is lost comes back from a copy, or is told; what is good is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
import torch

from modelstore.errors import NotFoundError, StorageError
from modelstore.format.names import parse_reference
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.store.manifests import Manifests
from modelstore.store.mend.repair import repair
from modelstore.store.repo import Repo
from modelstore.testing.faults import CountingStorage, FaultyStorage, Killed
from tests.store.helpers import Small, cut, flip, weights

T = TypeVar("T")


def one() -> Small:
    """A store of one model."""
    small = Small.new()
    small.store.save("org/m", weights(1))
    return small


def test_a_good_store_is_not_written_to() -> None:
    small = one()
    counting = CountingStorage(small.storage)
    report = repair(Repo.on(counting), None, None)
    assert report.ok
    assert report.repaired == ()
    assert (report.tensors, report.chunks > 0, report.bytes > 0) == (3, True, True)
    assert not counting.requests.keys() & {"create", "put", "delete"}


def test_chunks_are_counted_once_whatever_shares_them() -> None:
    small = one()
    changed = dict(weights(1))
    name = next(iter(changed))
    small.store.save("org/m", changed | {name: changed[name] + 1})  # shares the others' chunks
    small.store.save("org/twin", weights(1))
    counts = [(report.tensors, report.chunks) for report in (small.store.verify(), small.store.repair())]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("harm", ["lost", "flipped", "cut"])
@pytest.mark.parametrize("wanted", [None, "org/m", "org/m@1"])
def test_a_manifest_is_rebuilt_from_its_copy(harm: str, wanted: str | None) -> None:
    small = one()
    key = manifest_key("org/m", small.entry("org/m").manifest)
    data = small.storage.get(key)
    spoil(small, key, harm)
    report = small.mend(ref=parse_reference(wanted) if wanted else None)
    assert report.ok
    assert report.repaired == (key,)
    assert small.storage.get(key) == data
    small.check("org/m", weights(1))


@pytest.mark.parametrize("harm", ["lost", "flipped", "cut"])
def test_a_copy_is_rebuilt_from_its_manifest(harm: str) -> None:
    small = one()
    entry = small.entry("org/m")
    good = small.storage.get(pack_key(entry.copy))
    spoil(small, pack_key(entry.copy), harm)
    report = small.mend()
    assert report.ok
    assert report.repaired == (pack_key(entry.copy),)
    assert small.storage.get(pack_key(entry.copy)) == good
    assert small.entry("org/m") == entry


@pytest.mark.parametrize("lost_manifest", [False, True])
def test_an_entry_that_points_at_the_wrong_copy_is_mended_by_what_packs_say(lost_manifest: bool) -> None:
    small = one()
    entry = small.entry("org/m")
    wrong = msgspec.structs.replace(entry, copy=small.manifest("org/m").packs[0])
    small.store.repo.catalog.replace_entry("org/m", 1, "original", "w", wrong)
    if lost_manifest:
        small.storage.delete(manifest_key("org/m", entry.manifest))
    report = small.mend()
    assert report.ok
    assert small.entry("org/m") == entry
    assert small.mend().repaired == ()
    small.check("org/m", weights(1))


def test_manifest_and_copy_both_lost() -> None:
    small = one()
    whole = small.copied()
    entry = small.entry("org/m")
    lost = {manifest_key("org/m", entry.manifest), pack_key(entry.copy)}
    for key in lost:
        small.storage.delete(key)
    report = small.mend()
    assert [p.object for p in report.problems] == [manifest_key("org/m", entry.manifest)]
    assert "--from" in report.problems[0].message
    again = small.mend(whole)
    assert again.ok
    assert set(again.repaired) == lost
    assert small.objects() == whole.objects()
    small.check("org/m", weights(1))


@pytest.mark.parametrize("harm", ["lost", "flipped", "cut"])
def test_a_pack_is_replaced_from_another_copy_of_the_store(harm: str) -> None:
    small = one()
    whole = small.copied()
    key = pack_key(small.manifest("org/m").packs[0])
    spoil(small, key, harm)
    report = small.mend()
    assert [(p.object, p.model) for p in report.problems] == [(key, "org/m")]
    assert report.problems[0].tensor in weights(1)
    assert "modelstore repair org/m --from URL" in report.problems[0].message
    mended = small.mend(whole)
    assert mended.ok
    assert mended.repaired == (key,)
    assert small.storage.get(key) == whole.storage.get(key)
    small.check("org/m", weights(1))


def test_a_pack_with_a_damaged_header_is_made_again_of_its_chunks() -> None:
    small = one()
    key = pack_key(small.manifest("org/m").packs[0])
    good = small.storage.get(key)
    spoil(small, key, "header")
    report = small.mend()
    assert report.ok
    assert report.repaired == (key,)
    assert small.storage.get(key) == good


def test_a_pack_comes_from_the_source_where_its_chunks_elsewhere_cannot_be_read() -> None:
    small = one()
    whole = small.copied()
    there = {key for key in small.objects() if key.startswith("packs/")}
    small.store.save("other", {"more": torch.randn(900), **weights(1)})
    key = pack_key(small.manifest("org/m").packs[0])
    small.storage.delete(key)
    copy = pack_key(small.entry("other").copy)
    closed = {k for k in small.objects() if k.startswith("packs/")} - there - {copy}
    assert closed

    class Closed(WrappingStorage):
        def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
            if verb == "read" and key in closed:
                raise StorageError("permission denied", object=key)
            return act()

    shut = Closed(small.storage)
    report = repair(Repo.on(shut), None, whole.storage)
    assert report.repaired == (key,)
    assert small.storage.get(key) == whole.storage.get(key)


def test_a_manifest_that_cannot_be_read_now_is_not_said_to_be_lost() -> None:
    small = one()
    entry = small.entry("org/m")

    class Closed(WrappingStorage):
        def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
            if verb in ("get", "read") and key in (manifest_key("org/m", entry.manifest), pack_key(entry.copy)):
                raise StorageError("permission denied", object=key)
            return act()

    shut = Closed(small.storage)
    report = repair(Repo.on(shut), None, None)
    assert [(p.kind, p.object) for p in report.problems] == [("unreadable", manifest_key("org/m", entry.manifest))]
    assert "lost" not in report.problems[0].message


def test_what_the_source_has_no_good_copy_of_stays_a_problem_and_the_rest_is_mended() -> None:
    small = one()
    small.store.save("other", weights(2))
    source = small.copied()
    keys = [pack_key(small.manifest(ref).packs[0]) for ref in ("org/m", "other")]
    for key in keys:
        small.damage(key, flip())
    source.damage(keys[0], flip(-2))
    report = small.mend(source)
    assert [p.object for p in report.problems] == [keys[0]]
    assert "another copy" in report.problems[0].message
    assert report.repaired == (keys[1],)
    small.check("other", weights(2))


def test_what_a_delta_is_stored_against_is_mended_too() -> None:
    small = Small.new()
    small.store.save("base", weights(1))
    tuned = {**weights(2)}
    small.store.save("tuned", tuned, codec="delta", parent="base")
    small.store.delete("base@1")
    whole = small.copied()
    base = small.manifest("tuned").base
    assert base is not None
    small.storage.delete(manifest_key("base", base.manifest))
    report = small.mend(ref=parse_reference("tuned"))
    assert report.ok
    assert report.repaired == (manifest_key("base", base.manifest),)
    key = pack_key(small.manifest("tuned").packs[0])
    small.storage.delete(key)
    for pack in Manifests(small.storage).read("base", base.manifest).packs:
        small.damage(pack_key(pack), flip())
    assert small.mend(whole).ok
    small.check("tuned", tuned)


def test_a_record_that_cannot_be_read_is_told_and_the_other_models_are_mended() -> None:
    small = one()
    small.store.save("other", weights(2))
    key = manifest_key("other", small.entry("other").manifest)
    small.storage.delete(key)
    record = next(k for k in small.objects() if k.startswith("models/org/m/versions/"))
    small.damage(record, cut)
    report = small.mend()
    assert [p.object for p in report.problems] == [record]
    assert report.repaired == (key,)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        one().mend(ref=parse_reference("nobody"))


def test_killed_at_any_write_a_rerun_finishes() -> None:
    at = 0
    while True:
        at += 1
        small = one()
        whole = small.copied()
        entry = small.entry("org/m")
        small.storage.delete(manifest_key("org/m", entry.manifest))
        small.storage.delete(pack_key(entry.copy))
        small.damage(pack_key(small_pack(whole)), flip())
        faulty = FaultyStorage(small.storage, kill_at=at, kill_after=bool(at % 2))
        try:
            repair(Repo.on(faulty), None, whole.storage)
        except Killed:
            assert small.mend(whole).ok
            small.check("org/m", weights(1))
            continue
        break
    assert at == 4


def small_pack(small: Small) -> str:
    """The digest of the model's first pack."""
    return small.manifest("org/m").packs[0]


def spoil(small: Small, key: str, harm: str) -> None:
    """Harm an object."""
    if harm == "lost":
        small.storage.delete(key)
    else:
        small.damage(key, {"flipped": flip(), "cut": cut, "header": flip(4)}[harm])
