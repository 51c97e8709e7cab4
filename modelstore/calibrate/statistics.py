"""What goes into a model's linear layers, summed up while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modelstore.errors import FormatError


@dataclass
class Inputs:
    """Of one input: the sum of outer products of its vectors, and how many they are."""

    hessian: torch.Tensor
    count: int = 0

    @property
    def enough(self) -> bool:
        """Whether layers that read it can be solved."""
        return self.count >= TOKENS * len(self.hessian)


TOKENS = 2  # for each column: an input that fewer came to says too little


@dataclass
class Gathered:
    """The inputs that linear layers read, by the layers' names; layers that read one thing share one sum.

    Sums are float32 within a run and float64 over the runs, in their order: the same bits each time.
    """

    of: dict[str, str] = field(default_factory=dict)  # layer → the first layer that reads the same
    inputs: dict[str, Inputs] = field(default_factory=dict)
    _seen: list[tuple[torch.Tensor, str]] = field(default_factory=list)

    @contextmanager
    def watching(self, layers: Mapping[str, torch.nn.Linear]) -> Iterator[None]:
        """While layers run, sum up what they read."""
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, name=name: self._add(name, given[0]))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            self._seen.clear()
            for hook in hooks:
                hook.remove()

    def begin(self) -> None:
        """Another run begins."""
        self._seen.clear()

    def read_by(self, layer: str) -> Inputs | None:
        """What a layer reads; None where nothing came to it."""
        return self.inputs.get(self.of.get(layer, ""))

    def _add(self, name: str, values: torch.Tensor) -> None:
        shared = next((first for seen, first in self._seen if seen is values), None)
        if shared is not None and self.of.setdefault(name, shared) == shared:
            return
        self.of[name] = name
        self._seen.append((values, name))
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        product = (rows.T @ rows).double()
        if not bool(torch.isfinite(product).all()):
            raise FormatError(
                f"what comes to {name!r} is not finite on the calibration text: the weights before it, or what they compute, "
                f"overflow or are no numbers; look at the tensors before it",
                tensor=f"{name}.weight",
            )
        found = self.inputs.get(name)
        if found is None:
            self.inputs[name] = Inputs(product, len(rows))
        else:
            found.hessian += product
            found.count += len(rows)
