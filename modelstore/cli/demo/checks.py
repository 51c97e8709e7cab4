"""The checks of the demonstration, and the ways it changes and damages things."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.errors import CorruptionError

if TYPE_CHECKING:
    import torch


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, by the safetensors library alone."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)


def same(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """`CorruptionError` unless dtype, shape and every bit are the same (NaNs and zeros of both signs included)."""
    import torch

    alike = one.dtype == other.dtype and one.shape == other.shape
    if not alike or not torch.equal(_bits(one), _bits(other)):
        raise CorruptionError(f"tensor {name} did not come back as it was", tensor=name)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def tune(source: Path, target: Path) -> tuple[int, int]:
    """A copy of the folder in which about one float tensor of a hundred changed a little: how many, and of how many."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    names = sorted(name for name, tensor in tensors(source) if tensor.is_floating_point() and tensor.dim() == 2)
    total = sum(1 for _ in tensors(source))
    chosen = set(names[len(names) // 2 :][: max(1, total // 100)])
    noise = torch.Generator().manual_seed(0)
    for path in sorted(source.glob("*.safetensors")):
        weights = load_file(path)
        for name in sorted(chosen & weights.keys()):
            old = weights[name]
            weights[name] = (old.float() * (1 + 0.01 * torch.randn(old.shape, generator=noise))).to(old.dtype)
        save_file(weights, target / path.name, {"format": "pt"})
    return len(chosen), total


def flip_a_bit(store: Path) -> str:
    """Flip one bit in the middle of the largest pack of a local store; the pack's path within it."""
    pack = max((store / "packs").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return pack.relative_to(store).as_posix()


def compare_in_transformers(one: Path, other: Path) -> int:
    """Load both folders with transformers, and compare all parameters; how many there are."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    models: list[Any] = [AutoModel.from_pretrained(path, local_files_only=True, dtype="auto") for path in (one, other)]
    parameters: list[dict[str, torch.Tensor]] = [model.state_dict() for model in models]
    if parameters[0].keys() != parameters[1].keys():
        raise CorruptionError("transformers finds other parameters in the export than in the source")
    for name, tensor in parameters[0].items():
        same(parameters[1][name], tensor, name)
    return len(parameters[0])
