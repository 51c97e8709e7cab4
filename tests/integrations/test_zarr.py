"""The Zarr view: what zarr-python and xarray read is what the tensors hold, from the chunks it needs."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import CorruptionError
from modelstore.format.dtypes import DTYPES, dtype
from modelstore.format.region import Region, Shape, slices

zarr = pytest.importorskip("zarr")
ml_dtypes = pytest.importorskip("ml_dtypes")

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest  # noqa: E402
from zarr.core.buffer import cpu, default_buffer_prototype  # noqa: E402
from zarr.core.sync import sync  # noqa: E402
from zarr.testing.store import StoreTests  # noqa: E402

from modelstore.integrations.zarr import ModelArrays  # noqa: E402


@dataclass(frozen=True)
class Stored:
    """A tensor in memory: `bits` has one element of the stored width for each stored element."""

    bits: np.ndarray
    dtype_name: str
    chunk_shape: Shape

    @property
    def dtype(self) -> Any:
        return dtype(self.dtype_name)

    @property
    def shape(self) -> Shape:
        return self.bits.shape


@dataclass
class Memory:
    """A reader over tensors in memory that remembers what was read, and by which threads."""

    tensors: dict[str, Stored]
    attributes: dict[str, Any] = field(default_factory=dict)
    reads: list[tuple[str, Region]] = field(default_factory=list, compare=False)
    threads: set[int] = field(default_factory=set, compare=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and list(self.tensors) == list(other.tensors)

    def read(self, name: str, region: Region) -> bytes:
        self.reads.append((name, region))
        self.threads.add(threading.get_ident())
        return np.ascontiguousarray(self.tensors[name].bits[slices(region)]).tobytes()


def tensor(values: np.ndarray, chunks: Shape, name: str | None = None) -> Stored:
    return Stored(values, name or values.dtype.name, chunks)


def one(stored: Stored, **options: Any) -> tuple[Memory, Any]:
    reader = Memory({"w": stored})
    return reader, zarr.open_group(ModelArrays(reader, **options), mode="r")["w"]


RANDOM = np.random.default_rng(5)


@st.composite
def sliced(draw: st.DrawFn) -> tuple[Shape, Shape, tuple[slice, ...]]:
    """A shape, the shape of its chunks, and an index of slices."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    chunks = tuple(draw(st.integers(1, max(1, n + 1))) for n in shape)
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, chunks, tuple(slice(a, b) for a, b in bounds)


