"""Manifests made to do harm, under their true digest: each gives one clear error, within little memory."""

from __future__ import annotations

import base64
import copy
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.errors import CorruptionError, FormatError, ModelStoreError, UnsupportedError
from modelstore.format.objects import manifest as man
from modelstore.format.objects.record import manifest_key
from modelstore.plan.chain import LONGEST_CHAIN
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from tests.helpers.hostile import little_memory, manifest_of, plant, read_all
from tests.helpers.stores import copy_all, open_on, shrink, weights

Json = Any
HUGE = 2**62


@pytest.fixture(scope="module")
def source() -> MemoryStorage:
    """A store with a sound model, `good`, in small chunks, once lossless and once raw, and a delta on it."""
    storage = MemoryStorage(uuid.uuid4().hex)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        store = open_on(storage)
        files = {"config.json": b"{}"}
        store.save("good", weights(1), files=files)
        store.save("raw", weights(1), codec="raw", files=files)
        store.save("delta", {n: t * 1.01 for n, t in weights(1).items()}, codec="delta", parent="good", files=files)
        for model in ("good", "raw", "delta"):
            read_all(store, model)  # so that what is compiled, or imported, once is not counted later
    return storage


@pytest.fixture
def storage(source: MemoryStorage) -> MemoryStorage:
    """A store of one's own like `source`."""
    storage = MemoryStorage(uuid.uuid4().hex)
    copy_all(source, storage)
    return storage


def tensor(manifest: Json, name: str = "large") -> Json:
    return next(t for t in manifest["tensors"] if t["name"] == name)


def column(manifest: Json, name: str, kind: str, change: Callable[[Any], Any]) -> None:
    """Change a column of the chunk table, as an array."""
    values = np.frombuffer(base64.b64decode(manifest["chunks"][name]), kind).copy()
    changed = change(values)
    manifest["chunks"][name] = base64.b64encode((values if changed is None else changed).tobytes()).decode()


def setter(index: Any, value: Any) -> Callable[[Any], None]:
    return lambda array: array.__setitem__(index, value)


def nested(depth: int) -> Json:
    value: Json = 0
    for _ in range(depth):
        value = [value]
    return value


