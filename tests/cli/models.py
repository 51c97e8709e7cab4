"""A small model to work on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(512, 64, generator=generator).bfloat16(),
        "layer.0.weight": torch.randn(64, 64, generator=generator),
        "layer.0.bias": torch.randn(64, generator=generator).half(),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))
    return folder
