"""Weights that were solved again, in files until they are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.execute.read.tensors import bytes_of
from modelstore.format.digest import name_of
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Tensor


class SolvedWeights:
    """Tensors by the name that they replace, mapped from files of a temporary folder, which is removed with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="modelstore-restructure-")
        self._arrays: dict[str, NDArray[Any]] = {}

    def put(self, tensor: Tensor, value: torch.Tensor) -> None:
        """Keep a tensor's new values, in its own dtype. `OSError` if the disk is full."""
        raw = bytes_of(value.contiguous())
        assert raw is not None, "solved weights have a dtype that is stored"
        path = Path(self._folder.name) / str(len(self._arrays))
        path.write_bytes(raw.data)
        words = np.dtype(f"V{DTYPES[tensor.dtype].itemsize}")
        self._arrays[tensor.name] = np.memmap(path, words, mode="r", shape=tuple(value.shape))

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The tensors, as words of their dtype's size."""
        return self._arrays

    def digests(self) -> dict[str, str]:
        """The digest of each tensor, by the name that it replaces."""
        return {name: name_of(array.reshape(-1).view(np.uint8)) for name, array in self._arrays.items()}

    def close(self) -> None:
        """Remove the files."""
        self._arrays.clear()
        self._folder.cleanup()
