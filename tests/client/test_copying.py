"""Copies between stores: exact, once, and whatever happens meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import modelstore.client
from modelstore.errors import ConflictError, CorruptionError, NotFoundError, UnsupportedError
from modelstore.format.buffers import Buffer
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import open_on, pack_sizes, shrink
from tests.store.helpers import Small, cut, flip, weights

T = TypeVar("T")


def linear(seed: int) -> dict[str, torch.Tensor]:
    """A model with something to compress."""
    return {**weights(seed), "model.layers.0.mlp.up_proj.weight": torch.randn(64, 128).bfloat16()}


@pytest.fixture
def full() -> Small:
    """Two versions, a variant, a tag; and a delta of another model."""
    return _full().copied()


@cache
def _full() -> Small:
    small = Small.new()
    small.store.save("org/m", linear(1), tag="prod")
    small.store.save("org/m", linear(2))
    small.store.compress("org/m@1", "int8")
    small.store.save("tuned", {**linear(1), "mlp.bias": torch.arange(7) + 9}, codec="delta", parent="org/m@1")
    return small


def same(one: Small, other: Small, *refs: str) -> None:
    """See that these load with the same values from both, in a new process's eyes, and that all is well there."""
    a, b = (modelstore.client.open(small.store.url, memory="64MiB", threads=2) for small in (one, other))
    for ref in refs:
        there = b.load(ref)
        for name, tensor in a.load(ref).items():
            assert torch.equal(there[name], tensor), (ref, name)
    assert b.verify(deep=True).problems == ()


def test_a_version_comes_with_what_is_asked_for_and_no_more(full: Small) -> None:
    other = Small.new()
    done = full.store.copy("org/m", other.store)
    assert [(one.source, one.model, one.version, one.variants, one.new) for one in done.versions] == [
        ("org/m@2", "org/m", 2, ("original",), True)
    ]
    assert {key for key in other.objects() if key.startswith("packs/")} <= full.objects()
    assert (
        done.sent
        == sum(pack_sizes(other.storage).values()) - other.storage.get(pack_key(other.entry("org/m").copy)).__len__()
    )
    assert [version.version for version in other.store.versions("org/m")] == [2], "the number it has"
    same(full, other, "org/m@2")
    done = full.store.copy("org/m@prod:int8", other.store, tags=True)
    assert done.versions[0].variants == ("original", "int8")
    assert other.store.models()[0].tags == {"prod": 1}
    same(full, other, "org/m@prod:int8", "org/m@1", "org/m@2")
    assert other.store.save("org/m", weights(5)).version == 3


def test_what_is_there_is_not_sent(full: Small) -> None:
    other = Small.new()
    full.store.copy(None, other.store, all=True)
    before = other.objects()
    again = full.store.copy(None, other.store, all=True)
    assert (again.sent, again.packs) == (0, 0)
    assert not any(one.variants or one.new for one in again.versions)
    assert {k for k in other.objects() if not k.startswith("jobs/")} == before
    same(full, other, "org/m@1", "org/m@1:int8", "org/m@2", "tuned")


def test_what_a_delta_is_stored_against_comes_along(full: Small) -> None:
    other = Small.new()
    full.store.copy("tuned", other.store)
    assert [model.name for model in other.store.models()] == ["tuned"]
    same(full, other, "tuned")
    other.age(1e6)
    other.sweep(grace=0)
    same(full, other, "tuned")


def test_a_delta_whose_base_is_lost_is_refused_with_the_reason(full: Small) -> None:
    full.storage.delete(manifest_key("org/m", full.entry("org/m@1").manifest))
    fresh = modelstore.client.open(full.store.url, memory="64MiB")
    other = Small.new()
    with pytest.raises(CorruptionError, match="difference to a version of 'org/m'"):
        fresh.copy("tuned", other.store)
    assert not [k for k in other.objects() if "/versions/" in k or k.startswith("packs/")]


