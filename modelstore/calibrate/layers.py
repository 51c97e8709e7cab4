"""The linear layers of a block whose weights are tensors of their own, and how a tensor reads once a codec has stored it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from modelstore.codecs.weight import WeightCodec
from modelstore.compress.stages import Stages
from modelstore.execute.read.tensors import bytes_of, to_torch
from modelstore.format.buffers import Buffer
from modelstore.format.manifest import Manifest, Tensor


class Linear(NamedTuple):
    """A layer, the name of its weight among the model's parameters, and the stored tensor that is this weight."""

    module: torch.nn.Linear
    parameter: str
    tensor: str


Linears = Mapping[str, Linear]  # by the layer's name


def linears(stages: Stages, manifest: Manifest, block: int, wanted: Collection[str]) -> dict[str, Linear]:
    """A block's linear layers whose tensors are among the wanted, by name."""
    name = f"{stages.skeleton.stack}.{block}"
    found = {}
    for below, module in stages.skeleton.model.get_submodule(name).named_modules(prefix=name):
        parameter = f"{below}.weight"
        made = stages.names.made.get(parameter)
        if isinstance(module, torch.nn.Linear) and made is not None and made.patterns == ("",):
            tensor = manifest.by_name[made.sources[0]].name
            if tensor in wanted:
                found[below] = Linear(module, parameter, tensor)
    return found


def as_stored(codec: WeightCodec, tensor: torch.Tensor, about: Tensor) -> torch.Tensor:
    """How a tensor reads once a codec has stored it."""
    raw = bytes_of(tensor.contiguous())
    return tensor if raw is None else decoded(codec, codec.encode(raw, about.shape, about.kind), about)


def decoded(codec: WeightCodec, planes: Sequence[Buffer], about: Tensor) -> torch.Tensor:
    """The tensor that planes of a codec give."""
    out = np.empty((1, about.nbytes), np.uint8)
    codec.decode(planes, about.shape, about.kind, out)
    return to_torch(out.reshape(-1), about.dtype, about.shape)