CHANGES: dict[str, Callable[[Json], object]] = {
    "shape huge": lambda m: tensor(m).update(shape=[HUGE, HUGE]),
    "shape huge in one": lambda m: tensor(m).update(shape=[HUGE, 400]),
    "shape empty but huge": lambda m: tensor(m, "none").update(shape=[0, HUGE, HUGE], chunk=[1, 1, 1]),
    "shape empty and huge": lambda m: tensor(m, "none").update(shape=[0, HUGE], chunk=[1, 1]),
    "shape negative": lambda m: tensor(m).update(shape=[-128, -400]),
    "shape of floats": lambda m: tensor(m).update(shape=[128.5, 400]),
    "shape of text": lambda m: tensor(m).update(shape=["128", "400"]),
    "shape beyond 64 bits": lambda m: tensor(m).update(shape=[10**30, 1]),
    "dimensions": lambda m: tensor(m).update(shape=[1] * 10_000, chunk=[1] * 10_000),
    "dimensions that differ": lambda m: tensor(m).update(chunk=[8]),
    "chunks of nothing": lambda m: tensor(m).update(chunk=[0, 400]),
    "chunks beyond the shape": lambda m: tensor(m).update(chunk=[256, 400]),
    "chunks too large": lambda m: tensor(m).update(shape=[1 << 30, 400], chunk=[1 << 30, 400]),
    "chunks too many": lambda m: tensor(m).update(chunk=[1, 1]),
    "dtype unknown": lambda m: tensor(m).update(dtype="float7"),
    "dtype private": lambda m: tensor(m).update(dtype="__class__"),
    "dtype wider": lambda m: tensor(m).update(dtype="complex128"),
    "codec out of range": lambda m: tensor(m).update(codec=99),
    "codec negative": lambda m: tensor(m).update(codec=-1),
    "codec unknown": lambda m: m["codecs"][0].update(name="os.system"),
    "codec with parameters": lambda m: m["codecs"][0].update(params={"level": 3}),
    "codec with odd parameters": lambda m: m["codecs"][0].update(params={"": "x" * 100_000}),
    "no codecs": lambda m: m.update(codecs=[]),
    "no planes": lambda m: tensor(m).update(planes=[]),
    "two planes": lambda m: tensor(m).update(planes=tensor(m)["planes"] * 2),
    "planes shared": lambda m: tensor(m, "norm").update(planes=tensor(m)["planes"]),
    "plane beyond": lambda m: tensor(m).update(planes=[["data", HUGE]]),
    "plane negative": lambda m: tensor(m).update(planes=[["data", -1]]),
    "plane at the end": lambda m: tensor(m).update(planes=[["data", 10**4]]),
    "pack out of range": lambda m: column(m, "pack", "<u4", setter(0, 2**32 - 1)),
    "offset beyond": lambda m: column(m, "offset", "<u8", setter(slice(None), 2**40)),
    "offset huge": lambda m: column(m, "offset", "<u8", setter(0, 2**64 - 1)),
    "offset that wraps": lambda m: column(m, "offset", "<u8", setter(0, 2**64 - 16)),
    "offsets that overlap": lambda m: column(m, "offset", "<u8", lambda a: a // 2),
    "length huge": lambda m: column(m, "length", "<u8", setter(slice(None), 2**40)),
    "length large": lambda m: column(m, "length", "<u8", setter(slice(None), 128 << 20)),
    "length large, once": lambda m: column(m, "length", "<u8", setter(0, 128 << 20)),
    "length of nothing": lambda m: column(m, "length", "<u8", setter(slice(None), 0)),
    "length of one": lambda m: column(m, "length", "<u8", setter(slice(None), 1)),
    "digests of others": lambda m: column(m, "digest", "V32", lambda a: a[::-1]),
    "a column cut": lambda m: column(m, "offset", "<u8", lambda a: a[:-1]),
    "a column of odd size": lambda m: column(m, "pack", "u1", lambda a: a[:-1]),
    "a column empty": lambda m: m["chunks"].update(digest=""),
    "a column that is no base64": lambda m: m["chunks"].update(digest="###"),
    "packs none": lambda m: m.update(packs=[]),
    "packs lost": lambda m: m.update(packs=["f" * 64] * len(m["packs"])),
    "packs with paths": lambda m: m.update(packs=["../../../etc/passwd"] * len(m["packs"])),
    "packs with paths of the right length": lambda m: m.update(packs=[("../" * 22)[:64]] * len(m["packs"])),
    "a tensor twice": lambda m: m["tensors"].append(m["tensors"][0]),
    "a tensor without a name": lambda m: tensor(m).update(name=""),
    "a tensor of a long name": lambda m: tensor(m).update(name="x" * 2000),
    "a tensor of control characters": lambda m: tensor(m).update(name="a\x1b[2Jb"),
    "an alias of nothing": lambda m: m.update(aliases={"a": "b"}),
    "aliases in a loop": lambda m: m.update(aliases={"a": "b", "b": "a"}),
    "an alias of itself": lambda m: m.update(aliases={"a": "a"}),
    "an alias that hides": lambda m: m.update(aliases={"large": "norm"}),
    "a file above": lambda m: m["files"][0].update(name="../../above"),
    "a file at the root": lambda m: m["files"][0].update(name="/etc/evil"),
    "a file by a way around": lambda m: m["files"][0].update(name="a/../../b"),
    "a file with backslashes": lambda m: m["files"][0].update(name="..\\up"),
    "a file twice": lambda m: m["files"].append(m["files"][0]),
    "a file of floats": lambda m: m["files"][0].update(dtype="float32"),
    "a base that is lost": lambda m: m.update(base={"model": "good", "manifest": "f" * 64}),
    "a base elsewhere": lambda m: m.update(base={"model": "../../x", "manifest": "f" * 64}),
    "a base of another digest": lambda m: m.update(base={"model": "good", "manifest": "../../x"}),
    "format of the future": lambda m: m.update(format=99),
    "format of text": lambda m: m.update(format="1"),
    "no format": lambda m: m.pop("format"),
    "no chunk table": lambda m: m.pop("chunks"),
    "tensors in an object": lambda m: m.update(tensors={}),
    "metadata of numbers": lambda m: m.update(metadata={"a": 1}),
}


@pytest.mark.parametrize(("model", "local"), [("good", False), ("raw", False), ("raw", True), ("delta", False)])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_manifest(
    change: Callable[[Json], object], model: str, local: bool, source: MemoryStorage, tmp_path: Path
) -> None:
    storage = LocalStorage(tmp_path) if local else MemoryStorage(uuid.uuid4().hex)
    copy_all(source, storage)
    manifest = manifest_of(open_on(storage), model)
    change(manifest)
    plant(storage, manifest)
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    assert "load" in errors
    assert isinstance(errors["load"], (FormatError, CorruptionError, UnsupportedError))
    assert open_on(storage).load("good")  # and nothing else suffers


TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"\xff\xfe\x00",
    "a number": b"1",
    "a list": b"[]",
    "an empty object": b"{}",
    "a number of many digits": b'{"format":' + b"9" * 100_000 + b"}",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_manifest_that_is_none(text: bytes, storage: MemoryStorage) -> None:
    plant(storage, text)
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    assert "load" in errors


@pytest.mark.parametrize("where", ["recipe", "metadata", "base"])
@pytest.mark.parametrize(
    "value", [b"[" * 100_000 + b"]" * 100_000, b"9" * 100_000, b'{"a":' * 9_000 + b"0" + b"}" * 9_000]
)
def test_a_value_that_is_deep_or_long(where: str, value: bytes, storage: MemoryStorage) -> None:
    import msgspec

    manifest = manifest_of(open_on(storage), "good")
    manifest[where] = {"x": msgspec.Raw(value)}
    plant(storage, manifest)
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    assert "load" in errors


def bomb(nbytes: int) -> bytes:
    """A small zstd frame of that many spaces."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=nbytes)
    piece = b" " * (1 << 20)
    return b"".join([compressor.compress(piece) for _ in range(nbytes >> 20)] + [compressor.flush()])


def declared(nbytes: int) -> bytes:
    """A frame that declares more than it holds."""
    return b"\x28\xb5\x2f\xfd\xe0" + nbytes.to_bytes(8, "little") + b"\x01\x00\x00"


def test_bombs(storage: MemoryStorage) -> None:
    streamed = zstandard.ZstdCompressor().compressobj()
    frames = {
        "bomb": bomb(1 << 30),
        "declared": declared(2**62),
        "declared below the limit": declared(man.MAX_MANIFEST - 1),
        "no declaration": streamed.compress(b"{}") + streamed.flush(),
        "cut": zstandard.ZstdCompressor().compress(bytes(1000))[:-3],
        "no frame": b"PK\x03\x04" + bytes(100),
        "empty": b"",
        "skippable": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    }
    assert len(frames["bomb"]) < 200_000
    for name, stored in frames.items():
        plant(storage, name.encode(), stored=stored)
        with little_memory(room=512 << 20):
            errors = read_all(open_on(storage), "bad")
        assert isinstance(errors["load"], CorruptionError), name
        assert isinstance(errors["load"].__cause__, FormatError), name


@pytest.mark.parametrize("part", [b"[]", b"{}", b"0", b'"a":0'], ids=["lists", "objects", "numbers", "members"])
@pytest.mark.parametrize("nbytes", [14 << 20, 172 << 20], ids=["14 MB", "172 MB"])
def test_much_structure_in_few_bytes_is_refused_before_it_is_made(
    part: bytes, nbytes: int, storage: MemoryStorage
) -> None:
    """Each of these is millions of Python objects, from a frame of a few KB."""
    begin, end = (b'{"metrics":{', b"}}") if b":" in part else (b'{"metrics":{"a":[', b"]}}")
    text = begin + b",".join([part] * (nbytes // (len(part) + 1))) + end
    stored = zstandard.ZstdCompressor(level=19).compress(text)
    assert len(stored) < 60_000
    with little_memory(room=512 << 20), pytest.raises(FormatError, match=r"members and elements|bytes of JSON"):
        man.decode(stored, blake3(text).hexdigest(), "k")


def test_what_is_all_the_same_is_written_so_that_it_can_be_read(storage: MemoryStorage) -> None:
    """Equal tensors and equal chunks make manifests of few bytes: a skippable frame makes up for it."""
    digest = blake3(b"x")
    tensors = tuple(
        man.Tensor(f"t{i}", "uint8", (1,), (1,), 0, digest.hexdigest(), (man.Plane("data", i),)) for i in range(5000)
    )
    rows = [(0, 0, 1, digest.digest())] * 600_000
    packs = (digest.hexdigest(),)
    whole = man.Manifest(man.FORMAT, packs, (man.CodecSpec("raw"),), tensors, (), man.chunk_table(rows))
    assert len(man._encoder.encode(whole)) > man.UNSUSPECTED
    name, data = man.encode(whole)
    assert man.decode(data, name, "k") == whole
    cut = len(data) // 2
    with pytest.raises(FormatError):
        man.decode(data[:cut], name, "k")


def test_bases_upon_bases(storage: MemoryStorage) -> None:
    """A chain of deltas beyond what is ever written, each link sound by itself."""
    manifest = manifest_of(open_on(storage), "delta")
    for _ in range(LONGEST_CHAIN + 8):
        plant(storage, manifest)
        digest = open_on(storage).repo.catalog.newest("bad").variants["original"].manifest
        manifest = copy.deepcopy(manifest) | {"base": {"model": "bad", "manifest": digest}}
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    assert isinstance(errors["load"], FormatError)
    assert "deep" in str(errors["load"])


@pytest.mark.parametrize("lacking", [True, False])
def test_a_delta_on_a_base_that_does_not_fit(lacking: bool, storage: MemoryStorage) -> None:
    store = open_on(storage)
    store.save("other", {"norm": weights()["norm"]} if lacking else {"large": weights()["large"][:64]})
    digest = store.repo.catalog.newest("other").variants["original"].manifest
    manifest = manifest_of(store, "delta") | {"base": {"model": "other", "manifest": digest}}
    plant(storage, manifest)
    errors = read_all(open_on(storage), "bad")
    assert isinstance(errors["load"], FormatError)
    without = manifest_of(store, "delta")
    del without["base"]
    plant(storage, without)
    assert isinstance(read_all(open_on(storage), "bad")["load"], FormatError)


def test_a_base_of_other_values_is_not_believed(storage: MemoryStorage) -> None:
    """A delta moved onto another base of the same shapes decodes to other bytes: `verify(deep=True)` finds it."""
    store = open_on(storage)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        store.save("other", weights(9))
    digest = store.repo.catalog.newest("other").variants["original"].manifest
    plant(storage, manifest_of(store, "delta") | {"base": {"model": "other", "manifest": digest}})
    assert not open_on(storage).verify("bad", deep=True).ok


def test_many_tensors_in_few_bytes(storage: MemoryStorage) -> None:
    """Thousands of tensors that all claim the same chunks: their sum is not believed."""
    manifest = manifest_of(open_on(storage), "good")
    some = tensor(manifest)
    manifest["tensors"] = [some | {"name": f"t{i}"} for i in range(20_000)]
    plant(storage, manifest)
    with little_memory():
        errors = read_all(open_on(storage), "bad")
    assert isinstance(errors["load"], CorruptionError)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), model=st.sampled_from(["good", "raw", "delta"]))
def test_mutated_bytes(source: MemoryStorage, data: st.DataObject, model: str) -> None:
    store = open_on(source)
    digest = store.repo.catalog.newest(model).variants["original"].manifest
    text = bytearray(zstandard.ZstdDecompressor().decompress(source.get(manifest_key(model, digest))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "digit", "copy"]))
        if kind == "set":
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            text[at:at] = data.draw(st.sampled_from([b"-", b"9" * 19, b"0", b"]", b"null", b'"', b"1e9", b"\\ud800"]))
        elif kind == "delete":
            del text[at : at + data.draw(st.integers(1, 8))]
        elif kind == "digit":
            digits = [i for i, c in enumerate(text) if 48 <= c <= 57]
            text[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
        else:
            other = data.draw(st.integers(0, len(text) - 1))
            n = data.draw(st.integers(1, 64))
            text[at : at + n] = text[other : other + n]
    name = blake3(bytes(text)).hexdigest()
    stored = zstandard.ZstdCompressor().compress(bytes(text))
    try:
        manifest = man.decode(stored, name, "here")
    except ModelStoreError:
        return
    assert man.first_problem(manifest) is None
    storage = MemoryStorage("")
    storage._shelf.objects = dict(source._shelf.objects)
    plant(storage, bytes(text))
    with little_memory():
        read_all(open_on(storage), "bad")
