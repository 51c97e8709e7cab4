"""A module whose parameters and buffers are exchanged, all at once, for tensors of a model."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping

import torch

from modelstore.execute.read.tensors import check_targets
from modelstore.format.region import Region
from modelstore.sources.slices import box_of, is_dtensor
from modelstore.sources.torch import unwrapped


def targets_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers by their names, as they are; `ValueError` if these are copies, or not made yet."""
    targets = {n: value for n, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    lazy = next((name for name, value in targets.items() if torch.nn.parameter.is_lazy(value)), None)
    if lazy is not None:
        raise ValueError(f"{lazy!r} of the module does not have a shape yet: run the module once before it is loaded")
    fully = sys.modules.get("torch.distributed.fsdp")
    if fully is not None and any(isinstance(part, fully.FullyShardedDataParallel) for part in module.modules()):
        raise ValueError(
            "the state_dict of a FullyShardedDataParallel module is a copy: load the module before it is wrapped, or shard it "
            "by fully_shard"
        )
    return targets


def check_writable(targets: Mapping[str, torch.Tensor]) -> None:
    """`ValueError` for a target that values cannot be written into, each to a place of its own."""
    for name, target in targets.items():
        if is_dtensor(target):
            continue
        if target.layout != torch.strided or target.is_quantized:
            what = "quantized" if target.is_quantized else f"of layout {str(target.layout).removeprefix('torch.')}"
        elif any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True)):
            what = "expanded, with several numbers in one place"
        else:
            continue
        raise ValueError(
            f"{name!r} of the module is {what}, so values cannot be written into it: make it a plain tensor; nothing was changed"
        )


def boxes_of(targets: Mapping[str, torch.Tensor]) -> dict[str, Region | None]:
    """For each DTensor the box that this process holds, None if it holds nothing of it."""
    return {name: box_of(name, value) for name, value in targets.items() if is_dtensor(value)}


def local_of(target: torch.Tensor) -> torch.Tensor:
    """This process's part of a target, in the target's own memory."""
    return target.to_local().detach() if is_dtensor(target) else target


def like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The replacement of a target that does not have memory: these values, of its dtype, and divided in the same way."""
    value = value.to(target.dtype)
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import DTensor

    mesh, places = target.device_mesh, target.placements
    value = value.to(mesh.device_type)
    return DTensor.from_local(value, mesh, places, run_check=False, shape=target.shape, stride=target.stride())


def to_fill(targets: Mapping[str, torch.Tensor], stored: Container[str]) -> dict[str, torch.Tensor]:
    """The targets that a checkpoint has to hold: a tied name that it leaves out is filled through the other."""
    tied = {id(value) for name, value in targets.items() if name in stored}
    return {name: value for name, value in targets.items() if name in stored or id(value) not in tied}


class ModuleSlots:
    """The places of a module's tensors, by the names in a model; ties of the module stay ties.

    `ValueError` if names or shapes do not fit.
    """

    def __init__(self, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        module = unwrapped(module)
        self._targets = targets_of(module)
        for name, target in self._targets.items():
            if is_dtensor(target):
                raise ValueError(
                    f"{name!r} is a DTensor, of which each rank holds a part: it cannot be exchanged; fill it by load_into"
                )
        self._wanted = to_fill(self._targets, tensors)
        self.check(tensors)
        self._places: dict[str, list[tuple[torch.nn.Module, str, bool]]] = {}
        names = {id(value): name for name, value in reversed(self._wanted.items())}
        for part in module.modules():
            for own, kind in ((part._parameters, True), (part._buffers, False)):
                for key, value in own.items():
                    if value is not None and id(value) in names:
                        self._places.setdefault(names[id(value)], []).append((part, key, kind))

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`ValueError` if these do not fit the module."""
        stored = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        check_targets(self._wanted, stored, True)

    def set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make these the module's; values of another dtype are converted to the module's own."""
        made = {}
        for name in self._places:
            old = self._targets[name]
            value = tensors[name].to(old.dtype)
            trained = isinstance(old, torch.nn.Parameter) and old.requires_grad
            made[name] = (
                torch.nn.Parameter(value, requires_grad=trained) if isinstance(old, torch.nn.Parameter) else value
            )
        for name, places in self._places.items():
            for part, key, parameter in places:
                (part._parameters if parameter else part._buffers)[key] = made[name]  # type: ignore[assignment]
