"""Packed exports of small models of several kinds: transformers computes from them what it does from the dense export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import UnsupportedError
from tests.compress.engine_models import (
    DENSE_EXPERTS,
    FORMATS,
    MIXTURES,
    SWEPT,
    logits,
    quantization,
    recipe,
    saved,
    size,
)

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    """The models that are swept, saved."""
    path = tmp_path_factory.mktemp("models")
    store = ms.open(path / "store", memory="64MiB", threads=1)
    for name in SWEPT:
        saved(store, name, path)
    return store


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", SWEPT)
def test_packed_is_as_dense(store: ms.Store, tmp_path: Path, model: str, format: str) -> None:
    ref = f"{model}:{format}"
    if format not in store.versions(model)[-1].variants:
        store.compress(model, recipe(FORMATS[format]), variant=format)
    options: dict[str, Any] = {"activations": "int8"} if format == "W8A8" else {}
    store.export(ref, tmp_path / "packed", **options)
    store.export(ref, tmp_path / "dense", dequantize=True)
    packed, dense = logits(tmp_path / "packed", model), logits(tmp_path / "dense", model)
    assert (packed - dense).norm() < 0.03 * dense.norm()
    assert size(tmp_path / "packed") < 0.96 * size(tmp_path / "dense")
    experts = any(".experts." in name for name in quantization(tmp_path / "packed")["ignore"])
    assert experts == (model in MIXTURES and format in DENSE_EXPERTS)
    assert format == "W8A8" or torch.equal(packed, dense)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_floats_of_four_bits_are_unpacked_to_bfloat16(store: ms.Store, tmp_path: Path, format: str) -> None:
    wide = {name: tensor.float() for name, tensor in store.load("llama").items()}
    name = f"wide-{format}"
    store.save(name, wide, files={"config.json": b"".join(store.cat("llama", "config.json"))})
    store.compress(name, recipe(FORMATS[format]), variant="v")
    if format == "nvfp4":
        with pytest.raises(UnsupportedError, match=r"is float32, and compressed-tensors unpacks .* to bfloat16 only"):
            store.export(f"{name}:v", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    store.export(f"{name}:v", tmp_path / "out")
    store.export(f"{name}:v", tmp_path / "dense", dequantize=True)
    assert quantization(tmp_path / "out").get("dequantize", False) == (format == "mxfp4")
    found = logits(tmp_path / "out", "llama", torch.float32)
    assert torch.equal(found, logits(tmp_path / "dense", "llama", torch.float32))


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "nobody-knows"}, "does not know"),
        ({"architectures": ["NobodyForCausalLM"]}, "cannot build"),
        ({"architectures": ["pipeline"]}, "cannot build"),
        ({"num_hidden_layers": 10**12}, "correct config.json"),
        ({"num_hidden_layers": 120_000}, "more than 8[0-9]{3} modules"),
        ({"hidden_size": "wide"}, "cannot build"),
        ({"hidden_size": 64}, "correct config.json"),
    ],
)
def test_configs_of_no_model(store: ms.Store, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads(b"".join(store.cat("llama", "config.json"))) | change
    other = ms.open(tmp_path / "store")
    other.save("m", store.load("llama"), files={"config.json": json.dumps(config).encode()})
    other.compress("m", recipe(FORMATS["int4"]), variant="v")
    with pytest.raises(UnsupportedError, match=said) as caught:
        other.export("m:v", tmp_path / "out")
    assert "dequantize=True" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_transformers_splits(store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    halves = WeightConverter(["mlp.both.weight"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [halves])
    store.compress("llama", recipe(FORMATS["int4"]), variant="split")
    with pytest.raises(UnsupportedError, match=r"makes several weights of tensors such as 'mlp\.both\.weight'"):
        store.export("llama:split", tmp_path / "out")


def test_without_transformers(store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("tied", "mixtral"):
        store.compress(model, recipe(FORMATS["int4"]), variant="alone")
    store.export("tied:alone", tmp_path / "with")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    store.export("tied:alone", tmp_path / "without")
    assert quantization(tmp_path / "without") == quantization(tmp_path / "with")
    with pytest.raises(UnsupportedError, match=r"known to transformers 5, which is not installed"):
        store.export("mixtral:alone", tmp_path / "out")


def test_what_is_dense_is_said(store: ms.Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.compress("gpt-oss", recipe(FORMATS["int4"]), variant="said")
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.export("gpt-oss:said", tmp_path / "out")
    assert "is exported dense: it" in caplog.text
