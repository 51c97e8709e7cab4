"""`lossless`: byte planes, entropy-coded where that helps. Every dtype, every bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


@dataclass(frozen=True, slots=True)
class Lossless:
    """One plane, `data`, laid out as docs/codecs.md says. At most 4 + 4 bytes a piece of 128 KiB larger than raw."""

    @property
    def name(self) -> str:
        return "lossless"

    @property
    def exact(self) -> bool:
        return True

    @property
    def needs_base(self) -> bool:
        return False

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("data",)

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        return (byteplanes.encode(values, dtype),)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        byteplanes.decode(check.single(planes), dtype, out)