def test_another_name_in_the_same_store_sends_nothing(full: Small) -> None:
    done = full.store.copy("org/m@1", full.store, name="mine", variants=True)
    assert (done.sent, done.versions[0].model) == (0, "mine")
    same(full, full, "mine:int8", "mine")
    full.store.delete("org/m", all=True)
    full.age(1e6)
    full.sweep(grace=0)
    full.check("mine", full.store.load("mine"))
    assert full.store.verify(deep=True).ok


def test_a_number_that_is_taken_there_gives_the_next_and_is_known_again(full: Small) -> None:
    other = Small.new()
    other.store.save("org/m", weights(7))
    done = full.store.copy("org/m@1", other.store)
    assert [(one.version, one.new) for one in done.versions] == [(2, True)]
    again = full.store.copy("org/m@1", other.store, variants=True)
    assert [(one.version, one.new, one.variants) for one in again.versions] == [(2, False, ("int8",))]
    other.check("org/m@1", weights(7))


def test_it_is_known_again_when_it_was_stored_anew(full: Small) -> None:
    other = Small.new()
    full.store.copy("org/m@1", other.store)
    full.store.delete("org/m@1:int8")
    full.store.compress("org/m@1", "ladder")
    done = full.store.copy("org/m@1", other.store, variants=True)
    assert [(one.version, one.new) for one in done.versions] == [(1, False)]
    assert set(done.versions[0].variants) == {"original", "int4", "int8"}
    same(full, other, "org/m@1", "org/m@1:int4")
    assert not full.store.copy("org/m@1", other.store, variants=True).versions[0].variants


def test_a_variant_of_other_values_is_a_conflict_or_left_out(full: Small) -> None:
    other = Small.new()
    full.store.copy("org/m@1", other.store)
    other.store.compress("org/m@1", "int4", variant="int8")
    with pytest.raises(ConflictError, match="int8"):
        full.store.copy("org/m@1", other.store, variants=True)
    done = full.store.copy("org/m", other.store, all=True)
    assert len(done.left_out) == 1
    assert "int8" in done.left_out[0]
    same(full, other, "org/m@2")


@pytest.mark.parametrize("everything", [False, True])
def test_a_snapshot_that_was_written_to_since_is_not_taken_for_what_was_copied(full: Small, everything: bool) -> None:
    """It has the same id, and another version under the same number: neither it nor its variants come to stand for the first."""
    snapshot, other = full.copied(), Small.new()
    full.store.save("org/m", linear(3))
    snapshot.store.save("org/m", linear(4))
    snapshot.store.compress("org/m@3", "int8")
    full.store.copy("org/m@3", other.store)
    for _ in range(2):
        if everything:
            assert snapshot.store.copy("org/m", other.store, all=True).left_out == ()
        else:
            snapshot.store.copy("org/m@3", other.store, variants=True)
        same(full, other, "org/m@3")
        assert [info.variant for info in other.store.variants("org/m@3")] == ["original"]
        newest = other.store.versions("org/m")[-1].version
        assert newest == 4  # a version of its own, and known again
        for variant in ("original", "int8"):
            there, here = other.store.load(f"org/m@4:{variant}"), snapshot.store.load(f"org/m@3:{variant}")
            assert all(torch.equal(there[name], tensor) for name, tensor in here.items())


def test_what_was_deleted_there_is_copied_anew_only_by_its_own_name(full: Small) -> None:
    other = Small.new()
    full.store.copy(None, other.store, all=True)
    other.store.delete("org/m@2")
    done = full.store.copy(None, other.store, all=True)
    assert [text.partition(":")[0] for text in done.left_out] == ["org/m@2"]
    assert [version.version for version in other.store.versions("org/m")] == [1], (
        "the newest must not become an old one"
    )
    assert full.store.copy("org/m@2", other.store).versions[0].version == 3
    assert full.store.copy("org/m@2", other.store).versions[0].version == 3


