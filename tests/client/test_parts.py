"""Saving from many ranks: what comes back, what is refused, what a session leaves behind."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import ConflictError, CorruptionError, FormatError, NotFoundError
from modelstore.execute.write import merge as merging
from modelstore.execute.write.parts import published_key, session_prefix
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.objects.record import PACKS, pack_key
from modelstore.format.region import Region
from modelstore.plan.parts import RankSlice, common_chunk, piece_problem, shared_chunk
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import all_bits, bits, contents, keys, open_on, pack_sizes, shrink
from tests.store.helpers import Small


def split(tensor: torch.Tensor, ranks: int, rank: int, axis: int = 0) -> ms.Slice:
    """A rank's slice of an even split, as torch.chunk makes it."""
    n = tensor.shape[axis]
    part = -(-n // ranks)
    start, stop = min(n, rank * part), min(n, (rank + 1) * part)
    offset = [0] * tensor.ndim
    offset[axis] = start
    return ms.Slice(tensor.narrow(axis, start, stop - start), offset, tensor.shape)


def save_all(store: Store, parts: list[dict[str, Any]], session: str = "s", **options: Any) -> None:
    """Save every rank's part."""
    for rank, part in enumerate(parts):
        store.save_part("m", part, session=session, rank=rank, ranks=len(parts), **options)


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many shapes; with `shrink`, some of many chunks."""
    random = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(200, 64, generator=random).bfloat16(),
        "up": torch.randn(96, 64, generator=random),
        "odd": torch.randn(37, 5, generator=random),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(11),
    }


@pytest.fixture
def storage() -> Storage:
    return MemoryStorage("parts")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", ["lossless", "raw"])
def test_slices_come_back_as_what_was_cut(ranks: int, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    whole = model()
    store = Small.new().store
    parts: list[dict[str, Any]] = [
        {name: split(whole[name], ranks, rank, axis) for name, axis in (("embed", 0), ("up", 1), ("odd", 0))}
        for rank in range(ranks)
    ]
    for number, name in enumerate(("scalar", "empty", "ids")):
        parts[number % ranks][name] = whole[name]
    save_all(store, parts, codec=codec)
    with pytest.raises(NotFoundError):
        store.versions("m")
    saved = store.publish("m", "s", ranks=ranks, tag="prod", files={"config.json": b"{}"})
    assert saved.bytes == sum(tensor.nbytes for tensor in whole.values())
    assert all_bits(store.load("m@prod")) == {name: bits(whole[name]) for name in store.load("m")}
    assert store.load("m").keys() == whole.keys()
    assert store.file("m", "config.json") == b"{}"
    assert not store.verify("m", deep=True).problems
    digests = {tensor.name: tensor.digest for tensor in store.describe("m").tensors}
    store.save("other", whole)
    assert digests == {tensor.name: tensor.digest for tensor in store.describe("other").tensors}


def test_an_even_split_shares_chunks_with_what_was_saved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, pack=100_000)
    small = Small.new()
    whole = {"a": torch.randn(256, 64), "b": torch.randn(64, 1024)}
    small.store.save("m", whole)
    before = pack_sizes(small.storage)
    save_all(small.store, [{"a": split(whole["a"], 4, r), "b": split(whole["b"], 4, r, 1)} for r in range(4)])
    saved = small.store.publish("m", "s", ranks=4)
    assert saved.stored == 0
    assert saved.reused
    assert pack_sizes(small.storage) == before  # even the manifest is the same


def test_slices_that_share_no_grid_are_cut_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    store = Small.new().store
    whole = torch.randn(101, 64)
    borders = [0, 13, 14, 78, 101]
    parts = [{"t": ms.Slice(whole[a:b], (a, 0), whole.shape)} for a, b in itertools.pairwise(borders)]
    save_all(store, parts)
    store.publish("m", "s", ranks=4)
    assert bits(store.load("m")["t"]) == bits(whole)
    info = store.describe("m").tensors[0]
    assert info.chunk_shape == grid.chunk_shape((101, 64), 4)
    assert not store.verify("m", deep=True).problems


shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, data=st.data())
def test_any_way_of_cutting_gives_the_tensor_back(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Random borders along every dimension, cells dealt to ranks at random; a rank's cells of one tensor are its slices."""
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, math.prod(shape), np.uint8)).reshape(shape)
    borders = []
    for n in shape:
        inner = data.draw(st.lists(st.integers(1, n - 1), max_size=2, unique=True)) if n > 1 else []
        borders.append([0, *sorted(inner), n])
    cells: list[list[tuple[int, int]]] = [[]]
    for axis in borders:
        cells = [[*cell, pair] for cell in cells for pair in itertools.pairwise(axis)]
    store = Small.new().store
    for rank, cell in enumerate(cells):
        box = values[tuple(slice(a, b) for a, b in cell)]
        part = {"t": ms.Slice(box, [a for a, _ in cell], shape)}
        store.save_part("m", part, session="s", rank=rank, ranks=len(cells))
    store.publish("m", "s", ranks=len(cells))
    assert bits(store.load("m")["t"]) == bits(values)


