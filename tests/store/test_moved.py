"""Readers of versions whose chunks a compaction takes elsewhere, and whose old packs and manifests are collected at once."""

from __future__ import annotations

import pytest

from modelstore.errors import CorruptionError
from tests.helpers.stores import all_bits, bits, open_on, pack_sizes
from tests.store.helpers import Small
from tests.store.test_compaction import Beside, Tensors, fresh, small, wanted

__all__ = ["small", "wanted"]


def emptied(small: Small) -> None:
    """Compacted, with nothing left of what was before."""
    fresh(small).gc(dry_run=False, grace=0, compact=True)
    small.age(1e6)
    fresh(small).gc(dry_run=False, grace=0)


def reading(small: Small, ref: str) -> int:
    """How many operations a load has."""
    counting = Beside(small.storage, 0, lambda: None)
    open_on(counting, threads=1).load(ref)
    return -counting.left


@pytest.mark.parametrize("ref", ["m@prod", "tuned@2", "whole"])
def test_a_compaction_at_any_moment_of_a_load(small: Small, wanted: dict[str, Tensors], ref: str) -> None:
    for at in range(1, reading(small, ref) + 1):
        beside = small.copied()
        found = open_on(Beside(beside.storage, at, lambda beside=beside: emptied(beside)), threads=1).load(ref)  # type: ignore[misc]
        assert all_bits(found) == all_bits(wanted[ref]), at


def test_what_was_opened_before_is_read_after(small: Small, wanted: dict[str, Tensors]) -> None:
    store = fresh(small)
    opened = {(ref, name): store.tensor(ref, name) for ref, tensors in wanted.items() for name in tensors}
    streams = {ref: store.stream(ref) for ref in wanted}
    old = set(small.objects())
    emptied(small)
    assert {key for key in old - set(small.objects()) if key.startswith("packs/")}, "packs are gone that were there"
    for (ref, name), tensor in opened.items():
        assert bits(tensor[...]) == bits(wanted[ref][name]), (ref, name)
    for ref, stream in streams.items():
        assert all_bits(dict(stream)) == all_bits(wanted[ref]), ref
    emptied(small)
    for (ref, name), tensor in opened.items():
        assert bits(tensor[...]) == bits(wanted[ref][name]), (ref, name)


def test_what_was_not_moved_is_lost_as_before(small: Small) -> None:
    store = fresh(small)
    tensor = store.tensor("m@prod", "a")
    for key in pack_sizes(small.storage):
        small.storage.delete(key)
    with pytest.raises(CorruptionError, match=r"'a' of model 'm' is lost.*modelstore repair"):
        tensor[...]
