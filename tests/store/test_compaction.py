"""What is live of packs moves, exactly; readers, writers and whoever kills it lose nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

import modelstore.client
from modelstore.codecs.exact import lossless
from modelstore.errors import ModelStoreError
from modelstore.format.answers.inventory import Compaction, Swept
from modelstore.format.buffers import Buffer
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import T, Verb, WrappingStorage
from modelstore.store import packs
from modelstore.store.compact import repack
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import all_bits, open_on, pack_sizes, shrink
from tests.store.helpers import Small, flip

Tensors = dict[str, torch.Tensor]


def tensors(seed: int, *names: str) -> Tensors:
    """A few tensors of different values, by these names; small ones between larger ones."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (64, 96), "b": (7,), "c": (48, 64), "d": (128, 32), "e": (1,)}
    made = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
    return {name: value for name, value in made.items() if not names or name in names}


@cache
def _made() -> tuple[Small, dict[str, Tensors]]:
    """Stores of mostly dead packs: versions, a variant's like, a delta, whole tensors, one model on another's chunks."""
    small = Small.new()
    first, second = tensors(1), {**tensors(2), **tensors(1, "c", "b")}
    small.store.save("m", first)
    small.store.save("m", second, tag="prod")
    small.store.save("other", {**tensors(3, "a"), **tensors(1, "c")}, parent="m@1")
    tuned = {**second, "e": torch.ones(1).bfloat16()}
    small.store.save("tuned", tuned, codec="delta", parent="m@2")
    small.store.save("tuned", {**tuned, "b": torch.ones(7).bfloat16()}, codec="delta", parent="tuned@1")
    small.store.save("whole", tensors(5), codec="raw", grid="whole")
    small.store.save("whole", {**tensors(5, "a", "e"), "f": torch.ones(3)}, codec="raw", grid="whole")
    catalog = small.store.repo.catalog
    catalog.publish_variants("m", 2, {"twin": small.entry("m@2")}, "w")
    small.store.delete("m@1")
    small.store.delete("whole@1")
    wanted = {
        "m@prod": second,
        "m@2:twin": second,
        "other": {**tensors(3, "a"), **tensors(1, "c")},
        "tuned@1": tuned,
        "tuned@2": {**tuned, "b": torch.ones(7).bfloat16()},
        "whole": {**tensors(5, "a", "e"), "f": torch.ones(3)},
    }
    small.age(1e6)
    return small, wanted


@pytest.fixture
def small() -> Small:
    """Such a store."""
    return _made()[0].copied()


@pytest.fixture
def wanted() -> dict[str, Tensors]:
    """What is in it."""
    return _made()[1]


def fresh(small: Small) -> modelstore.client.Store:
    """The store as a new process sees it."""
    return modelstore.client.open(small.store.url, memory="64MiB", threads=2)


def right(small: Small, wanted: dict[str, Tensors]) -> None:
    """See that everything is exactly there."""
    store = fresh(small)
    for ref, values in wanted.items():
        assert all_bits(store.load(ref)) == all_bits(values), ref
    assert store.verify(deep=True).problems == ()


def compacted(swept: Swept) -> Compaction:
    """What became of the packs."""
    assert swept.compaction is not None
    return swept.compaction


def test_dead_bytes_are_said_and_go(small: Small, wanted: dict[str, Tensors]) -> None:
    before = sum(pack_sizes(small.storage).values())
    found = fresh(small).gc(dry_run=False)
    assert found.compaction is None
    assert found.dead == fresh(small).du().dead > 0
    would = compacted(fresh(small).gc(compact=True))
    assert {ref.partition(":")[0] for ref in would.variants} == {"m@2", "other@1", "tuned@1", "tuned@2", "whole@2"}
    assert would.left == ()
    held = small.objects()
    fresh(small).gc(compact=True)
    assert small.objects() == held, "a dry run changes nothing"
    done = compacted(fresh(small).gc(dry_run=False, compact=True))
    assert (done.packs, done.before, done.after, done.variants) == (
        would.packs,
        would.before,
        would.after,
        would.variants,
    )
    right(small, wanted)
    small.age(1e6)
    swept = fresh(small).gc(dry_run=False, compact=True)
    assert (compacted(swept).packs, swept.dead) == (0, 0)
    right(small, wanted)
    after = sum(pack_sizes(small.storage).values())
    assert after < before - found.dead // 2
    assert fresh(small).du().unused == 0


def test_packs_above_the_bound_stay(small: Small) -> None:
    assert compacted(fresh(small).gc(compact=0.01)).packs == 0
    assert compacted(fresh(small).gc(compact=1.0)).packs >= compacted(fresh(small).gc(compact=0.8)).packs > 0


