"""Sums of the inputs of a model's linear layers, made while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.overrides

from modelstore.architecture.classes.skeleton import Skeleton
from modelstore.calibrate.layers import Linears
from modelstore.errors import FormatError
from modelstore.execute.spool import Spool

TOKENS = 2  # for each column: an input that fewer came to says too little
_PANEL = 256  # columns whose products are computed together
_EXACT = 4096  # columns up to which sums are given in float64


@dataclass
class Inputs:
    """The statistics of one input: the sum of outer products of its vectors, and how many they are.

    Sums are float32 within a run and float64 over the runs. Each pair of columns is summed once: of every few columns the
    products with themselves and with those behind.
    """

    columns: int
    count: int = 0
    magnitude: torch.Tensor | None = None  # the sum of each column's absolute values, float64
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
        sizes = vectors.abs().sum(0).double()
        self.magnitude = sizes if self.magnitude is None else self.magnitude + sizes
        self.count += len(vectors)
        return finite

    def divide(self, by: torch.Tensor) -> None:
        """As if each column of the inputs had been divided by this, (columns)."""
        for number, at in enumerate(range(0, self.columns, _PANEL)):
            self._panels[number] /= by[at : at + _PANEL, None] * by[at:]
        if self.magnitude is not None:
            self.magnitude /= by

    def taken(self) -> torch.Tensor:
        """The sum (columns, columns), which is let go of here: float64 up to 4,096 columns, float32 beyond them."""
        kind = torch.float64 if self.columns <= _EXACT else torch.float32
        whole = torch.empty(self.columns, self.columns, dtype=kind)
        for at in range(0, self.columns, _PANEL):
            panel = self._panels.pop(0)
            whole[at : at + _PANEL, at:] = panel
            whole[at:, at : at + _PANEL] = panel.T
        return whole


class _Stacks(torch.overrides.TorchFunctionMode):
    """Sees the inputs of each matrix of a stack, which is not a module of its own."""

    def __init__(
        self, stacked: Mapping[int, Mapping[int, list[str]]], add: Callable[[str, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._stacked, self._add = stacked, add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and len(args) > 1 and args[1].dim() == 2:
            weight = args[1]
            there = self._stacked.get(weight.untyped_storage().data_ptr(), {})
            for name in there.get(weight.storage_offset() // weight.numel(), ()):
                self._add(name, args[0])
        return func(*args, **(kwargs or {}))


@dataclass
class ColumnSquares:
    """The sum of the squares of each column of one input, float64 (columns), and how many vectors it is of."""

    columns: int
    count: int = 0
    sums: torch.Tensor | None = None

    def add(self, vectors: torch.Tensor) -> bool:
        """As `Inputs.add`."""
        found = vectors.square().sum(0).double()
        self.sums = found if self.sums is None else self.sums + found
        self.count += len(vectors)
        return bool(torch.isfinite(found).all())


class _Sums(Protocol):
    def add(self, vectors: torch.Tensor) -> bool: ...


S = TypeVar("S", bound=_Sums)


@dataclass
class Gathered(Generic[S]):
    """The inputs that linear layers read, by the layers' names; layers that read one thing share one sum, which `start` makes
    of the number of columns.

    Runs are added in their order: the same bits each time.
    """

    start: Callable[[int], S]
    of: dict[str, str] = field(default_factory=dict)  # layer → the first layer that reads the same
    inputs: dict[str, S] = field(default_factory=dict)
    _seen: list[tuple[torch.Tensor, str]] = field(default_factory=list)

    @contextmanager
    def watching(self, layers: Linears, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While layers run, with these values of their parameters, sum up what they read."""
        alone = {name: layer.module for name, layer in layers.items() if layer.part is None}
        stacked: dict[int, dict[int, list[str]]] = {}  # by where a stack lies: the layers of each of its matrices
        for name, layer in layers.items():
            if layer.part is not None:
                at = values[layer.parameter].untyped_storage().data_ptr()
                stacked.setdefault(at, {}).setdefault(layer.part.matrix, []).append(name)
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: self._add(name, given[0]))
            for name, module in alone.items()
        ]
        try:
            with _Stacks(stacked, self._add) if stacked else nullcontext():
                yield
        finally:
            self._seen.clear()
            for hook in hooks:
                hook.remove()

    def run(
        self,
        skeleton: Skeleton,
        block: int,
        layers: Linears,
        values: Mapping[str, torch.Tensor],
        shards: Sequence[torch.Tensor],
        before: Spool,
        given: Spool | None = None,
    ) -> None:
        """Run a block of these values on shards of samples, and sum up what its layers read; `given` is appended its output.

        `before` has the output of the block before, which the first block does not need.
        """
        stacks = any(layer.part is not None for layer in layers.values())
        with (
            skeleton.at(block, values) as run,
            skeleton.experts_one_by_one() if stacks else nullcontext(),
            self.watching(layers, values),
        ):
            for at, ids in enumerate(shards):
                self.begin()
                found = run(ids, before[at] if block else None)
                if given is not None:
                    given.append(found)

    def begin(self) -> None:
        """Another run starts."""
        self._seen.clear()

    def read_by(self, layer: str) -> S | None:
        """The input of a layer; None if nothing came to it."""
        return self.inputs.get(self.of.get(layer, ""))

    def _add(self, name: str, values: torch.Tensor) -> None:
        shared = next((first for seen, first in self._seen if seen is values), None)
        if shared is not None and self.of.setdefault(name, shared) == shared:
            return
        self.of[name] = name
        self._seen.append((values, name))
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        if name not in self.inputs:
            self.inputs[name] = self.start(rows.shape[1])
        if not self.inputs[name].add(rows):
            raise FormatError(
                f"what comes to {name!r} is not finite on the calibration text: the weights before it, or what they compute, "
                f"overflow or are not numbers; look at the tensors before it",
                tensor=f"{name}.weight",
            )
