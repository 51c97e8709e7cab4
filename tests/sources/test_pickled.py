from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.dtypes import DTYPES
from modelstore.sources.open import open_source
from modelstore.sources.pickles.source import PickledSource
from tests.sources.contract import Opened, SourceContract, bits, raw, read


def state() -> dict[str, torch.Tensor]:
    base = bits("bfloat16", 6, 8, 4)
    return {f"of.{name}": bits(name, 4, 6, 3) for name in DTYPES} | {
        "base": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1:5:2, ::3],
        "wide": base[:1].expand(9, 8, 4),
        "tied": base,
        "scalar": bits("float32"),
        "empty": bits("int64", 0, 3),
        "large": bits("float32", 700, 2000).t(),
        "parameter": torch.nn.Parameter(bits("float32", 3, 4)),
    }


class TestFile(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        path = tmp_path_factory.mktemp("pickled") / "weights.pt"
        torch.save(state(), path)
        return Opened(open_source(path), state())

    def test_tied_tensors_stay_tied(self, opened: Opened) -> None:
        assert opened.source.aliases == {"tied": "base"}


class TestOldFile(SourceContract):
    """The format of torch before 1.6, read in place as well."""

    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        path = tmp_path_factory.mktemp("old") / "weights.pth"
        base = bits("float32", 60, 4)
        weights = {"a": base, "b": bits("bfloat16", 5), "part": base[3:50:2, 1:], "tied": base, "c": bits("bool", 7)}
        torch.save({"state_dict": weights, "epoch": 3}, path, _use_new_zipfile_serialization=False)
        source = open_source(path)
        assert isinstance(source, PickledSource)
        return Opened(source, weights)


class TestShards(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("shards")
        one, two = {"a": bits("float32", 3, 4)}, {"b": bits("float16", 5)}
        torch.save(one, root / "pytorch_model-00001-of-00002.bin")
        torch.save(two, root / "pytorch_model-00002-of-00002.bin")
        weights = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        (root / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
        (root / "config.json").write_text("{}")
        return Opened(open_source(root), one | two)

    def test_the_other_files_are_kept(self, opened: Opened) -> None:
        assert set(opened.source.files) == {"config.json"}


class TestWrappers:
    def test_a_usual_wrapper_is_looked_into(self, tmp_path: Path) -> None:
        weights = torch.nn.Linear(2, 2).state_dict()
        saved = {"model": {"state_dict": weights}, "optimizer": {"state": {0: torch.ones(1)}}, "epoch": 3}
        torch.save(saved, tmp_path / "x.ckpt")
        source = open_source(tmp_path / "x.ckpt")
        assert isinstance(source, PickledSource)
        assert [spec.name for spec in source.tensors] == ["weight", "bias"]
        assert source.metadata == {"torch.state_dict": "model.state_dict"}
        assert set(source.skipped) == {"x.ckpt:optimizer", "x.ckpt:epoch"}
        assert np.array_equal(read(source, "weight"), raw(weights["weight"]))

    @pytest.mark.parametrize(
        ("saved", "says"),
        [
            ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, r"several.*state_dict, model"),
            ({"optimizer": {"w": torch.ones(1)}}, "no state dict among 'optimizer'"),
            ({"g": {"w": torch.ones(1)}, "d": {"w": torch.ones(1)}}, r"several state dicts \(g, d\).*key='g'"),
            ({"g": {"w": torch.ones(1)}, "w": torch.ones(1)}, r"several state dicts \(\., g\)"),
            ([torch.ones(1)], "holds a value of type list"),
            (torch.ones(1), "holds a tensor, not a state dict: save a dict"),
            ({1: torch.ones(1)}, "a name of type int"),
            ({}, "no state dict"),
        ],
    )
    def test_what_is_not_clear_is_refused(self, tmp_path: Path, saved: object, says: str) -> None:
        torch.save(saved, tmp_path / "x.pt")
        with pytest.raises(FormatError, match=says):
            open_source(tmp_path / "x.pt")

    @pytest.mark.filterwarnings("ignore")
    def test_tensors_that_are_not_dense_are_named(self, tmp_path: Path) -> None:
        for tensor in (torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)):
            torch.save({"layer.x": tensor}, tmp_path / "x.pt")
            with pytest.raises(UnsupportedError, match=r"'layer\.x' is a (sparse|quantized)"):
                open_source(tmp_path / "x.pt")

    def test_a_directory_with_one_file(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(1)}, tmp_path / "ours.pth")
        for beside in ("optimizer.pt", "training_args.bin", "rng_state_0.pth"):
            (tmp_path / beside).write_bytes(b"x")
        source = open_source(tmp_path)
        assert [spec.name for spec in source.tensors] == ["w"]
        assert set(source.files) == {"optimizer.pt", "training_args.bin", "rng_state_0.pth"}
        torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
        with pytest.raises(FormatError, match="2 other files"):
            open_source(tmp_path)


