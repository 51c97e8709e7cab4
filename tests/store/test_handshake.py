"""A save and a collection beside each other, whoever sleeps, dies or has a wrong clock between two steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelstore.client import Store
from modelstore.errors import ConflictError, FormatError
from modelstore.format.objects import handshake as hs
from modelstore.format.objects.handshake import Condemned, Intent
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.record import LAST, VersionRecord, pack_key
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.keys import key_problem
from modelstore.storage.wrapping import WRITES, T, Verb, WrappingStorage
from modelstore.store.collect.condemned import FORGOTTEN, Condemnation
from modelstore.testing.faults import FaultyStorage, Killed
from tests.store.helpers import Small, weights

X, Y = "a" * 32, "b" * 32


class At(WrappingStorage):
    """Does something once, before the first operation that `when` chooses, as if this client slept meanwhile."""

    def __init__(
        self, small: Small, when: Callable[[Verb, str], bool], act: Callable[[], Any], on: Storage | None = None
    ) -> None:
        super().__init__(on or small.storage)
        self._when, self._act = when, act
        self.done = False

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if not self.done and self._when(verb, key):
            self.done = True
            self._act()
        return act()


class Off(WrappingStorage):
    """A storage whose clock is so many seconds ahead of that of its clients."""

    def __init__(self, inner: Storage, seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def info(self, key: str) -> ObjectInfo | None:
        info = super().info(key)
        return info and info._replace(modified=info.modified + self._seconds)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, limit=limit, after=after):
            yield info._replace(modified=info.modified + self._seconds)


def is_record(verb: Verb, key: str) -> bool:
    """Whether this is the write that makes a version visible."""
    return verb == "create" and "/versions/" in key


WHENS: dict[str, Callable[[Verb, str], bool]] = {
    "after its packs": lambda verb, key: verb == "put" and "/manifests/" in key,
    "before its intent": lambda verb, key: verb == "create" and key.startswith(hs.INTENTS),
    "before it looks at condemnations": lambda verb, key: verb == "list" and key == hs.CONDEMNED,
    "before it looks at what is there": lambda verb, key: verb == "info" and key.startswith("packs/"),
    "before its record": is_record,
}


@pytest.mark.parametrize("grace", [0, 100])
@pytest.mark.parametrize("when", WHENS.values(), ids=WHENS)
def test_a_save_that_sleeps_through_a_collection(when: Callable[[Verb, str], bool], grace: float) -> None:
    small = Small.new()
    small.store.save("m", weights(1))

    def a_week() -> None:
        small.age(7 * 86_400)
        small.sweep(grace=grace)
        small.sweep(grace=grace)

    asleep = At(small, when, a_week)
    saved = Store(asleep, memory="64MiB", threads=2).save("m", weights(2))
    assert asleep.done
    small.check(f"m@{saved.version}", weights(2))
    small.check("m@1", weights(1))
    small.age(1e6)
    small.sweep(grace=0)
    small.check(f"m@{saved.version}", weights(2))
    assert not [key for key in small.objects() if key.startswith((hs.INTENTS, hs.CONDEMNED))]
    assert small.store.save("m", weights(3)).version == saved.version + 1


@pytest.mark.parametrize("at", ["packs/", "/manifests/", "/versions/"])
@pytest.mark.parametrize("hours", [-72, 0, 72])
@pytest.mark.parametrize("grace", [0, 3600, 86_400])
def test_content_that_was_deleted_is_saved_again_beside_a_collection_by_a_client_with_a_wrong_clock(
    hours: float, grace: float, at: str
) -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    small.store.delete("m@1")
    small.age(48 * 3600)
    clock = Off(small.storage, hours * 3600)
    asleep = At(
        small, lambda verb, key: verb in WRITES and at in key, lambda: small.sweep(grace=grace, on=clock), on=clock
    )
    saved = Store(asleep, memory="64MiB", threads=2).save("m", weights(1))
    small.check(f"m@{saved.version}", weights(1))


def test_what_a_sleeping_collection_is_removing_is_copied_to_another_name() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    old = {pack_key(d) for d in small.manifest("m@1").packs} | {pack_key(small.entry("m@1").copy)}
    small.store.delete("m@1")
    small.age(1e6)
    beside: list[int] = []

    def save() -> None:
        beside.append(small.store.save("m", weights(1)).version)

    # The verdict is there, nothing was looked at again: every removal is still to come.
    asleep = At(small, lambda verb, key: verb == "info" and key.endswith("verdict.json"), save)
    small.sweep(grace=0, on=asleep)
    assert beside == [2]
    small.check("m@2", weights(1))
    assert not {pack_key(d) for d in small.manifest("m@2").packs} & old
    assert small.store.verify(deep=True).ok


def test_a_collection_that_only_thinks_of_it_is_stopped_by_a_save() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    small.store.delete("m@1")
    small.age(1e6)
    asleep = At(
        small,
        lambda verb, key: verb == "create" and key.endswith("verdict.json"),
        lambda: small.store.save("m", weights(1)),
    )
    swept = small.sweep(grace=0, on=asleep)
    assert not swept.objects
    small.check("m@2", weights(1))


def test_killed_collections_stay_in_force_for_a_month() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    key = pack_key(small.entry("m@1").copy)
    condemned = Condemnation(small.storage, {key})
    assert condemned.pronounce({key})
    small.age(FORGOTTEN - 3600, *[k for k in small.objects() if k.startswith(hs.CONDEMNED)])
    small.sweep()
    condemned.check()
    small.age(2 * 3600, *[k for k in small.objects() if k.startswith(hs.CONDEMNED)])
    small.sweep()
    with pytest.raises(ConflictError, match="run it again"):
        condemned.check()
    thinking = Condemnation(small.storage, {key})
    small.age(FORGOTTEN + 1, *[k for k in small.objects() if k.startswith(hs.CONDEMNED)])
    small.sweep()
    with pytest.raises(ConflictError, match="run it again"):
        thinking.pronounce({key})


@pytest.mark.parametrize("after", [False, True])
def test_a_collection_killed_anywhere_hinders_no_save(after: bool) -> None:
    for at in range(1, 100):
        small = Small.new()
        small.store.save("m", weights(1))
        small.store.save("m", weights(2))
        small.store.delete("m@1")
        small.age(1e6)
        faulty = FaultyStorage(small.storage, kill_at=at, kill_after=after)
        with contextlib.suppress(Killed):
            small.sweep(grace=0, on=faulty)
        for version, seed in ((3, 1), (4, 2)):
            assert small.store.save("m", weights(seed)).version == version
        small.age(1e6)
        small.sweep(grace=0)
        small.check("m@2", weights(2))
        small.check("m@3", weights(1))
        small.check("m@4", weights(2))
        if not faulty.dead:
            break
    assert at > 6


def test_a_save_killed_before_its_record_is_collected_when_its_intent_is_old() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    before = {key for key in small.objects() if key.startswith("packs/")}
    dying = At(small, is_record, lambda: (_ for _ in ()).throw(Killed("here")))
    with pytest.raises(Killed):
        Store(dying, memory="64MiB", threads=2).save("m", weights(2))
    assert not small.sweep(grace=100).objects, "its intent is young"
    for _ in range(3):
        small.age(1000)
        small.sweep(grace=100)
    assert {key for key in small.objects() if key.startswith("packs/")} == before
    assert small.store.save("m", weights(3)).version in (2, 3)


def test_for_an_intent_that_is_damaged_everything_is_kept_and_it_is_named() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    small.store.delete("m@1")
    small.age(1e6)
    small.storage.create(hs.intent_key(X), b"{")
    before = {key for key in small.objects() if key.startswith(("packs/", "models/"))}
    swept = small.sweep(grace=0)
    assert [one.object for one in swept.problems] == [hs.intent_key(X)]
    assert {key for key in small.objects() if key.startswith(("packs/", "models/"))} == before
    assert [one.object for one in small.store.verify().problems] == [hs.intent_key(X)]


def asleep_with_a_damaged_intent(small: Small, act: Callable[[], Any]) -> At:
    """A storage on which the writer's intent is damaged, and `act` is done, just before the writer's record is created."""

    def damage() -> None:
        (key,) = [key for key in small.objects() if key.startswith(hs.INTENTS)]
        small.storage.put(key, [b""], 0)
        act()

    return At(small, is_record, damage)


@pytest.mark.parametrize("versions", [0, 1])
def test_an_intent_that_is_damaged_is_voided_like_any_other_and_its_writer_begins_anew(versions: int) -> None:
    small = Small.new()
    for seed in range(versions):
        small.store.save("org/m", weights(seed))

    def a_year() -> None:
        assert small.sweep(grace=100).problems, "it is young"
        small.age(365 * 86_400)
        swept = small.sweep(grace=100)
        assert not swept.problems
        assert swept.objects
        assert not [key for key in small.objects() if key.startswith(hs.INTENTS)]

    asleep = asleep_with_a_damaged_intent(small, a_year)
    saved = Store(asleep, memory="64MiB", threads=2).save("org/m", weights(5))
    assert asleep.done
    assert saved.version == versions + 2
    small.check(f"org/m@{saved.version}", weights(5))
    assert small.store.verify(deep=True).ok
    assert [info.version for info in small.store.versions("org/m")] == [*range(1, versions + 1), saved.version]


def test_the_damaged_intent_of_a_variant_is_voided_too() -> None:
    small = Small.new()
    small.store.save("m", weights(1))

    def a_year() -> None:
        small.age(365 * 86_400)
        assert not small.sweep(grace=100).problems

    asleep = asleep_with_a_damaged_intent(small, a_year)
    with contextlib.suppress(ConflictError):  # what it relies on is gone, or it is published after all
        Store(asleep, memory="64MiB", threads=2).compress("m", "int8", include=["*"])
    assert asleep.done
    small.check("m", weights(1))
    assert small.store.verify(deep=True).ok


def test_a_damaged_intent_that_names_no_record_is_forgotten_after_a_month() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    small.storage.create(hs.intent_key(X), b"{")
    small.age(FORGOTTEN - 3600)
    problems = small.sweep(grace=0).problems
    assert "30 days ago" in problems[0].message
    small.age(2 * 3600)
    assert small.sweep(grace=0, dry_run=True).problems
    assert not small.sweep(grace=0).problems
    assert hs.intent_key(X) not in small.objects()


def test_every_damaged_intent_is_named() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    for id in (X, Y):
        small.storage.create(hs.intent_key(id), b"{")
    assert [one.object for one in small.sweep(grace=0).problems] == [hs.intent_key(X), hs.intent_key(Y)]


@pytest.mark.parametrize("model", ["m", "org/m", "a" * 96 + "/" + "b" * 96])
def test_the_key_of_an_intent_names_its_record(model: str) -> None:
    record = VersionRecord(FORMAT, model, LAST, LAST, "", 0.0, {})
    key = hs.intent_key("f" * 32, record)
    assert key_problem(key) is None
    assert hs.claimed(key) == hs.Claim(model, LAST, LAST, {})
    for other in (
        "",
        "-1",
        "-1-2",
        "-1-2-",
        "-0-1-m",
        "-1-0-m",
        "-1--2-m",
        "-1-2-..",
        "-²-1-m",
        "-1-2-a/b/c",
        "-999999999-1-m",
    ):
        assert hs.claimed(f"{hs.INTENTS}{'f' * 32}{other}.json") is None
    assert hs.claimed(f"{hs.INTENTS}x-1-2-m.json") is None


def test_an_intent_of_what_cannot_be_is_not_made_a_record() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    for version, number in ((10**8, 1), (2, 1), (1, 9)):
        claim = hs.Claim("m", version, number, {})
        small.storage.create(hs.intent_key(f"{version + number:032x}"), hs.encode(Intent(FORMAT, ("packs/x",), claim)))
    small.age(1e6)
    small.sweep(grace=0)
    assert small.store.save("m", weights(2)).version == 2


def test_a_damaged_verdict_is_taken_to_name_all_that_was_thought_of() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    condemned = tuple(key for key in small.objects() if key.startswith(("packs/", "models/m/manifests/")))
    small.storage.create(hs.candidates_key(X), hs.encode(Condemned(FORMAT, "x", condemned)))
    small.storage.create(hs.verdict_key(X), b"")
    assert small.store.save("m", weights(1)).version == 2
    for key in condemned:
        small.storage.delete(key)
    assert small.store.load("m@2").keys() == weights(1).keys()


def test_a_collection_whose_candidates_are_damaged_is_stopped() -> None:
    small = Small.new()
    small.storage.create(hs.candidates_key(X), b"{")
    assert small.store.save("m", weights(1)).version == 1
    verdict = hs.parse(small.storage.get(hs.verdict_key(X)), Condemned, hs.verdict_key(X))
    assert verdict.objects == ()


def test_a_condemnation_of_which_nothing_can_be_read_stops_what_would_rely_on_it() -> None:
    small = Small.new()
    small.store.save("m", weights(1))
    small.storage.create(hs.candidates_key(X), b"")
    small.storage.create(hs.verdict_key(X), b"")
    with pytest.raises(FormatError, match=rf"condemned/{X}/candidates\.json"):
        small.store.save("m", weights(2))
    assert small.store.versions("m")[-1].version == 1


def test_a_verdict_without_candidates_is_of_a_collection_that_is_over() -> None:
    small = Small.new()
    small.storage.create(hs.verdict_key(X), b"")
    assert small.store.save("m", weights(1)).version == 1
