"""Variants that are not stored: made while they are read, with the bits that `compress` stores."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.client import Store
from modelstore.codecs.look import Look
from modelstore.codecs.shared.kmeans import KMeans
from modelstore.compress.presets import PRESETS
from modelstore.errors import NotFoundError, UnsupportedError
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.compress.llama import FILES, LAYER, llama
from tests.helpers.stores import all_bits, bits, open_on

REFUSED = ("ladder", "sparse50-global")
MADE = [name for name in PRESETS if name not in REFUSED]
ENGINES = ("fp8", "fp8-block", "mxfp4", "nvfp4", "int8", "int4", "int4-affine")
DOWN = f"{LAYER}mlp.down_proj.weight"
UP = f"{LAYER}mlp.up_proj.weight"


def saved(storage: Any = None, **options: Any) -> Store:
    store = open_on(storage or MemoryStorage(uuid.uuid4().hex))
    store.save("m", llama(), files=FILES, **options)
    return store


@pytest.mark.parametrize("recipe", MADE)
def test_the_bits_are_those_of_the_stored_variant(recipe: str) -> None:
    store, layout = saved(), ms.TensorParallel(1, 2)
    made = all_bits(store.load(f"m:{recipe}"))
    streamed = all_bits(dict(store.stream(f"m:{recipe}")))
    sliced = all_bits(store.load(f"m:{recipe}", shard=layout))
    part = bits(store.tensor(f"m:{recipe}", DOWN)[5:140, 300:777])
    assert [info.variant for info in store.variants("m")] == ["original"]
    store.compress("m", recipe)
    assert made == streamed == all_bits(store.load(f"m:{recipe}"))
    assert sliced == all_bits(store.load(f"m:{recipe}", shard=layout))
    assert part == bits(store.tensor(f"m:{recipe}", DOWN)[5:140, 300:777])


@pytest.mark.parametrize(("recipe", "place"), [*((name, "memory") for name in ENGINES), ("int4", "files")])
def test_engines_get_the_same_parts(recipe: str, place: str, tmp_path: Path) -> None:
    store, layout = saved(LocalStorage(tmp_path) if place == "files" else None), ms.TensorParallel(0, 2)
    made = all_bits(store.load(f"m:{recipe}", dequantize=False))
    sliced = all_bits(dict(store.stream(f"m:{recipe}", shard=layout, dequantize=False)))
    store.compress("m", recipe)
    assert made == all_bits(store.load(f"m:{recipe}", dequantize=False))
    assert sliced == all_bits(store.load(f"m:{recipe}", shard=layout, dequantize=False))


def test_it_is_said_once_and_how_to_store_it(caplog: pytest.LogCaptureFixture) -> None:
    store = saved()
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.load("m:fp8")
    assert [record.getMessage() for record in caplog.records] == [
        "variant 'fp8' of m@1 is not stored and is made of the original while it is read: "
        "compress('m@1', 'fp8') stores it"
    ]
    caplog.clear()
    store.compress("m@1", "fp8")
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.load("m:fp8")
    assert not caplog.records


def test_what_needs_the_whole_model_is_refused() -> None:
    store = saved()
    for recipe in REFUSED:
        for read in (store.load, store.stream):
            with pytest.raises(UnsupportedError, match=rf"compress\('m', '{recipe}'\)"):
                read(f"m:{recipe}")


def test_what_only_looks_at_a_variant_does_not_make_it() -> None:
    store = saved()
    for look in (store.describe, store.verify):
        with pytest.raises(NotFoundError, match="no variant 'fp8'"):
            look("m:fp8")
    with pytest.raises(NotFoundError, match="no variant 'mine'"):
        store.load("m:mine")
    with pytest.raises(NotFoundError):
        store.load("other:fp8")


def test_a_model_with_nothing_to_compress_says_so() -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    store.save("m", {"norm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="compresses none"):
        store.load("m:fp8")


def test_a_slice_reads_only_what_it_needs(tmp_path: Path) -> None:
    saved(LocalStorage(tmp_path))
    counting = CountingStorage(LocalStorage(tmp_path))
    store = open_on(counting)
    lazy = store.tensor("m:int4-rtn", UP)
    counting.bytes.clear()
    part = lazy[:32, :128]
    stored = next(t.stored for t in store.describe("m").tensors if t.name == UP)
    assert 0 < counting.bytes["read"] < stored / 2
    assert bits(part) == bits(store.load("m:int4-rtn", names=[UP])[UP][:32, :128].contiguous())


def test_a_whole_tensor_is_looked_at_once_however_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved()
    fits = []
    fit = KMeans.fit

    def counted(self: KMeans, look: Look) -> Any:
        fits.append(look.shape)
        return fit(self, look)

    monkeypatch.setattr(KMeans, "fit", counted)
    store.load("m:kmeans4")
    assert len(fits) == 7
    fits.clear()
    lazy = store.tensor("m:kmeans4", DOWN)
    assert bits(torch.cat([lazy[:200], lazy[200:]])) == bits(lazy[...])
    assert len(fits) == 1


def test_modules_files_and_deltas() -> None:
    store = saved()
    newer = llama()
    newer[DOWN] = newer[DOWN] + 0.01
    store.save("m", newer, files=FILES, codec="delta", parent="m@1")
    made = all_bits(store.load("m@2:int8"))
    linear = torch.nn.Linear(1536, 512, bias=False, dtype=torch.bfloat16)
    holder = torch.nn.ModuleDict({"down_proj": linear})
    nested = torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"mlp": holder})})
    outer = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": nested})})
    store.load_into(outer, "m@2:int8", strict=False)
    assert bits(linear.weight) == made[DOWN]
    store.compress("m@2", "int8")
    assert made == all_bits(store.load("m@2:int8"))
    assert made != all_bits(store.load("m@1:int8"))


def test_the_same_bits_from_any_number_of_threads_and_a_small_budget(tmp_path: Path) -> None:
    saved(LocalStorage(tmp_path))
    made = [
        all_bits(Store(LocalStorage(tmp_path), memory=memory, threads=threads).load("m:int8"))
        for memory, threads in (("64MiB", 1), ("1GiB", 6))
    ]
    assert made[0] == made[1]
