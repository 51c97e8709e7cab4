from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelstore
from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.format.files.gguf import parse_header
from modelstore.sources.choosing import Selection
from modelstore.sources.gguf import open_gguf
from modelstore.sources.open import open_source
from tests.hostile.test_sources import MIB, at_most
from tests.sources.contract import read

gguf = pytest.importorskip("gguf")

PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
)


def write(
    path: Path, tensors: dict[str, tuple[np.ndarray, str | None]], architecture: str = "other", **values: Any
) -> Path:
    """A GGUF file, as the reference writes it; tensors as numbers, or as the bytes of a type."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "\x00", "b" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.5, float("nan"), -1.0])
    for key, value in values.items():
        add = (
            writer.add_float32
            if isinstance(value, float)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
        )
        add(f"{architecture}.{key}".replace("__", "."), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: str, *rows: int, columns: int = 512, seed: int = 0) -> tuple[np.ndarray, str]:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng([seed, *kind.encode()])
    return rng.integers(0, 256, (*rows, columns // block * size), np.uint8), kind


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"w.{kind}": random_blocks(kind, 7) for kind in (*KINDS, *PLAIN)}
    tensors |= {
        "experts": random_blocks("Q4_K", 3, 5),
        "one": random_blocks("Q8_0"),
        "v": (np.ones(3, np.float32), None),
    }
    return write(tmp_path_factory.mktemp("gguf") / "every.gguf", tensors)


def llama(path: Path, architecture: str = "llama", **more: tuple[np.ndarray, str | None]) -> Path:
    tensors: dict[str, tuple[np.ndarray, str | None]] = {
        "token_embd.weight": random_blocks("Q8_0", 10, columns=64),
        "output_norm.weight": (np.ones(64, np.float32), None),
    }
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_q.weight": random_blocks("Q4_0", 64, columns=64, seed=i),
            f"blk.{i}.attn_k.weight": (np.random.default_rng(i).normal(size=(32, 64)).astype(np.float16), None),
            f"blk.{i}.attn_v.weight": random_blocks("Q4_0", 32, columns=64, seed=9),
            f"blk.{i}.ffn_down.weight": random_blocks("Q4_0", 64, columns=64, seed=3),
        }
    values: dict[str, Any] = {
        "embedding_length": 64,
        "attention__head_count": 4,
        "attention__head_count_kv": 2,
        "block_count": 2,
    }
    values |= {"feed_forward_length": 64, "context_length": 128, "attention__layer_norm_rms_epsilon": 1e-5}
    return write(path, tensors | more, architecture, **values)


class TestNumbers:
    def test_they_are_those_of_the_reference(self, every: Path) -> None:
        source = open_source(every)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(every).tensors}
        assert [spec.name for spec in source.tensors] == list(tensors)
        for spec in source.tensors:
            given, wanted = read(source, spec.name), tensors[spec.name]
            if wanted.tensor_type.name in PLAIN:
                assert given.tobytes() == wanted.data.tobytes(), spec
                continue
            with np.errstate(all="ignore"):
                numbers = gguf.quants.dequantize(wanted.data, wanted.tensor_type)
            assert spec.shape == numbers.shape
            assert np.array_equal(given.reshape(-1).view("u4"), numbers.reshape(-1).view("u4")), spec

    def test_regions_are_parts_of_them(self, every: Path) -> None:
        source = open_source(every)
        for name, region in {
            "w.Q4_0": ((2, 5), (33, 95)),
            "w.Q6_K": ((6, 7), (255, 257)),
            "experts": ((1, 3), (2, 4), (100, 400)),
            "one": ((31, 300),),
            "w.IQ2_XS": ((0, 7), (0, 0)),
        }.items():
            whole = read(source, name)
            assert np.array_equal(read(source, name, region), whole[tuple(slice(a, b) for a, b in region)]), name

    def test_memory_follows_the_region(self, tmp_path: Path) -> None:
        write(tmp_path / "x.gguf", {"w": random_blocks("Q4_0", 4096, columns=4096)})
        source = open_source(tmp_path / "x.gguf")
        out = np.empty(512 * 4096 * 4, np.uint8)
        with at_most(32 * MIB):
            source.read("w", ((1024, 1536), (0, 4096)), out)

    def test_metadata_and_tokenizer_are_kept(self, every: Path) -> None:
        source = open_source(every)
        data = source.files["gguf_metadata.json"]
        assert isinstance(data, bytes)
        table = json.loads(data)
        assert table["general.architecture"] == {"type": "string", "value": "other"}
        assert table["tokenizer.ggml.tokens"]["value"] == ["a", "é", "\x00", "b" * 300]
        assert table["tokenizer.ggml.scores"] == {"type": "array", "items": "f32", "value": [0.5, "nan", -1.0]}
        assert source.metadata["gguf.names"] == "as in the file"

    def test_llama_has_the_names_and_rows_of_transformers(self, tmp_path: Path) -> None:
        source = open_source(llama(tmp_path / "x.gguf"))
        names = {spec.name for spec in source.tensors}
        assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"} < names
        config = json.loads(source.files["config.json"])  # type: ignore[arg-type]
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["head_dim"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (16, 1e-5, True)
        # Row 2k + half of a head in the file is row (half, k) here, as transformers' own loader has it.
        plain = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}["blk.0.attn_k.weight"].data
        given = read(source, "model.layers.0.self_attn.k_proj.weight").reshape(-1).view(np.float16).reshape(32, 64)
        wanted = plain.reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)
        assert np.array_equal(given, wanted)
        part = read(source, "model.layers.0.self_attn.k_proj.weight", ((5, 23), (7, 40)))
        assert np.array_equal(part.reshape(-1).view(np.float16).reshape(18, 33), wanted[5:23, 7:40])
        whole = read(source, "model.layers.1.self_attn.q_proj.weight")
        assert np.array_equal(
            read(source, "model.layers.1.self_attn.q_proj.weight", ((9, 50), (3, 64))), whole[9:50, 3:64]
        )

    def test_qwen_rotates_halves_and_others_keep_their_names(self, tmp_path: Path) -> None:
        source = open_gguf(llama(tmp_path / "q.gguf", "qwen3"))
        plain = {t.name: t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}["blk.0.attn_k.weight"].data
        assert read(source, "model.layers.0.self_attn.k_proj.weight").tobytes() == plain.tobytes()
        mixed = open_gguf(llama(tmp_path / "m.gguf", **{"blk.0.ffn_gate_exps.weight": random_blocks("Q4_0", 2, 4)}))
        assert "blk.0.attn_q.weight" in {spec.name for spec in mixed.tensors}
        assert mixed.metadata["gguf.names"] == "as in the file"
        scaled = open_gguf(llama(tmp_path / "s.gguf", **{"rope_freqs.weight": (np.ones(8, np.float32), None)}))
        assert set(scaled.skipped) == {"rope_freqs.weight", "config.json"}

    def test_a_type_without_reference_is_named(self, tmp_path: Path) -> None:
        write(tmp_path / "x.gguf", {"w": random_blocks("Q8_K", 2)})
        with pytest.raises(UnsupportedError, match=r"'w' has type Q8_K.*gguf=\"blocks\""):
            open_source(tmp_path / "x.gguf")
        assert open_source(tmp_path / "x.gguf", choice=Selection(gguf="blocks")).tensors[0].dtype.name == "uint8"


class TestBlocks:
    def test_the_same_file_is_written_again(self, tmp_path: Path, every: Path) -> None:
        store = modelstore.open(tmp_path / "store")
        saved = store.save("m", every, gguf="blocks")
        assert saved.left_out == ()
        exported = store.export("m", tmp_path / "again.gguf", format="gguf")
        assert exported.bytes == every.stat().st_size
        assert (tmp_path / "again.gguf").read_bytes() == every.read_bytes()
        with pytest.raises(ValueError, match="leave gguf_type out"):
            store.export("m", tmp_path / "other.gguf", format="gguf", gguf_type="F16")

    def test_blocks_are_bytes_of_each_row(self, every: Path) -> None:
        source = open_source(every, choice=Selection(gguf="blocks"))
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(every).tensors}
        for spec in source.tensors:
            assert read(source, spec.name).tobytes() == tensors[spec.name].data.tobytes()
        assert {spec.name: spec.shape for spec in source.tensors}["w.Q4_0"] == (7, 288)

    def test_a_name_of_any_kind_is_known_by_its_content(self, tmp_path: Path, every: Path) -> None:
        (tmp_path / "model").write_bytes(every.read_bytes())
        assert len(open_source(tmp_path / "model").tensors) == len(open_source(every).tensors)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


class TestHostile:
    @pytest.mark.parametrize(
        "data",
        [
            b"GGUF",
            head(1 << 60, 0),
            head(0, 1 << 60),
            head(0, 1, version=1),
            b"GGUF\0\0\0\3" + bytes(16),
            head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60),
            head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62),
            head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1),
            head(0, 1) + text(b"k") + struct.pack("<I", 99) + bytes(8),
            head(0, 1) + struct.pack("<Q", 1 << 62) + b"k",
            head(0, 2) + entry(b"k", 4, bytes(4)) * 2,
            head(0, 1) + entry(b"general.alignment", 4, bytes(4)),
            head(0, 1) + entry(b"general.alignment", 8, text(b"32")),
            head(0, 1) + entry(b"split.count", 2, b"\3\0"),
            head(1, 0) + info(b"w", (1 << 40,), 0, 0),
            head(1, 0) + info(b"w", (1 << 62, 1 << 62), 0, 0),
            head(1, 0) + info(b"w", (1,) * 9, 0, 0),
            head(1, 0) + info(b"w", (33,), 2, 0),
            head(1, 0) + info(b"w", (4,), 999, 0),
            head(1, 0) + info(b"w", (4,), 0, 1 << 63),
            head(1, 0) + info(b"w", (4,), 0, 8),
            head(1, 0) + info(b"a\nb", (4,), 0, 0),
            head(2, 0) + info(b"w", (4,), 0, 0) * 2,
            head(2, 0) + info(b"w", (16,), 0, 0) + info(b"v", (16,), 0, 32),
        ],
        ids=range(24),
    )
    def test_headers_that_are_not_valid(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x.gguf").write_bytes(data.ljust(512, b"\0"))
        with at_most(4 * MIB), pytest.raises((FormatError, UnsupportedError)):
            open_gguf(tmp_path / "x.gguf")

    def test_no_changed_byte_makes_it_fail_otherwise(self, tmp_path: Path) -> None:
        whole = llama(tmp_path / "x.gguf").read_bytes()
        length = parse_header(lambda start, n: whole[start : start + n], len(whole)).length
        rng = np.random.default_rng(0)
        for i in range(300):
            changed = bytearray(whole)
            for at in rng.integers(0, length, 1 + i % 3):
                changed[at] = int(rng.integers(0, 256))
            stop = len(changed) if i % 4 else int(rng.integers(0, len(changed)))
            (tmp_path / "y.gguf").write_bytes(changed[:stop])
            try:
                source = open_gguf(tmp_path / "y.gguf", blocks=bool(i % 2))
                for spec in source.tensors:
                    read(source, spec.name)
                source.close()
            except ModelStoreError:
                pass
