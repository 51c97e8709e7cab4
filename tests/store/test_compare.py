"""What differs between two variants: names, chunks, and bytes."""

from __future__ import annotations

import pytest
import torch

from modelstore.format import grid
from modelstore.format.answers.results import Diff
from tests.store.helpers import Small, weights


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, codecs: tuple[str, str] = ("raw", "raw")) -> Diff:
    """The difference between two versions that hold these."""
    small = Small.new()
    small.store.save("m", a, codec=codecs[0])  # type: ignore[arg-type]
    small.store.save("m", b, codec=codecs[1])  # type: ignore[arg-type]
    return small.store.diff("m@1", "m@2")


def test_a_variant_does_not_differ_from_itself() -> None:
    found = differ(weights(1), weights(1))
    assert (found.added, found.removed, found.changed) == ((), (), ())
    assert (found.chunks_changed, found.bytes_changed) == (0, 0)
    assert found.chunks_total == 3
    assert found.bytes_total == 64 * 96 * 2 + 48 * 40 * 4 + 7 * 8


def test_names_that_came_went_and_changed() -> None:
    before = weights(1)
    after = {**weights(1), "new": torch.ones(10), "mlp.bias": torch.zeros(7, dtype=torch.int64)}
    del after["mlp.up"]
    found = differ(before, after)
    assert found.added == ("new",)
    assert found.removed == ("mlp.up",)
    assert found.changed == ("mlp.bias",)
    assert (found.chunks_changed, found.chunks_total) == (1, 2)
    assert found.bytes_changed == 7 * 8 + 10 * 4


def test_another_shape_or_dtype_of_the_same_bytes_is_a_change() -> None:
    found = differ(
        {"a": torch.zeros(4, 6), "b": torch.zeros(8, dtype=torch.float32)},
        {"a": torch.zeros(6, 4), "b": torch.zeros(8, dtype=torch.int32)},
    )
    assert found.changed == ("a", "b")
    assert found.chunks_changed == 2
    assert found.bytes_changed == 0, "the bytes are stored already"


def test_a_tied_tensor_changes_under_each_name_and_counts_once() -> None:
    after = weights(1)
    after["embed"] = after["head"] = after["embed"] + 1
    found = differ(weights(1), after)
    assert found.changed == ("embed", "head")
    assert (found.chunks_changed, found.chunks_total) == (1, 3)
    apart = {**weights(1), "head": torch.zeros(64, 96)}
    assert differ(weights(1), apart).changed == ("head",)


def test_only_the_chunks_that_changed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TARGET", 4096)
    monkeypatch.setattr(grid, "SMALL", 4096)
    before = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    after = {"w": before["w"].clone()}
    after["w"][0, 0] = -1
    for codecs in (("raw", "raw"), ("lossless", "lossless")):
        found = differ(before, after, codecs=codecs)
        assert found.changed == ("w",)
        assert found.chunks_changed == 1
        assert found.chunks_total > 3
        assert 0 < found.bytes_changed < found.bytes_total / 2
    found = differ(before, after, codecs=("raw", "lossless"))
    assert found.chunks_changed == found.chunks_total
    same = differ(before, before, codecs=("raw", "lossless"))
    assert (same.changed, same.chunks_changed) == ((), 0)


def test_empty_and_no_tensors() -> None:
    found = differ({"a": torch.empty(0, 3)}, {"a": torch.empty(0, 4)})
    assert found.changed == ("a",)
    assert (found.chunks_changed, found.chunks_total, found.bytes_changed, found.bytes_total) == (0, 0, 0, 0)
