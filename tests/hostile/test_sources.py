"""Small files that ask for much: what is done for them stays in proportion to their own size."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.format.files.safetensors import parse_header
from modelstore.sources.open import open_source
from modelstore.sources.pickles.unpickle import Key, unpickle
from tests.sources.contract import read
from tests.sources.test_pickled import archive, storage, tensor

MIB = 1 << 20


@contextmanager
def at_most(bytes: int) -> Iterator[None]:
    """The block takes no more memory than that at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bytes
    finally:
        tracemalloc.stop()


@contextmanager
def steps(most: int) -> Iterator[None]:
    """The block runs no more than so many lines and calls of Python."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += 1
        assert count < most, "too much work"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Counted(str):
    """A text that counts comparisons."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


class TestSafetensors:
    def test_a_name_that_repeats_is_found_by_one_look(self) -> None:
        from modelstore.format.files.safetensors import _unique

        pairs: list[tuple[str, Any]] = [(Counted(f"t{i}"), None) for i in range(5000)]
        Counted.comparisons = 0
        with pytest.raises(FormatError, match="'t4999' appears twice"):
            _unique([*pairs, (Counted("t4999"), None)])
        assert Counted.comparisons < 100
        with pytest.raises(FormatError, match="twice"):
            parse_header(b'{"a":{},"a":{}}', 100)

    def test_junk_at_any_depth_is_refused_as_such(self) -> None:
        for depth in range(900, 1000):
            junk = b"[" * depth + b"]" * depth
            with pytest.raises(FormatError):
                parse_header(b'{"a":{"dtype":' + junk + b',"shape":[],"data_offsets":[0,0]}}', 100)


class TestPickles:
    def test_keys_of_one_hash_are_told_apart_without_comparing_them(self) -> None:
        prime = 2**61 - 1
        made = unpickle(pickle.dumps({i * prime: None for i in range(2000)}, 2), {}, where="x")
        assert sum(isinstance(key, Key) for key in made) > 1990
        assert len({hash(key) for key in made}) > 1990

    def test_memory_numbered_by_such_keys_is_refused(self) -> None:
        with pytest.raises(FormatError, match=r"2\*\*32"):
            unpickle(b"N" + b"p%d\n" % (2**61 - 1) + b".", {}, where="x")

    def test_views_of_one_hash_are_compared_by_text(self) -> None:
        from modelstore.format.dtypes import DTYPES
        from modelstore.sources.pickles.tensors import Ref

        prime = 2**61 - 1
        refs = [Ref("0", DTYPES["float32"], 0, (1, 1), (a * prime, b * prime)) for a in range(4) for b in range(4)]
        assert len({hash(ref) for ref in refs}) == 1  # what an author can choose
        assert len({hash(ref.key) for ref in refs}) == 16

    def test_a_long_tuple_is_not_copied_by_every_call(self) -> None:
        data = b"\x80\x02(" + b"N" * 10_000 + b"tq\x00cx\ny\nq\x01h\x00R."
        with pytest.raises(FormatError, match="10000 arguments"):
            unpickle(data, {}, inert=True, where="x")

    @pytest.mark.parametrize("code", [b"\x8e", b"\x96", b"\x8d"])  # BINBYTES8, BYTEARRAY8, BINUNICODE8
    def test_no_memory_is_made_for_what_is_not_there(self, code: bytes) -> None:
        with at_most(MIB), pytest.raises(FormatError):
            unpickle(b"\x80\x05" + code + struct.pack("<Q", 3 << 30) + b"x.", {}, where="x")

    def test_doubling_structures_are_looked_at_once(self, tmp_path: Path) -> None:
        inner: list[Any] = []
        for _ in range(200):
            inner = [inner, inner]
        torch.save({"state_dict": {"w": torch.ones(1)}, "bomb": inner}, tmp_path / "x.pt")
        with steps(300_000):
            assert [spec.name for spec in open_source(tmp_path / "x.pt").tensors] == ["w"]

    def test_what_many_refer_to_is_looked_at_once(self, tmp_path: Path) -> None:
        shared = {i: i for i in range(2000)}
        saved = {f"k{i}": shared for i in range(500)} | {"model": {"w": torch.ones(1)}}
        saved["model"] |= {f"x{i}": shared for i in range(500)}
        torch.save(saved, tmp_path / "x.pt")
        with steps(400_000):
            assert [spec.name for spec in open_source(tmp_path / "x.pt").tensors] == ["w"]

    def test_large_numbers_as_keys_are_named_without_being_written_out(self, tmp_path: Path) -> None:
        torch.save({"model": {"w": torch.ones(1)}, 10**5000: 1, "x": {10**5000: 2}}, tmp_path / "x.pt")
        assert "x.pt:a large number" in open_source(tmp_path / "x.pt").skipped  # type: ignore[attr-defined]


