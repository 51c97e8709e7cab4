"""The contract of a source of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape
from modelstore.sources.local.reading import Files


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape, without its values."""

    name: str
    dtype: DType
    shape: Shape


class Source(Protocol):
    """Tensors and files to save. Threads may read different tensors, or regions of one, in parallel."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every distinct tensor, in model order (the order of the checkpoint's files and of the tensors within them)."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied tensors: name → the name in `tensors`."""

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        """Other files of the model (config, tokenizer, …): relative POSIX path → a local file or its bytes."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The checkpoint's own metadata (safetensors' `__metadata__`)."""

    @property
    def fingerprint(self) -> str | None:
        """The same text as long as the source holds the same bytes, so that an interrupted save can go on; None if unknown."""

    @property
    def opened(self) -> Files:
        """The files that are read, those of `files` among them; `opened.check()` when all was read."""

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """Write the region's raw little-endian bytes, row-major, into `out`: 1-d, exactly as long as the region.

        Takes no more memory than a small multiple of `out`, whatever the tensor's size.
        """

    def close(self) -> None:
        """Let go of files and memory."""
