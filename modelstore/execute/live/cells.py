"""Tensors in memory, and what they are seen through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from modelstore.execute.live.pages import Image
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest
from modelstore.plan.update import Slot

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cell:
    """The values of a slot; on the host also the image that they are seen through, and which chunks are not as there.

    `digest`: of a part of a tensor, the BLAKE3 of its bytes as they were read; "" where it is not known.
    """

    tensor: torch.Tensor
    buffer: Bytes | None = None
    image: Image | None = None
    start: int = 0
    apart: frozenset[int] = frozenset()
    digest: str = ""

    def host(self) -> Bytes:
        """The bytes in host memory."""
        from modelstore.execute.read import tensors as ten

        data = ten.bytes_of(self.tensor.cpu()) if self.buffer is None else self.buffer
        return np.empty(0, np.uint8) if data is None else data


@dataclass(frozen=True)
class LoadedVersion:
    """One version in memory."""

    manifest: Manifest
    cells: Mapping[Slot, Cell] = field(default_factory=dict)
