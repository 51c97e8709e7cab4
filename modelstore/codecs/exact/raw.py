"""`raw`: the bytes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelstore.codecs import check
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


@dataclass(frozen=True, slots=True)
class Raw:
    """One plane, `data`: the region's raw bytes. Encoding copies nothing: the plane is the memory of the values."""

    @property
    def name(self) -> str:
        return "raw"

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
        return (values,)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        data = as_bytes(check.single(planes))
        if data.size != out.size:
            raise FormatError(f"{data.size} raw bytes are stored where a region of {dtype.name}{shape} has {out.size}")
        out[:] = data.reshape(out.shape)
