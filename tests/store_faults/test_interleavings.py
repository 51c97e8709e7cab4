"""Saves, deletions, collections, compactions and repairs, interleaved operation by operation on a storage in memory.

After each write, and at the end, all that is visible is looked at. Of two works every interleaving is run, and those in which one
of them dies before some operation; of three, and of those that take long, `MODELSTORE_TEST_RUNS` says how many are run at random.
The two that take minutes are followed to the end where it says 0.
The clocks of works are 72 to 144 hours apart.
"""

from __future__ import annotations

import os

import pytest

from modelstore.errors import ConflictError, NotFoundError
from modelstore.storage.base import Storage
from modelstore.store.catalog import Catalog
from tests.helpers.actors import Actor, Ended, Work, inline
from tests.helpers.behaviour import closing
from tests.helpers.interleaving import at_random, explore
from tests.helpers.stepping import Aged, Contents, Request, perform
from tests.helpers.stores import open_on
from tests.helpers.works import (
    CASES,
    CLOSED,
    GONE,
    HALF,
    acknowledged_is_there,
    collecting,
    compacting,
    deleting,
    fewer_tries,
    made,
    repairing,
    saving,
    visible_is_whole,
)

RUNS = int(os.environ.get("MODELSTORE_TEST_RUNS", "60"))
LONG = {  # minutes: see docs/reliability.md
    "a save that shares with a version, and that version's deletion and collection",
    "a save that shares with a pack, and its compaction",
}
SLOW = LONG | {
    "a save whose intent is damaged, and a collection",
    "a compaction, and the deletion and collection of what it moves",
    "two compactions",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works would do in pools of threads, the thread of the work does in order."""
    inline(monkeypatch)
    fewer_tries(monkeypatch)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_every_interleaving(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case in LONG and RUNS:
        pytest.skip("it takes minutes: MODELSTORE_TEST_RUNS=0 follows it to the end")
    closing(monkeypatch, CLOSED)
    stored, works, saved = CASES[case]
    print(explore(stored, works, visible_is_whole, acknowledged_is_there(saved), mortal=True))


@pytest.mark.parametrize("case", sorted(SLOW))
def test_some_interleavings_at_random(case: str) -> None:
    stored, works, saved = CASES[case]
    for seed in range(RUNS // 3):
        at_random(stored, works, seed, visible_is_whole, acknowledged_is_there(saved), mortal=False)


def test_there_is_something_to_compact() -> None:
    assert compacting(Aged(HALF)).packs > 0


def test_interleavings_of_three_at_random() -> None:
    for seed in range(RUNS):
        first = ["a", "b", "ab"][seed % 3]
        third: Work = [collecting(), deleting(2, then=collecting(3600)), repairing, compacting, saving("a")][seed % 5]
        at_random(
            [GONE, HALF][seed % 2],
            [saving(first), collecting([0, 3600, 86_400][seed % 3]), third],
            seed,
            visible_is_whole,
            acknowledged_is_there([first, None, None]),
        )


def tagging(ref: str, tag: str = "prod") -> Work:
    """Let a tag name a version."""
    return lambda storage: open_on(storage).tag(ref, tag)


def nothing(_: Storage) -> None:
    """Between two writes a tag may name what is being deleted."""


def tags_name_what_is_there(storage: Storage, ends: list[Ended]) -> None:
    """A check for the end: who was not told otherwise did what he was asked, or was overtaken; no tag leads nowhere."""
    catalog = Catalog(storage)
    for end in ends:
        if end.error and not isinstance(end.error, (ConflictError, NotFoundError)):
            raise end.error
    live = {record.version for record in catalog.live("m")}
    assert set(catalog.tags("m").values()) <= live


TAGS: dict[str, tuple[Contents, list[Work]]] = {
    "a tag and a deletion": (made(saving("a"), saving("b")), [tagging("m@1"), deleting(1)]),
    "a tag that moves, and a deletion": (made(saving("a"), saving("b"), tagging("m@2")), [tagging("m@1"), deleting(1)]),
    "a tag that moves away, and deletions of both": (
        made(saving("a"), saving("b"), tagging("m@1")),
        [tagging("m@2"), deleting(2), deleting(1)],
    ),
    "two tags and a deletion": (made(saving("a"), saving("b")), [tagging("m@1"), tagging("m@2"), deleting(1)]),
}


@pytest.mark.parametrize("case", TAGS.values(), ids=TAGS)
def test_no_tag_names_what_is_deleted(case: tuple[Contents, list[Work]]) -> None:
    stored, works = case
    print(explore(stored, works, nothing, tags_name_what_is_there))


def test_a_deletion_says_which_tag_it_takes_back(caplog: pytest.LogCaptureFixture) -> None:
    """Who set it was told that it is set: there was no deletion yet."""
    storage = Aged(made(saving("a"), saving("b")))
    deletion = Actor(deleting(1), 0)
    request = deletion.step()
    while isinstance(request, Request):
        if request.verb == "create" and "/versions/" in request.key:
            tagging("m@1")(storage)
        storage.stored, answer = perform(storage.stored, request)
        request = deletion.step(answer)
    assert request == Ended()
    assert "tag 'prod' of model 'm' was set to version 1 while that was deleted: it was taken back" in caplog.text
    assert Catalog(storage).tags("m") == {}