def test_killed_at_any_write_it_goes_on_and_nothing_half_is_seen(full: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    full.store.save("org/m", linear(3))
    packs = len(full.manifest("org/m").packs)
    for at in range(1, 60):
        other = Small.new()
        faulty = FaultyStorage(other.storage, kill_at=at, kill_after=bool(at % 2))
        with contextlib.suppress(Killed):
            full.store.copy(None, open_on(faulty), all=True)
        there = set(pack_sizes(other.storage))
        fresh = modelstore.client.open(other.store.url, memory="64MiB")
        with contextlib.suppress(NotFoundError):
            assert fresh.verify(deep=True).ok
        again = full.store.copy(None, fresh, all=True)
        assert not {pack_key(p) for p in full.manifest("org/m").packs} & there or again.packs < packs + 10
        same(full, other, "org/m@1", "org/m@1:int8", "org/m@2", "org/m@3", "tuned")
        assert [v.version for v in fresh.versions("org/m")] == [1, 2, 3]
        if not faulty.dead:
            break
    assert at > 20


@pytest.mark.parametrize("change", [flip(-1), flip(40), cut])
def test_a_damaged_pack_is_never_whole_there(full: Small, change: Callable[[bytearray], None]) -> None:
    good = full.copied()
    pack = full.manifest("org/m@2").packs[-1]
    full.damage(pack_key(pack), change)
    other = Small.new()
    with pytest.raises(CorruptionError, match="not those that its name stands for"):
        full.store.copy("org/m@2", other.store)
    assert pack_key(pack) not in other.objects()
    assert not [k for k in other.objects() if "/versions/" in k]
    mirrored = open_on(full.storage, mirrors=[good.storage])
    mirrored.copy("org/m@2", other.store)
    same(good, other, "org/m@2")


@pytest.mark.parametrize("change", [flip(-1), cut])
def test_what_is_there_is_checked_before_it_is_relied_upon(full: Small, change: Callable[[bytearray], None]) -> None:
    other = Small.new()
    full.store.copy("org/m@1", other.store)
    pack = max(pack_sizes(other.storage).items(), key=lambda item: item[1])[0]
    other.damage(pack, change)
    done = full.store.copy("org/m@1", other.store, name="again")
    assert done.packs == 1
    same(full, other, "org/m@1")
    assert torch.equal(other.store.load("again")["mlp.up"], linear(1)["mlp.up"])


@pytest.mark.parametrize("all_", [False, True])
@pytest.mark.parametrize("change", [flip(-1), cut])
def test_a_version_that_is_there_is_looked_at_again(
    full: Small, change: Callable[[bytearray], None], all_: bool
) -> None:
    there = Small.new()
    ref = "org/m" if all_ else "org/m@1"
    full.store.copy(ref, there.store, all=all_)
    entry = full.store.repo.catalog.version("org/m", 1).variants["original"]
    packs = [pack_key(pack) for pack in full.manifest("org/m@1").packs]
    copies = [pack_key(entry.copy)]
    if all_:  # of many, packs are looked at by the sizes that their chunks need
        packs, copies = (packs if change is cut else []), []
    for key in (*packs, *copies, manifest_key("org/m", entry.manifest)):
        other = there.copied()
        other.damage(key, change)
        full.store.copy(ref, other.store, all=all_)
        assert open_on(other.storage).verify("org/m@1").ok, key


@pytest.mark.parametrize("all_", [False, True])
def test_a_version_that_lies_there_in_other_packs_is_looked_at_again(all_: bool) -> None:
    one, other = Small.new(), Small.new()
    for wide in (90, 10):
        one.store.save("m", {"kept": torch.arange(900.0), "changed": torch.randn(wide, 99)}, codec="raw")
    one.store.copy("m@2", other.store)
    one.store.delete("m@1")
    compaction = one.store.gc(dry_run=False, grace=0, compact=True).compaction
    assert compaction
    assert compaction.variants
    for pack in sorted(pack_sizes(other.storage)):
        other.damage(pack, cut)
    one.store.copy("m" if all_ else "m@2", open_on(other.storage), all=all_)
    assert open_on(other.storage).verify().ok


def test_a_collection_in_the_other_store_at_any_moment(full: Small) -> None:
    class Collected(WrappingStorage):
        """One in which garbage is collected at the `at`-th write, whatever its age."""

        at = 0

        def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
            if verb in WRITES and not key.startswith("jobs/"):
                self.at -= 1
                if not self.at:
                    other.sweep(grace=0)
            return act()

    for at in range(1, 30):
        other = Small.new()
        other.store.save("x", weights(3))
        beside = Collected(other.storage)
        beside.at = at
        full.store.copy("tuned", open_on(beside))
        same(full, other, "tuned")
        if beside.at > 0:
            break
    assert at > 8


def test_what_is_damaged_does_not_keep_the_rest_from_being_copied(full: Small) -> None:
    full.store.save("torn", weights(4))
    full.store.save("lost", weights(5))
    full.store.save("gone", weights(6))
    record = next(k for k in sorted(full.objects()) if k.startswith("models/torn/versions/"))
    full.damage(record, lambda data: data.clear())
    full.storage.delete(pack_key(full.manifest("lost").packs[0]))
    full.storage.delete(manifest_key("gone", full.entry("gone").manifest))
    other = Small.new()
    fresh = modelstore.client.open(full.store.url, memory="64MiB")
    done = fresh.copy(None, other.store, all=True)
    assert len(done.left_out) == 3
    assert [sum(name in said for said in done.left_out) for name in ("torn", "lost@1", "gone@1")] == [1, 1, 1]
    assert [model.name for model in other.store.models()] == ["org/m", "tuned"]
    same(full, other, "org/m@1:int8", "org/m@2", "tuned")
    found = modelstore.client.open(full.store.url, memory="64MiB").du()
    assert len(found.problems) == 2
    assert [one.name for one in found.models] == ["lost", "org/m", "tuned"]
    with pytest.raises(CorruptionError):
        fresh.copy("lost", other.store)


class Counting(WrappingStorage):
    """The largest piece that was read or written."""

    largest = 0

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def read(self, key: str, start: int, out: memoryview) -> None:
        self.largest = max(self.largest, out.nbytes)
        super().read(key, start, out)

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        def watched() -> Iterable[Buffer]:
            for piece in pieces:
                self.largest = max(self.largest, memoryview(piece).nbytes)
                yield piece

        super().put(key, watched(), size)


def test_packs_of_any_size_are_streamed(tmp_path: Path) -> None:
    small = Small.new()
    small.store.save("m", {"w": torch.zeros(24 << 20, dtype=torch.uint8)}, codec="raw", grid="whole")
    source, target = Counting(small.storage), Counting(modelstore.client.open(tmp_path / "s").repo.storage)
    open_on(source).copy("m", open_on(target))
    assert 0 < source.largest <= 8 << 20
    assert 0 < target.largest <= 8 << 20
    assert modelstore.client.open(tmp_path / "s").load("m", mmap=True)["w"].sum() == 0


def test_wrong_arguments_are_said(full: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all=True"):
        full.store.copy(None, tmp_path / "s")
    with pytest.raises(ValueError, match="name alone"):
        full.store.copy("org/m@1", tmp_path / "s", all=True)
    with pytest.raises(ValueError, match="one model"):
        full.store.copy(None, tmp_path / "s", all=True, name="x")
    with pytest.raises(TypeError, match="list"):
        full.store.copy("org/m", tmp_path / "s", variants="int8")
    with pytest.raises(NotFoundError, match="int5"):
        full.store.copy("org/m", tmp_path / "s", variants=["int5"])
    with pytest.raises(NotFoundError, match="nope"):
        full.store.copy("org/m@1", tmp_path / "s", tags=["nope"])
    with pytest.raises(NotFoundError, match="other"):
        full.store.copy("other", tmp_path / "s", all=True)
    assert not (tmp_path / "s").exists(), "a store is made when there is something to copy"
    modelstore.client.open(tmp_path / "t").save("x", weights(1))
    with pytest.raises(UnsupportedError, match="reading only"):
        full.store.copy("org/m", modelstore.client.open(tmp_path / "t", read_only=True))


def test_progress_ends_at_what_is_sent(full: Small) -> None:
    heard: list[tuple[int, int]] = []
    done = full.store.copy(None, Small.new().store, all=True, progress=lambda now, total, _: heard.append((now, total)))
    assert heard[-1] == (done.sent, done.sent)
