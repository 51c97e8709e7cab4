"""Saves, deletions, collections, compactions and repairs, interleaved operation by operation on a storage in memory.

After each write, and at the end, all that is visible is looked at. `MODELSTORE_TEST_RUNS` says how many interleavings of each
case are run at random, a third of them where something is compacted or of three works; 0 says all of each case.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modelstore.client import Store
from modelstore.errors import ConflictError, CorruptionError, ModelStoreError, NotFoundError, StorageError
from modelstore.format.record import pack_key
from modelstore.plan import work
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.store.catalog import Catalog
from modelstore.store.collect.garbage import collect
from modelstore.store.compact.compaction import clean
from modelstore.store.relying import check_there, relied_on
from modelstore.store.repo import Repo
from modelstore.testing.faults import Killed
from tests.helpers.interleaving import NOW, Actor, Aged, at_random, explore, inline
from tests.helpers.stores import copy_all, keys, open_on

RUNS = int(os.environ.get("MODELSTORE_TEST_RUNS", "60"))
Work = Callable[[Storage], Any]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works would do in pools of threads, the thread of the work does in order; what is done anew, is so once.

    A third try begins as the second one does: it leads to no other kind of state.
    """
    inline(monkeypatch)
    monkeypatch.setattr("modelstore.store.relying._TRIES", 2)


def model(letters: str) -> dict[str, torch.Tensor]:
    """A tiny model of a matrix for each letter, the same in all models."""
    return {f"{letter}.weight": torch.arange(1024.0).reshape(16, 64) * ord(letter) for letter in letters}


def saving(letters: str, name: str = "m", **how: Any) -> Work:
    """Save a model; the work gives its version."""
    return lambda storage: open_on(storage, threads=1).save(name, model(letters), **how).version


def collecting(grace: float = 0) -> Work:
    """Collect garbage."""
    return lambda storage: collect(Repo.on(storage), dry_run=False, grace=grace)


def compacting(storage: Storage) -> Any:
    """Compact packs of which any part is dead, and collect garbage, with no grace."""
    return clean(Repo.on(storage), dry_run=False, grace=0, bound=1.0, work=work.Work(work.Limits(6 << 20))).compaction


def deleting(version: int, then: Work | None = None) -> Work:
    """Delete a version, then do another work."""

    def act(storage: Storage) -> None:
        open_on(storage).delete(f"m@{version}")
        if then is not None:
            then(storage)

    return act


def repairing(storage: Storage) -> Any:
    """Repair all models; the work gives what could not be mended."""
    return open_on(storage).repair().problems


def compressing(storage: Storage) -> Any:
    """Make a variant of the newest version."""
    return open_on(storage, threads=1).compress("m", "int8").version


def damaging_intents(storage: Storage) -> None:
    """Let nothing be readable of the intents that are there."""
    for key in keys(storage, "intents/"):
        storage.put(key, [b""], 0)


def made(*steps: Work) -> Callable[[], Aged]:
    """What makes storages on which these works were done before, each another one."""
    template = MemoryStorage(uuid.uuid4().hex)
    for step in steps:
        step(template)

    runs = itertools.count()

    def setup() -> Aged:
        # Another address: what this process remembers of one storage is not taken for the next.
        storage = Aged(f"{template.url.removeprefix('memory://')}-{next(runs)}")
        copy_all(template, storage)
        return storage

    return setup


def losing_a_copy(storage: Storage) -> None:
    """Lose the copy of the newest version's manifest."""
    storage.delete(pack_key(Catalog(storage).newest("m").variants["original"].copy))


def visible_is_whole(storage: Storage) -> None:
    """Each variant of each live version has its manifest and packs, and those of its bases, at least as long as needed.

    Copies of manifests may be missing, as some cases begin without one.
    """
    inner = MemoryStorage(storage.url.removeprefix("memory://"))
    catalog = Catalog(inner)
    for name in catalog.models():
        for record in catalog.live(name):
            needed = relied_on(inner, name, record.variants.values())
            copies = {pack_key(entry.copy) for entry in record.variants.values()}
            check_there(inner, name, {key: size for key, size in needed.items() if key not in copies})


def is_record(key: str) -> bool:
    """Whether an object is the record of a version, which makes packs and manifests visible, or ends that."""
    return "/versions/" in key


def acknowledged_is_there(saved: list[str | None]) -> Any:
    """A check for the end: the version of each save that gave one is exact, also after a collection without grace.

    Every variant that is live then can be loaded, and no intent is left. A work may have been killed, or have ended with one
    of the errors that say that another was quicker or something is gone, also what tells the time (no grace spares that).
    """

    def finish(storage: Storage, actors: list[Actor]) -> None:
        inner = MemoryStorage(storage.url.removeprefix("memory://"))
        for letters, actor in zip(saved, actors, strict=True):
            expected = Killed, ConflictError, NotFoundError
            # A work that saves nothing may read a version that is deleted, and collected with no grace, meanwhile.
            swept = isinstance(actor.error, StorageError) and "as soon as it was made" in str(actor.error)
            if (
                actor.error
                and not swept
                and not isinstance(actor.error, expected if letters else (*expected, CorruptionError))
            ):
                raise actor.error
        for _ in range(2):
            for letters, actor in zip(saved, actors, strict=True):
                if letters is None or not isinstance(actor.result, int):
                    continue
                loaded = Store(inner).load(f"m@{actor.result}")
                assert all(torch.equal(loaded[name], tensor) for name, tensor in model(letters).items())
            collecting()(storage)
            visible_is_whole(storage)
        for record in Catalog(inner).live("m"):
            for variant in record.variants:
                Store(inner).load(f"m@{record.version}:{variant}")  # checks the digests
        assert not keys(inner, "intents/")

    return finish


