"""A save that was to store differences says so where it stores none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore.plan import chain


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def store(tmp_path: Path) -> ms.Store:
    store = ms.open(tmp_path / "store")
    store.save("m", weights(0))
    return store


@pytest.mark.parametrize(
    "others",
    [{"v": torch.ones(8, 8)}, {"w": torch.ones(8, 4)}, {"w": torch.ones(8, 8).half()}],
    ids=["name", "shape", "dtype"],
)
def test_a_parent_with_nothing_in_common_is_said(store: ms.Store, others: dict[str, torch.Tensor]) -> None:
    saved = store.save("other", others, codec="delta", parent="m")
    assert saved.remarks == (
        "nothing is stored as a difference: no tensor has the name, shape and dtype of one of m: is it the right parent?",
    )
    assert store.load("other").keys() == others.keys()


def test_a_chain_that_ends_is_said(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "LONGEST_CHAIN", 1)
    monkeypatch.setattr(chain, "SHARE", 10)
    assert store.save("m", weights(1), codec="delta", parent="m@1").remarks == ()
    (remark,) = store.save("m", weights(2), codec="delta", parent="m@2").remarks
    assert "m is the last of 1 deltas already: the next ones may be deltas to this version" in remark
    assert store.save("m", weights(2)).remarks == ()  # none was asked for
