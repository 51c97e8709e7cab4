from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.sources.open import open_source
from modelstore.sources.zarr.chunks import Chunks
from tests.sources.contract import Opened, SourceContract, bits, raw, read

_NATIVE = (
    "float16 float32 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 bool complex64 complex128".split()  # noqa: SIM905
)


def native() -> dict[str, torch.Tensor]:
    named = {f"layers/{i}/{name}": bits(name, 6, 5, 4) for i, name in enumerate(_NATIVE)}
    return named | {"scalar": bits("float32"), "empty": bits("float32", 0, 3), "odd": bits("float32", 7, 11)}


def values(tensor: torch.Tensor) -> np.ndarray:
    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return np.frombuffer(raw(tensor).tobytes(), kind).reshape(tensor.shape)


def fill(group, tensors: dict[str, torch.Tensor], **options) -> None:  # type: ignore[no-untyped-def]
    for name, tensor in tensors.items():
        array = values(tensor)
        chunks = tuple(max(1, min(4, n)) for n in array.shape)
        made = group.create_array(name, shape=array.shape, chunks=chunks, dtype=options.get("dtype") or array.dtype)
        made[...] = array


@pytest.fixture(scope="class", params=[2, 3])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class TestDirectory(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory, version: int) -> Opened:
        root = tmp_path_factory.mktemp("zarr") / "model.zarr"
        group = zarr.open_group(root, mode="w", zarr_format=version)
        fill(group, native())
        group.attrs["made"] = "by a test"
        group["scalar"].attrs["unit"] = "none"
        (root / "config.json").write_text("{}")
        return Opened(open_source(root), native(), ordered=False)

    def test_attributes_and_other_files_are_kept(self, opened: Opened) -> None:
        files = opened.source.files
        assert set(files) == {"config.json", "zarr_attributes.json"}
        written = files["zarr_attributes.json"]
        assert isinstance(written, bytes)
        assert json.loads(written) == {"": {"made": "by a test"}, "scalar": {"unit": "none"}}
        assert opened.source.fingerprint is not None


class TestGroup(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, version: int) -> Opened:
        group = zarr.open_group(zarr.storage.MemoryStore(), mode="w", zarr_format=version)
        inner = group.create_group("below")
        fill(inner, native())
        return Opened(open_source(inner), native(), ordered=False)


class TestBigEndian(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, version: int) -> Opened:
        group = zarr.open_group(zarr.storage.MemoryStore(), mode="w", zarr_format=version)
        tensors = {"a": bits("float32", 5, 6), "b": bits("int64", 9)}
        options = {} if version == 2 else {"serializer": zarr.codecs.BytesCodec(endian="big")}
        for name, tensor in tensors.items():
            kind = values(tensor).dtype.newbyteorder(">")
            group.create_array(name, shape=tensor.shape, chunks=(4,) * tensor.ndim, dtype=kind, **options)[...] = (
                values(tensor)
            )
        return Opened(open_source(group), tensors, ordered=False)


_NAMED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def as_tensorstore_writes(root: Path, version: int, compressed: bool) -> dict[str, torch.Tensor]:
    """One folder an array, no group above; the dtype by its name in ml_dtypes, which zarr does not know."""
    tensors = {f"params.{name}": bits(name, 6, 8) for name in _NAMED}
    for name, tensor in tensors.items():
        kind = name.removeprefix("params.")
        width = tensor.element_size()
        plain = np.frombuffer(raw(tensor).tobytes(), f"<u{width}").reshape(tensor.shape)
        zarr.create_array(
            root / name, data=plain, chunks=(4, 8), zarr_format=version, compressors="auto" if compressed else None
        )
        path = root / name / (".zarray" if version == 2 else "zarr.json")
        table = json.loads(path.read_text())
        table["dtype" if version == 2 else "data_type"] = kind
        table["fill_value"] = None if version == 2 else "0x7fc0" if width == 2 else 0.0
        path.write_text(json.dumps(table))
    (root / "_METADATA").write_text("{}")
    return tensors


class TestOrbax(SourceContract):
    @pytest.fixture(scope="class", params=[True, False], ids=["compressed", "plain"])
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory, version: int, request: pytest.FixtureRequest) -> Opened:
        root = tmp_path_factory.mktemp("orbax")
        expected = as_tensorstore_writes(root, version, request.param)
        return Opened(open_source(root), expected, ordered=False)

    def test_orbax_own_files_are_kept(self, opened: Opened) -> None:
        assert set(opened.source.files) == {"_METADATA"}

    def test_in_a_group(self, tmp_path: Path, version: int) -> None:
        expected = as_tensorstore_writes(tmp_path, version, True)
        source = open_source(zarr.open_group(tmp_path, mode="a", zarr_format=version))
        for name, tensor in expected.items():
            assert np.array_equal(read(source, name), raw(tensor))


def test_chunks_that_were_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(6,), chunks=(2,), dtype="uint16", zarr_format=2)[:2] = 7
    table = json.loads((tmp_path / "a/.zarray").read_text())
    (tmp_path / "a/.zarray").write_text(json.dumps(table | {"dtype": "bfloat16", "fill_value": 1.5}))
    got = read(open_source(tmp_path), "a").reshape(-1).view(np.uint16)
    assert got.tolist() == [7, 7, *[0x3FC0] * 4]


