"""What models hold, alone and shared; what is dead, and what nobody needs."""

from __future__ import annotations

from pathlib import Path

import torch

import modelstore as ms
from modelstore.storage.keys import TEMPORARY
from tests.helpers.stores import pack_sizes
from tests.store.helpers import Small


def test_what_is_shared_and_what_is_alone() -> None:
    small = Small.new()
    big, mine = torch.randn(256, 256), torch.randn(64, 64)
    small.store.save("a", {"big": big}, codec="raw")
    small.store.save("b", {"big": big, "mine": mine}, codec="raw", parent="a")
    small.store.save("c", {"x": torch.randn(32, 32)}, codec="raw")
    found = small.store.du()
    assert [(one.name, one.bytes, one.alone) for one in found.models] == [
        ("a", big.nbytes, 0),
        ("b", big.nbytes + mine.nbytes, mine.nbytes),
        ("c", 4096, 4096),
    ]
    assert found.live == big.nbytes + mine.nbytes + 4096
    assert (found.dead, found.unused) == (0, 0)
    assert found.total == sum(info.size for info in small.storage.list("")) - len(small.storage.get("modelstore.json"))
    assert [one.name for one in small.store.du("b").variants] == ["b@1:original"]


def test_versions_of_one_model_share_and_their_model_holds_it_alone() -> None:
    small = Small.new()
    values = {"big": torch.randn(256, 256), "mine": torch.zeros(16)}
    small.store.save("a", values, codec="raw")
    small.store.save("a", {**values, "mine": torch.ones(16)}, codec="raw")
    found = small.store.du("a")
    assert [(one.name, one.alone) for one in found.versions] == [("a@1", 64), ("a@2", 64)]
    assert found.models[0].alone == found.models[0].bytes == values["big"].nbytes + 128


def test_what_a_delta_is_stored_against_is_held_by_it() -> None:
    small = Small.new()
    base = torch.randn(256, 256)
    small.store.save("a", {"w": base}, codec="raw")
    small.store.save("d", {"w": base + 1e-6}, codec="delta", parent="a")
    small.store.delete("a@1")
    found = small.store.du()
    assert [one.name for one in found.models] == ["d"]
    assert found.models[0].alone > base.nbytes
    assert found.unused == 0


def test_dead_and_unused_bytes() -> None:
    small = Small.new()
    kept, gone = torch.randn(64, 64), torch.randn(128, 128)
    small.store.save("a", {"kept": kept, "gone": gone}, codec="raw")
    small.store.save("a", {"kept": kept, "new": torch.zeros(16)}, codec="raw")
    assert small.store.du().dead == 0
    before = set(pack_sizes(small.storage))
    first = {f"packs/{d[:2]}/{d}.safetensors" for d in (small.entry("a@1").copy,)} & before
    unused = sum(pack_sizes(small.storage)[key] for key in first)
    unused += next(i.size for i in small.storage.list("models/a/manifests/") if small.entry("a@1").manifest in i.key)
    small.store.delete("a@1")
    found = small.store.du()
    assert found.dead == gone.nbytes
    assert found.unused == unused


def test_what_killed_saves_left_half_written_is_counted(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "s")
    store.save("m", {"w": torch.ones(4)})
    folder = next((tmp_path / "s/packs").iterdir())
    before = store.du()
    assert before.unused == 0
    (folder / f"{TEMPORARY}1-{16 * 'a'}").write_bytes(b"12345")
    after = store.du()
    assert (after.unused, after.total) == (5, before.total + 5)
    dry = store.gc()
    assert (dry.bytes, dry.young) == (0, 5)
    assert store.gc(grace=0).bytes == 5
    assert store.gc(dry_run=False, grace=0).bytes == 5
    assert store.du() == before
