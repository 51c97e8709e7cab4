"""What other tools do of the same work; each case is run in a process of its own (see `measure`).

All of them end with tensors in memory of their own, as `store.load` does. Imports are not timed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Timer, prime, warm

if TYPE_CHECKING:
    import torch

PAGE = 4096


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all bytes, by name: so that the contenders' results can be told to be the same."""
    import torch
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO)
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def outcome(timer: Timer, tensors: Mapping[str, torch.Tensor], check: bool) -> dict[str, Any]:
    """What a loading case returns."""
    return {**timer.found, "tensors": len(tensors), "digest": digest(tensors) if check else None}


def prime_for(model: str, *folders: str) -> None:
    """Memory for all of a model, and a quarter more; files in the page cache."""
    prime(sum(Path(path).stat().st_size for path in files(model)) * 5 // 4, *folders)


def files(model: str) -> list[str]:
    """The model's safetensors files."""
    return sorted(str(path) for path in Path(model).glob("*.safetensors"))


def small(folder: str) -> str:
    """A small file in safetensors' format, for what is loaded once a process."""
    import torch
    from safetensors.torch import save_file

    path = f"{folder}/small.safetensors"
    save_file({"w": torch.zeros(1 << 20, dtype=torch.bfloat16)}, path)
    return path


def safetensors_clone(model: str, check: bool = False) -> dict[str, Any]:
    """`load_file` maps the file; a clone makes the tensors one's own."""
    import torch  # noqa: F401
    from safetensors.torch import load_file

    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        load_file(small(folder))["w"].clone()
    prime_for(model, model)
    with Timer() as timer:
        for path in files(model):
            tensors.update({name: tensor.clone() for name, tensor in load_file(path).items()})
    return outcome(timer, tensors, check)


def safetensors_touch(model: str) -> dict[str, Any]:
    """`load_file`, and one byte of every page touched."""
    import torch  # noqa: F401
    from safetensors.torch import load_file

    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        touch(load_file(small(folder)))
    warm(Path(model))
    with Timer() as timer:
        for path in files(model):
            tensors.update(load_file(path))
        total = touch(tensors)
    return {**timer.found, "tensors": len(tensors), "touched": total}


def touch(tensors: Mapping[str, torch.Tensor]) -> int:
    """Read one byte of every page."""
    import torch

    return sum(int(t.reshape(-1).view(torch.uint8).numpy()[::PAGE].sum()) for t in tensors.values())


def runai(model: str, owned: bool, paths: list[str] | None = None, check: bool = False) -> dict[str, Any]:
    """The Run:ai streamer, from the model's files or s3:// `paths`: tensors as it makes them one's own, or its views cloned."""
    import torch  # noqa: F401
    from runai_model_streamer import SafetensorsStreamer

    tensors = {}
    if not paths:
        with tempfile.TemporaryDirectory() as folder, SafetensorsStreamer() as streamer:
            streamer.stream_files([small(folder)], owned=owned)
            dict(streamer.get_tensors())
    prime_for(model, *([] if paths else [model]))
    with Timer() as timer, SafetensorsStreamer() as streamer:
        streamer.stream_files(paths or files(model), owned=owned)
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor if owned else tensor.clone()
    return outcome(timer, tensors, check)


def runai_environment() -> dict[str, str]:
    """What the streamer must be told to speak to a server of one's own."""
    if "AWS_ENDPOINT_URL" not in os.environ:
        return {}
    return {
        "RUNAI_STREAMER_S3_ENDPOINT": os.environ["AWS_ENDPOINT_URL"],
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