def test_an_array_at_the_root(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "weight.zarr", data=np.arange(6, dtype=np.int32))
    source = open_source(tmp_path / "weight.zarr")
    assert [spec.name for spec in source.tensors] == ["weight"]
    assert read(source, "weight").reshape(-1).view(np.int32).tolist() == list(range(6))


def test_a_large_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = bits("float32", 64, 64)
    zarr.create_array(tmp_path / "w", data=values(tensor), chunks=(64, 64))
    source = open_source(tmp_path)
    calls = []
    decode = zarr.Array.get_basic_selection
    monkeypatch.setattr(zarr.Array, "get_basic_selection", lambda *args: calls.append(args) or decode(*args))
    for row in range(64):
        region = ((row, row + 1), (3, 60))
        assert np.array_equal(read(source, "w", region), raw(tensor)[row : row + 1, 3:60])
    assert len(calls) == 1


def test_decoded_chunks_are_forgotten_in_turn() -> None:
    chunks = Chunks(limit=100)
    made = []

    def get(i: int, size: int) -> None:
        def decode() -> np.ndarray:
            made.append(i)
            return np.full(size, i, np.uint8)

        assert chunks.get(("w", ((i, i + 1),)), size, decode)[0] == i

    for i in (0, 1, 0, 2, 0, 1, 3):
        get(i, 40)
    get(4, 1000)
    get(4, 1000)
    assert made == [0, 1, 2, 1, 3, 4]


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.path}",)


class TestHostile:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        zarr.create_array(tmp_path / "x/w", data=np.arange(6, dtype=np.int32), zarr_format=2, compressors=None)
        return tmp_path / "x"

    def change(self, root: Path, **fields: object) -> None:
        table = json.loads((root / "w/.zarray").read_text())
        (root / "w/.zarray").write_text(json.dumps(table | fields))

    @pytest.mark.parametrize("where", ["compressor", "filters"])
    def test_a_pickle_as_a_codec_is_not_run(self, root: Path, where: str) -> None:
        codec = {"id": "pickle", "protocol": 5}
        self.change(root, **{where: codec if where == "compressor" else [codec]})
        (root / "w/0").write_bytes(pickle.dumps(Runs(root / "ran")))
        with pytest.raises(UnsupportedError, match="'pickle', which is not run"):
            read(open_source(root), "w")
        assert not (root / "ran").exists()

    def test_a_pickle_within_a_shard_is_not_run(self, tmp_path: Path) -> None:
        made = zarr.create_array(tmp_path / "w", shape=(8,), chunks=(2,), shards=(4,), dtype="int32")
        path = tmp_path / "w/zarr.json"
        assert made.shape == (8,)
        table = json.loads(path.read_text())
        table["codecs"][0]["configuration"]["codecs"].append({"name": "numcodecs.pickle", "configuration": {}})
        path.write_text(json.dumps(table))
        with pytest.raises(UnsupportedError, match=r"numcodecs\.pickle"):
            open_source(tmp_path)

    @pytest.mark.parametrize(
        "kind", ["|O", "<U5", "|S3", "<M8[ns]", "|V4", [["a", "<i4"]], "<f16", "int4", "nothing", 3]
    )
    def test_dtypes_that_no_tensor_has(self, root: Path, kind: object) -> None:
        self.change(root, dtype=kind, fill_value=None)
        with pytest.raises(ModelStoreError, match="w"):
            open_source(root)

    @pytest.mark.parametrize(
        "fields",
        [
            {"shape": [-1]},
            {"shape": [2**62, 2**62], "chunks": [1, 1]},
            {"shape": [2**40], "chunks": [2**40]},
            {"shape": ["6"]},
            {"shape": [6, 6]},
            {"chunks": [0]},
            {"compressor": {"id": "zstd", "level": "x"}, "zarr_format": 7},
            {"order": "X"},
            {"codec": [[[[[]]]]], "dtype": "bfloat16", "fill_value": {}},
            {"dtype": "bfloat16", "fill_value": "0xzz"},
        ],
        ids=str,
    )
    def test_metadata_that_is_not_valid(self, root: Path, fields: dict[str, object]) -> None:
        self.change(root, **fields)
        with pytest.raises(ModelStoreError):
            read(open_source(root), "w")

    def test_deep_nesting(self, root: Path) -> None:
        (root / "w/.zarray").write_text('{"a":' * 100_000)
        with pytest.raises(FormatError):
            open_source(root)

    def test_chunks_that_are_cut_short(self, root: Path) -> None:
        (root / "w/0").write_bytes(b"123")
        with pytest.raises(FormatError, match="'w': zarr cannot read"):
            read(open_source(root), "w")

    def test_a_chunk_behind_a_link_out(self, root: Path) -> None:
        (root / "w/0").rename(root.parent / "elsewhere")
        (root / "w/0").symlink_to(root.parent / "elsewhere")
        with pytest.raises(FormatError, match="link out"):
            open_source(root)

    def test_a_checkpoint_in_ocdbt(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.ocdbt").write_bytes(b"x")
        with pytest.raises(UnsupportedError, match="use_ocdbt=False"):
            open_source(tmp_path)
