"""A real language model, compressed and exported to the engines that run it.

`MODELSTORE_TEST_MODELS` names a folder of models in Hugging Face layout; those of Llama's architecture are exported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import modelstore as ms
from tests.helpers.llama_cpp import llama_cpp

TEXT = "The capital of France is Paris, and in 2024 it's about 12,345 people's   home.\n\tHello!  été"


def found() -> list[Path]:
    """Folders of Llamas with a tokenizer."""
    root = os.environ.get("MODELSTORE_TEST_MODELS")
    folders = sorted(Path(root).iterdir()) if root else []
    return [
        folder
        for folder in folders
        if (folder / "tokenizer.json").exists()
        and "LlamaForCausalLM" in json.loads((folder / "config.json").read_text()).get("architectures", [])
    ]


MODELS = found()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODELS, reason="no real Llama is on this machine")]


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    store = ms.open(tmp_path_factory.mktemp("store"), memory="512MiB")
    store.save("org/model", folder)
    return store


def logits(folder: Path, dtype: torch.dtype, tokens: list[int]) -> torch.Tensor:
    """What transformers computes."""
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        made: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(
            torch.tensor([tokens])
        ).logits[0]
    return made


def encoded(folder: Path) -> list[int]:
    """The text in the model's tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    ids: list[int] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    return ids


@pytest.mark.parametrize("preset", ["int4-g32", "fp8"])
def test_transformers_computes_the_same_from_packed_weights(
    folder: Path, store: ms.Store, tmp_path: Path, preset: str
) -> None:
    pytest.importorskip("compressed_tensors")
    store.compress("org/model", preset)
    store.export(f"org/model:{preset}", tmp_path / "packed")
    store.export(f"org/model:{preset}", tmp_path / "dense", dequantize=True)
    tokens = encoded(folder)
    packed = logits(tmp_path / "packed", torch.bfloat16, tokens)
    assert torch.equal(packed, logits(tmp_path / "dense", torch.bfloat16, tokens))
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("packed", "dense")
    ]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize(("kind", "most"), [("F16", 0.005), ("BF16", 0.02), ("Q8_0", 0.15)])
def test_llama_cpp_runs_it(folder: Path, store: ms.Store, tmp_path: Path, kind: str, most: float) -> None:
    out = tmp_path / "model.gguf"
    store.export("org/model", out, format="gguf", gguf_type=kind)
    tokens = encoded(folder)
    at = (0, len(tokens) // 2, len(tokens) - 1)  # each answer is a list of the whole vocabulary
    expected = logits(folder, torch.float32, tokens).double().log_softmax(-1).numpy()[list(at)]
    with llama_cpp(out) as model:
        assert model.tokenize(TEXT) == tokens
        found = model.log_probabilities(tokens, expected.shape[-1], at)
        assert "Paris" in model.says("The capital of France is", 4)
    # Weights in the type asked for, keys and values in float16; Q8_0 rounds activations to 8 bits too.
    assert np.linalg.norm(found - expected) < most * np.linalg.norm(expected - expected.mean(-1, keepdims=True))


def test_a_compressed_variant_becomes_a_gguf(store: ms.Store, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    store.compress("org/model", "int8")
    store.export("org/model:int8", tmp_path / "m.gguf", format="gguf", gguf_type="F32")
    values = store.load("org/model:int8")["model.layers.0.mlp.down_proj.weight"].float().numpy()
    (found,) = (t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    np.testing.assert_array_equal(found.data, values)
