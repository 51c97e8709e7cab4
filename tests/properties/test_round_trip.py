"""Any tensors, by any codec and grid, come back bit for bit by every way of reading them."""

from __future__ import annotations

import itertools
import math
import uuid
from typing import Any

import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modelstore as ms
from modelstore.client import Store
from modelstore.format import grid
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import Region
from modelstore.storage.memory import MemoryStorage
from modelstore.store import packs
from tests.helpers.stores import all_bits, bits, open_on

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(QUICK, max_examples=25)

HOW: dict[str, dict[str, str]] = {
    "lossless": {},
    "raw": {"codec": "raw"},
    "whole": {"codec": "raw", "grid": "whole"},
    "delta": {"codec": "delta", "parent": "m@1"},
}
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 17, 64]), max_size=5).filter(lambda s: math.prod(s) <= 20_000)


@st.composite
def tensors(draw: st.DrawFn, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor of any dtype and shape; its bits are random, constant, or nearly so."""
    name = dtype or draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(SHAPES)) if shape is None else shape
    nbytes = math.prod(shape) * DTYPES[name].itemsize
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=random)
    kind = draw(st.sampled_from(["random", "zeros", "ones", "sparse"]))
    if kind == "sparse":
        raw *= torch.rand(nbytes, generator=random) < 0.1
    elif kind != "random":
        raw.fill_(0 if kind == "zeros" else 255)
    if name == "bool":
        raw &= 1
    if not nbytes:
        return torch.empty(shape, dtype=getattr(torch, name))
    return raw.view(getattr(torch, name)).reshape(shape)


MODELS = st.dictionaries(st.sampled_from(["a", "b.weight", "c/d", "é"]), tensors(), min_size=1, max_size=4)


def small(patch: pytest.MonkeyPatch, chunk: int) -> None:
    patch.setattr(grid, "TARGET", chunk)
    patch.setattr(grid, "SMALL", chunk)
    patch.setattr(grid, "FINEST", max(1, chunk // 16))
    patch.setattr(packs, "PACK_BYTES", 8 * chunk)


def changed(data: st.DataObject, model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a delta may be made against: some tensors as they were, some changed, some of other kinds, some gone."""
    other = {}
    for name, tensor in model.items():
        kind = data.draw(st.sampled_from(["same", "bits", "other", "gone"]))
        if kind == "same":
            other[name] = tensor
        elif kind == "bits":
            other[name] = data.draw(tensors(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        elif kind == "other":
            other[name] = data.draw(tensors())
    return other or {"new": torch.zeros(1)}  # a model without a tensor is none


def saved(data: st.DataObject, model: dict[str, torch.Tensor]) -> Store:
    """A store with the model as `m`, saved in a way that is drawn."""
    how = data.draw(st.sampled_from(sorted(HOW)))
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    with pytest.MonkeyPatch.context() as patch:
        small(patch, data.draw(st.sampled_from([16, 100, 1024, 1 << 20])))
        if how == "delta":
            store.save("m", changed(data, model), codec=data.draw(st.sampled_from(["lossless", "raw"])))  # type: ignore[arg-type]
        store.save("m", model, **HOW[how])  # type: ignore[arg-type]
    return store


def region(data: st.DataObject, shape: tuple[int, ...]) -> Region:
    """Any box within a shape, an empty one too."""
    pairs = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in pairs)


def box(tensor: torch.Tensor, at: Region) -> torch.Tensor:
    """The expected part, cut by its bits: torch cannot slice every dtype."""
    raw = raw_view(tensor)
    part = raw[tuple(slice(a, b) for a, b in at)]
    shape = part.shape[:-1]
    flat = part.contiguous().reshape(-1)
    return flat.view(tensor.dtype).reshape(shape) if flat.numel() else torch.empty(shape, dtype=tensor.dtype)


def raw_view(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, with the bytes of an element as its last dimension."""
    itemsize = tensor.element_size()
    if not tensor.numel():
        return torch.empty(*tensor.shape, itemsize, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(*tensor.shape, itemsize)


@QUICK
@given(model=MODELS, data=st.data())
def test_whole_models(model: dict[str, torch.Tensor], data: st.DataObject) -> None:
    store = saved(data, model)
    assert all_bits(store.load("m")) == all_bits(model)
    assert all_bits(dict(store.stream("m"))) == all_bits(model)
    report = store.verify("m", deep=True)
    assert report.ok
    assert store.diff("m", "m").changed == ()
    some = data.draw(st.sets(st.sampled_from(sorted(model))))
    assert all_bits(store.load("m", names=sorted(some))) == all_bits({n: model[n] for n in some})


@QUICK
@given(model=MODELS, data=st.data())
def test_regions(model: dict[str, torch.Tensor], data: st.DataObject) -> None:
    store = saved(data, model)
    boxes = {name: region(data, tuple(tensor.shape)) for name, tensor in model.items()}
    expected = all_bits({name: box(model[name], at) for name, at in boxes.items()})
    assert all_bits(store.load("m", shard=ms.Regions(boxes))) == expected
    assert all_bits(dict(store.stream("m", shard=boxes))) == expected
    for name, at in boxes.items():
        index = tuple(slice(a, b) for a, b in at)
        assert bits(store.tensor("m", name)[index]) == expected[name]


@QUICK
@given(tensor=tensors(), data=st.data())
def test_indices(tensor: torch.Tensor, data: st.DataObject) -> None:
    """Ints drop their dimension, '...' fills, negative numbers count from the end: as torch has it."""
    store = saved(data, {"t": tensor})
    index: list[Any] = []
    for n in tensor.shape:
        bound = st.none() | st.integers(-n - 2, n + 2)
        choices = [st.builds(slice, bound, bound)] + ([st.integers(-n, n - 1)] if n else [])
        index.append(data.draw(st.one_of(choices)))
    if data.draw(st.booleans()):
        a = data.draw(st.integers(0, len(index)))
        b = data.draw(st.integers(a, len(index)))
        index[a:b] = [...]
    found = store.tensor("m", "t")[tuple(index)]
    expected = raw_view(tensor)[(*index, slice(None))] if ... in [i if i is ... else 0 for i in index] else None
    if expected is None:
        expected = raw_view(tensor)[(*index, ..., slice(None))]
    assert tuple(found.shape) == tuple(expected.shape[:-1])
    assert bits(found)[2] == bits(expected)[2]
    assert found.dtype == tensor.dtype


@FEW
@given(tensor=tensors(), data=st.data())
def test_slices_put_together_are_the_tensor(tensor: torch.Tensor, data: st.DataObject) -> None:
    store = saved(data, {"t": tensor})
    if not tensor.dim():
        return
    axis = data.draw(st.integers(0, tensor.dim() - 1))
    cuts = sorted({0, tensor.shape[axis], *data.draw(st.lists(st.integers(0, tensor.shape[axis]), max_size=3))})
    lazy = store.tensor("m", "t")
    before = (slice(None),) * axis
    parts = [raw_view(lazy[(*before, slice(a, b))]) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts, axis), raw_view(tensor)) if parts else tensor.shape[axis] == 0


@FEW
@given(model=MODELS, data=st.data(), meta=st.booleans())
def test_load_into(model: dict[str, torch.Tensor], data: st.DataObject, meta: bool) -> None:
    model = {name.replace(".", "_").replace("/", "_"): tensor for name, tensor in model.items()}
    store = saved(data, model)
    module = torch.nn.Module()
    for name, tensor in model.items():
        module.register_buffer(name, torch.empty_like(tensor, device="meta" if meta else "cpu"))
    store.load_into(module, "m")
    assert all_bits(dict(module.named_buffers())) == all_bits(model)


@FEW
@given(model=MODELS, data=st.data())
def test_zarr_view(model: dict[str, torch.Tensor], data: st.DataObject) -> None:
    store = saved(data, model)
    group = zarr.open_group(store.zarr("m", bits=True), mode="r")
    for name, tensor in model.items():
        array = group[name]
        at = region(data, tuple(tensor.shape))
        part = array[tuple(slice(a, b) for a, b in at)]
        assert part.tobytes() == bits(box(tensor, at))[2]


@FEW
@given(model=MODELS, data=st.data())
def test_saved_again(model: dict[str, torch.Tensor], data: st.DataObject) -> None:
    """Whatever lies before it, a version is exact, and what it shares is not stored again."""
    store = saved(data, model)
    again = store.save("m", model)
    assert all_bits(store.load("m")) == all_bits(model)
    assert store.save("m", model).stored == 0
    assert store.describe("m").bytes == again.bytes == sum(t.numel() * t.element_size() for t in model.values())


@FEW
@given(data=st.data(), tensor=tensors())
def test_tied_tensors_stay_tied(data: st.DataObject, tensor: torch.Tensor) -> None:
    store = saved(data, {"a": tensor, "b": tensor})
    found = store.load("m")
    assert all_bits(found) == all_bits({"a": tensor, "b": tensor})
    if tensor.numel():
        assert found["a"].data_ptr() == found["b"].data_ptr()
