"""Tensors that wait for the next pass: in memory up to a limit, beyond it in a file without a name."""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np
import torch


class Spool:
    """Tensors in their order. `memory`: bytes that stay in memory; the file is gone with the spool."""

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._held: list[torch.Tensor | tuple[int, torch.dtype, torch.Size]] = []
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def append(self, tensor: torch.Tensor) -> None:
        """Put one more tensor behind the others. `OSError` if the disk is full."""
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._held.append(tensor)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="modelstore-spool-")  # noqa: SIM115  closed with the spool
        at = self._file.seek(0, 2)
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._held.append((at, tensor.dtype, tensor.shape))

    def __getitem__(self, index: int) -> torch.Tensor:
        found = self._held[index]
        if isinstance(found, torch.Tensor):
            return found
        assert self._file is not None, "what is not in memory is in the file"
        at, dtype, shape = found
        raw = np.empty(shape.numel() * dtype.itemsize, np.uint8)
        self._file.seek(at)
        done = self._file.readinto(raw.data)  # type: ignore[attr-defined]
        if done != raw.size:
            raise OSError(f"the spool in {tempfile.gettempdir()} was cut short: {done} of {raw.size} bytes")
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def close(self) -> None:
        """Let go of all tensors."""
        self._held.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