def test_nothing_is_decoded_or_encoded(
    small: Small, wanted: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a chunk was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(lossless.Lossless, "decode", never)
        patch.setattr(lossless.Lossless, "encode", never)
        fresh(small).gc(dry_run=False, compact=True)
    right(small, wanted)


def test_whole_tensors_stay_files_that_any_loader_maps(tmp_path: Path) -> None:
    store = modelstore.client.open(tmp_path / "s", memory="64MiB")
    store.save("whole", tensors(5), codec="raw", grid="whole")
    kept = tensors(5, "a", "c")
    store.save("whole", kept, codec="raw", grid="whole")
    store.delete("whole@1")
    assert compacted(store.gc(dry_run=False, grace=0, compact=True)).packs == 1
    fresh = modelstore.client.open(tmp_path / "s", memory="64MiB")
    assert all_bits(fresh.load("whole", mmap=True)) == all_bits(kept)
    (pack,) = [p for p in (tmp_path / "s" / "packs").rglob("*.safetensors") if p.stat().st_size > 4096]
    assert all_bits(load(pack.read_bytes())) == all_bits(kept)


def test_a_new_pack_says_what_lies_in_it(small: Small) -> None:
    fresh(small).gc(dry_run=False, compact=True)
    for digest in small.manifest("other").packs:
        opened = packs.open_pack(small.storage, pack_key(digest))
        note = repack.old_pack(small.storage, digest, np.zeros(0, repack.PLACE))
        assert note is not None
        assert {entry.name.rsplit("/", 2)[0] for entry in opened.entries} <= set(note.note.tensors)


def test_a_save_finds_the_moved_chunks(small: Small) -> None:
    fresh(small).gc(dry_run=False, grace=0, compact=True)
    assert fresh(small).save("m", _made()[1]["m@prod"]).stored == 0


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_nothing_is_lost_and_the_next_goes_on(wanted: dict[str, Tensors], after: bool) -> None:
    for at in range(1 + after, 100, 2):
        small = _made()[0].copied()
        faulty = FaultyStorage(small.storage, kill_at=at, kill_after=after)
        with contextlib.suppress(Killed):
            open_on(faulty).gc(dry_run=False, grace=0, compact=True)
        right(small, wanted)
        small.age(40 * 86_400)
        fresh(small).gc(dry_run=False, grace=0, compact=True)
        small.age(40 * 86_400)
        fresh(small).gc(dry_run=False, grace=0)
        right(small, wanted)
        found = fresh(small).du()
        assert (found.dead, found.unused) == (0, 0)
        if not faulty.dead:
            break
    assert at > 20


def test_readers_that_opened_a_model_before_go_on(small: Small, wanted: dict[str, Tensors]) -> None:
    reader = fresh(small)
    held = reader.tensor("m@prod", "c"), reader.tensor("tuned@2", "a"), reader.tensor("whole", "a")
    fresh(small).gc(dry_run=False, compact=True)
    fresh(small).gc(dry_run=False)
    for one, ref in zip(held, ("m@prod", "tuned@2", "whole"), strict=True):
        assert torch.equal(one[...], wanted[ref][one.name])
    right(small, wanted)


class Beside(WrappingStorage):
    """Does something just before the `at`-th operation that is no listing."""

    def __init__(self, inner: Storage, at: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self.left = at
        self._act = act

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        self.left -= 1
        if not self.left:
            self._act()
        return act()


def _operations() -> int:
    small = _made()[0].copied()
    counting = Beside(small.storage, 0, lambda: None)
    open_on(counting, threads=1).gc(dry_run=False, compact=True)
    return -counting.left


OTHERS: dict[str, Callable[[Small], object]] = {
    "a save": lambda small: fresh(small).save("m", {**_made()[1]["m@prod"], "z": torch.ones(4)}),
    "a variant deleted": lambda small: fresh(small).delete("m@2:twin"),
    "a collection": lambda small: fresh(small).gc(dry_run=False, grace=0),
    "another compaction": lambda small: fresh(small).gc(dry_run=False, grace=0, compact=True),
    "a delta": lambda small: fresh(small).save("late", _made()[1]["m@prod"], codec="delta", parent="m@2"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_beside_others_at_any_moment(other: Callable[[Small], object], wanted: dict[str, Tensors]) -> None:
    operations = _operations()
    for at in range(1, operations, max(1, operations // 15)):
        small = _made()[0].copied()
        with contextlib.suppress(ModelStoreError):
            open_on(Beside(small.storage, at, lambda: other(small)), threads=1).gc(dry_run=False, compact=True)  # noqa: B023
        expected = dict(wanted)
        found = {f"{m.name}@{v.version}" for m in fresh(small).models() for v in fresh(small).versions(m.name)}
        if "twin" not in fresh(small).versions("m")[-1].variants and other is OTHERS["a variant deleted"]:
            del expected["m@2:twin"]
        if "m@3" in found:
            expected["m@3"] = {**wanted["m@prod"], "z": torch.ones(4)}
        if "late@1" in found:
            expected["late"] = wanted["m@prod"]
        right(small, expected)
        small.age(40 * 86_400)
        fresh(small).gc(dry_run=False, grace=0, compact=True)
        right(small, expected)


def test_a_deleted_variant_does_not_come_back(small: Small) -> None:
    class Deleting(WrappingStorage):
        done = False

        def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
            if verb == "put" and "/manifests/" in key and not self.done:
                self.done = True
                fresh(small).delete("m@2:twin")
            return act()

    done = compacted(open_on(Deleting(small.storage)).gc(dry_run=False, compact=True))
    assert "m@2:twin" not in done.variants
    assert "twin" not in fresh(small).versions("m")[-1].variants


def test_a_damaged_chunk_stays_where_it_is_and_is_named(small: Small, wanted: dict[str, Tensors]) -> None:
    good = small.copied()
    manifest = small.manifest("other")
    tensor = manifest.by_name["c"]
    row = tensor.planes[0].first
    pack = manifest.packs[int(manifest.pack[row])]
    small.damage(pack_key(pack), flip(int(manifest.offset[row])))
    done = compacted(fresh(small).gc(dry_run=False, compact=True))
    assert [pack in said for said in done.left] == [True]
    assert "whole@2:original" in done.variants, "the others are compacted"
    assert not any(ref.startswith("other") for ref in done.variants)
    assert all_bits(fresh(small).load("whole")) == all_bits(wanted["whole"])
    mirrored = open_on(small.storage, mirrors=[good.storage])
    assert compacted(mirrored.gc(dry_run=False, grace=0, compact=True)).left == ()
    right(small, wanted)


def test_a_pack_whose_header_is_damaged_stays_as_it_is(small: Small) -> None:
    (pack,) = set(small.manifest("whole@2").packs) - set(small.manifest("other").packs) - _new(small)
    small.damage(pack_key(pack), flip(12))
    done = compacted(fresh(small).gc(dry_run=False, compact=True))
    assert any(pack in said for said in done.left)
    assert not any(ref.startswith("whole") for ref in done.variants)


def _new(small: Small) -> set[str]:
    """Packs of which everything is live."""
    manifest = small.manifest("whole@2")
    row = manifest.by_name["f"].planes[0].first
    return {manifest.packs[int(manifest.pack[row])]}


class Largest(WrappingStorage):
    """The largest piece that was read or written."""

    largest = 0

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def read(self, key: str, start: int, out: memoryview) -> None:
        self.largest = max(self.largest, out.nbytes)
        super().read(key, start, out)

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        def watched() -> Iterable[Buffer]:
            for piece in pieces:
                self.largest = max(self.largest, memoryview(piece).nbytes)
                yield piece

        super().put(key, watched(), size)


def test_packs_that_do_not_fit_in_memory_are_streamed() -> None:
    small = Small.new()
    large = {"x": torch.arange(6 << 20), "y": torch.arange(6 << 20) + 1}
    small.store.save("w", large, codec="raw", grid="whole")
    small.store.save("w", {"y": large["y"]}, codec="raw", grid="whole")
    small.store.delete("w@1")
    small.age(1e6)
    watched = Largest(small.storage)
    assert compacted(open_on(watched, memory="96MiB").gc(dry_run=False, compact=True)).packs == 1
    assert watched.largest <= 8 << 20
    assert torch.equal(fresh(small).load("w")["y"], large["y"])


def test_many_small_packs_become_few(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    small = Small.new()
    values = {f"t{i}": torch.randn(40, 40) for i in range(12)}
    small.store.save("m", values)
    kept = {name: value if i % 2 else value + 1 for i, (name, value) in enumerate(values.items())}
    small.store.save("m", kept)
    small.store.delete("m@1")
    small.age(1e6)
    before = len(small.manifest("m").packs)
    monkeypatch.setattr(packs, "PACK_BYTES", 1 << 20)
    done = compacted(fresh(small).gc(dry_run=False, grace=0, compact=True))
    assert len(small.manifest("m").packs) < before
    assert done.after < done.before
    right(small, {"m": kept})


def test_ladders_and_what_is_made_of_them(small: Small) -> None:
    small = Small.new()
    model = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(128, 256).bfloat16() for i in range(2)}
    model["model.embed_tokens.weight"] = torch.randn(64, 256).bfloat16()
    small.store.save("m", model)
    small.store.compress("m", "ladder")
    small.age(1e6)
    before = {variant: fresh(small).load(f"m:{variant}") for variant in ("int8", "int4")}
    small.sweep(grace=0)
    assert fresh(small).gc(grace=0).dead > 0
    done = compacted(fresh(small).gc(dry_run=False, grace=0, compact=True))
    assert set(done.variants) == {"m@1:original", "m@1:int8", "m@1:int4"}
    for variant, values in before.items():
        assert all_bits(fresh(small).load(f"m:{variant}")) == all_bits(values)
    right(small, {"m": model})
    assert small.manifest("m:int8").parent == small.manifest("m").content
    assert manifest_key("m", small.entry("m").manifest) in small.objects()


def test_a_record_that_cannot_be_read_stops_it_and_is_named(small: Small, wanted: dict[str, Tensors]) -> None:
    key = next(key for key in sorted(small.objects()) if key.startswith("models/other/versions/"))
    kept = small.storage.get(key)
    small.damage(key, lambda data: data.clear())
    before = small.objects()
    done = compacted(fresh(small).gc(dry_run=False, compact=True))
    assert done.packs == 0
    assert any(key in said for said in done.left)
    assert {k for k in before if k.startswith("packs/")} >= {k for k in small.objects() if k.startswith("packs/")}
    small.storage.put(key, [kept], len(kept))
    right(small, wanted)