# A collection finds version 1 deleted; so does a compaction, and half of its pack is dead, as version 2 shares the other half.
GONE = made(saving("a"), saving("b"), deleting(1))
HALF = made(saving("ab"), saving("a"), deleting(1))
CASES: dict[str, tuple[Callable[[], Aged], list[Work], list[str | None]]] = {
    "a save of content that was deleted, and a collection": (GONE, [saving("a"), collecting()], ["a", None]),
    "a save that shares with a version, and that version's deletion and collection": (
        made(saving("a")),
        [saving("ab"), deleting(1, then=collecting())],
        ["ab", None],
    ),
    "two saves of the same": (made(saving("a")), [saving("ab"), saving("ab")], ["ab", "ab"]),
    "a save whose intent is damaged, and a collection": (
        GONE,
        [saving("a"), collecting(), damaging_intents],
        ["a", None, None],
    ),
    "two collections": (GONE, [collecting(), collecting()], [None, None]),
    "a save and a repair": (made(saving("a"), losing_a_copy), [saving("ab"), repairing], ["ab", None]),
    "a repair and a collection": (
        made(saving("ab"), saving("a"), deleting(1), losing_a_copy),
        [repairing, collecting()],
        [None, None],
    ),
    "a variant, and its version's deletion and collection": (
        made(saving("a")),
        [compressing, deleting(1, then=collecting())],
        [None, None],
    ),
    "a save that shares with a pack, and its compaction": (HALF, [saving("ab"), compacting], ["ab", None]),
    "a compaction, and the deletion and collection of what it moves": (
        HALF,
        [compacting, deleting(2, then=collecting())],
        [None, None],
    ),
    "two compactions": (HALF, [compacting, compacting], [None, None]),
    "a compaction and a repair": (
        made(saving("ab"), saving("a"), deleting(1), losing_a_copy),
        [compacting, repairing],
        [None, None],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interleavings(case: tuple[Callable[[], Aged], list[Work], list[str | None]]) -> None:
    setup, works, saved = case
    if RUNS:
        for seed in range(RUNS // 3 if compacting in works else RUNS):  # of these each takes longer
            at_random(setup(), works, seed, visible_is_whole, acknowledged_is_there(saved), mortal=False)
    else:
        found = explore(setup, works, visible_is_whole, acknowledged_is_there(saved), is_record)
        print(f"{found.runs:,} runs, {found.states:,} states, {found.stored:,} of what is stored")
        assert found.runs > 1


def test_there_is_something_to_compact() -> None:
    setup, _, _ = CASES["two compactions"]
    assert compacting(setup()).packs > 0


@pytest.mark.parametrize("hours", [-72, 0, 72])
def test_interleavings_of_three_at_random(hours: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of all clients is so many hours ahead of the storage's."""
    monkeypatch.setattr(time, "time", lambda: NOW + hours * 3600)
    for seed in range(RUNS // 3):
        first = ["a", "b", "ab"][seed % 3]
        third: Work = [collecting(), deleting(2, then=collecting(3600)), repairing, compacting, saving("a")][seed % 5]
        at_random(
            [GONE, HALF][seed % 2](),
            [saving(first), collecting([0, 3600, 86_400][seed % 3]), third],
            seed,
            visible_is_whole,
            acknowledged_is_there([first, None, None]),
        )


def test_the_checker_finds_a_handshake_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the intents, which a collection reads, something is lost."""
    monkeypatch.setattr("modelstore.store.collect.garbage.held_by_writers", lambda *_, **__: set())
    setup, works, saved = CASES["a save of content that was deleted, and a collection"]
    with pytest.raises((ModelStoreError, AssertionError)):
        explore(setup, works, visible_is_whole, acknowledged_is_there(saved), is_record)


def tagging(ref: str, tag: str = "prod") -> Work:
    """Let a tag name a version."""
    return lambda storage: open_on(storage).tag(ref, tag)


def nothing(_: Storage) -> None:
    """Between two writes a tag may name what is being deleted."""


def tags_name_what_is_there(storage: Storage, actors: list[Actor]) -> None:
    """A check for the end: who was not told otherwise did what he was asked, or was overtaken; no tag leads nowhere."""
    catalog = Catalog(MemoryStorage(storage.url.removeprefix("memory://")))
    for actor in actors:
        if actor.error and not isinstance(actor.error, (ConflictError, NotFoundError)):
            raise actor.error
    live = {record.version for record in catalog.live("m")}
    assert set(catalog.tags("m").values()) <= live


TAGS: dict[str, tuple[Callable[[], Aged], list[Work]]] = {
    "a tag and a deletion": (made(saving("a"), saving("b")), [tagging("m@1"), deleting(1)]),
    "a tag that moves, and a deletion": (made(saving("a"), saving("b"), tagging("m@2")), [tagging("m@1"), deleting(1)]),
    "a tag that moves away, and deletions of both": (
        made(saving("a"), saving("b"), tagging("m@1")),
        [tagging("m@2"), deleting(2), deleting(1)],
    ),
    "two tags and a deletion": (made(saving("a"), saving("b")), [tagging("m@1"), tagging("m@2"), deleting(1)]),
}


@pytest.mark.parametrize("case", TAGS.values(), ids=TAGS)
def test_no_tag_names_what_is_deleted(case: tuple[Callable[[], Aged], list[Work]]) -> None:
    setup, works = case
    if len(works) == 2 or not RUNS:
        assert explore(setup, works, nothing, tags_name_what_is_there).runs > 1
    else:
        for seed in range(RUNS):
            at_random(setup(), works, seed, nothing, tags_name_what_is_there, mortal=False)
