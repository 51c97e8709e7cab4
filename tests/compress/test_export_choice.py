"""What is packed and how config.json says so: layers that are unpacked while they are loaded, experts, int8 activations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import UnsupportedError
from tests.compress.engine_models import FORMATS, logits, quantization, recipe, saved, size

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    """The models of these tests, saved."""
    path = tmp_path_factory.mktemp("models")
    store = ms.open(path / "store", memory="64MiB", threads=1)
    for name in ("llama", "bert", "mixtral", "gpt-oss", "modernbert", "ctrl", "roberta"):
        saved(store, name, path)
    return store


# ---------------------------------------------------------------------- what has to be unpacked while it is loaded


@pytest.mark.parametrize("format", ["int4", "fp8", "nvfp4"])
def test_layers_that_transformers_looks_at(store: ms.Store, tmp_path: Path, format: str) -> None:
    """It initializes them while they have no weight yet, unless that is unpacked before."""
    variant = f"looked-{format}"
    store.compress("modernbert", recipe(FORMATS[format]), variant=variant)
    store.export(f"modernbert:{variant}", tmp_path / "packed")
    store.export(f"modernbert:{variant}", tmp_path / "dense", dequantize=True)
    said = quantization(tmp_path / "packed")
    assert said.get("dequantize", False) == (format != "fp8")  # whose layers have a weight
    assert "model.layers.0.mlp.Wi" not in said["ignore"]
    assert torch.equal(logits(tmp_path / "packed", "modernbert"), logits(tmp_path / "dense", "modernbert"))


def test_layers_that_transformers_looks_at_of_two_schemes(store: ms.Store, tmp_path: Path) -> None:
    """All weights are unpacked by one scheme while they are loaded: with two those layers are dense."""
    rules = [*recipe(FORMATS["fp8"], ("*attn*",))["rules"], *recipe(FORMATS["int4"])["rules"]]
    store.compress("modernbert", {"name": "v", "rules": rules}, variant="two")
    store.export("modernbert:two", tmp_path / "packed")
    store.export("modernbert:two", tmp_path / "dense", dequantize=True)
    said = quantization(tmp_path / "packed")
    assert "model.layers.0.mlp.Wi" in said["ignore"]
    assert "dequantize" not in said
    assert torch.equal(logits(tmp_path / "packed", "modernbert"), logits(tmp_path / "dense", "modernbert"))


@pytest.mark.parametrize(
    ("kind", "right", "refused"),
    [("DeformableDetr", "fp8", "int4"), ("Detr", "int4", None), ("Detr", "int4-affine", None)],
)
def test_weights_that_are_not_unpacked_while_they_are_loaded(
    tmp_path: Path, kind: str, right: str, refused: str | None
) -> None:
    """Frozen norms have a buffer called `weight`, which transformers does not load then: zero points are left out."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**sizes, out_features=["stage4"])
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    config = getattr(transformers, f"{kind}Config")
    made = getattr(transformers, f"{kind}ForObjectDetection")
    torch.manual_seed(0)
    model = made(config(backbone_config=backbone, d_model=64, num_queries=8, **layers))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    store = ms.open(tmp_path / "store", threads=1)
    store.save("m", tmp_path / "m")
    store.compress("m", recipe(FORMATS[right]), variant=right)
    store.export(f"m:{right}", tmp_path / "packed")
    store.export(f"m:{right}", tmp_path / "dense", dequantize=True)
    pixels = torch.randn(1, 3, 64, 64).bfloat16()
    with torch.no_grad():
        packed, dense = (
            made.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()(pixels).logits
            for name in ("packed", "dense")
        )
    assert torch.equal(packed, dense)
    assert size(tmp_path / "packed") < 0.95 * size(tmp_path / "dense")
    assert "dequantize" not in quantization(tmp_path / "packed")
    if refused:
        store.compress("m", recipe(FORMATS[refused]), variant=refused)
        with pytest.raises(UnsupportedError, match="is looked at by transformers before it is unpacked"):
            store.export(f"m:{refused}", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- experts


def test_experts_beside_other_schemes(store: ms.Store, tmp_path: Path) -> None:
    """transformers takes the experts' scheme for the first that config.json has."""
    rules = [
        *recipe(FORMATS["nvfp4"], ("*self_attn*",))["rules"],
        *recipe(FORMATS["int4"])["rules"],
    ]
    store.compress("mixtral", {"name": "v", "rules": rules}, variant="two")
    store.export("mixtral:two", tmp_path / "packed")
    store.export("mixtral:two", tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(tmp_path / "packed", "mixtral"), logits(tmp_path / "dense", "mixtral"))


@pytest.mark.parametrize("name", ["attention", "some weights", "two schemes", "zero points of 8 bits"])
def test_experts_are_dense_beside_packed_weights(
    store: ms.Store, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes those of a model packed if all are so, and in one way; what is dense is said, with its size."""
    attention, affine8 = recipe(FORMATS["int4"], ("*self_attn*",)), {"bits": 8, "group_size": 32, "symmetric": False}
    rules = {
        "attention": attention["rules"],
        "some weights": recipe(FORMATS["int4"], ("*self_attn*", "*w1*", "*w3*"))["rules"],
        "two schemes": [*recipe(FORMATS["int8"], ("*experts.0*",))["rules"], *recipe(FORMATS["int4"])["rules"]],
        "zero points of 8 bits": recipe({"name": "int", "params": affine8})["rules"],
    }
    variant = name.replace(" ", "-")
    store.compress("mixtral", {"name": "v", "rules": rules[name]}, variant=variant)
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.export(f"mixtral:{variant}", tmp_path / "packed")
    store.export(f"mixtral:{variant}", tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(tmp_path / "packed", "mixtral"), logits(tmp_path / "dense", "mixtral"))
    assert size(tmp_path / "packed") < size(tmp_path / "dense")
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in quantization(tmp_path / "packed")["ignore"]
    assert (" bytes of 1,050,368)" in caplog.text) == (name != "attention")  # whose experts were not compressed


def test_experts_alone_that_are_dense(store: ms.Store, tmp_path: Path) -> None:
    store.compress("mixtral", recipe(FORMATS["int4"], ("*experts.[01].*",)), variant="alone")
    with pytest.raises(UnsupportedError, match="packed if all are so"):
        store.export("mixtral:alone", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_experts_beside_float8(store: ms.Store, tmp_path: Path) -> None:
    store.compress("mixtral", recipe(FORMATS["fp8"], ("*self_attn*",)), variant="attention8")
    store.export("mixtral:attention8", tmp_path / "packed")
    store.export("mixtral:attention8", tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(tmp_path / "packed", "mixtral"), logits(tmp_path / "dense", "mixtral"))


def test_stacks_are_named_as_not_quantized(store: ms.Store, tmp_path: Path) -> None:
    store.compress("gpt-oss", recipe(FORMATS["int4"]), variant="stack")
    store.export("gpt-oss:stack", tmp_path / "out")
    assert "model.layers.0.mlp.experts" in quantization(tmp_path / "out")["ignore"]


# ---------------------------------------------------------------------- what transformers does to dtypes


def test_scales_that_transformers_keeps_in_float32(
    store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern such as "scale" means them too, and the weights would be unpacked to float32 where they run."""
    store.compress("llama", recipe(FORMATS["int4"]), variant="kept")
    store.export("llama:kept", tmp_path / "dense", dequantize=True)
    for at, (pattern, early) in enumerate([("q_proj.weight_scale", True), ("k_proj", False)]):
        monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", [pattern])
        store.export("llama:kept", tmp_path / str(at))
        assert quantization(tmp_path / str(at)).get("dequantize", False) == early
        if early:  # the other is multiplied in float32 as its dense weight would be, which this class does not do
            assert torch.equal(logits(tmp_path / str(at), "llama"), logits(tmp_path / "dense", "llama"))


def test_a_model_that_casts_its_buffers(store: ms.Store, tmp_path: Path) -> None:
    store.compress("ctrl", recipe(FORMATS["int4"]), variant="v")
    store.export("ctrl:v", tmp_path / "packed")
    store.export("ctrl:v", tmp_path / "dense", dequantize=True)
    assert quantization(tmp_path / "packed")["dequantize"] is True
    assert torch.equal(logits(tmp_path / "packed", "ctrl"), logits(tmp_path / "dense", "ctrl"))
    rules = [*recipe(FORMATS["int8"], ("*Wq*",))["rules"], *recipe(FORMATS["int4"])["rules"]]
    store.compress("ctrl", {"name": "v", "rules": rules}, variant="two")
    store.export("ctrl:two", tmp_path / "packed2")
    store.export("ctrl:two", tmp_path / "dense2", dequantize=True)
    assert "transformer.h.0.multi_head_attention.Wq" in quantization(tmp_path / "packed2")["ignore"]
    assert torch.equal(logits(tmp_path / "packed2", "ctrl"), logits(tmp_path / "dense2", "ctrl"))


def test_zero_points_of_few_rows(store: ms.Store, tmp_path: Path) -> None:
    """compressed-tensors does not unpack those that fill one word."""
    store.compress("roberta", recipe(FORMATS["int4-affine"]), variant="v")
    store.export("roberta:v", tmp_path / "packed")
    store.export("roberta:v", tmp_path / "dense", dequantize=True)
    ignored = quantization(tmp_path / "packed")["ignore"]
    assert "classifier.out_proj" in ignored
    assert "classifier.dense" not in ignored
    assert torch.equal(logits(tmp_path / "packed", "roberta"), logits(tmp_path / "dense", "roberta"))


# ---------------------------------------------------------------------- int8 activations


def test_experts_beside_int8_activations(store: ms.Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers takes experts of pack-quantized apart, and none of int-quantized."""
    store.compress("mixtral", recipe(FORMATS["int8"]), variant="beside")
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.export("mixtral:beside", tmp_path / "out", activations="int8")
    assert "12 weights such as" in caplog.text
    experts, others = quantization(tmp_path / "out")["config_groups"].values()
    assert (experts["format"], experts["input_activations"]) == ("pack-quantized", None)
    assert others["format"] == "int-quantized"
    assert others["input_activations"]["num_bits"] == 8
    assert "model.layers.0.self_attn.q_proj" in others["targets"]


def test_int8_activations_are_described(store: ms.Store, tmp_path: Path) -> None:
    if "int8" not in store.versions("llama")[-1].variants:
        store.compress("llama", recipe(FORMATS["int8"]), variant="int8")
    store.export("llama:int8", tmp_path / "out", activations="int8")
    said = quantization(tmp_path / "out")
    (group,) = said["config_groups"].values()
    assert said["format"] == group["format"] == "int-quantized"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    store.export("llama:int8", tmp_path / "weights")
    (group,) = quantization(tmp_path / "weights")["config_groups"].values()
    assert (group["format"], group["input_activations"]) == ("pack-quantized", None)


@pytest.mark.parametrize("preset", ["int4-rtn", "fp8", "ladder", "nf4"])
def test_int8_activations_want_int8_weights(store: ms.Store, tmp_path: Path, preset: str) -> None:
    store.save(
        f"llama-{preset}", store.load("llama"), files={"config.json": b"".join(store.cat("llama", "config.json"))}
    )
    store.compress(f"llama-{preset}", preset)
    ref = f"llama-{preset}:{'int8' if preset == 'ladder' else preset}"
    with pytest.raises(UnsupportedError, match="weights of 8 bits, symmetric, with a scale a channel"):
        store.export(ref, tmp_path / "out", activations="int8")
    assert not (tmp_path / "out").exists()


def test_int8_activations_of_an_original(store: ms.Store, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing is compressed"):
        store.export("bert", tmp_path / "out", activations="int8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activations": "int8", "dequantize": True}, "leave one of the two out"),
        ({"activations": "int8", "format": "safetensors"}, "leave one of the two out"),
        ({"activations": "int4"}, "one of 'int8'"),
    ],
)
def test_what_activations_do_not_go_with(store: ms.Store, tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        store.export("llama:int8", tmp_path / "out.safetensors", **options)
