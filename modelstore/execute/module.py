"""A module whose parameters and buffers are exchanged, all at once, for tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from modelstore.execute.tensors import check_targets


class ModuleSlots:
    """Where a module's tensors go, by the names in a model; ties of the module stay ties.

    `ValueError` where names or shapes do not fit.
    """

    def __init__(self, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._targets = {
            name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
        }
        tied = {id(value) for name, value in self._targets.items() if name in tensors}
        # A tied name that the checkpoint leaves out is filled through the other.
        self._wanted = {n: v for n, v in self._targets.items() if n in tensors or id(v) not in tied}
        self.check(tensors)
        self._places: dict[str, list[tuple[torch.nn.Module, str, bool]]] = {}
        names = {id(value): name for name, value in reversed(self._wanted.items())}
        for part in module.modules():
            for own, kind in ((part._parameters, True), (part._buffers, False)):
                for key, value in own.items():
                    if value is not None and id(value) in names:
                        self._places.setdefault(names[id(value)], []).append((part, key, kind))

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`ValueError` where these do not fit the module."""
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
