"""What goes into a model's linear layers, summed up while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modelstore.errors import FormatError

TOKENS = 2  # for each column: an input that fewer came to says too little
_PANEL = 256  # columns whose products are computed together
_EXACT = 4096  # columns up to which sums are given in float64


@dataclass
class Inputs:
    """Of one input: the sum of outer products of its vectors, and how many they are.

    Sums are float32 within a run and float64 over the runs. Each pair of columns is summed once: of every few columns the
    products with themselves and with those behind.
    """

    columns: int
    count: int = 0
    _panels: list[torch.Tensor] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        """Whether layers that read it can be solved."""
        return self.count >= TOKENS * self.columns

    def add(self, vectors: torch.Tensor) -> bool:
        """Add vectors, float32 (count, columns), of one run; whether all their products are finite."""
        first, finite = not self._panels, True
        for number, at in enumerate(range(0, self.columns, _PANEL)):
            product = (vectors[:, at : at + _PANEL].T @ vectors[:, at:]).double()
            finite = finite and bool(torch.isfinite(product).all())
            if first:
                self._panels.append(product)
            else:
                self._panels[number] += product
        self.count += len(vectors)
        return finite

    @property
    def hessian(self) -> torch.Tensor:
        """The sum (columns, columns), made anew: float64 up to 4,096 columns, float32 beyond them."""
        whole = torch.empty(
            self.columns, self.columns, dtype=torch.float64 if self.columns <= _EXACT else torch.float32
        )
        for at, panel in zip(range(0, self.columns, _PANEL), self._panels, strict=True):
            whole[at : at + _PANEL, at:] = panel
            whole[at:, at : at + _PANEL] = panel.T
        return whole


@dataclass
class Gathered:
    """The inputs that linear layers read, by the layers' names; layers that read one thing share one sum.

    Runs are added in their order: the same bits each time.
    """

    of: dict[str, str] = field(default_factory=dict)  # layer → the first layer that reads the same
    inputs: dict[str, Inputs] = field(default_factory=dict)
    _seen: list[tuple[torch.Tensor, str]] = field(default_factory=list)

    @contextmanager
    def watching(self, layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
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
        if not self.inputs.setdefault(name, Inputs(rows.shape[1])).add(rows):
            raise FormatError(
                f"what comes to {name!r} is not finite on the calibration text: the weights before it, or what they compute, "
                f"overflow or are no numbers; look at the tensors before it",
                tensor=f"{name}.weight",
            )
