"""Checkpoints that are quantized already, compressed from their dequantized values."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import UnsupportedError

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LAYER = "model.layers.0."


def config(**quantization: Any) -> bytes:
    return json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantization}).encode()


def fp8_layer(
    rows: int, columns: int, scales: tuple[int, ...], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, columns, generator=generator) * 50).to(FP8)
    scale = torch.rand(scales, generator=generator) * 0.01 + 0.001
    spread = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(rows, 1) if scale.numel() == rows else scale
    if spread.shape == (-(-rows // 128), -(-columns // 128)):
        spread = spread.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return codes, scale, (codes.float() * spread).bfloat16()


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected.double()).pow(2).sum()
    return 10 * math.log10(expected.double().pow(2).sum() / noise)


@pytest.fixture
def store() -> ms.Store:
    return ms.open(f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("weight_scale_inv", (3, 2)),
        ("weight_scale", (300, 1)),
        ("weight_scale", (300,)),
        ("weight_scale", ()),
        ("weight_scale", (1,)),
    ],
)
def test_float8(store: ms.Store, name: str, scales: tuple[int, ...]) -> None:
    codes, scale, weight = fp8_layer(300, 256, scales)
    norm, head = torch.rand(256).bfloat16(), torch.randn(64, 256).bfloat16()
    layer = f"{LAYER}mlp.up_proj."
    tensors = {
        f"{layer}weight": codes,
        f"{layer}{name}": scale,
        f"{layer}input_scale": torch.ones(1),
        "model.norm.weight": norm,
        "lm_head.weight": head,
    }
    store.save("m", tensors, files={"config.json": config(**BLOCKS), "README.md": b"text"})
    plan = store.plan_compression("m", "int4-g32", requantize=True)
    assert plan.requantized == "fp8"
    assert [choice.name for choice in plan.choices] == [f"{layer}weight", "model.norm.weight", "lm_head.weight"]
    assert plan.choices[0].reason == "made of its fp8 values"
    assert (plan.choices[0].dtype, plan.choices[0].shape) == ("bfloat16", (300, 256))
    done = store.compress("m", "int4-g32", requantize=True)
    found = store.load("m:int4-g32")
    assert list(found) == [f"{layer}weight", "model.norm.weight", "lm_head.weight"]
    assert torch.equal(found["model.norm.weight"], norm)
    assert torch.equal(found["lm_head.weight"], head)
    store.save("dense", {f"{layer}weight": weight, "model.norm.weight": norm, "lm_head.weight": head})
    store.compress("dense", "int4-g32")
    assert torch.equal(found[f"{layer}weight"], store.load("dense:int4-g32")[f"{layer}weight"])
    assert sqnr(found[f"{layer}weight"], weight) > 15
    assert done.metrics["int4-g32"]["sqnr"] == pytest.approx(sqnr(found[f"{layer}weight"], weight), abs=0.02)
    said = json.loads(store.file("m:int4-g32", "config.json"))
    assert said == {"model_type": "llama", "dtype": "bfloat16"}
    assert store.file("m:int4-g32", "README.md") == b"text"
    assert json.loads(store.file("m", "config.json"))["quantization_config"] == BLOCKS
    whole = store.load("m")
    assert all(
        torch.equal(whole[one].view(torch.uint8), tensor.view(torch.uint8))
        for one, tensor in tensors.items()
        if tensor.dim()
    )
    assert not store.verify("m", deep=True).problems
    assert store.compress("m", "int4-g32", requantize=True).stored == 0


def test_mxfp4_is_what_transformers_makes_of_it(store: ms.Store) -> None:
    loaded = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 96, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 96, 3), generator=generator, dtype=torch.uint8)
    expected = loaded.convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{experts}_blocks": blocks,
        f"{experts}_scales": scales,
        f"{experts}_bias": torch.randn(2, 96).bfloat16(),
    }
    store.save("m", tensors, files={"config.json": config(quant_method="mxfp4")})
    assert store.plan_compression("m", "int3", requantize=True).requantized == "mxfp4"
    store.compress("m", "int3", requantize=True)
    found = store.load("m:int3")
    assert list(found) == [experts, f"{experts}_bias"]
    assert torch.equal(found[f"{experts}_bias"], tensors[f"{experts}_bias"])
    store.save("dense", {experts: expected})
    store.compress("dense", "int3")
    assert torch.equal(found[experts], store.load("dense:int3")[experts])
    with pytest.raises(ValueError, match="choose a recipe of fewer bits"):
        store.plan_compression("m", "int8", requantize=True)


def test_what_does_not_become_smaller_is_refused(store: ms.Store) -> None:
    codes, scale, _ = fp8_layer(256, 256, (2, 2))
    store.save("m", {"a.weight": codes, "a.weight_scale_inv": scale}, files={"config.json": config(**BLOCKS)})
    with pytest.raises(
        ValueError, match=r"'a.weight' has \d+ bytes as it is stored now, quantized by fp8, and would have \d+"
    ):
        store.plan_compression("m", "half", include=["a.weight"], requantize=True)
    with pytest.raises(ValueError, match=r"would be kept as floats \(the recipe keeps it\)"):
        store.plan_compression("m", "int4", skip=["a.weight"], requantize=True)
    with pytest.raises(ValueError, match="a ladder stores the original itself again"):
        store.compress("m", "ladder", requantize=True)


OTHERS: dict[str, dict[str, torch.Tensor]] = {
    "gptq": {
        "a.qweight": torch.ones(8, 64, dtype=torch.int32),
        "a.qzeros": torch.ones(1, 8, dtype=torch.int32),
        "a.scales": torch.ones(1, 64).half(),
    },
    "bitsandbytes": {"a.weight": torch.ones(64, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2)},
    "compressed-tensors": {
        "a.weight_packed": torch.ones(64, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 2).bfloat16(),
    },
    "blocks of another size": {"a.weight": torch.ones(256, 256).to(FP8), "a.weight_scale_inv": torch.ones(3, 2)},
    "stacks": {"a.weight": torch.ones(2, 128, 128).to(FP8), "a.weight_scale_inv": torch.ones(2, 1, 1)},
    "names of its own": {
        "a.weight": torch.ones(256, 256).to(FP8),
        "a.weight_scale_inv": torch.ones(2, 2),
        "c.weight": torch.ones(256, 256).to(FP8),
        "c.scale": torch.ones(2, 2),
    },
    "torchao": {"a.weight:qdata": torch.ones(64, 64, dtype=torch.int8), "a.weight:scale": torch.ones(64)},
    "nothing": {"a.weight": torch.ones(64, 64)},
}


@pytest.mark.parametrize("by", OTHERS)
def test_what_cannot_be_computed_is_refused(store: ms.Store, by: str) -> None:
    store.save("m", OTHERS[by] | {"b.weight": torch.ones(64, 64)}, files={"config.json": config(quant_method=by)})
    for call in (store.plan_compression, store.compress):
        with pytest.raises(
            UnsupportedError, match=f"quantized by {by}, and .* dequantize it with the tool that made it"
        ):
            call("m", "int4", requantize=True)
    assert list(store.versions("m")[0].variants) == ["original"]


def test_what_is_not_quantized(store: ms.Store) -> None:
    store.save("m", {"a.weight": torch.ones(64, 64)}, files={"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(UnsupportedError, match="is not quantized, and is compressed as it is: leave out requantize"):
        store.compress("m", "int4", requantize=True)


def test_a_tensor_that_is_there_twice(store: ms.Store) -> None:
    experts = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{experts}_blocks": torch.zeros(1, 32, 1, 16, dtype=torch.uint8),
        f"{experts}_scales": torch.zeros(1, 32, 1, dtype=torch.uint8),
        experts: torch.zeros(1, 32, 32),
    }
    store.save("m", tensors, files={"config.json": config(quant_method="mxfp4")})
    with pytest.raises(UnsupportedError, match="both quantized and not"):
        store.plan_compression("m", "int3", requantize=True)


def test_without_a_config(store: ms.Store, tmp_path: Path) -> None:
    codes, scale, weight = fp8_layer(256, 512, (2, 4))
    store.save("m", {"a.weight": codes, "a.weight_scale_inv": scale})
    assert store.plan_compression("m", "int4", requantize=True).requantized == "another tool"
    store.compress("m", "int4", requantize=True)
    store.export("m:int4", tmp_path / "out.safetensors", format="safetensors")
    assert sqnr(store.load("m:int4")["a.weight"], weight) > 15