class TestArchives:
    def test_views_that_repeat_a_byte_are_refused(self, tmp_path: Path) -> None:
        archive(tmp_path / "x.pt", tensor(0, (2**31,), (0,)))
        with pytest.raises(FormatError, match="repeat the same bytes"):
            open_source(tmp_path / "x.pt")

    def test_so_they_are_in_the_old_format(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(1).expand(2**31)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(FormatError, match="repeat the same bytes"):
            open_source(tmp_path / "x.pt")

    def test_and_many_that_overlap_are(self, tmp_path: Path) -> None:
        base = torch.zeros(1 << 20)
        torch.save({f"w{i}": base[i:] for i in range(200)}, tmp_path / "x.pt")
        with pytest.raises(FormatError, match="repeat the same bytes"):
            open_source(tmp_path / "x.pt")

    def test_views_in_proportion_are_taken(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(4, 1).expand(4, 1000)}, tmp_path / "x.pt")
        assert open_source(tmp_path / "x.pt").tensors[0].shape == (4, 1000)

    def test_a_directory_without_bounds_is_refused(self, tmp_path: Path) -> None:
        end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, 100 * MIB, 64, 0)
        with (tmp_path / "x.pt").open("wb") as file:
            file.write(b"PK\3\4" + bytes(60))
            file.truncate(64 + 100 * MIB)
            file.seek(0, os.SEEK_END)
            file.write(end)
        with at_most(4 * MIB), pytest.raises(FormatError, match="limit"):
            open_source(tmp_path / "x.pt")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_is_named(self, tmp_path: Path) -> None:
        class Module(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        torch.jit.save(torch.jit.script(Module()), tmp_path / "x.pt")
        with pytest.raises(UnsupportedError, match="TorchScript"):
            open_source(tmp_path / "x.pt")

    @pytest.mark.parametrize("key", ["../x", "", "1", "data.pkl"])
    def test_storages_of_other_names_are_not_found(self, tmp_path: Path, key: str) -> None:
        archive(tmp_path / "x.pt", tensor(0, (2, 2), (2, 1), storage(key=key)))
        with pytest.raises(FormatError):
            open_source(tmp_path / "x.pt")


def zarr_array(root: Path, codec: str, chunk: bytes, version: int = 2, **more: Any) -> Path:
    """An array of 64 bytes in one chunk, with these bytes for it."""
    root.mkdir()
    if version == 2:
        table = {"zarr_format": 2, "shape": [64], "chunks": [64], "dtype": "|u1", "fill_value": 0, "order": "C"}
        table |= {"compressor": {"id": codec, **more}, "filters": None}
        (root / ".zarray").write_text(json.dumps(table))
        (root / "0").write_bytes(chunk)
        return root
    names = [{"name": "bytes"}, {"name": codec, "configuration": more}]
    table = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [64],
        "data_type": "uint8",
        "fill_value": 0,
        "codecs": names,
    }
    table |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64]}}}
    table |= {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}}
    (root / "zarr.json").write_text(json.dumps(table))
    (root / "c").mkdir()
    (root / "c/0").write_bytes(chunk)
    return root


