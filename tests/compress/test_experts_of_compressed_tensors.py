"""Experts are exported dense in schemes that transformers loads from nobody: it is given what compressed-tensors packs itself.

Where one of these tests fails because the values are right, transformers has learned to load them: pack them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

EXPERT = "model.layers.0.block_sparse_moe.experts.0.w2"
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int4-affine": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "W8A8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}
LOADED = ("int4", "fp8")


def blocks(weight: torch.Tensor, args: dict[str, Any]) -> torch.Tensor:
    """The weight as [rows of scales, columns of scales, what shares one]."""
    rows, columns = weight.shape
    high, wide = args.get("block_structure", (1, args.get("group_size") or columns))
    return weight.reshape(rows // high, high, columns // wide, wide).permute(0, 2, 1, 3).flatten(2)


def packed(weight: torch.Tensor, form: str, args: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What compressed-tensors makes of a weight, and of that again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    shared = blocks(weight, args)
    parts = {"weight": weight}
    if form.startswith("nvfp4"):
        parts["weight_global_scale"] = 448.0 * 6.0 / weight.abs().max().float().reshape(1)
    scale, zero = calculate_qparams(
        shared.amin(-1), shared.amax(-1), scheme.weights, global_scale=parts.get("weight_global_scale")
    )
    parts |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    made = compressor.compress(parts, scheme)
    return made, compressor.decompress(dict(made), scheme)["weight"]


def checkpoint(folder: Path, form: str, args: dict[str, Any]) -> torch.Tensor:
    """A Mixtral whose experts are packed, and nothing else; the weight that one of them stands for."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=64, num_hidden_layers=1, num_local_experts=2, max_position_embeddings=64
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), torch.empty(0)
    for name in [name for name in tensors if ".experts." in name]:
        parts, weight = packed(tensors.pop(name), form, args)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
        expected = weight if name == f"{EXPERT}.weight" else expected
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "format": form}},
    }
    (folder / "config.json").write_text(json.dumps(said))
    return expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_as_compressed_tensors_packs_them(tmp_path: Path, scheme: str) -> None:
    expected = checkpoint(tmp_path, *SCHEMES[scheme])
    try:
        model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    except Exception:
        assert scheme not in LOADED
        return
    found = model.state_dict()["model.layers.0.mlp.experts.down_proj"][0]
    assert found.shape == expected.shape
    assert torch.allclose(found.float(), expected.float(), rtol=0.01, atol=1e-4) == (scheme in LOADED)