@settings(max_examples=150, deadline=None)
@given(sliced(), st.sampled_from(["float32", "bfloat16", "int64", "float4_e2m1fn_x2"]))
def test_any_slice_reads_its_chunks_only(case: tuple, name: str) -> None:
    shape, chunks, index = case
    values, stored = make(name, shape, chunks)
    reader, array = one(stored)
    each = 2 if name == "float4_e2m1fn_x2" and shape else 1
    if each == 2:
        index = (*index[:-1], slice(index[-1].start * 2, index[-1].stop * 2))
    np.testing.assert_array_equal(array[index if index else ...], values[index])
    region = [(s.start, s.stop) for s in index]
    if region and each == 2:
        region[-1] = (region[-1][0] // 2, region[-1][1] // 2)
    empty = any(a == b for a, b in region)
    used = tuple(max(1, min(c, n)) for c, n in zip(chunks, shape, strict=True))
    touched = 0 if empty else int(np.prod([-(-b // c) - a // c for (a, b), c in zip(region, used, strict=True)]))
    assert len(reader.reads) == touched == len(set(reader.reads))


def make(name: str, shape: Shape, chunks: Shape) -> tuple[np.ndarray, Stored]:
    """(values as Zarr shows them, the stored tensor)."""
    if name == "bfloat16":
        values = RANDOM.normal(size=shape).astype(ml_dtypes.bfloat16)
        return values.astype("f4"), tensor(values.view("u2") if shape else np.array(values).view("u2"), chunks, name)
    if name == "float4_e2m1fn_x2":
        codes = RANDOM.integers(0, 256, size=shape, dtype="u1")
        if not shape:
            return codes, tensor(np.asarray(codes), chunks, name)
        numbers = np.stack([codes & 15, codes >> 4], axis=-1).astype("u1").view(ml_dtypes.float4_e2m1fn)
        return numbers.astype("f4").reshape(*shape[:-1], 2 * shape[-1]), tensor(codes, chunks, name)
    values = np.asarray(RANDOM.normal(size=shape) * 1000).astype(name)
    return values, tensor(values, chunks)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    """All bit patterns of one byte, or random bits: shown exactly, and as they are with `bits`."""
    size = DTYPES[name].itemsize
    raw = np.arange(256, dtype="u1") if size == 1 else RANDOM.integers(0, 256, size=64 * size, dtype="u1")
    if name == "bool":
        raw &= 1
    stored = tensor(raw.view({1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[size]), (48,), name)
    _, shown = one(stored)
    assert shown.attrs["dtype"] == name
    assert shown.attrs["tensor"] == "w"
    if name == "complex32":
        expected = raw.view("f2").astype("f4").view("c8")
    elif name == "float4_e2m1fn_x2":
        expected = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1).view(ml_dtypes.float4_e2m1fn).astype("f4")
    elif name == "bfloat16" or name.startswith("float8"):
        expected = raw.view(getattr(ml_dtypes, name)).astype("f4")
    else:
        expected = raw.view(name)
    assert shown.dtype == expected.dtype
    np.testing.assert_array_equal(shown[:], expected)
    signs = [np.signbit(part[~np.isnan(part)]) for part in (shown[:], expected) if part.dtype.kind == "f"]
    if signs:
        np.testing.assert_array_equal(*signs)
    _, bits = one(stored, bits=True)
    assert bits[:].tobytes() == raw.tobytes()
    if bits.dtype != shown.dtype:
        assert bits.dtype == f"uint{8 * size}"


def test_bfloat16_keeps_nan_payloads() -> None:
    bits = np.array([0x7FC1, 0xFF81, 0x8000, 0x7F80, 0x0001], dtype="u2")
    _, shown = one(tensor(bits, (2,), "bfloat16"))
    assert (shown[:].view("u4") >> 16 == bits).all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "bool", "float4_e2m1fn_x2", "complex32"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_scalars_and_empty_tensors(name: str, shape: Shape) -> None:
    width = DTYPES[name].itemsize
    stored = tensor(np.zeros(shape, dtype=f"u{width}"), tuple(min(n, 2) for n in shape), name)
    reader, shown = one(stored)
    assert shown.ndim == len(shape)
    assert shown[...].size == (1 if shape == () else 0)
    assert len(reader.reads) == (1 if shape == () else 0)


NAMES = [
    "model.layers.0.weight",
    "a/b/c",
    "a/d",
    "a/c/0",
    "c/0",
    "x",
    "x/c/0",
    "x/y",
    "",
    "..",
    "__reserved",
    "back\\slash",
]
MORE = ["zarr.json", "a//e", "/lead", "trail/", "ünïcode", "with space", "p%2Fq", "p/q", "dim_3", "x%2Fy"]


@pytest.mark.parametrize("consolidated", [True, False])
def test_names_and_groups(consolidated: bool) -> None:
    tensors = {name: tensor(np.full(3, i, dtype="i4"), (2,)) for i, name in enumerate(NAMES + MORE)}
    store = ModelArrays(Memory(tensors, {"model": "acme/x"}), consolidated=consolidated)
    group = zarr.open_group(store, mode="r")
    assert group.attrs["model"] == "acme/x"
    found = {
        array.attrs["tensor"]: array[:].tolist()
        for _, array in group.members(max_depth=None)
        if hasattr(array, "shape")
    }
    assert found == {name: [i] * 3 for i, name in enumerate(NAMES + MORE)}
    for plain in ("model.layers.0.weight", "a/b/c", "a/d", "a/c/0", "c/0", "x", "ünïcode", "with space", "p/q"):
        assert group[plain].attrs["tensor"] == plain
    assert isinstance(group["a"], zarr.Group)
    assert set(group["a"].keys()) >= {"b", "d", "c"}


def test_listing_agrees_with_getting() -> None:
    tensors = {
        "a/b": tensor(np.zeros((5, 4), "f4"), (2, 3)),
        "s": tensor(np.zeros((), "f4"), ()),
        "e": tensor(np.zeros((0, 2), "f4"), (1, 1)),
    }
    store = ModelArrays(Memory(tensors, {}))

    async def check() -> None:
        keys = [key async for key in store.list()]
        assert sorted(keys) == sorted(
            ["zarr.json", "a/zarr.json", "a/b/zarr.json", "s/zarr.json", "s/c", "e/zarr.json"]
            + [f"a/b/c/{i}/{j}" for i in range(3) for j in range(2)]
        )
        for prefix in ("", "a", "a/", "a/b", "a/b/c/1", "a/b/c/1/", "s/", "z", "a/b/zarr.json"):
            assert [k async for k in store.list_prefix(prefix)] == [k for k in keys if k.startswith(prefix)]
        for folder in ("", "a", "a/b", "a/b/c", "a/b/c/2", "a/b/c/2/0", "a/b/c/9", "s", "e", "e/c", "z"):
            under = {
                k[len(folder) + 1 if folder else 0 :].split("/")[0]
                for k in keys
                if k.startswith(folder + "/" * bool(folder))
            }
            assert {n async for n in store.list_dir(folder)} == under, folder
            assert {n async for n in store.list_dir(folder + "/")} == under
        for key in keys:
            value = await store.get(key, default_buffer_prototype())
            assert value is not None
            assert await store.exists(key)
            assert await store.getsize(key) == len(value)
        for key in (
            "b",
            "a/b/c/3/0",
            "a/b/c/0",
            "a/b/c",
            "a/b/c/00/0",
            "a/b/c/-1/0",
            "s/c/0",
            "e/c/0/0",
            "c/0",
            "z/zarr.json",
        ):
            assert await store.get(key, default_buffer_prototype()) is None
            assert not await store.exists(key)
            with pytest.raises(FileNotFoundError):
                await store.getsize(key)

    asyncio.run(check())


@given(st.integers(0, 40), st.integers(0, 40))
def test_byte_ranges_of_a_chunk(a: int, b: int) -> None:
    values = np.arange(10, dtype="<i4")
    store = ModelArrays(Memory({"w": tensor(values, (7,))}))
    raw = np.concatenate([values[7:], np.zeros(4, "<i4")]).tobytes()  # the last chunk, padded

    async def check() -> None:
        requests = [None, RangeByteRequest(a, b), OffsetByteRequest(a), SuffixByteRequest(a)]
        parts = await store.get_partial_values(default_buffer_prototype(), [("w/c/1", r) for r in requests])
        assert [p.to_bytes() for p in parts] == [raw, raw[a:b], raw[a:], raw[len(raw) - a :] if a <= len(raw) else raw]
        assert await store.get_partial_values(default_buffer_prototype(), [("w/c/2", None), ("no", None)]) == [
            None,
            None,
        ]

    asyncio.run(check())


def test_empty_byte_range_reads_nothing() -> None:
    reader = Memory({"w": tensor(np.arange(4, dtype="i4"), (2,))})
    part = sync(ModelArrays(reader).get("w/c/0", default_buffer_prototype(), RangeByteRequest(8, 20)))
    assert part.to_bytes() == b""
    assert reader.reads == []


def test_reads_overlap() -> None:
    """Reads of several chunks are under way at the same time."""
    barrier = threading.Barrier(2, timeout=20)

    class Slow(Memory):
        def read(self, name: str, region: Region) -> bytes:
            barrier.wait()  # passes only when two reads meet
            return super().read(name, region)

    group = zarr.open_group(ModelArrays(Slow({"w": tensor(np.arange(8, dtype="i4"), (2,))})), mode="r")
    assert group["w"][:].tolist() == list(range(8))


def test_errors_of_the_reader_come_through() -> None:
    class Broken(Memory):
        def read(self, name: str, region: Region) -> bytes:
            raise CorruptionError(f"no good copy of {region}", tensor=name)

    array = zarr.open_group(ModelArrays(Broken({"w": tensor(np.arange(8.0), (2,))})), mode="r")["w"]
    with pytest.raises(CorruptionError, match="no good copy"):
        array[:]

    class Short(Memory):
        def read(self, name: str, region: Region) -> bytes:
            return super().read(name, region)[:-1]

    array = zarr.open_group(ModelArrays(Short({"w": tensor(np.arange(8.0), (2,))})), mode="r")["w"]
    with pytest.raises(ValueError, match="w: 15 bytes were read"):
        array[:]


def test_grid_with_wrong_dimensions() -> None:
    with pytest.raises(ValueError, match="one length a dimension"):
        ModelArrays(Memory({"w": tensor(np.zeros((2, 2)), (2,))}))


def test_nothing_is_written() -> None:
    store = ModelArrays(Memory({"w": tensor(np.arange(8.0), (2,))}))
    assert store.read_only
    assert not store.supports_writes
    assert not store.supports_deletes
    group = zarr.open_group(store, mode="r")
    with pytest.raises(ValueError, match="read-only"):
        group["w"][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(store, mode="w")
    with pytest.raises(ValueError, match="mode='r'"):
        ModelArrays(store.reader, read_only=False)
    with pytest.raises(ValueError, match="mode='r'"):
        store.with_read_only(False)
    actions: list[Callable[[], Any]] = [
        lambda: store.set("w/c/0", cpu.Buffer.from_bytes(b"")),
        lambda: store.delete("w/c/0"),
        lambda: store.set_if_not_exists("new", cpu.Buffer.from_bytes(b"")),
    ]
    for action in actions:
        with pytest.raises(ValueError, match="read-only"):
            sync(action())


@pytest.mark.parametrize("consolidated", [True, False])
def test_xarray_is_lazy(consolidated: bool) -> None:
    xarray = pytest.importorskip("xarray")
    square = RANDOM.normal(size=(6, 6)).astype(ml_dtypes.bfloat16)
    reader = Memory(
        {
            "square.weight": tensor(square.view("u2"), (2, 6), "bfloat16"),
            "other.weight": tensor(RANDOM.normal(size=(4, 6)), (4, 3)),
            "dim_6": tensor(np.arange(6.0), (6,)),
            "scale": tensor(np.array(2.0), ()),
            "mask": tensor(np.array([True, False]), (2,)),
            "none": tensor(np.zeros((0, 6), "f2"), (1, 6)),
        },
        {"model": "acme/x"},
    )
    data = xarray.open_zarr(ModelArrays(reader), consolidated=consolidated, chunks=None)
    assert data.attrs["model"] == "acme/x"
    assert not data.coords  # no tensor is taken for an index
    assert set(data) == set(reader.tensors)
    assert reader.reads == []
    rows = data["square.weight"][2:4].values
    np.testing.assert_array_equal(rows, square[2:4].astype("f4"))
    assert reader.reads == [("square.weight", ((2, 4), (0, 6)))]
    assert data["mask"].values.tolist() == [True, False]
    assert float(data["scale"]) == 2.0


class TestContract(StoreTests[ModelArrays, cpu.Buffer]):
    """zarr's own contract, for as much of it as a read-only store of a fixed hierarchy can be asked."""

    store_cls = ModelArrays
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self) -> dict[str, Any]:
        return {"reader": Memory({"foo": tensor(np.arange(8, dtype="i4"), (4,))})}

    @pytest.fixture
    def store(self, store_kwargs: dict[str, Any]) -> ModelArrays:
        return sync(ModelArrays.open(**store_kwargs))

    async def set(self, store: ModelArrays, key: str, value: cpu.Buffer) -> None:
        """What is there is there."""

    async def get(self, store: ModelArrays, key: str) -> cpu.Buffer:
        found = await store.get(key, default_buffer_prototype())
        assert found is not None
        return found

    def test_store_repr(self, store: ModelArrays) -> None:
        assert repr(store) == "ModelArrays(1 tensors, bits=False)"

    def test_store_supports_writes(self, store: ModelArrays) -> None:
        assert not store.supports_writes

    def test_store_supports_listing(self, store: ModelArrays) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: ModelArrays) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False

    def test_serializable_store(self, store: ModelArrays) -> None:
        again = pickle.loads(pickle.dumps(store))
        assert again == store
        assert hash(again) == hash(store)
        assert zarr.open_group(again, mode="r")["foo"][:].tolist() == list(range(8))

    def test_store_context_manager(self, store_kwargs: dict[str, Any]) -> None:
        with sync(ModelArrays.open(**store_kwargs)) as store:
            arrays = store
            assert arrays._is_open
            with pytest.raises(ValueError, match="already open"):
                sync(arrays._open())
        assert not arrays._is_open

    def test_get(self, store_kwargs: dict[str, Any]) -> None:
        store = ModelArrays(**store_kwargs)
        assert sync(self.get(store, "foo/c/1")).to_bytes() == np.arange(4, 8, dtype="<i4").tobytes()

    def test_get_raises(self, store: ModelArrays) -> None:
        with pytest.raises(ValueError, match="Unexpected byte_range, got"):
            sync(store.get("foo/c/0", default_buffer_prototype(), (0, 2)))  # type: ignore[arg-type]

    def test_get_json_sync(self, store: ModelArrays) -> None:
        arrays = store
        assert arrays._get_json_sync("foo/zarr.json", prototype=default_buffer_prototype())["node_type"] == "array"
        assert json.loads(arrays._get_bytes_sync("zarr.json", prototype=default_buffer_prototype()))["zarr_format"] == 3

    def test_is_empty(self, store: ModelArrays) -> None:
        assert not sync(store.is_empty("foo"))
        assert sync(store.is_empty("fo"))

    def test_read_only_store_raises(self, store: ModelArrays) -> None:
        for action in (store.set("foo", cpu.Buffer.from_bytes(b"")), store.delete("foo")):
            with pytest.raises(ValueError, match="store was opened in read-only mode and does not support writing"):
                sync(action)


# The rest of the contract writes its own keys first, or wants a store that can be opened for writing
for _name in (
    *("test_store_open_read_only", "test_with_read_only_store", "test_get_not_open", "test_get_many", "test_getsize"),
    *("test_getsize_prefix", "test_getsize_raises", "test_set", "test_set_not_open", "test_set_many", "test_exists"),
    *("test_get_partial_values", "test_delete", "test_delete_dir", "test_delete_nonexistent_key_does_not_raise"),
    *("test_clear", "test_list", "test_list_prefix", "test_list_empty_path", "test_list_dir", "test_set_if_not_exists"),
    *("test_get_bytes", "test_get_bytes_sync", "test_get_json", "test_get_sync", "test_get_sync_missing"),
    *("test_set_sync", "test_delete_sync", "test_delete_sync_missing"),
):
    setattr(TestContract, _name, None)
