"""One variant of one version: it stays at its version, and does what the store does with its reference."""

from __future__ import annotations

import inspect
import pickle
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.errors import NotFoundError
from modelstore.execute.read.loading import LazyTensor
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import all_bits, open_on, weights

MODEL = {"a.weight": torch.randn(64, 256).bfloat16(), **weights(1)}
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:")


@pytest.fixture
def store() -> ms.Store:
    made = open_on(MemoryStorage(uuid.uuid4().hex))
    made.save("m", MODEL, files={"notes.txt": b"first"}, tag="prod")
    return made


@pytest.mark.parametrize("ref", ["m", "m@prod", "m@1"])
def test_it_stays_at_its_version(store: ms.Store, ref: str) -> None:
    model = store[ref]
    store.save("m", weights(2), files={"notes.txt": b"second"}, tag="prod")
    assert (model.ref, model.name, model.version, model.variant) == ("m@1", "m", 1, "original")
    assert all_bits(model.load()) == all_bits(MODEL)
    assert model.file("notes.txt") == b"first"
    assert model.describe().version == 1
    assert store["m@prod"].version == store["m"].version == 2


def test_it_goes_on_when_its_version_was_stored_anew(store: ms.Store) -> None:
    model = store["m"]
    lazy = model.tensor("large")
    assert model.compress("ladder").version == 1
    store.gc(dry_run=False, grace=0)
    assert store.variants("m")[0].codec == "ladder"
    assert all_bits(model.load()) == all_bits(MODEL)
    assert lazy.shape == (128, 400)
    store.untag("m", "prod")
    store.delete("m@1")
    with pytest.raises(NotFoundError):
        model.load()


def test_what_is_not_there_is_told_at_once(store: ms.Store) -> None:
    for ref in ("n", "m@2", "m@beta", "m:mine"):
        with pytest.raises(NotFoundError):
            store[ref]
    with pytest.raises(ValueError, match="not valid"):
        store["m@@"]
    with pytest.raises(TypeError):
        store[3]  # type: ignore[index]


def test_a_preset_is_made_while_it_is_read(store: ms.Store) -> None:
    model = store["m@prod:int8"]
    read = all_bits(model.load())
    with pytest.raises(NotFoundError):
        model.describe()
    store.compress("m", "int8")
    assert all_bits(model.load()) == read
    assert model.describe().stored < store.describe("m").stored


def test_it_is_pickled(tmp_path: object) -> None:
    store = ms.open(str(tmp_path))
    store.save("m", MODEL)
    model = store["m"]
    store.save("m", weights(2))
    again = pickle.loads(pickle.dumps(model))
    assert again.ref == "m@1"
    assert all_bits(again.load()) == all_bits(MODEL)


def test_it_asks_for_no_more_than_the_store_does() -> None:
    counting = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counting)
    store.save("m", MODEL)
    asked = []
    for read in (lambda: open_on(counting).load("m"), lambda: open_on(counting)["m"].load()):
        counting.reset()
        read()
        asked.append(dict(counting.requests))
    assert asked[0] == asked[1]


def test_wrong_arguments_are_refused(store: ms.Store) -> None:
    with pytest.raises(TypeError, match="names"):
        store["m"].load(names=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device"):
        store["m"].stream(device="cuda:99")


@pytest.mark.parametrize("size", ["512M", "512MB", "0.5GiB", 512_000_000])
def test_sizes_are_those_of_the_command_line(size: int | str, tmp_path: object) -> None:
    store = ms.open(str(tmp_path), memory=size)
    store.save("m", {"w": torch.ones(300, 300), "v": torch.ones(300, 300)})
    done = store["m"].export(f"{tmp_path}/out", max_shard_bytes="400K")
    assert sum(name.endswith(".safetensors") for name in done.files) == 2


def test_without_a_cluster_there_is_none(store: ms.Store) -> None:
    assert store.cluster is None
    with pytest.raises(ValueError, match="without a cluster"):
        store.prefetch("m")


@pytest.mark.parametrize("kind", [ms.Store, ms.Model, ms.Cluster])
def test_every_method_tells_arguments_results_errors_and_an_example(kind: type) -> None:
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith("_") or (kind is ms.Model and name in ("record", "opened")):
            continue
        text, parameters = (
            inspect.getdoc(method) or "",
            [p for p in inspect.signature(method).parameters if p != "self"],
        )
        told = [section for section in SECTIONS if section in text]
        assert {"Raises:", "Example:"} <= set(told), name
        assert bool(parameters) == ("Args:" in told), name
        assert ("Returns:" in told) == (inspect.signature(method).return_annotation != "None"), name
        for parameter in parameters:
            assert f"    {parameter}: " in text, f"{kind.__name__}.{name} does not tell of {parameter}"


def test_a_stores_methods_tell_what_its_models_do() -> None:
    for name in ("load", "stream", "export", "describe", "compress", "file"):
        text = inspect.getdoc(getattr(ms.Store, name)) or ""
        assert text.startswith(f"The same as `store[ref].{name}(…)`.")
        assert "ref: " in text


def test_a_lazy_tensor_becomes_an_array_by_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ms.open(tmp_path)
    values = torch.arange(5000.0).reshape(50, 100)
    store.save("m", {"w": values, "half": values.bfloat16()})
    reads: list[str] = []
    read = LazyTensor.__getitem__
    monkeypatch.setattr(LazyTensor, "__getitem__", lambda self, index: (reads.append(self.name), read(self, index))[1])
    assert torch.equal(torch.as_tensor(store.tensor("m", "w")), values)
    assert torch.equal(torch.tensor(store.tensor("m", "half")), values.bfloat16())
    assert np.array_equal(np.asarray(store.tensor("m", "w")), values.numpy())
    assert np.array_equal(np.asarray(store.tensor("m", "w"), np.float64), values.double().numpy())
    assert reads == ["w", "half", "w", "w"]
    with pytest.raises(TypeError, match="BFloat16"):
        np.asarray(store.tensor("m", "half"))


def test_small_slices_that_are_kept_hold_little(tmp_path: Path) -> None:
    store = ms.open(tmp_path)
    store.save("m", {"w": torch.arange(1 << 16).reshape(256, 256)})
    lazy = store.tensor("m", "w")
    tracemalloc.start()
    try:
        rows = [lazy[i] for i in range(256)]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    mapped = sum(1 for row in rows if row.data_ptr() % (2 << 20) == 0)
    assert held < 4 * sum(row.nbytes for row in rows)
    assert mapped == 0, "a map of huge pages each"
