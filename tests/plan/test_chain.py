"""Chains of deltas: none is longer, or heavier, than a late reader can bear."""

from __future__ import annotations

import uuid

import pytest
import torch

from modelstore.plan.chain import LONGEST_CHAIN, Chain
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import all_bits, open_on


def test_a_chain_of_small_deltas_ends_at_its_length() -> None:
    chain = Chain(1000)
    while chain.may_grow:
        chain = chain.then(1)
    assert (chain.links, chain.deltas) == (LONGEST_CHAIN, LONGEST_CHAIN)


def test_a_chain_of_large_deltas_ends_at_their_bytes() -> None:
    chain = Chain(1000)
    while chain.may_grow:
        chain = chain.then(180)
    assert (chain.links, chain.deltas) == (3, 540)


@pytest.mark.parametrize("share", [0.0005, 0.5])
def test_saves_store_in_full_when_a_chain_ends(share: float) -> None:
    """What comes last is right, and so is each before it, over many links."""
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    random = torch.Generator().manual_seed(0)
    values = torch.randn(256, 512, generator=random).bfloat16()
    versions = [store.save("m", {"w": values})]
    saved = [values]
    for step in range(1, LONGEST_CHAIN + 4):
        values = torch.where(torch.rand(values.shape, generator=random) < share, values * 1.01, values)
        versions.append(store.save("m", {"w": values}, codec="delta", parent=f"m@{step}"))
        saved.append(values)
    full = [v.version for v in versions if v.stored > versions[0].stored / 2]
    assert full[:1] == [1]
    assert (full[1:] == [LONGEST_CHAIN + 2]) if share < 0.01 else (len(full) > LONGEST_CHAIN / 4)
    for version in (2, LONGEST_CHAIN + 1, LONGEST_CHAIN + 4):
        assert all_bits(dict(store.load(f"m@{version}"))) == all_bits({"w": saved[version - 1]})
