"""Checkpoints that another tool has quantized: recognised, and kept exactly."""

from __future__ import annotations

import json
import uuid

import pytest
import torch

import modelstore as ms
from modelstore.architecture.quantized import method

LAYER = "model.layers.0.mlp.down_proj"


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


CHECKPOINTS = {
    "fp8": {
        f"{LAYER}.weight": codes(torch.float8_e4m3fn, 64, 64),
        f"{LAYER}.weight_scale_inv": codes(torch.float32, 1, 1),
    },
    "mxfp4": {
        "model.layers.0.mlp.experts.down_proj_blocks": codes(torch.uint8, 4, 64, 2, 16),
        "model.layers.0.mlp.experts.down_proj_scales": codes(torch.uint8, 4, 64, 2),
        "model.layers.0.mlp.experts.down_proj_bias": codes(torch.bfloat16, 4, 64),
    },
    "gptq": {
        f"{LAYER}.qweight": codes(torch.int32, 8, 64),
        f"{LAYER}.qzeros": codes(torch.int32, 1, 8),
        f"{LAYER}.scales": codes(torch.float16, 1, 64),
        f"{LAYER}.g_idx": codes(torch.int32, 64),
    },
    "bitsandbytes": {
        f"{LAYER}.weight": codes(torch.uint8, 2048, 1),
        f"{LAYER}.weight.absmax": codes(torch.float32, 64),
        f"{LAYER}.weight.quant_map": codes(torch.float32, 16),
        f"{LAYER}.weight.quant_state.bitsandbytes__nf4": codes(torch.uint8, 90),
    },
    "compressed-tensors": {
        f"{LAYER}.weight_packed": codes(torch.int32, 64, 8),
        f"{LAYER}.weight_scale": codes(torch.bfloat16, 64, 2),
        f"{LAYER}.weight_shape": codes(torch.int64, 2),
    },
}
BESIDE = {
    "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64).bfloat16(),
    "lm_head.weight": torch.randn(64, 64),
}


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("by", CHECKPOINTS)
def test_a_checkpoint_that_is_quantized_is_kept(by: str, said: bool) -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    tensors = {**CHECKPOINTS[by], **BESIDE}
    files = {"config.json": json.dumps({"quantization_config": {"quant_method": by}}).encode()} if said else {}
    store.save("m", tensors, files=files)
    for preset in ("int8", "int4", "half", "ladder"):
        with pytest.raises(ValueError, match=f"quantized already, by {by if said else 'another tool'}"):
            store.plan_compression("m", preset)
    plan = store.plan_compression("m", "int8", include=["model.layers.0.self_attn.q_proj.weight"])
    assert [choice.name for choice in plan.compressed] == ["model.layers.0.self_attn.q_proj.weight"]
    kinds = {choice.name: choice.kind for choice in plan.choices}
    assert {kinds[name] for name in CHECKPOINTS[by]} <= {"quantized", "bias"}
    assert {kinds[name] for name in BESIDE} == {"linear", "head"}


def test_a_scale_beside_wide_numbers_is_no_quantization() -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    store.save("m", {"a.weight": torch.randn(64, 64), "a.weight_scale": torch.ones(64, 1)})
    assert [choice.name for choice in store.plan_compression("m", "int8").compressed] == ["a.weight"]


def test_numbers_of_one_byte_do_not_shrink_to_eight_bits() -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    store.save("m", {"a.weight": codes(torch.float8_e4m3fn, 64, 256), "b.weight": torch.randn(64, 256)})
    plan = store.plan_compression("m", "int8")
    assert {c.name: c.reason for c in plan.choices if c.codec is None} == {"a.weight": "it would not shrink"}


def test_what_is_unknown_is_compressed_where_it_is_named() -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    store.save("m", {"w": torch.randn(64, 64), "blocks.0.A_log": torch.randn(64, 16)})
    with pytest.raises(ValueError, match=r"nothing is known of tensors such as 'w'.*include=\['w'\]"):
        store.plan_compression("m", "int8")
    assert [choice.name for choice in store.plan_compression("m", "int8", include=["w"]).compressed] == ["w"]


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": []}, {"quantization_config": {}}]
)
def test_a_config_that_speaks_of_no_method(config: dict[str, object]) -> None:
    assert method(config) is None
    assert method({"text_config": config}) is None


def test_a_method_without_a_name() -> None:
    assert method({"text_config": {"quantization_config": {"bits": 4}}}) == "a method without a name"
