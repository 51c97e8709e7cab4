"""Layouts: which part of each tensor a rank holds. Pure functions over names, shapes and `config.json`.

For example:

    held = (PipelineStage(1, 4) & TensorParallel(3, 8)).shares(config, {name: shape})     # {name: Share}
    for source, target in held["model.layers.9.mlp.down_proj.weight"].pieces():           # regions: whole → rank's
        ...

`modelstore.architecture.ranks.parallel` knows how an architecture is cut.
"""

from modelstore.plan.layout_pipeline import Layers, PipelineStage
from modelstore.plan.layout_share import (
    Both,
    Layout,
    Regions,
    Shard,
    Share,
    as_layout,
    whole,
)
from modelstore.plan.layout_tensor import ExpertParallel, TensorParallel

__all__ = [
    "Both",
    "ExpertParallel",
    "Layers",
    "Layout",
    "PipelineStage",
    "Regions",
    "Shard",
    "Share",
    "TensorParallel",
    "as_layout",
    "whole",
]
