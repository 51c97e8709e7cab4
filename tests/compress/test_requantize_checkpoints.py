"""Whole checkpoints that are quantized already: what is made of them is what is made of transformers' dequantized model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelstore as ms

transformers = pytest.importorskip("transformers")

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
RECIPE = {"name": "v", "rules": [{"targets": ["linear"], "codec": {"name": "int", "params": {"bits": 3}}}]}
BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": 64}, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config)


def float8(weight: torch.Tensor, said: dict[str, Any], kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix of whole blocks; without blocks one scale, without dimensions."""
    rows, columns = weight.shape
    high, wide = said["weight_block_size"] or (rows, columns)
    shared = weight.float().reshape(rows // high, high, columns // wide, wide)
    scale = shared.abs().amax((1, 3)) / 448
    scale = scale if kind == torch.float32 else torch.exp2(scale.log2().ceil())
    codes = (shared / scale[:, None, :, None]).clamp(-448, 448).reshape(rows, columns).to(FP8)
    stored = (scale.log2() + 127).to(kind) if kind == torch.uint8 else scale.to(kind)
    return codes, stored if said["weight_block_size"] else stored.reshape(())


def in_float8(tensors: dict[str, torch.Tensor], said: dict[str, Any], kind: torch.dtype) -> dict[str, torch.Tensor]:
    """Linear layers as codes and scales."""
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            made[name], made[f"{name}_scale_inv"] = float8(tensor, said, kind)
            if said["activation_scheme"] == "static":
                made[name.replace(".weight", ".activation_scale")] = torch.tensor(1.0)
    return made


def in_mxfp4(tensors: dict[str, torch.Tensor], said: dict[str, Any], kind: torch.dtype) -> dict[str, torch.Tensor]:
    """Experts as codes and scales, at random."""
    made, random = {}, torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            made[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        shape = (experts, columns, rows // 32)
        made[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=random, dtype=kind)
        made[f"{name}_scales"] = torch.randint(115, 122, shape, generator=random, dtype=kind)
    return made


Case = tuple[Callable[[], Any], Callable[..., dict[str, torch.Tensor]], dict[str, Any], torch.dtype]
MXFP8 = BLOCKS | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
CASES: dict[str, Case] = {
    "fp8": (llama, in_float8, BLOCKS, torch.float32),
    "fp8-experts": (mixtral, in_float8, BLOCKS, torch.float32),
    "fp8-e8m0": (llama, in_float8, BLOCKS | {"scale_fmt": "ue8m0"}, E8M0),
    "fp8-static": (
        llama,
        in_float8,
        BLOCKS | {"activation_scheme": "static", "weight_block_size": None},
        torch.float32,
    ),
    "mxfp8": (llama, in_float8, MXFP8, torch.uint8),
    "mxfp4": (gpt_oss, in_mxfp4, {"quant_method": "mxfp4"}, torch.uint8),
}


def dequantized(folder: Path, made: Any, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What transformers loads; it asks for accelerate even where it does not use it."""
    for module in ("quantizer_finegrained_fp8", "quantizer_mxfp4"):
        monkeypatch.setattr(f"transformers.quantizers.{module}.is_accelerate_available", lambda: True)
    kind = transformers.Mxfp4Config if said["quant_method"] == "mxfp4" else transformers.FineGrainedFP8Config
    return made.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=kind(dequantize=True))


@pytest.mark.parametrize("case", CASES)
def test_a_whole_checkpoint(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, quantize, said, kind = CASES[case]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    file, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    save_file(quantize(load_file(file), said, kind), file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": said}))
    dequantized(tmp_path / "m", type(model), said, monkeypatch).save_pretrained(tmp_path / "dense")
    store = ms.open(tmp_path / "store", threads=1)
    for name in ("m", "dense"):
        store.save(name, tmp_path / name)
        store.compress(name, RECIPE, requantize=name == "m")
    found, expected = store.load("m:v"), store.load("dense:v")
    assert set(found) == set(expected)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    configs = [json.loads(store.file(f"{name}:v", "config.json")) for name in ("m", "dense")]
    assert configs[0] == configs[1]
    store.export("m:v", tmp_path / "out", dequantize=True)
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    of_dense = store.export("dense:v", tmp_path / "same", dequantize=True)
    assert of_dense is not None
    same = type(model).from_pretrained(tmp_path / "same", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in same.items())
