"""The contract of a codec: a pure, synchronous pair of functions between a region's raw bytes and its planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


class Codec(Protocol):
    """One codec with its parameters. Inputs are never changed, nothing is kept between calls, all threads may call it."""

    @property
    def name(self) -> str:
        """The codec's name in manifests and recipes."""

    @property
    def exact(self) -> bool:
        """Whether decode gives back every bit."""

    @property
    def needs_base(self) -> bool:
        """Whether encode and decode need the same region of a base tensor. Each element depends on the base's same one alone."""

    def planes(self, dtype: DType) -> tuple[str, ...]:
        """Names of the planes that a tensor of that dtype is stored as, in the order of encode's result."""

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:
        """One buffer per plane. `values`, and `base` where needed: the region's raw little-endian bytes, 1-d, row-major."""

    def decode(
        self, planes: Sequence[Buffer], shape: Shape, dtype: DType, out: Bytes, base: Bytes | None = None
    ) -> None:
        """Write the region's raw bytes into `out`: 2-d (rows, bytes of a row), rows contiguous in themselves, any stride between.

        `rows * bytes of a row` is the region's size; a row holds whole elements. `base` as for encode; it may be the memory of
        `out` itself, where that is one run of bytes.
        `FormatError` if the planes are not what encode makes: whatever they hold, nothing outside `out` is written and
        no more memory is taken than a small multiple of the region.
        """
