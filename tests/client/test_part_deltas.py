"""Steps of training that many ranks save as differences to the step before, and what follows them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import ConflictError
from tests.helpers.stores import all_bits, shrink
from tests.store.helpers import Small

Tensors = dict[str, torch.Tensor]
BORDERS = {"even": (0, 256, 512), "uneven": (0, 201, 512), "other": (0, 64, 512)}


def model() -> Tensors:
    """Tensors of many chunks, and small ones."""
    random = torch.Generator().manual_seed(1)
    return {
        "w": torch.randn(512, 256, generator=random).bfloat16(),
        "v": torch.randn(512, 64, generator=random),
        "norm": torch.ones(64),
        "scalar": torch.tensor(0.5),
    }


def changed(tensors: Tensors, seed: int) -> Tensors:
    """One element in a hundred moved."""
    random = torch.Generator().manual_seed(seed)
    return {n: torch.where(torch.rand(t.shape, generator=random) < 0.01, t + 1, t) for n, t in tensors.items()}


def cut(tensor: torch.Tensor, start: int, stop: int, axis: int = 0) -> ms.Slice:
    """A slice of a tensor along an axis."""
    offset = [0] * tensor.ndim
    offset[axis] = start
    return ms.Slice(tensor.narrow(axis, start, stop - start), offset, tensor.shape)


def part(tensors: Tensors, rank: int, borders: tuple[int, ...]) -> dict[str, Any]:
    """What one of two ranks holds: slices by rows of the large tensors, and one of the small ones."""
    start, stop = borders[rank : rank + 2]
    small = "scalar" if rank else "norm"
    return {"w": cut(tensors["w"], start, stop), "v": cut(tensors["v"], start, stop), small: tensors[small]}


def save(store: Store, tensors: Tensors, step: int, how: str = "even") -> ms.Saved:
    """Both ranks' parts of a step, and the version that they become."""
    for rank in range(2):
        held = part(tensors, rank, BORDERS[how])
        options: dict[str, Any] = {"codec": "delta", "parent": f"m@{step - 1}"}
        store.save_part("m", held, session=f"step-{step}", rank=rank, ranks=2, **options)
    return store.publish("m", f"step-{step}", ranks=2)


@pytest.mark.parametrize("how", BORDERS)
def test_steps_come_back_and_are_small(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether slices share a grid or are cut anew: only differences are stored, and a follower reads only those."""
    shrink(monkeypatch)
    store, tensors = Small.new().store, model()
    full = store.save("m", tensors).stored
    live = store.follow("m")
    for step in range(2, 5):
        tensors = changed(tensors, step)
        saved = save(store, tensors, step, how)
        assert 0 < saved.stored < full / 10
        live.swap_to(step)
        assert all_bits(dict(live.tensors)) == all_bits(tensors)
        assert all_bits(store.load(f"m@{step}")) == all_bits(tensors)
    found = store.describe("m")
    assert {tensor.codec for tensor in found.tensors} == {"delta"}
    assert not store.verify("m", deep=True).problems
    store.save("whole", tensors)
    digests = {tensor.name: tensor.digest for tensor in store.describe("whole").tensors}
    assert {tensor.name: tensor.digest for tensor in found.tensors} == digests


def test_what_the_parent_does_not_have_is_stored_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    store, tensors = Small.new().store, model()
    store.save("m", {"w": tensors["w"], "v": tensors["v"][:100]})
    save(store, tensors, 2)
    assert all_bits(store.load("m")) == all_bits(tensors)
    assert {t.name: t.codec for t in store.describe("m").tensors}["v"] == "lossless"


def test_a_tie_of_one_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 ties two tensors that the other does not: the second's slice is a difference to the first's base."""
    shrink(monkeypatch)
    store, a = Small.new().store, model()["w"]
    b = torch.cat([a[:256], a[256:] + 3])
    store.save("m", {"a": a, "b": b + 1})
    a, b = a + 0, b + 0
    shared = cut(a, 0, 256)
    parts = [{"a": shared, "b": shared}, {"a": cut(a, 256, 512), "b": cut(b, 256, 512)}]
    for rank, held in enumerate(parts):
        store.save_part("m", held, session="s", rank=rank, ranks=2, codec="delta", parent="m@1")
    store.publish("m", "s", ranks=2)
    assert all_bits(store.load("m")) == all_bits({"a": a, "b": b})
    assert not store.verify("m", deep=True).problems


def test_different_parents_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    store, tensors = Small.new().store, model()
    for _ in range(2):
        tensors = changed(tensors, 3)
        store.save("m", tensors)
    for rank in range(2):
        held = part(tensors, rank, BORDERS["even"])
        store.save_part("m", held, session="s", rank=rank, ranks=2, codec="delta", parent=f"m@{rank + 1}")
    with pytest.raises(ConflictError, match="ranks 0 and 1 stored differences to different versions"):
        store.publish("m", "s", ranks=2)
    assert [version.version for version in store.versions("m")] == [1, 2]


def test_a_chain_that_ends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr("modelstore.plan.chain.LONGEST_CHAIN", 1)
    store, tensors = Small.new().store, model()
    store.save("m", tensors)
    save(store, tensors, 2)
    held = part(tensors, 0, BORDERS["even"])
    done = store.save_part("m", held, session="s", rank=0, ranks=2, codec="delta", parent="m@2")
    assert [remark for remark in done.remarks if "nothing is stored as a difference" in remark]


def test_ranks_save_and_followers_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks and two followers, each with a store of its own, at once: every follower has every step's bits."""
    shrink(monkeypatch)
    url, steps = str(tmp_path / "store"), 4
    made = [model()]
    for step in range(2, steps + 1):
        made.append(changed(made[-1], step))
    full = ms.open(url).save("m", made[0]).stored
    meet = threading.Barrier(2)

    def train(rank: int) -> None:
        store = ms.open(url)
        for step in range(2, steps + 1):
            held = part(made[step - 1], rank, BORDERS["even"])
            options: dict[str, Any] = {"codec": "delta", "parent": f"m@{step - 1}"}
            store.save_part("m", held, session=f"step-{step}", rank=rank, ranks=2, **options)
            meet.wait(60)
            if rank == 0:
                store.publish("m", f"step-{step}", ranks=2)
            meet.wait(60)

    def follow(_: int) -> list[int]:
        store = ms.open(url)
        live, read = store.follow("m@1"), []
        for version in store.watch("m", poll=0.02, since=1):
            read.append(live.swap_to(version.version).bytes)
            assert all_bits(dict(live.tensors)) == all_bits(made[live.version - 1])
            if live.version == steps:
                return read
        raise AssertionError("a watch ends when it is closed")

    with ThreadPoolExecutor(4) as pool:
        training = [pool.submit(train, rank) for rank in range(2)]
        following = [pool.submit(follow, number) for number in range(2)]
        for one in training:
            one.result(120)
        for other in following:
            manifests = (steps - 1) * 20_000
            assert sum(other.result(120)) < (steps - 1) * full / 10 + manifests
