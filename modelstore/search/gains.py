"""What solving leaves of a rounded layer's error: by how much less it costs than its Fisher information alone says.

Where codes are solved for what comes to a layer, errors of its weights make up for each other, which the squares of gradients do
not see. The share of tr(ΔW H ΔWᵀ) that solving leaves is much the same in all formats of a layer, so it is found in one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from modelstore.calibrate.gptq import Factored, solve
from modelstore.calibrate.statistics import Gathered
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.compress.stages import Stages
from modelstore.format.manifest import Manifest

_TOKENS = 2  # for each column: of an input that fewer came to nothing is solved
Linears = Mapping[str, tuple[torch.nn.Linear, str]]  # by name: the layer, and its tensor


def linears(
    stages: Stages, manifest: Manifest, stage: int, wanted: Collection[str]
) -> dict[str, tuple[torch.nn.Linear, str]]:
    """A block's linear layers with a tensor of their own among the wanted."""
    found = {}
    name = f"{stages.skeleton.stack}.{stage}"
    for below, module in stages.skeleton.model.get_submodule(name).named_modules(prefix=name):
        made = stages.names.made.get(f"{below}.weight")
        if isinstance(module, torch.nn.Linear) and made is not None and made.patterns == ("",):
            tensor = manifest.by_name[made.sources[0]].name
            if tensor in wanted:
                found[below] = (module, tensor)
    return found


def gains(
    layers: Linears,
    gathered: Gathered,
    values: Mapping[str, torch.Tensor],
    rounded: Callable[[str], torch.Tensor],
    manifest: Manifest,
    bits: int,
    group: int,
) -> dict[str, float]:
    """Of each tensor, the share that solving leaves; of those that too little came to, nothing is said.

    `rounded`: a layer's weight by its parameter's name, as its format stores it without data.
    """
    found = {}
    shared, factored = "", None  # by layers that follow each other, such as q, k and v
    for name, (_, tensor) in layers.items():
        read, weight = gathered.read_by(name), values[f"{name}.weight"]
        if read is None or read.count < _TOKENS * weight.shape[1]:
            continue
        if factored is None or shared != gathered.of[name]:
            shared, factored = gathered.of[name], Factored.of(read.hessian)
        stored = getattr(torch, scale_dtype(manifest.by_name[tensor].kind))
        made = solve(weight, factored, bits, group, stored)
        scales = torch.from_numpy(made.scales).repeat_interleave(group, 1)[:, : weight.shape[1]]
        moved = (torch.from_numpy(made.codes) * scales - weight, rounded(f"{name}.weight").float() - weight)
        lost = [_error(one, read.hessian) for one in moved]
        if lost[1] > 0:
            found[tensor] = min(1.0, lost[0] / lost[1])
    return found


def _error(moved: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((moved @ hessian.float()) * moved).double().sum())
