"""`parent="auto"` finds the version that a model was made from, says which, and takes none where none is near."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

import modelstore as ms
from modelstore.format.objects.record import version_key
from modelstore.plan import chain

Tensors = dict[str, torch.Tensor]


def weights(seed: int, layers: int = 4) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    matrices = {f"layers.{n}.weight": 0.02 * torch.randn(96, 64, generator=random) for n in range(layers)}
    return {name: t.bfloat16() for name, t in matrices.items()} | {"norm": torch.ones(64).bfloat16()}


def tuned(model: Tensors, by: float, seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + by * t.float().std() * torch.randn(t.shape, generator=random)).bfloat16()
        for name, t in model.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> ms.Store:
    """A base among strangers."""
    store = ms.open(tmp_path / "store")
    for seed in range(4):
        store.save(f"strangers/{seed}", weights(seed))
    store.save("acme/base", weights(10))
    return store


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fine_tune_is_stored_against_its_base(store: ms.Store) -> None:
    fine = tuned(weights(10), 0.01, 1)
    saved = store.save("other/name", fine, codec="delta", parent="auto")
    assert saved.stored < 0.5 * saved.bytes
    assert saved.remarks[0].startswith("parent acme/base@1: the nearest of 5 versions with a sketch, at 0.")
    assert store.log("other/name")[0].parent == "acme/base@1"
    assert same(store.load("other/name"), fine)


def test_of_a_family_the_nearest_is_taken(store: ms.Store) -> None:
    fine = tuned(weights(10), 0.05, 1)
    store.save("acme/fine", fine, codec="delta", parent="acme/base")
    store.save("acme/sibling", tuned(weights(10), 0.05, 2), codec="delta", parent="acme/base")
    store.save("acme/more", tuned(fine, 0.01, 3), parent="auto")
    assert store.log("acme/more")[0].parent == "acme/fine@1"


def test_of_copies_the_first_is_taken(store: ms.Store) -> None:
    store.save("acme/copy", weights(10), codec="delta", parent="auto")
    store.save("acme/again", weights(10), codec="delta", parent="auto")
    assert store.log("acme/again")[0].parent == "acme/base@1"


def test_without_anything_near_there_is_no_parent(store: ms.Store) -> None:
    saved = store.save("acme/new", weights(20), codec="delta", parent="auto")
    assert saved.remarks[0].startswith("no parent: of 5 versions with a sketch, ")
    assert store.log("acme/new")[0].parent == ""
    assert same(store.load("acme/new"), weights(20))


def test_a_store_without_sketches_says_so(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save_part("m", weights(1), session="a", rank=0, ranks=1)
    store.publish("m", "a", ranks=1)  # parts are not sketched
    saved = store.save("n", weights(1), parent="auto")
    assert saved.remarks == ("no parent: no version in the store has a sketch",)


def test_tensors_of_other_names_are_recognised(store: ms.Store) -> None:
    renamed = {name.replace("layers", "h"): t for name, t in weights(10).items()}
    saved = store.save("acme/renamed", renamed, parent="auto")
    assert store.log("acme/renamed")[0].parent == "acme/base@1"
    assert saved.stored == 0  # chunks of the same values are the same


def test_a_base_whose_chain_is_full_is_passed_over(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "LONGEST_CHAIN", 1)
    fine = tuned(weights(10), 0.01, 1)
    store.save("acme/fine", fine, codec="delta", parent="acme/base")
    saved = store.save("acme/more", tuned(fine, 0.005, 2), codec="delta", parent="auto")
    assert store.log("acme/more")[0].parent == "acme/base@1"
    assert saved.stored < 0.6 * saved.bytes


def test_a_deleted_version_is_no_parent(store: ms.Store) -> None:
    store.delete("acme/base@1")
    assert store.save("m", weights(10), parent="auto").remarks[0].startswith("no parent: of 4 versions")


def test_a_version_that_cannot_be_read_is_passed_over(store: ms.Store, caplog: pytest.LogCaptureFixture) -> None:
    store.save("acme/second", tuned(weights(10), 0.01, 1))
    root = Path(store.url.removeprefix("file://"))
    for manifest in (root / "models/acme/base/manifests").iterdir():
        manifest.write_bytes(b"damaged")
    again = ms.open(root)
    again.save("acme/third", weights(10), codec="delta", parent="auto")
    assert again.log("acme/third")[0].parent == "acme/second@1"
    assert "is lost or damaged" in caplog.text


def test_the_sketch_stays_when_the_original_is_stored_in_another_way(store: ms.Store) -> None:
    large = {"model.layers.0.mlp.up_proj.weight": (0.02 * torch.randn(256, 256)).bfloat16()}
    store.save("acme/large", large)
    store.compress("acme/large", "ladder", include=["*"])
    store.save("acme/next", tuned(large, 0.01, 1), parent="auto")
    assert store.log("acme/next")[0].parent == "acme/large@1"


def test_ranks_must_name_the_parent(store: ms.Store) -> None:
    with pytest.raises(ValueError, match="all ranks must give the same version"):
        store.save_part("m", weights(1), session="a", rank=0, ranks=2, codec="delta", parent="auto")


def test_the_record_has_the_sketch_that_the_format_describes(tmp_path: Path) -> None:
    """Made here by what docs/format.md says, and by nothing else."""
    store, values = ms.open(tmp_path / "store"), torch.arange(-600, 600).reshape(6, 200).to(torch.float16)
    store.save("m", {"w": values, "scalar": torch.tensor(1.0), "wide": torch.ones(9, dtype=torch.float64)})

    def short(text: str) -> int:
        return int(struct.unpack("<I", blake3(text.encode()).digest()[:4])[0])

    words = values[3, 100:164].contiguous().view(torch.int16).numpy().view(np.uint16)
    ordinals = np.where(words >> 15, words ^ 0x7FFF, words).astype("<u2")
    made = struct.pack("<BIIIBB", 1, 1, short("w"), short("float16\0(6, 200)"), 2, 64) + ordinals.tobytes()
    record = json.loads((tmp_path / "store" / version_key("m", 1, 1)).read_text())
    assert base64.b64decode(record["variants"]["original"]["sketch"]) == made
