"""Renamings beside other works, operation by operation: no version is lost, whoever dies, and under the names that are there."""

from __future__ import annotations

import os

import pytest
import torch

from modelstore.client import Store
from modelstore.errors import ConflictError, CorruptionError, NotFoundError
from modelstore.storage.base import Storage
from modelstore.store.catalog import Catalog
from modelstore.testing.faults import Killed
from tests.helpers.actors import Ended, Work, inline
from tests.helpers.interleaving import at_random
from tests.helpers.stepping import Aged
from tests.helpers.stores import open_on
from tests.helpers.works import (
    collecting,
    compacting,
    compressing,
    deleting,
    fewer_tries,
    made,
    model,
    repairing,
    saving,
    visible_is_whole,
)

RUNS = int(os.environ.get("MODELSTORE_TEST_RUNS", "60"))
NAMES = ("m", "n", "o")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works would do in pools of threads, the thread of the work does in order."""
    inline(monkeypatch)
    fewer_tries(monkeypatch)


def renaming(new: str) -> Work:
    """Rename the model; the work gives nothing that counts as a version."""

    def act(storage: Storage) -> None:
        open_on(storage, threads=1).rename("m", new)

    return act


def letters_of(storage: Storage) -> list[str]:
    """What is live under any name, by the letters of its tensors; each is exact."""
    found = []
    store, catalog = Store(storage), Catalog(storage)
    for name in NAMES:
        for record in catalog.live(name):
            loaded = store.load(f"{name}@{record.version}")
            letters = "".join(sorted(key[0] for key in loaded))
            assert all(torch.equal(loaded[key], tensor) for key, tensor in model(letters).items())
            found.append(letters)
            for variant in record.variants:
                store.load(f"{name}@{record.version}:{variant}")
    return found


BEFORE = made(saving("a"), saving("b"))
CASES: dict[str, tuple[Work, list[str]]] = {  # what goes on beside it, and what must be there at the end
    "a save": (saving("ab"), ["a", "b"]),
    "a collection": (collecting(), ["a", "b"]),
    "a compaction": (compacting, ["a", "b"]),
    "a variant": (compressing, ["a", "b"]),
    "a repair": (repairing, ["a", "b"]),
    "a deletion": (deleting(1, then=collecting()), ["b"]),
    "itself": (renaming("n"), ["a", "b"]),
    "a renaming to another name": (renaming("o"), ["a", "b"]),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost(case: str) -> None:
    beside, needed = CASES[case]

    def check(storage: Storage) -> None:
        visible_is_whole(storage)
        live = sum(len(list(Catalog(storage).live(name))) for name in NAMES)
        assert live >= len(needed)

    def finish(storage: Aged, ends: list[Ended]) -> None:
        for end in ends:
            if end.error and not isinstance(end.error, (Killed, ConflictError, NotFoundError, CorruptionError)):
                raise end.error
        expected = [*needed, *(["ab"] if case == "a save" and isinstance(ends[1].result, int) else [])]
        for _ in range(2):
            there = letters_of(storage)
            assert set(expected) <= set(there), f"{expected} of {there}"
            collecting()(storage)
        if not any(end.error for end in ends) and case != "a renaming to another name":
            assert len(there) == len(set(there)), f"a version is there twice: {there}"

    for seed in range(RUNS // 6):
        at_random(BEFORE, [renaming("n"), beside], seed, check, finish)
