"""A student: a module whose parameters are trained in float32, and the stored tensors that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from modelstore.architecture.classes.names import parameters
from modelstore.compress.built import built_of
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format.objects.manifest import Tensor
from modelstore.transfer.head import SplitModel
from modelstore.transfer.settings import DECAY
from modelstore.transfer.stays import Stays

CODES = "codes "  # before the names of tensors that are codes


@dataclass
class Weight:
    """A parameter that is trained.

    `about`: the stored tensor that it is; `used`: what the module computes with; `master`: float32, what steps move, the same
    object where nothing is rounded; `stays`: what it stays, None if it may become anything.
    """

    about: Tensor
    used: torch.nn.Parameter
    master: torch.nn.Parameter
    stays: Stays | None = None

    @property
    def stored(self) -> torch.dtype:
        """The dtype that it is stored in."""
        found: torch.dtype = getattr(torch, self.about.dtype)
        return found

    def published(self) -> torch.Tensor:
        """The values that a reader of what is published will get, float32."""
        master = self.master.detach()
        found = master if self.stays is None else self.stays.used(master)
        return found.to(self.stored).float()


class Student:
    """A module in training. `stays`: what weights stay, by the name of the stored tensor."""

    def __init__(self, model: Variant, class_name: str, module: torch.nn.Module, stays: Mapping[str, Stays]) -> None:
        self.module, self.split = module, SplitModel(module)
        self.weights = _weights(model, class_name, module, stays)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: matrices decay, norms and biases do not."""
        matrices = [one.master for one in self.weights.values() if one.master.dim() > 1]
        others = [one.master for one in self.weights.values() if one.master.dim() < 2]
        return [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]

    def masters(self) -> Sequence[torch.nn.Parameter]:
        """The parameters that steps move."""
        return [one.master for one in self.weights.values()]

    def place(self) -> None:
        """Let the module compute with the forms that weights keep."""
        for one in self.weights.values():
            if one.stays is not None:
                one.used.data.copy_(one.stays.used(one.master.detach()))

    def gather(self) -> None:
        """Let masters have the gradients of what the module computed with."""
        for one in self.weights.values():
            if one.stays is not None and one.used.grad is not None:
                one.master.grad = one.stays.gradient(one.master.detach(), one.used.grad)
                if one.used is not one.master:
                    one.used.grad = None

    def settle(self) -> None:
        """After a step: masters have their form again."""
        for one in self.weights.values():
            if one.stays is not None:
                one.stays.settle(one.master.data)

    @contextmanager
    def as_published(self) -> Iterator[SplitModel]:
        """While it runs, the module computes with what a reader would get."""
        held = {name: one.used.data for name, one in self.weights.items()}
        try:
            for one in self.weights.values():
                one.used.data = one.published()
            yield self.split
        finally:
            for name, value in held.items():
                self.weights[name].used.data = value

    def taken(self) -> dict[str, torch.Tensor]:
        """The values that would be published now, by name: tensors in their stored dtype, and codes."""
        found = {}
        for one in self.weights.values():
            master = one.master.detach()
            found[one.about.name] = master.to(one.stored, copy=True).cpu()
            codes = None if one.stays is None else one.stays.codes(master)
            if codes is not None:
                found[CODES + one.about.name] = codes.cpu()
        return found


def _weights(model: Variant, class_name: str, module: torch.nn.Module, stays: Mapping[str, Stays]) -> dict[str, Weight]:
    """The module's parameters by their own names. `UnsupportedError` for one that is made of several stored tensors."""
    known = parameters(built_of(model, class_name), model.manifest.by_name)
    found: dict[str, Weight] = {}
    for name, parameter in module.named_parameters():
        made = known.made[known.tied.get(name, name)]
        if made.patterns != ("",):
            raise UnsupportedError(
                f"{name!r} of model {model.name!r} is made of several stored tensors ({made.sources[0]}, …): such a model is "
                f"not trained here",
                model=model.name,
                tensor=made.sources[0],
            )
        about = model.manifest.by_name[made.sources[0]]
        mine = stays.get(about.name)
        apart = mine is not None and mine.apart
        master = torch.nn.Parameter(parameter.detach().clone()) if apart else parameter
        found[name] = Weight(about, parameter, master, mine)
    return found
