"""Stored chunks made to do harm, under their true digest: each decodes, or gives one error, and never takes much memory."""

from __future__ import annotations

import base64
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.errors import FormatError
from modelstore.format.objects.record import pack_key
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from tests.helpers.hostile import little_memory, manifest_of, plant, read_all
from tests.helpers.stores import copy_all, open_on

FORGED = "f" * 64
BASE = {
    "large": torch.arange(200_000).bfloat16().reshape(500, 400),
    "embed": torch.arange(3000, dtype=torch.int32),
    "norm": torch.full((300,), 2.0),
    "none": torch.empty(0, 3),
}


@pytest.fixture(scope="module")
def source() -> MemoryStorage:
    """Each codec's encoding of the same values."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    files = {"config.json": b"{}"}
    store.save("good", BASE, files=files)
    store.save("raw", BASE, codec="raw", files=files)
    store.save("delta", {n: t + 1 for n, t in BASE.items()}, codec="delta", parent="good", files=files)
    read_all(store, "delta")
    return storage


def chunk(manifest: Any, storage: MemoryStorage, row: int) -> bytes:
    """The encoded bytes of a row."""
    pack, at, n = (column(manifest, *c)[row] for c in (("pack", "<u4"), ("offset", "<u8"), ("length", "<u8")))
    return storage.get(pack_key(manifest["packs"][pack]))[int(at) : int(at + n)]


def column(manifest: Any, name: str, kind: str) -> Any:
    return np.frombuffer(base64.b64decode(manifest["chunks"][name]), kind).copy()


def forge(source: MemoryStorage, model: str, tensor: str, data: bytes) -> MemoryStorage:
    """A store in which a tensor's first chunk is `data`, by a manifest that says so."""
    storage = MemoryStorage(uuid.uuid4().hex)
    storage._shelf.objects = dict(source._shelf.objects)
    manifest = msgspec.json.decode(msgspec.json.encode(manifest_of(open_on(source), model)))
    row = next(t for t in manifest["tensors"] if t["name"] == tensor)["planes"][0][1]
    manifest["packs"].append(FORGED)
    values = {"pack": ("<u4", len(manifest["packs"]) - 1), "offset": ("<u8", 0), "length": ("<u8", len(data))}
    values["digest"] = ("V32", np.void(blake3(data).digest()))  # type: ignore[assignment]
    for name, (kind, value) in values.items():
        changed = column(manifest, name, kind)
        changed[row] = value
        manifest["chunks"][name] = base64.b64encode(changed.tobytes()).decode()
    storage.put(pack_key(FORGED), [data], len(data))
    plant(storage, manifest)
    return storage


def first_row(source: MemoryStorage, model: str, tensor: str) -> bytes:
    manifest = manifest_of(open_on(source), model)
    row = next(t for t in manifest["tensors"] if t["name"] == tensor)["planes"][0][1]
    return chunk(manifest, source, row)


def test_what_is_forged_soundly_is_read(source: MemoryStorage) -> None:
    """So that the tests below test what they mean to."""
    for model in ("good", "raw", "delta"):
        storage = forge(source, model, "large", first_row(source, model, "large"))
        assert torch.equal(open_on(storage).load("bad")["large"], open_on(source).load(model)["large"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    model=st.sampled_from(["good", "raw", "delta"]),
    tensor=st.sampled_from(["large", "embed", "norm"]),
)
def test_mutated_chunks(source: MemoryStorage, data: st.DataObject, model: str, tensor: str) -> None:
    encoded = bytearray(first_row(source, model, tensor))
    for _ in range(data.draw(st.integers(1, 3))):
        if not encoded:
            break
        near = st.integers(0, min(64, len(encoded) - 1))  # headers and lengths lie first
        at = data.draw(near | st.integers(0, len(encoded) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            encoded[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            encoded[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del encoded[at : at + data.draw(st.integers(1, 9))]
        else:
            del encoded[at + 1 :]
    storage = forge(source, model, tensor, bytes(encoded))
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    if "load" in errors:
        assert isinstance(errors["load"], FormatError)
        assert errors["load"].tensor == tensor
    else:
        assert open_on(storage).load("bad")[tensor].shape == BASE[tensor].shape


def test_a_bomb_in_a_chunk(source: MemoryStorage) -> None:
    encoded = first_row(source, "good", "norm")
    planes = encoded[2]
    frame = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    assert len(frame) < 64 << 10
    lengths = np.array([len(frame)] + [1] * (planes - 1), "<u4").tobytes()
    storage = forge(source, "good", "norm", encoded[:4] + lengths + frame + bytes(planes - 1))
    with little_memory(room=512 << 20):
        errors = read_all(open_on(storage), "bad")
    assert isinstance(errors["load"], FormatError)
    assert (errors["load"].tensor, errors["load"].chunk) == ("norm", 0)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("length", [0, 1, 4, 1196, 1199, 1201, 2400])
@pytest.mark.parametrize("model", ["raw", "good"])
def test_a_chunk_of_another_length(model: str, length: int, local: bool, source: MemoryStorage, tmp_path: Path) -> None:
    """Above all, a short one is not stretched, and a long one not cut, to fit its place of 1,200 bytes."""
    encoded = first_row(source, model, "norm")
    forged = forge(source, model, "norm", (encoded * 2)[:length] if model == "raw" else encoded + bytes(length + 1))
    storage = LocalStorage(tmp_path) if local else MemoryStorage(uuid.uuid4().hex)
    copy_all(forged, storage)
    error = read_all(open_on(storage), "bad")["load"]
    assert isinstance(error, FormatError)
    assert (error.tensor, error.chunk) == ("norm", 0)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("model", ["raw", "good"])
def test_planes_that_the_codec_has_not(model: str, local: bool, source: MemoryStorage, tmp_path: Path) -> None:
    """Two planes, each with rows of its own, where the codec stores one."""
    manifest = manifest_of(open_on(source), model)
    norm = next(t for t in manifest["tensors"] if t["name"] == "norm")
    ((name, row),) = norm["planes"]
    for part, kind in (("pack", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("digest", "V32")):
        values = column(manifest, part, kind)
        more = np.concatenate([values, values[row : row + 1]])
        manifest["chunks"][part] = base64.b64encode(more.tobytes()).decode()
    norm["planes"] = [[name, row], ["more", len(values)]]
    storage = LocalStorage(tmp_path) if local else MemoryStorage(uuid.uuid4().hex)
    copy_all(source, storage)
    plant(storage, manifest)
    error = read_all(open_on(storage), "bad")["load"]
    assert isinstance(error, FormatError)
    assert (error.tensor, error.chunk) == ("norm", 0)
