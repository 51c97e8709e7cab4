"""Compressing: what is made, what stays, what happens when it is done twice, beside others, or of bad input."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import modelstore as ms
from modelstore.compress.presets import PRESETS
from modelstore.errors import ConflictError, CorruptionError, UnsupportedError
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import all_bits, journal, open_on, pack_sizes, shrink

RECIPES = tuple(name for name in PRESETS if name not in ("ladder", "round"))


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A small model with something of each kind."""
    torch.manual_seed(seed)
    made = {
        "model.embed_tokens.weight": torch.randn(320, 192),
        "model.layers.0.mlp.down_proj.weight": torch.randn(192, 640) * torch.logspace(-2, 0, 192)[:, None],
        "model.layers.0.mlp.up_proj.weight": torch.randn(640, 192),
        "model.layers.0.conv.weight": torch.randn(24, 8, 3, 3),
        "model.layers.0.norm.weight": torch.ones(192),
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()} | {"steps": torch.arange(7)}


def sqnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to noise in dB."""
    noise = (one.double() - other.double()).square().sum()
    return float(10 * torch.log10(one.double().square().sum() / noise)) if noise else float("inf")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_variant_is_made_and_the_original_stays(recipe: str) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store, saved = open_on(storage), model()
    store.save("m", saved)
    before = pack_sizes(storage)
    made = store.compress("m", recipe)
    assert [info.variant for info in store.variants("m")] == ["original", recipe]
    assert all_bits(store.load("m")) == all_bits(saved)
    loaded = store.load(f"m:{recipe}")
    assert {n: (t.dtype, t.shape) for n, t in loaded.items()} == {n: (t.dtype, t.shape) for n, t in saved.items()}
    for name in ("model.embed_tokens.weight", "model.layers.0.norm.weight", "steps"):
        assert torch.equal(loaded[name], saved[name]) or recipe == "half"
    about = store.describe(f"m:{recipe}")
    told: Mapping[str, float] = about.metrics.get("tensor_sqnr", {})
    for name, value in told.items():
        assert sqnr(saved[name], loaded[name]) == pytest.approx(value, abs=0.05)
    assert about.recipe["name"] == recipe
    fresh = [size for key, size in pack_sizes(storage).items() if key not in before]
    assert made.stored <= sum(fresh) < made.stored + 8192  # the manifest's copy aside, nothing that was there already
    assert store.verify(deep=True).ok
    assert not journal(storage)


def test_the_same_bytes_whatever_the_threads() -> None:
    made = []
    for threads in (1, 2, 5):
        storage = MemoryStorage(uuid.uuid4().hex)
        store = open_on(storage, threads=threads)
        store.save("m", model())
        store.compress("m", "int4")
        made.append((pack_sizes(storage), store.repo.catalog.newest("m").variants["int4"].manifest))
    assert made[0] == made[1] == made[2]


def test_done_twice_is_done_once() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", model())
    first = store.compress("m", "int8")
    stored = pack_sizes(storage)
    again = store.compress("m", "int8")
    assert pack_sizes(storage) == stored
    assert again.stored == 0
    assert again.variants == first.variants
    assert again.metrics == first.metrics
    with pytest.raises(ConflictError, match="has a variant 'int8' already: delete m@1:int8 first"):
        store.compress("m", "int4", variant="int8")
    store.delete("m@1:int8")
    store.compress("m", "int4", variant="int8")
    assert store.describe("m:int8").recipe["name"] == "int4"


def test_what_a_killed_compression_stored_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    storage = MemoryStorage(uuid.uuid4().hex)
    open_on(storage).save("m", model())
    saved = set(pack_sizes(storage))
    at = 0
    while len(set(pack_sizes(storage)) - saved) < 2:  # until some of its packs are stored
        at += 1
        with pytest.raises(Killed):
            open_on(FaultyStorage(storage, kill_at=at)).compress("m", "int8")
    assert journal(storage)
    there = {key: storage.info(key) for key in pack_sizes(storage)}
    made = open_on(storage).compress("m", "int8")
    assert 0 < made.stored < sum(v.stored for v in made.variants)
    assert {key: storage.info(key) for key in there} == there
    assert not journal(storage)


def test_a_version_with_little_changed_stores_little() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", model())
    store.compress("m", "int4")
    changed = model()
    changed["model.layers.0.conv.weight"] = changed["model.layers.0.conv.weight"] * 2
    store.save("m", changed)
    made = store.compress("m", "int4")
    (tensor,) = (t for t in store.describe("m:int4").tensors if "conv" in t.name)
    assert made.stored < tensor.stored + 16_384  # that tensor, and a pack's header


def test_at_once() -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", model())
    recipes = ["int8", "int4", "int8", "int4-rtn", "int4"]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda recipe: store.compress("m", recipe), recipes))
    assert sorted(v.variant for v in store.variants("m")) == ["int4", "int4-rtn", "int8", "original"]
    assert store.verify(deep=True).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_ladder(dtype: torch.dtype) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store, saved = open_on(storage), model(dtype=dtype)
    store.save("m", saved)
    made = store.compress("m", "ladder")
    assert [v.variant for v in made.variants] == ["original", "int4", "int8"]
    assert all_bits(store.load("m")) == all_bits(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    assert sqnr(saved[name], store.load("m:int8")[name]) > 40
    assert 15 < sqnr(saved[name], store.load("m:int4")[name]) < 30
    manifests = {
        v: {p.name for t in store[f"m:{v}"].opened().manifest.tensors if t.name == name for p in t.planes}
        for v in VIEWS
    }
    assert manifests["int4"] < manifests["int8"] < manifests["original"]
    store.gc(dry_run=False, grace=0)  # the original's old packs are garbage now
    assert store.verify(deep=True).ok
    assert store.verify(deep=True).problems == ()
    assert all_bits(store.load("m")) == all_bits(saved)
    assert store.compress("m", "ladder").stored == 0
    store.save("m", saved)  # and a version after it stays on the ladder
    assert sum(t.codec == "ladder" for t in store.describe("m@2").tensors) == 3


VIEWS = ("original", "int8", "int4")


def test_values_that_are_not_finite_are_counted() -> None:
    store, saved = open_on(MemoryStorage(uuid.uuid4().hex)), model()
    name = "model.layers.0.mlp.up_proj.weight"
    saved[name][3, :5] = float("nan")
    saved[name][4, 0] = float("-inf")
    store.save("m", saved)
    made = store.compress("m", "int8")
    assert made.metrics["int8"]["nonfinite"] == {name: 6}
    loaded = store.load("m:int8")[name]
    assert loaded.isfinite().all()
    assert all_bits(store.load("m")) == all_bits(saved)


def test_an_original_that_is_damaged_is_not_compressed() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", model())
    key = max(pack_sizes(storage), key=lambda k: pack_sizes(storage)[k])
    data = bytearray(storage.get(key))
    data[len(data) // 2] ^= 1
    storage.delete(key)
    storage.put(key, [bytes(data)], len(data))
    with pytest.raises(CorruptionError, match="run 'modelstore repair"):
        store.compress("m", "int8")
    assert [v.variant for v in store.variants("m")] == ["original"]


def test_wrong_input() -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", model())
    with pytest.raises(ms.errors.NotFoundError):
        store.compress("other", "int8")
    with pytest.raises(ValueError, match="names a variant"):
        store.compress("m:int8", "int4")
    with pytest.raises(ValueError, match="made cannot be called 'original'"):
        store.compress("m", "int8", variant="original")
    rules = [{"targets": [t], "codec": {"name": c}} for t, c in (("linear", "ladder"), ("convolution", "int"))]
    with pytest.raises(ValueError, match="mixes ladder with other codecs"):
        store.compress("m", {"name": "x", "rules": rules})


def test_what_a_codec_cannot_do_within_the_budget_is_refused_before_it_begins() -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}", memory="64MiB")
    name = "model.layers.0.mlp.up_proj.weight"
    store.save("m", {name: torch.zeros(1100, 14_000, dtype=torch.bfloat16), "b": torch.ones(3)})
    recipe = ms.Recipe(
        "thin", (ms.Rule(("linear",), ms.CodecSpec("lowrank", {"energy": 0.5})),)
    )  # an energy needs all eigenvectors
    for do in (
        lambda: store.compress("m", recipe),
        lambda: store.compress("m", "lowrank"),
        lambda: store.load("m:lowrank"),
    ):
        with pytest.raises(UnsupportedError, match=rf"{name}.* needs \d+ MiB .* by lowrank, and memory= is 64 MiB"):
            do()
    assert [list(info.variants) for info in store.versions("m")] == [["original"]]
