"""Layouts: which part of each tensor a rank holds. Pure functions over names, shapes and `config.json`.

    held = (PipelineStage(1, 4) & TensorParallel(3, 8)).shares(config, {name: shape})     # {name: Share}
    for source, target in held["model.layers.9.mlp.down_proj.weight"].pieces():           # regions: whole → rank's
        ...

`axes(config)` says along which axis tensor parallelism would cut a tensor, for the chunk grid.
"""

from modelstore.plan.layout_pipeline import Layers, PipelineStage
from modelstore.plan.layout_share import (
    Both,
    Config,
    Layout,
    Regions,
    Shard,
    Share,
    Tensors,
    as_layout,
    whole,
)
from modelstore.plan.layout_tensor import ExpertParallel, TensorParallel, axes, tensor_parallel_axis

__all__ = [
    "Both",
    "Config",
    "ExpertParallel",
    "Layers",
    "Layout",
    "PipelineStage",
    "Regions",
    "Shard",
    "Share",
    "TensorParallel",
    "Tensors",
    "as_layout",
    "axes",
    "tensor_parallel_axis",
    "whole",
]