@given(n=st.integers(1, 3000), width=st.integers(1, 64), ranks=st.integers(2, 9), data=st.data())
def test_ranks_of_an_even_split_find_the_same_cut(n: int, width: int, ranks: int, data: st.DataObject) -> None:
    """Each from its own place alone; but for rare last ranks whose place fits another split too."""
    axis = data.draw(st.integers(0, 1))
    shape = (n, width) if axis == 0 else (width, n)
    part = -(-n // ranks)
    pieces = []
    for rank in range(ranks):
        pair = (rank * part, min(n, (rank + 1) * part))
        if pair[0] >= pair[1] or pair == (0, n):
            continue
        region = (pair, (0, width)) if axis == 0 else ((0, width), pair)
        pieces.append(RankSlice(rank, "float32", shape, region, shared_chunk(shape, region, 4, ranks, None)))
    if not pieces:
        return
    assert piece_problem(pieces) is None
    if n % ranks == 0:
        assert common_chunk(pieces) is not None
    assert all(piece.chunk is not None for piece in pieces)


def test_a_large_cell_is_cut_into_chunks_of_the_targets_size() -> None:
    for n in (8 * 4096, 7 * 4099, 3 * 50257):
        ranks = 8 if n % 8 == 0 else 7 if n % 7 == 0 else 3
        chunk = shared_chunk((n, 4096), ((0, n // ranks), (0, 4096)), 2, ranks, None)
        assert chunk is not None
        assert (n // ranks) % chunk[0] == 0
        assert 64 << 10 < math.prod(chunk) * 2 <= grid.TARGET


def test_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie that every rank has is one; one that only some have is a tensor of its own, of the same chunks."""
    shrink(monkeypatch)
    store = Small.new().store
    embed, other = torch.randn(64, 8), torch.randn(64, 8)
    parts: list[dict[str, Any]] = []
    for rank in range(2):
        mine = embed[32 * rank : 32 * rank + 32]
        place = (32 * rank, 0)
        half = mine if rank == 0 else other[32:]
        parts.append(
            {
                "embed": ms.Slice(mine, place, embed.shape),
                "head": ms.Slice(mine, place, embed.shape),
                "half": ms.Slice(half, place, embed.shape),
            }
        )
    parts[0]["shifted"] = ms.Slice(embed[:32], (0, 0), (32, 8))  # the same memory, but another tensor
    save_all(store, parts)
    store.publish("m", "s", ranks=2)
    loaded = store.load("m")
    assert loaded["head"] is loaded["embed"]
    assert store.describe("m").aliases == {"head": "embed"}
    assert bits(loaded["embed"]) == bits(embed)
    assert bits(loaded["half"]) == bits(torch.cat([embed[:32], other[32:]]))
    assert bits(loaded["shifted"]) == bits(embed[:32])


def test_what_does_not_go_together_names_tensor_and_ranks() -> None:
    whole = torch.randn(8, 4)
    first = ms.Slice(whole[:4], (0, 0), (8, 4))
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"t": first}, {"t": ms.Slice(whole[3:], (3, 0), (8, 4))}, r"'t'.*ranks 0 and 1 both have \[3:4, 0:4\]"),
        (
            {"t": first},
            {"t": ms.Slice(whole[5:], (5, 0), (8, 4))},
            r"'t'.*of its 32 elements 28.*rank 1 has \[5:8, 0:4\]",
        ),
        ({"t": first}, {"t": ms.Slice(whole[4:].double(), (4, 0), (8, 4))}, r"'t'.*rank 0 has float32.*rank 1 float64"),
        ({"t": first}, {"t": ms.Slice(whole[4:], (4, 0), (9, 4))}, r"'t'.*shape \(8, 4\).*rank 1.*\(9, 4\)"),
        ({"t": whole}, {"t": whole}, r"'t'.*ranks 0 and 1 both have"),
        ({"s": torch.tensor(1)}, {"s": torch.tensor(1)}, r"'s'.*ranks 0 and 1 both have all of it"),
        ({"t": first}, {}, r"'t'.*of its 32 elements 16 are there: rank 0 has \[0:4, 0:4\]"),
    ]
    for one, other, message in cases:
        small = Small.new()
        save_all(small.store, [one, other])
        with pytest.raises(ConflictError, match=message) as caught:
            small.store.publish("m", "s", ranks=2)
        assert caught.value.tensor in ("t", "s")
        assert contents(small.store) == {}
    store = Small.new().store
    store.save_part("m", {"t": first}, session="s", rank=0, ranks=2)
    store.save_part("m", {"t": ms.Slice(whole[4:], (4, 0), (8, 4))}, session="s", rank=1, ranks=2, codec="raw")
    with pytest.raises(ConflictError, match="rank 0 has codec 'lossless', rank 1 has 'raw'"):
        store.publish("m", "s", ranks=2)


def test_a_missing_rank_is_named() -> None:
    store = Small.new().store
    store.save_part("m", {"a": torch.ones(3)}, session="s", rank=1, ranks=4)
    with pytest.raises(NotFoundError, match="rank 0, 2, 3 of 4"):
        store.publish("m", "s", ranks=4)
    with pytest.raises(NotFoundError, match="no part of rank 0 of 1"):
        store.publish("m", "another", ranks=1)
    store.save_part("m", {"b": torch.ones(3)}, session="s", rank=0, ranks=2)
    with pytest.raises(ConflictError, match=r"rank 1 .* one of 4 ranks, not of 2"):
        store.publish("m", "s", ranks=2)
    assert contents(store) == {}


def test_wrong_arguments() -> None:
    store = Small.new().store
    good = {"a": torch.ones(3)}
    for options in ({"rank": 2, "ranks": 2}, {"rank": -1, "ranks": 2}, {"rank": 0, "ranks": 0}):
        with pytest.raises(ValueError, match="rank="):
            store.save_part("m", good, session="s", **options)
    with pytest.raises(ValueError, match="session"):
        store.save_part("m", good, session="", rank=0, ranks=1)
    with pytest.raises(ValueError, match="codec"):
        store.save_part("m", good, session="s", rank=0, ranks=1, codec="delta")
    for slice in (
        ms.Slice(torch.ones(3, 2), (2, 0), (4, 2)),
        ms.Slice(torch.ones(3), (0, 0), (4, 2)),
        ms.Slice(torch.ones(2), (-1,), (4,)),
    ):
        with pytest.raises(ValueError, match=r"slice of tensor 'a'.*does not lie within"):
            store.save_part("m", {"a": slice}, session="s", rank=0, ranks=1)
    with pytest.raises(TypeError, match="'a' is a list"):
        store.save_part("m", {"a": [1]}, session="s", rank=0, ranks=1)
    with pytest.raises(NotFoundError):
        store.models()


def test_files_of_ranks_must_agree_unless_replaced() -> None:
    store = Small.new().store
    for rank in range(2):
        store.save_part(
            *("m", {f"t{rank}": torch.ones(2)}),
            session="s",
            rank=rank,
            ranks=2,
            files={"a": b"same", "b": bytes([rank])},
        )
    with pytest.raises(ConflictError, match="file 'b' of ranks 0 and 1 differs"):
        store.publish("m", "s", ranks=2)
    store.publish("m", "s", ranks=2, files={"b": b"last"})
    assert (store.file("m", "a"), store.file("m", "b")) == (b"same", b"last")


def test_a_rank_that_is_run_again_stores_nothing_twice_and_counts(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    counting = CountingStorage(MemoryStorage("again"))
    store = open_on(counting)
    first = {"t": torch.randn(64, 64)}
    store.save_part("m", first, session="s", rank=0, ranks=1)
    there = keys(counting)
    counting.reset()
    part = store.save_part("m", first, session="s", rank=0, ranks=1)
    assert part.stored == 0
    assert part.reused
    assert keys(counting) == there
    assert not counting.requests["put"]
    assert counting.requests["create"] <= 1, "the storage's clock is asked"
    second = {"t": torch.cat([first["t"][:32], torch.zeros(32, 64)])}
    store.save_part("m", second, session="s", rank=0, ranks=1)
    store.publish("m", "s", ranks=1)
    assert bits(store.load("m")["t"]) == bits(second["t"])


def test_a_session_becomes_one_version(storage: Storage) -> None:
    """However often, and by however many at once, it is published; and is then closed."""
    url_storage = MemoryStorage("once")
    stores = [open_on(url_storage) for _ in range(6)]
    save_all(stores[0], [{"a": torch.ones(3)}, {"b": torch.zeros(3)}])
    gate = threading.Barrier(len(stores))

    def publish(store: Store) -> int:
        gate.wait()
        try:
            return store.publish("m", "s", ranks=2).version
        except NotFoundError:  # another was done in the midst of this one, and took the pages away
            return store.publish("m", "s", ranks=2).version

    with ThreadPoolExecutor(len(stores)) as pool:
        assert set(pool.map(publish, stores)) == {1}
    assert [v.version for v in stores[0].versions("m")] == [1]
    assert stores[0].publish("m", "s", ranks=2).version == 1
    with pytest.raises(ConflictError, match="published as version 1"):
        stores[0].save_part("m", {"a": torch.ones(3)}, session="s", rank=0, ranks=2)
    assert keys(url_storage, session_prefix("m", "s")) == {published_key("m", "s")}


def test_what_is_said_of_a_version_in_parts_is_kept() -> None:
    store = Small.new().store
    save_all(store, [{"a": torch.ones(3)}, {"b": torch.zeros(3)}])
    for message, meta, error in (
        (3, None, TypeError),
        ("x" * 5000, None, ValueError),
        (None, ["step"], TypeError),
        (None, {"step": [1]}, TypeError),
        (None, {"1 2": 1}, ValueError),
    ):
        with pytest.raises(error, match=r"message|meta"):
            store.publish("m", "s", ranks=2, message=message, meta=meta)  # type: ignore[arg-type]
    assert not store.publish("m", "s", ranks=2, message="after warm-up", meta={"step": 7, "loss": 0.5}).reused
    assert store.publish("m", "s", ranks=2, message="once more").version == 1
    (entry,) = store.log("m")
    assert (entry.message, entry.meta) == ("after warm-up", {"step": "7", "loss": "0.5"})
    assert entry.source == "2 ranks' parts"
    assert entry.by


def test_a_publisher_that_died_after_the_record_makes_no_second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Small.new().store
    save_all(store, [{"a": torch.ones(3)}])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "published_key", dies)
        with pytest.raises(KeyboardInterrupt):
            store.publish("m", "s", ranks=1)
    store.save("m", {"other": torch.zeros(2)})  # an unrelated writer comes between
    assert store.publish("m", "s", ranks=1).version == 1
    assert [v.version for v in store.versions("m")] == [1, 2]


def test_garbage_collection_keeps_a_session_that_goes_on_and_sweeps_one_that_does_not() -> None:
    small = Small.new()
    store = small.store
    store.save("m", {"x": torch.ones(1)})
    store.save_part("m", {"a": torch.randn(50)}, session="s", rank=0, ranks=2)
    small.age(1000)
    store.save_part("m", {"b": torch.randn(50)}, session="s", rank=1, ranks=2)
    small.sweep(grace=100)  # the first rank's pack is old, and its page; the session goes on
    store.publish("m", "s", ranks=2)
    assert store.load("m").keys() == {"a", "b"}
    store.save_part("m", {"c": torch.randn(50)}, session="given up", rank=0, ranks=2)
    packs = keys(small.storage, PACKS)
    small.age(1000)
    small.sweep(grace=100)
    assert len(packs - keys(small.storage, PACKS)) == 1
    assert not keys(small.storage, "jobs/")
    assert store.load("m").keys() == {"a", "b"}


def test_old_packs_are_written_again_and_lost_ones_named_before_anything_is_published() -> None:
    small = Small.new()
    store = small.store
    store.save_part("m", {"a": torch.randn(50)}, session="s", rank=0, ranks=1)
    (pack,) = keys(small.storage, PACKS)
    small.age(20 * 3600, pack)
    store.publish("m", "s", ranks=1)
    small.sweep(grace=3600)
    info = small.storage.info(pack)
    assert info is not None
    store.save_part("m", {"a": torch.randn(50)}, session="t", rank=0, ranks=1)
    (fresh,) = {k for k in keys(small.storage, PACKS) if k in _packs_of(small, "t")}
    small.storage.delete(fresh)
    with pytest.raises(NotFoundError, match="part of rank 0 is gone"):
        store.publish("m", "t", ranks=1)
    assert len(store.versions("m")) == 1
    store.save_part("m", {"a": torch.ones(5)}, session="t", rank=0, ranks=1)
    assert store.publish("m", "t", ranks=1).version == 2


def test_a_pack_that_was_damaged_since_its_part_was_saved_is_named_before_anything_is_published() -> None:
    small = Small.new()
    store = small.store
    store.save_part("m", {"a": torch.randn(50)}, session="s", rank=0, ranks=1)
    (pack,) = keys(small.storage, PACKS)
    small.damage(pack, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(CorruptionError, match="part of rank 0 is damaged: nothing was published; save that rank again"):
        open_on(small.storage).publish("m", "s", ranks=1)
    assert not list(store.models())


def test_a_session_that_was_published_is_looked_at_before_it_is_said_to_be_there() -> None:
    small = Small.new()
    small.store.save_part("m", {"a": torch.randn(50)}, session="s", rank=0, ranks=1)
    small.store.publish("m", "s", ranks=1)
    pack = pack_key(small.manifest("m").packs[0])
    small.damage(pack, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(CorruptionError, match="damaged"):
        open_on(small.storage).publish("m", "s", ranks=1)
    small.store.delete("m@1")
    with pytest.raises(ConflictError, match="version 1, which was deleted since"):
        open_on(small.storage).publish("m", "s", ranks=1)


def _packs_of(small: Small, session: str) -> set[str]:
    from modelstore.execute.write.parts import read_parts

    (part,) = read_parts(small.storage, "m", session, 1)
    return {pack_key(pack) for pack in part.page.manifest.packs}


def test_damaged_pages_are_one_clear_error() -> None:
    small = Small.new()
    small.store.save_part("m", {"t": ms.Slice(torch.ones(4), (0,), (8,))}, session="s", rank=0, ranks=1)
    (key,) = keys(small.storage, session_prefix("m", "s"))
    good = small.storage.get(key)
    for wrong in (b"", good[:-9], b"[1]", good.replace(b"[8]", b"[7]").replace(b"[[0,4]]", b"[[4,8]]"), b"[" * 10_000):
        small.damage(key, lambda data, wrong=wrong: data.__setitem__(slice(None), wrong))  # type: ignore[misc]
        with pytest.raises(FormatError, match="not a valid part"):
            small.store.publish("m", "s", ranks=1)
    assert contents(small.store) == {}


def test_the_digest_of_a_large_tensor_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing reads a tensor back in parts of what the budget allows: no read asks for more."""
    store = ms.open(str(tmp_path), memory="64MiB", threads=2)
    whole = torch.randn(3000, 8000)  # 96 MB
    save_all(store, [{"t": split(whole, 2, r, 1)} for r in range(2)], codec="raw")
    reads: list[int] = []
    read = merging._RankSlices.read

    def counted(self: merging._RankSlices, region: Region, out: Bytes) -> None:
        reads.append(out.nbytes)
        read(self, region, out)

    monkeypatch.setattr(merging._RankSlices, "read", counted)
    store.publish("m", "s", ranks=2)
    assert max(reads) <= (64 << 20) // 4
    assert sum(reads) == whole.nbytes
    assert bits(store.load("m")["t"]) == bits(whole)
