"""The linear layers of a block whose weights are stored tensors, and how a tensor reads once a codec has stored it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from modelstore.architecture.classes.names import Made
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.stages import Stages
from modelstore.execute.read.tensors import bytes_of, to_torch
from modelstore.format.buffers import Buffer
from modelstore.format.objects.manifest import Manifest, Tensor


class Stacked(NamedTuple):
    """Which rows of which matrix of a stack, such as an expert's gate beside its up."""

    matrix: int
    first: int
    stop: int


class Linear(NamedTuple):
    """A layer, the name of its weight among the model's parameters, and the stored tensor that is this weight.

    `across`: the weight has inputs as rows, as GPT-2's. `part`: of a parameter that is a stack, the part that is this weight.
    """

    module: torch.nn.Module
    parameter: str
    tensor: str
    across: bool = False
    part: Stacked | None = None

    def weight(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight, of the parameters by name, as it is stored: (rows, columns), or with inputs as rows (columns, rows)."""
        found = values[self.parameter]
        return found if self.part is None else found[self.part.matrix, self.part.first : self.part.stop]

    def inputs(self, values: Mapping[str, torch.Tensor]) -> int:
        """How many numbers the layer reads."""
        return int(values[self.parameter].shape[-2 if self.across else -1])


Linears = Mapping[str, Linear]  # by the layer's name; of a stack, the stack's and a number


def linears(stages: Stages, manifest: Manifest, block: int, wanted: Collection[str]) -> dict[str, Linear]:
    """A block's linear layers whose tensors are among the wanted, by name."""
    name = f"{stages.skeleton.stack}.{block}"
    found = {}
    for below, module in stages.skeleton.model.get_submodule(name).named_modules(prefix=name):
        for key, value in module.named_parameters(recurse=False):
            parameter = f"{below}.{key}"
            made = stages.names.made.get(parameter)
            if made is None:
                continue
            across = type(module).__name__ == "Conv1D"
            if made.patterns == ("",):
                tensor = manifest.by_name[made.sources[0]].name
                if key == "weight" and (across or isinstance(module, torch.nn.Linear)) and tensor in wanted:
                    found[below] = Linear(module, parameter, tensor, across)
            elif value.dim() == 3:
                for tensor, part in _parts(stages, made, value.shape, manifest):
                    if tensor in wanted:
                        found[f"{parameter}.{part.matrix}.{part.first}"] = Linear(module, parameter, tensor, part=part)
    return found


def norms(stages: Stages, manifest: Manifest, block: int) -> dict[str, str]:
    """The gains of a block's norms that have no bias: the stored tensor of each, by the parameter's name."""
    name = f"{stages.skeleton.stack}.{block}"
    found = {}
    for below, module in stages.skeleton.model.get_submodule(name).named_modules(prefix=name):
        own = dict(module.named_parameters(recurse=False))
        made = stages.names.made.get(f"{below}.weight")
        if list(own) == ["weight"] and own["weight"].dim() == 1 and made is not None and made.patterns == ("",):
            found[f"{below}.weight"] = manifest.by_name[made.sources[0]].name
    return found


def differing(layers: Linears, values: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> list[str]:
    """Layers of stacks that are not there what their shapes say: transformers changes what it stacks in another way."""
    return [
        name
        for name, layer in layers.items()
        if layer.part is not None and not torch.equal(layer.weight(values), stored[layer.tensor].float())
    ]


def _parts(stages: Stages, made: Made, shape: Sequence[int], manifest: Manifest) -> Iterator[tuple[str, Stacked]]:
    """The stored matrices that are stacked in a parameter (matrices, rows, columns), by shapes; none where these do not fit.

    Each pattern has one part for each matrix, in order; those of several patterns follow each other.
    """
    about = [manifest.by_name[source] for source in made.sources]
    order = [one for one in stages.built.converters[made.patterns[0]].source_patterns if one in made.patterns]
    each = {one: [at for at, pattern in zip(about, made.patterns, strict=True) if pattern == one] for one in order}
    rows = [each[one][0].shape[0] if each[one] else 0 for one in order]
    fits = all(
        len(each[one]) == shape[0] and all(at.shape == (high, shape[2]) for at in each[one])
        for one, high in zip(order, rows, strict=True)
    )
    if not fits or sum(rows) != shape[1]:
        return
    for matrix in range(shape[0]):
        first = 0
        for one, high in zip(order, rows, strict=True):
            yield each[one][matrix].name, Stacked(matrix, first, first + high)
            first += high


def as_stored(codec: WeightCodec, tensor: torch.Tensor, about: Tensor) -> torch.Tensor:
    """How a tensor reads once a codec has stored it."""
    raw = bytes_of(tensor.contiguous())
    return tensor if raw is None else decoded(codec, codec.encode(raw, about.shape, about.kind), about)


def decoded(codec: WeightCodec, planes: Sequence[Buffer], about: Tensor) -> torch.Tensor:
    """The tensor that planes of a codec give."""
    out = np.empty((1, about.nbytes), np.uint8)
    codec.decode(planes, about.shape, about.kind, out)
    return to_torch(out.reshape(-1), about.dtype, about.shape)
