"""GGUF: the blocks of ggml byte for byte, files that the gguf package reads back, and that llama.cpp computes the same with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import modelstore as ms
from modelstore.errors import ConflictError, ModelStoreError, UnsupportedError
from modelstore.execute.export import write as export_write
from modelstore.integrations.gguf.export import export_gguf
from modelstore.integrations.gguf.model import rows_in_order
from modelstore.integrations.gguf.quants import TYPES, quantize
from modelstore.integrations.gguf.rules import rule
from tests.helpers.llama_cpp import llama_cpp
from tests.integrations.models import (
    CONFIG,
    HIDDEN,
    KV_HEADS,
    SETTINGS,
    TEXT,
    VOCABULARY,
    WIDTH,
    byte_level,
    pieces,
    weights,
)

gguf = pytest.importorskip("gguf")


def folder(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], **files: str) -> Path:
    """A model in Hugging Face layout."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


def exported(tmp_path: Path, source: Path, kind: str | None = None, **options: Any) -> Path:
    """The GGUF file of a model."""
    store = ms.open(tmp_path / "store", memory="64MiB")
    store.save("org/m", source)
    out = tmp_path / "m.gguf"
    store.export("org/m", out, format="gguf", gguf_type=kind, **options)
    return out


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """A file's metadata and its tensors, their types and values, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = (tensor.tensor_type.name, values.reshape(shape))
    return fields, tensors


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-30, 1e-7, 0.02, 1.0, 3e4]), st.integers(1, 40))
def test_blocks_are_those_of_the_gguf_package(kind: str, seed: int, size: float, blocks: int) -> None:
    random = np.random.default_rng(seed)
    numbers = (random.standard_normal(32 * blocks) * size).astype(np.float32)
    numbers[: 32 * (blocks // 4)] = 0
    numbers[32 * (blocks // 2) :] = np.round(numbers[32 * (blocks // 2) :] / np.float32(size) * 2) * np.float32(size)
    numbers += np.float32(0)  # without negative zeros, whose place as a minimum is left to chance
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(numbers.reshape(blocks, 32), gguf.GGMLQuantizationType[kind])
    assert quantize(numbers, kind).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_what_is_not_finite_counts_as_zero(kind: str) -> None:
    numbers = np.linspace(-1, 1, 64).astype(np.float32)
    strange, clean = numbers.copy(), numbers.copy()
    strange[[3, 40, 41]] = np.nan, np.inf, -np.inf
    clean[[3, 40, 41]] = 0
    assert quantize(strange, kind).tobytes() == quantize(clean, kind).tobytes()


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_value_is_there_in_llamas_order(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype)
    fields, found = read(exported(tmp_path, folder(tmp_path / "in", tensors, CONFIG), "F32"))
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == KV_HEADS
    assert fields["llama.rope.dimension_count"] == WIDTH
    assert len(found) == len(tensors)
    np.testing.assert_array_equal(found["token_embd.weight"][1], tensors["model.embed_tokens.weight"].float().numpy())
    np.testing.assert_array_equal(
        found["blk.1.ffn_down.weight"][1], tensors["model.layers.1.mlp.down_proj.weight"].float()
    )
    for name, part in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        stored = tensors[f"model.layers.0.self_attn.{part}.weight"].float().numpy()
        turned = stored.reshape(-1, 2, WIDTH // 2, HIDDEN).swapaxes(1, 2).reshape(stored.shape)
        np.testing.assert_array_equal(found[f"blk.0.{name}.weight"][1], turned)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_matrices_are_of_the_type_asked_for(tmp_path: Path, kind: str) -> None:
    tensors = weights()
    fields, found = read(exported(tmp_path, folder(tmp_path / "in", tensors, CONFIG), kind))
    wide = "Q8_0" if kind.startswith("Q4") else kind
    assert {found[name][0] for name in ("token_embd.weight", "output.weight")} == {wide}
    assert found["blk.0.ffn_up.weight"][0] == kind
    assert found["blk.0.attn_norm.weight"][0] == "F32"
    assert fields["general.file_type"] == int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    source = tensors["model.layers.0.mlp.up_proj.weight"].float().numpy()
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(source, number), number)
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"][1], expected)


def test_the_default_follows_the_weights(tmp_path: Path) -> None:
    _, found = read(exported(tmp_path / "b", folder(tmp_path / "in", weights(), CONFIG)))
    assert found["blk.0.ffn_up.weight"][0] == "BF16"
    _, found = read(exported(tmp_path / "f", folder(tmp_path / "in32", weights(torch.float32), CONFIG)))
    assert found["blk.0.ffn_up.weight"][0] == "F16"


def test_a_tied_head_is_left_to_the_loader(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    _, found = read(exported(tmp_path, folder(tmp_path / "in", tensors, CONFIG | {"tie_word_embeddings": True})))
    assert "output.weight" not in found
    assert "token_embd.weight" in found


def test_rows_in_order_is_llamas_permutation() -> None:
    assert rows_in_order(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_interrupted_export_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", weights(), CONFIG)
    whole = exported(tmp_path, source, "Q8_0")
    store = ms.open(tmp_path / "store", memory="64MiB")
    put, count = export_write._Writer.put, [0]

    class Killed(BaseException):
        pass

    def die(self: Any, *rest: Any) -> None:
        count[0] += 1
        if count[0] == 9:
            raise Killed
        put(self, *rest)

    out = tmp_path / "again.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(export_write._Writer, "put", die)
        with pytest.raises(Killed):
            store.export("org/m", out, format="gguf", gguf_type="Q8_0")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name]
    store.export("org/m", out, format="gguf", gguf_type="Q8_0")
    assert out.read_bytes() == whole.read_bytes()
    with pytest.raises(ConflictError):
        store.export("org/m", out, format="gguf", gguf_type="Q8_0")
    with pytest.raises(ConflictError, match="belongs to the store"):
        store.export("org/m", tmp_path / "store/again.gguf", format="gguf", overwrite=True)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["BertModel"]}, "architecture 'BertModel'"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"vocab_size": 319}, "vocab_size 319"),
    ],
)
def test_nothing_is_written_of_a_model_that_llama_cpp_has_no_place_for(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelStoreError, match=said):
        exported(tmp_path, folder(tmp_path / "in", weights(), CONFIG | change))
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"adapter\.weight"):
        exported(tmp_path, folder(tmp_path / "in", weights() | {"adapter.weight": torch.ones(4, 4)}, CONFIG))


def test_wrong_arguments(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", folder(tmp_path / "in", weights(), CONFIG))
    with pytest.raises(ValueError, match=r"\.gguf"):
        store.export("m", tmp_path / "m.bin", format="gguf")
    with pytest.raises(ValueError, match="Q4_K"):
        store.export("m", tmp_path / "m.gguf", format="gguf", gguf_type="Q4_K")
    assert export_gguf.__doc__


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(("make", "model"), [(byte_level, "gpt2"), (pieces, "llama")])
def test_the_tokenizer_comes_along(tmp_path: Path, make: Any, model: str) -> None:
    settings = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"})
    source = folder(tmp_path / "in", weights(), CONFIG, tokenizer=make(), tokenizer_config=settings)
    fields, _ = read(exported(tmp_path, source))
    vocabulary = json.loads(make())["model"]["vocab"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == model
    assert len(tokens) == VOCABULARY
    assert all(tokens[number] == token for token, number in vocabulary.items())
    assert fields["tokenizer.ggml.bos_token_id"] == vocabulary["<s>"]
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    if model == "gpt2":
        assert fields["tokenizer.ggml.pre"] == "gpt-2"
        assert len(fields["tokenizer.ggml.merges"]) == len(json.loads(make())["model"]["merges"])


def test_a_rule_that_is_not_known_is_refused() -> None:
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "use_regex": False}
    with pytest.raises(UnsupportedError, match="rule"):
        rule({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]}})
    with pytest.raises(UnsupportedError, match="rule"):
        rule({"pre_tokenizer": {"type": "Whitespace"}})


# ---------------------------------------------------------------------- llama.cpp itself

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, ()),
    "llama-bias": ({"attention_bias": True}, ("bias", "output bias")),
    "llama3": ({"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 64}}, ()),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ()),
    "mistral": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": WIDTH}, ()),
    "qwen2": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, ("bias",)),
    "qwen2-yarn": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": _YARN}, ("bias",)),
    "yarn-factor": ({"rope_scaling": _YARN | {"attention_factor": 0.7}}, ()),
    "yarn-scales": ({"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, ()),
    "llama-biases": ({"mlp_bias": True}, ("mlp",)),
    "qwen3": ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": WIDTH}, ("norm",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    change, extra = MODELS[name]
    tensors = weights(torch.float32, extra)
    source = folder(tmp_path / "in", tensors, CONFIG | change, tokenizer=byte_level(), tokenizer_config=SETTINGS)
    tokens = [int(n) for n in np.random.default_rng(0).integers(0, VOCABULARY, 100)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([tokens])).logits[0]
    at = list(range(0, len(tokens), 7))
    expected = logits.double().log_softmax(-1).numpy()[at]
    with llama_cpp(exported(tmp_path, source, "F32")) as model:
        found = model.log_probabilities(tokens, VOCABULARY, at)
    # Keys and values are cached in float16 there.
    assert np.linalg.norm(found - expected) < 3e-3 * np.linalg.norm(expected - expected.mean(-1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("make", [byte_level, pieces])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path: Path, make: Any) -> None:
    import tokenizers

    source = folder(tmp_path / "in", weights(), CONFIG, tokenizer=make(), tokenizer_config=SETTINGS)
    tokenizer = tokenizers.Tokenizer.from_str(make())
    with llama_cpp(exported(tmp_path, source)) as model:
        for text in TEXT:
            assert model.tokenize(text) == tokenizer.encode(text).ids
