"""The works that are interleaved: saves, deletions, collections, compactions and repairs of tiny models; and what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelstore.client import Store
from modelstore.errors import ConflictError, CorruptionError, NotFoundError, StorageError
from modelstore.format.objects.record import pack_key
from modelstore.plan import work
from modelstore.storage.base import Storage
from modelstore.store import relying
from modelstore.store.catalog import Catalog
from modelstore.store.collect.garbage import collect
from modelstore.store.compact.compaction import clean
from modelstore.store.relying import check_there, relied_on
from modelstore.store.repo import Repo
from modelstore.testing.faults import Killed
from tests.helpers.actors import Ended, Work
from tests.helpers.behaviour import Holds, closed
from tests.helpers.interleaving import Finish
from tests.helpers.stepping import Aged, Contents
from tests.helpers.stores import keys, open_on

Case = tuple[Contents, list[Work], list[str | None]]


def fewer_tries(patch: pytest.MonkeyPatch) -> None:
    """Let a save or a collection that begins anew do so once: a third try begins as the second does."""
    patch.setattr("modelstore.store.relying._TRIES", 2)
    patch.setattr("modelstore.store.collect.garbage._ROUNDS", 2)
    tried_again = relying.again
    patch.setattr(
        "modelstore.client.saving.again", lambda work: tried_again(closed(work, "a try", lambda made: (made, work)))
    )


def model(letters: str) -> dict[str, torch.Tensor]:
    """A tiny model of a matrix for each letter, the same in all models."""
    return {f"{letter}.weight": torch.arange(1024.0).reshape(16, 64) * ord(letter) for letter in letters}


def saving(letters: str, name: str = "m", **how: Any) -> Work:
    """Save a model; the work gives its version."""
    return lambda storage: open_on(storage, threads=1).save(name, model(letters), **how).version


def collecting(grace: float = 0) -> Work:
    """Collect garbage; without grace every intent is voided, with an hour's it is respected."""
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


def made(*steps: Work) -> Contents:
    """What is stored after these works."""
    storage = Aged({})
    for step in steps:
        step(storage)
    return storage.stored


def losing_a_copy(storage: Storage) -> None:
    """Lose the copy of the newest version's manifest."""
    storage.delete(pack_key(Catalog(storage).newest("m").variants["original"].copy))


def visible_is_whole(storage: Storage) -> None:
    """Each variant of each live version has its manifest and packs, and those of its bases, at least as long as needed.

    Copies of manifests may be missing, as some cases begin without one.
    """
    catalog = Catalog(storage)
    for name in catalog.models():
        for record in catalog.live(name):
            needed = relied_on(storage, name, record.variants.values())
            copies = {pack_key(entry.copy) for entry in record.variants.values()}
            check_there(storage, name, {key: size for key, size in needed.items() if key not in copies})


def acknowledged_is_there(saved: list[str | None]) -> Finish:
    """A check for the end: the version of each save that gave one is exact, also after a collection without grace.

    Every variant that is live then can be loaded, and no intent is left. A work may have been killed, or have ended with one
    of the errors that say that another was quicker or something is gone, also what tells the time (no grace spares that).
    """

    def finish(storage: Aged, ends: list[Ended]) -> None:
        for letters, end in zip(saved, ends, strict=True):
            expected = Killed, ConflictError, NotFoundError
            # A work that saves nothing may read a version that is deleted, and collected with no grace, meanwhile.
            swept = isinstance(end.error, StorageError) and "as soon as it was made" in str(end.error)
            if (
                end.error
                and not swept
                and not isinstance(end.error, expected if letters else (*expected, CorruptionError))
            ):
                raise end.error
        for _ in range(2):
            for letters, end in zip(saved, ends, strict=True):
                if letters is None or not isinstance(end.result, int):
                    continue
                loaded = Store(storage).load(f"m@{end.result}")
                assert all(torch.equal(loaded[name], tensor) for name, tensor in model(letters).items())
            collecting()(storage)
            visible_is_whole(storage)
        for record in Catalog(storage).live("m"):
            for variant in record.variants:
                Store(storage).load(f"m@{record.version}:{variant}")  # checks the digests
        assert not keys(storage, "intents/")

    return finish


def _report(*_: Any, **__: Any) -> None:
    """What is only told to people is left behind, and nothing else."""


def _repo(_: Any, repo: Repo, *__: Any, **___: Any) -> Repo:
    """So is what a store has read already."""
    return repo


# Of these functions is forgotten, when they are over, all but what they leave behind: their result, and what they changed of what
# they were given, unless something else is said.
CLOSED: dict[str, Holds | None] = {
    "modelstore.store.relying.condemned_among": None,
    "modelstore.store.relying.check_there": None,
    "modelstore.store.shelf.is_good": None,
    "modelstore.store.shelf.Shelf.put": None,
    "modelstore.store.collect.garbage.now_of": None,
    "modelstore.store.collect.garbage._mark": None,
    "modelstore.store.collect.garbage._unmarked": None,
    "modelstore.store.collect.garbage._held": None,
    "modelstore.store.collect.condemned.forget_dead": None,
    "modelstore.store.collect.garbage._sweep": _report,
    "modelstore.store.collect.garbage._remove": _repo,
    "modelstore.store.collect.garbage.collect": _repo,
    "modelstore.store.compact.compaction.survey": None,
    "modelstore.store.compact.compaction.dead_packs": None,
    "modelstore.store.compact.compaction.compact": _repo,
}

# A collection finds version 1 deleted; so does a compaction, and half of its pack is dead, as version 2 shares the other half.
GONE = made(saving("a"), saving("b"), deleting(1))
HALF = made(saving("ab"), saving("a"), deleting(1))
CASES: dict[str, Case] = {
    "a save of content that was deleted, and a collection": (GONE, [saving("a"), collecting()], ["a", None]),
    "a save of content that was deleted, and a collection that voids no intent": (
        GONE,
        [saving("a"), collecting(3600)],
        ["a", None],
    ),
    "a variant, and its version's deletion and a collection that voids no intent": (
        made(saving("a")),
        [compressing, deleting(1, then=collecting(3600))],
        [None, None],
    ),
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
