"""A stored model that is run block by block: the weights of one stage are read, used and let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelstore.architecture.model_class import build
from modelstore.architecture.names import parameters, values
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.unsaved import made_again
from modelstore.plan.work import Limits, Work

if TYPE_CHECKING:
    import torch


class Stages:
    """A variant's blocks, its embedding before the first and its head behind the last, as float32.

    `UnsupportedError` where its architecture cannot be run so, `FormatError` where tensors that it needs are missing.
    """

    def __init__(self, model: Variant, class_name: str, limits: Limits) -> None:
        from modelstore.architecture.skeleton import Skeleton

        self._model, self._limits = model, limits
        config: dict[str, Any] = {**(model.config() or {}), "architectures": [class_name]}
        self.built = build(config, len(model.manifest.tensors))
        self.skeleton = Skeleton(self.built.model.eval())
        self.names = parameters(self.built, model.manifest.by_name)
        try:
            made = made_again(self.built.model, strict=True)
        except ValueError as error:
            raise UnsupportedError(f"a {class_name} cannot be run block by block: {error}") from None
        self._buffers = {buffer.name: value for buffer, value in made.items()}

    def values(
        self, stage: int, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """What a stage computes with: its block's parameters and those around the blocks, read from the store.

        `change` gives for a stored tensor, by its name, what it is taken to be instead.
        """
        import torch

        needed = self.skeleton.needs(stage)
        found = dict(self._buffers)
        for one in self.names.of(needed):
            read = self._model.load(self._model.shares(None, one.sources), Work(self._limits))
            if change is not None:
                read = {name: change(name, tensor) for name, tensor in read.items()}
            found |= values(self.built, one, read.__getitem__, torch.float32)
        return found | {name: found[of] for name, of in self.names.tied.items() if name in needed}