class Runs:
    """Pickled, it runs a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.path}",)


def archive(path: Path, data: bytes, **options: object) -> None:
    """A torch.save archive with this pickle."""
    with zipfile.ZipFile(path, "w", **options) as zipped:  # type: ignore[call-overload]
        zipped.writestr("archive/data.pkl", data)
        zipped.writestr("archive/byteorder", "little")
        zipped.writestr("archive/data/0", bytes(16))


def storage(kind: str = "FloatStorage", numel: int = 4, key: str = "0") -> bytes:
    """The operations that push a storage."""
    name = key.encode()
    return (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX" + struct.pack("<I", len(name)) + name
        + b"X\x03\x00\x00\x00cpuJ" + struct.pack("<i", numel) + b"tQ"
    )  # fmt: skip


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], stored: bytes = b"") -> bytes:
    """A pickle of {"w": a tensor of that view}."""
    numbers = [pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides)]
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + (stored or storage()) + b"".join(numbers)
        + b"\x89ccollections\nOrderedDict\n)Rt" + b"Rs."
    )  # fmt: skip


class TestHostile:
    @pytest.mark.parametrize("new", [True, False])
    def test_nothing_is_run(self, tmp_path: Path, new: bool) -> None:
        torch.save(
            {"w": torch.ones(1), "x": Runs(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=new
        )
        with pytest.raises(FormatError, match=r"posix\.system"):
            open_source(tmp_path / "x.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("new", [True, False])
    def test_nothing_beside_the_weights_is_run(self, tmp_path: Path, new: bool) -> None:
        saved = {"state_dict": {"w": torch.ones(1)}, "x": Runs(tmp_path / "ran"), "y": {1: [Runs(tmp_path / "ran")]}}
        torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        source = open_source(tmp_path / "x.pt")
        assert [spec.name for spec in source.tensors] == ["w"]
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "name",
        [
            b"builtins\neval", b"torch\nload", b"torch._utils\n_rebuild_device_tensor_from_numpy", b"numpy\nload",
            b"modelstore.sources.pickles.unpickle\nunpickle", b"torch\nsave", b"\n", b"torch.serialization\nload",
        ],
    )  # fmt: skip
    def test_other_names_are_refused(self, tmp_path: Path, name: bytes) -> None:
        archive(tmp_path / "x.pt", b"\x80\x02c" + name + b"\n)R.")
        with pytest.raises(FormatError, match=r"was not run|not a valid pickle|nothing was run|holds a"):
            open_source(tmp_path / "x.pt")

    def test_a_valid_archive_made_by_hand(self, tmp_path: Path) -> None:
        archive(tmp_path / "x.pt", tensor(0, (2, 2), (2, 1)))
        source = open_source(tmp_path / "x.pt")
        assert np.array_equal(read(source, "w"), np.zeros((2, 2, 4), np.uint8))

    @pytest.mark.parametrize(
        "data",
        [
            tensor(1, (2, 2), (2, 1)),
            tensor(0, (2, 3), (3, 1)),
            tensor(0, (2, 2), (2**40, 1)),
            tensor(2**62, (1,), (1,)),
            tensor(-1, (2, 2), (2, 1)),
            tensor(0, (-2, 2), (2, 1)),
            tensor(0, (2, 2), (-2, 1)),
            tensor(0, (2, 2), (1,)),
            tensor(0, (2**70,), (0,)),
            tensor(0, (2**40, 2**40), (0, 0)),
            tensor(0, (1,) * 100, (1,) * 100),
            tensor(0, (2, 2), (2, 1), storage(key="../0")),
            tensor(0, (2, 2), (2, 1), storage(key="1")),
            tensor(0, (2, 2), (2, 1), storage("NoStorage")),
            tensor(0, (2, 2), (2, 1), b"K\x01"),
        ],
    )
    def test_tensors_that_lead_outside(self, tmp_path: Path, data: bytes) -> None:
        archive(tmp_path / "x.pt", data)
        with pytest.raises(FormatError):
            open_source(tmp_path / "x.pt")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b".",
            b"\x80\x02",
            b"\x80\x09N.",
            b"\x80\x02]r\xff\xff\xff\xff.",  # a memo index of 2**32: memory for it would be 32 GiB
            b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of 1 TiB
            b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
            b"\x80\x02}" + b")" * 3 + b"\x85" * 300_000 + b"Ns.",  # a deep tuple as a key: hashing it walks it
            b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
            b"\x80\x02}(K\x01K\x01K\x01K\x02u.",
            b"\x80\x02]K\x01K\x02s.",
            b"\x80\x02}K\x01a.",
            b"\x80\x02K\x01)R.",
            b"\x80\x02K\x01)\x81.",
            b"\x80\x02K\x01}b.",
            b"\x80\x02P0\n.",
            b"\x80\x02\x82\x01.",
            b"I" + b"9" * 100_000 + b"\n.",
            b"\x80\x02Vx\n.",
            random.Random(0).randbytes(2000),
        ],
        ids=lambda data: repr(data[:12]),
    )
    def test_pickles_that_are_not_valid(self, tmp_path: Path, data: bytes) -> None:
        archive(tmp_path / "x.pt", data)
        started = time.monotonic()
        with pytest.raises(FormatError):
            open_source(tmp_path / "x.pt")
        assert time.monotonic() - started < 5

    def test_an_archive_that_is_compressed(self, tmp_path: Path) -> None:
        archive(tmp_path / "x.pt", tensor(0, (2, 2), (2, 1)), compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(FormatError, match="compressed"):
            open_source(tmp_path / "x.pt")

    def test_an_archive_without_a_pickle(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
            zipped.writestr("archive/data/0", b"x")
        with pytest.raises(FormatError, match=r"no data\.pkl"):
            open_source(tmp_path / "x.pt")

    def test_an_archive_of_a_big_endian_machine(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
            zipped.writestr("archive/data.pkl", tensor(0, (2, 2), (2, 1)))
            zipped.writestr("archive/byteorder", "big")
        with pytest.raises(UnsupportedError, match="big-endian"):
            open_source(tmp_path / "x.pt")

    def test_every_cut_of_an_archive_is_refused(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(OrderedDict(w=torch.ones(4)), buffer)
        whole = buffer.getvalue()
        for stop in range(0, len(whole), 41):
            (tmp_path / "x.pt").write_bytes(whole[:stop])
            with pytest.raises(FormatError, match=r"cut short|not a valid pickle \(KeyError\)"):  # "P" alone
                open_source(tmp_path / "x.pt")

    def test_every_cut_of_an_old_file_is_refused(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(OrderedDict(w=torch.ones(4)), buffer, _use_new_zipfile_serialization=False)
        whole = buffer.getvalue()
        for stop in range(0, len(whole), 7):
            (tmp_path / "x.pt").write_bytes(whole[:stop])
            with pytest.raises(FormatError, match=r"cut short|not a valid pickle"):
                open_source(tmp_path / "x.pt")

    def test_no_changed_byte_makes_it_fail_otherwise(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(OrderedDict(w=torch.ones(4)), buffer)
        whole = bytearray(buffer.getvalue())
        rng = np.random.default_rng(0)
        for at in rng.integers(0, len(whole), 400):
            changed = bytearray(whole)
            changed[at] ^= int(rng.integers(1, 256))
            (tmp_path / "x.pt").write_bytes(changed)
            try:
                source = open_source(tmp_path / "x.pt")
                for spec in source.tensors:
                    read(source, spec.name)
            except (FormatError, UnsupportedError):
                pass
