"""Training checkpoints: all that a trainer saved beside the weights, given back as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelstore.client.base import OpenedStore
from modelstore.errors import NotFoundError
from modelstore.format.names import ORIGINAL, parse_reference
from modelstore.format.progress import Progress

if TYPE_CHECKING:
    import torch


class Checkpoints(OpenedStore):
    """The part of a store that gives checkpoints back."""

    def checkpoint(self, ref: str, *, device: str | torch.device = "cpu", progress: Progress | None = None) -> Any:
        """Give back what was saved with `include="all"`: the model's state dict, the optimizer's, and every plain value.

        Tensors are exact, those that were one are one, and views of one memory share one again. Objects of other classes than
        plain data are `modelstore.Inert`. Paths are pure paths.

        Args:
            ref: The version, as `name[@version-or-tag]`.
            device: The device for the tensors.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The structure that was given to `save`.

        Raises:
            NotFoundError: There is no such version, or it was saved without.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> state = store.checkpoint("acme/llama@step-1000")
            >>> optimizer.load_state_dict(state["optimizer"])
        """

        from modelstore.format.structure import CHECKPOINT, FILE, structure
        from modelstore.plan.layout import as_layout

        parsed = parse_reference(ref)
        if parsed.variant not in (ORIGINAL, CHECKPOINT):
            raise ValueError(f"{ref!r} names a variant: give the version, such as {parsed.name!r}")
        self.repo.catalog.open()
        record = self.repo.catalog.resolve(parsed)
        if CHECKPOINT not in record.variants:
            raise NotFoundError(
                f"{parsed.name}@{record.version} holds the weights alone: what was beside them is kept by "
                'include="all" of a save',
                model=parsed.name,
            )
        model = self._access.opened(parsed.name, record.variants[CHECKPOINT])
        work = self._access.work(progress).begin(model.manifest.nbytes, f"loading {ref}")
        tensors = model.load(model.shares(as_layout(None), None), work, device=device)
        return structure(model.file(FILE), tensors)
