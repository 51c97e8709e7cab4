"""Weights in a folder that other programs load, as its own index says: a model's, an adapter's, a pipeline's.

A model has `model.safetensors` or numbered shards with an index; an adapter of PEFT `adapter_model.safetensors`; a pipeline of
diffusers a folder for each component that `model_index.json` names, whose tensors have the component's name and a slash
before their own: `unet/conv_in.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PIPELINE = "model_index.json"
ADAPTER = "adapter_config.json"
CONFIG = "config.json"
_SUFFIX = r"(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"
_OF_PEFT = "base_model."  # the first part of the names of an adapter's tensors
_COMPONENT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Weights:
    """The place of weights: the folder (ending in "/", empty: the top), and the first part of their files' names."""

    folder: str = ""
    stem: str = "model"
    sharded: bool = True  # whether loaders take numbered shards

    @property
    def single(self) -> str:
        """The file's name, without its folder, where there is one."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The name of the shards' index, without its folder."""
        return f"{self.stem}.safetensors.index.json"

    def shard(self, number: int, count: int) -> str:
        """The name of a shard, counted from 1, without its folder."""
        return f"{self.stem}-{number:05}-of-{count:05}.safetensors"

    def has(self, path: str) -> bool:
        """Whether loaders would take the file at a path, whatever its case, for these weights."""
        folder, stem = self.folder.casefold(), self.stem.casefold()
        return re.fullmatch(re.escape(folder + stem) + _SUFFIX, path.casefold()) is not None


def places(
    files: Collection[str],
    tensors: Collection[str],
    pipeline: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> list[Weights]:
    """The place of the weights of a model with these files and tensors.

    `pipeline` and `config`: its `model_index.json` and `config.json`, where it has them. If a component of a pipeline has a
    folder of its own, its `config.json` says which class of diffusers it is. If an adapter has a `config.json` beside it, the
    tensors' names show that they are PEFT's.
    """
    if pipeline is not None:
        return components(pipeline)
    if ADAPTER in files and (CONFIG not in files or all(name.startswith(_OF_PEFT) for name in tensors)):
        return [Weights(stem="adapter_model", sharded=False)]
    if config is not None and "_class_name" in config and "_diffusers_version" in config:
        return [Weights(stem="diffusion_pytorch_model")]
    return [Weights()]


def components(pipeline: Mapping[str, Any]) -> list[Weights]:
    """The components that a `model_index.json` names: name → [library, class]. Not all have weights."""
    found = []
    for name, value in pipeline.items():
        if not (_COMPONENT.fullmatch(name) and isinstance(value, list) and len(value) == 2):
            continue
        library = value[0]
        if isinstance(library, str):
            found.append(Weights(f"{name}/", "diffusion_pytorch_model" if library == "diffusers" else "model"))
    return found