def bombs() -> dict[str, tuple[int, dict[str, Any], Callable[[bytes], bytes]]]:
    import bz2
    import lzma

    import zstandard

    def streamed(data: bytes) -> bytes:
        job = zstandard.ZstdCompressor().compressobj()
        return job.compress(data) + job.flush()

    def blosc(data: bytes) -> bytes:
        return bytes(numcodecs.Blosc().encode(data))

    gzip: Callable[[bytes], bytes] = lambda data: (job := zlib.compressobj(9, wbits=31)).compress(data) + job.flush()  # noqa: E731
    return {
        "zlib": (2, {"level": 1}, zlib.compress),
        "gzip": (2, {"level": 1}, gzip),
        "gzip ": (3, {"level": 1}, gzip),
        "bz2": (2, {"level": 1}, bz2.compress),
        "lzma": (2, {"format": 1, "check": -1, "preset": None, "filters": None}, lzma.compress),
        "zstd": (2, {"level": 1}, zstandard.ZstdCompressor().compress),
        "zstd ": (3, {"level": 1, "checksum": False}, zstandard.ZstdCompressor().compress),
        "zstd  ": (3, {"level": 1, "checksum": False}, streamed),
        "lz4": (2, {"acceleration": 1}, lambda data: bytes(numcodecs.LZ4().encode(data))),
        "blosc": (2, {"cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}, blosc),
        "blosc ": (
            3,
            {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0},
            blosc,
        ),
        "numcodecs.zlib": (3, {"level": 1}, zlib.compress),
    }


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")
class TestZarr:
    @pytest.mark.parametrize("name", bombs())
    def test_a_chunk_is_not_decompressed_beyond_its_size(self, tmp_path: Path, name: str) -> None:
        version, options, compress = bombs()[name]
        root = zarr_array(tmp_path / "right", name.strip(), compress(bytes(range(64))), version, **options)
        assert read(open_source(root), "right").tobytes() == bytes(range(64))
        zarr_array(tmp_path / "bomb", name.strip(), compress(bytes(20 * MIB)), version, **options)
        with at_most(14 * MIB), pytest.raises(FormatError):
            read(open_source(tmp_path / "bomb"), "bomb")

    def test_within_shards_as_well(self, tmp_path: Path) -> None:
        array = zarr.create_array(
            tmp_path / "x", shape=(64,), chunks=(32,), shards=(64,), dtype="u1", compressors=zarr.codecs.GzipCodec()
        )
        array[...] = np.arange(64, dtype="u1")
        assert read(open_source(tmp_path / "x"), "x").ravel().tolist() == list(range(64))
        bomb = zlib.compressobj(9, wbits=31)
        data = bomb.compress(bytes(16 * MIB)) + bomb.flush()
        index = struct.pack("<4Q", 0, len(data), 0, len(data))
        (tmp_path / "x/c/0").write_bytes(data + bytes(numcodecs.CRC32C(location="end").encode(index)))
        with at_most(8 * MIB), pytest.raises(FormatError):
            read(open_source(tmp_path / "x"), "x")

    def test_a_chunk_file_without_bounds_is_refused(self, tmp_path: Path) -> None:
        root = zarr_array(tmp_path / "x", "zlib", b"", level=1)
        os.truncate(root / "0", 1 << 40)  # nothing of it is on the disk
        with at_most(4 * MIB), pytest.raises(FormatError, match="chunk file"):
            open_source(root)

    @pytest.mark.parametrize(("shape", "chunk"), [((1 << 50,), (1 << 30,)), ((1 << 40,), (1,))])
    def test_arrays_of_which_nothing_is_there_are_refused(
        self, tmp_path: Path, shape: tuple[int, ...], chunk: tuple[int, ...]
    ) -> None:
        zarr.create_array(tmp_path / "x", shape=shape, chunks=chunk, dtype="u1")
        with pytest.raises(FormatError):
            open_source(tmp_path / "x")

    def test_shards_of_too_many_chunks_are_refused(self, tmp_path: Path) -> None:
        zarr.create_array(tmp_path / "x", shape=(1 << 27,), chunks=(1,), shards=(1 << 27,), dtype="u1")
        with pytest.raises(UnsupportedError, match="shards of"):
            open_source(tmp_path / "x")

    @pytest.mark.parametrize("name", [".zarray", "0"])
    def test_pipes_do_not_hold_it(self, tmp_path: Path, name: str) -> None:
        root = zarr_array(tmp_path / "x", "zlib", zlib.compress(bytes(64)), level=1)
        (root / name).unlink()
        os.mkfifo(root / name)
        with pytest.raises(FormatError, match="not a regular file"):
            open_source(root)


class TestPipes:
    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
            ".metadata",
            "zarr.json",
            "x.safetensors",
        ],
    )
    def test_a_pipe_in_place_of_a_file_of_a_folder(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(ModelStoreError):
            open_source(tmp_path)

    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin", "x.ckpt", "x.pth.tar", "x.gguf", "x"])
    def test_pipes_devices_and_folders_in_place_of_a_file(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(FormatError, match="a pipe or a device"):
            open_source(tmp_path / name)
        with pytest.raises(FormatError, match="a pipe or a device"):
            open_source({}, files={"config.json": tmp_path / name})
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(FormatError, match="a pipe or a device"):
            open_source(tmp_path / name)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(ModelStoreError):
            open_source(tmp_path / name)


class TestIndexes:
    def test_an_index_without_bounds_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors.index.json"
        path.touch()
        os.truncate(path, 1 << 40)
        with at_most(200 * MIB), pytest.raises(FormatError, match="limit"):
            open_source(tmp_path)
