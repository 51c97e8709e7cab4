"""Other quantizers at the same work; each case is run in a process of its own (see `measure`). Imports are not timed.

llm-compressor goes from a checkpoint's folder to another, as `store.compress` goes from store to store. torchao and HQQ
quantize what is mapped from the page cache, and leave it in memory: nothing is written, which is to their favour.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Timer
from benchmarks.peers import files, prime_for

if TYPE_CHECKING:
    import torch

KEPT = ["lm_head", "model.embed_tokens"]
GROUP = 128


def is_linear(name: str) -> bool:
    """Whether a tensor of a Llama is the weight of a linear layer within a block."""
    return name.endswith("_proj.weight")


def linears(model: str, limit: int = 1 << 62) -> dict[str, torch.Tensor]:
    """The weights of linear layers, mapped, up to `limit` bytes."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    left = limit
    for path in files(model):
        for name, tensor in load_file(path).items():
            if is_linear(name) and left > 0:
                found[name] = tensor
                left -= tensor.nbytes
    return found


def llmcompressor(model: str, folder: str, scheme: str, workers: int) -> dict[str, Any]:
    """llm-compressor's data-free path: safetensors shard by shard, to a folder that vLLM loads."""
    from llmcompressor.entrypoints.model_free import model_free_ptq

    small = Path(folder, "small")
    _small(small)
    model_free_ptq(small, Path(folder, "small-out"), scheme=scheme, ignore=KEPT, device="cpu")
    out = Path(folder, "out")
    prime_for(model, model)
    os.sync()
    with Timer() as timer:
        model_free_ptq(model, out, scheme=scheme, ignore=KEPT, device="cpu", max_workers=workers)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(folder)
    return {**timer.found, "stored": size}


def _small(folder: Path) -> None:
    """A checkpoint of one layer, for what is loaded once a process."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.randn(1024, 1024).to(torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    index = {"metadata": {}, "weight_map": {name: "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def torchao(model: str, bits: int) -> dict[str, Any]:
    """`quantize_` with IntxWeightOnlyConfig, the fastest of torchao's that run on a CPU: channels for 8 bits, groups for 4."""
    import torch
    from torchao.quantization import quantize_

    config = torchao_config(bits, GROUP if bits == 4 else 0)
    quantize_(_module({"w": torch.randn(1024, 1024).to(torch.bfloat16)}), config)
    prime_for(model, model)
    with Timer() as timer:
        quantize_(_module(linears(model)), config)
    return timer.found


def torchao_config(bits: int, group: int, symmetric: bool = True) -> Any:
    """torchao's weight-only integers, in groups, or a scale a channel (`group` 0)."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    return IntxWeightOnlyConfig(
        weight_dtype=torch.int8 if bits == 8 else torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )


def _module(weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Linear layers of these weights, as a model has them."""
    import torch

    layers = []
    for weight in weights.values():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return torch.nn.Sequential(*layers)


def hqq(model: str, bits: int, optimize: bool, limit: int) -> dict[str, Any]:
    """HQQ's quantizer, with its search or with plain rounding, on up to `limit` bytes; says how many it took."""
    import torch

    hqq_quantize(torch.randn(1024, 1024).to(torch.bfloat16), bits, optimize)
    prime_for(model, model)
    with Timer() as timer:
        weights = linears(model, limit)
        kept = [hqq_quantize(weight, bits, optimize) for weight in weights.values()]
    assert len(kept) == len(weights)
    return {**timer.found, "bytes": sum(weight.nbytes for weight in weights.values())}


def hqq_quantize(weight: torch.Tensor, bits: int, optimize: bool) -> Any:
    """Codes and what they mean, packed, groups of 128 along columns."""
    from hqq.core.quantize import Quantizer

    return Quantizer.quantize(weight, nbits=bits, group_size=GROUP, axis=1, optimize=optimize, device="cpu")


def restored(tool: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight after 4 bits of a tool, as float32: "hqq", "torchao", "torchao affine" or "gguf" (Q4_0, groups of 32).

    torchao takes only groups that divide the columns: where 128 does not, the largest of 64 and 32 that does.
    """
    import torch

    if tool == "hqq":
        from hqq.core.quantize import Quantizer

        codes, meaning = hqq_quantize(weight, 4, True)
        return Quantizer.dequantize(codes, {**meaning, "compute_dtype": torch.float32}).float()
    if tool == "gguf":
        from gguf import GGMLQuantizationType, quants

        q4_0 = GGMLQuantizationType.Q4_0
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.float().numpy(), q4_0), q4_0))
    from torchao.quantization import quantize_

    group = next(g for g in (GROUP, 64, 32) if weight.shape[1] % g == 0)
    module = _module({"w": weight})
    quantize_(module, torchao_config(4, group, symmetric=tool == "torchao"))
    return module[0].weight.dequantize().float()  # type: ignore[index]
