"""How much of a rounded layer's error solving leaves: by how much less it costs than its Fisher information alone says.

If codes are solved for the inputs of a layer, errors of its weights compensate for each other, which the squares of gradients
do not see. The share of tr(ΔW H ΔWᵀ) that solving leaves is much the same in all formats of a layer, so it is found in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from modelstore.calibrate.gptq import Factored, solve
from modelstore.calibrate.layers import Linears
from modelstore.calibrate.statistics import Gathered, Inputs
from modelstore.codecs.integer.weighted import by_column
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.format.objects.manifest import Manifest


def gains(
    layers: Linears,
    gathered: Gathered[Inputs],
    values: Mapping[str, torch.Tensor],
    rounded: Callable[[str], torch.Tensor],
    manifest: Manifest,
    bits: int,
    group: int,
) -> dict[str, float]:
    """For each tensor, the share of the error that solving leaves; tensors with too little input are left out.

    `rounded`: a layer's weight by its parameter's name, as its format stores it without data.
    """
    found = {}
    shared, hessian, factored = None, None, None  # by layers that follow each other, such as q, k and v
    for name, layer in layers.items():
        read, weight = gathered.read_by(name), layer.weight(values)
        if read is None or not read.enough:
            continue
        if factored is None or hessian is None or shared is not read:
            shared, hessian = read, read.taken()
            factored = Factored.of(hessian)
        stored = getattr(torch, scale_dtype(manifest.by_name[layer.tensor].kind))
        made = solve(weight, factored, bits, group, stored, across=layer.across)
        scales = by_column(torch.from_numpy(made.scales), group, weight.shape[1])
        moved = (torch.from_numpy(made.codes) * scales - weight, rounded(layer.parameter).float() - weight)
        lost = [_error(one.T if layer.across else one, hessian) for one in moved]
        if lost[1] > 0:
            found[layer.tensor] = min(1.0, lost[0] / lost[1])
    return found


def _error(moved: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((moved @ hessian.float()) * moved).double().sum())
