"""The ladder's int4 and int8 as engines take them: compressed-tensors' pack-quantized, symmetric, in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.ladder.codes import GIVEN_PLANES, PLANES, CodeReader
from modelstore.codecs.ladder.kernels import ZERO
from modelstore.codecs.ladder.planes import BLOCK
from modelstore.codecs.numeric.numbers import from_float32, numpy_dtype
from modelstore.codecs.weight import EngineTensor, matrix
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


@dataclass(frozen=True, slots=True)
class LadderView:
    """Codes of `bits` (4 or 8) with a scale for each group of columns, of which the last one may be shorter.

    `given`: columns of a group of int4 codes that came from elsewhere, 0 if they are the ladder's own.
    """

    bits: int
    own: int
    given: int = 0

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.given or self.own if self.bits == 4 else self.own

    @property
    def format(self) -> str:
        """compressed-tensors' name of the format."""
        return "pack-quantized"

    def scheme(self) -> dict[str, Any]:
        """compressed-tensors' description of the weights."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:  # noqa: ARG002
        """The rows and columns of the matrix that one entry of each array stands for."""
        return {"codes": (1, 1), "scales": (1, self.group)}

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """codes: int8 (rows, columns); scales: the dtype (rows, groups). `planes` are those of int4, or of int8."""
        names = (GIVEN_PLANES if self.given else PLANES)[f"int{self.bits}"]
        if len(planes) != len(names):
            raise FormatError(f"{len(planes)} planes are stored where there are {len(names)}: {', '.join(names)}")
        rows, columns = matrix(shape)
        groups = -(-columns // self.group)
        data = {name: as_bytes(plane) for name, plane in zip(names, planes, strict=True)}
        for plane in data.values():
            plane.flags.writeable = False
        reader = CodeReader(data, rows, columns, self.own, self.given, dtype)
        codes = np.empty(rows * columns, np.uint8)
        for b, first in enumerate(range(0, codes.size, BLOCK)):
            reader.block(b, first, codes[first : first + BLOCK])
        codes -= np.uint8(ZERO if self.bits == 8 else 8)
        scales = reader.raw.copy()
        if self.bits == 8:
            from_float32(reader.scale, dtype, scales.reshape(1, -1))
        how = numpy_dtype(dtype)
        return {"codes": codes.view(np.int8).reshape(rows, columns), "scales": scales.view(how).reshape(rows, groups)}

    def parts(self, arrays: Mapping[str, NDArray[Any]], shape: Shape, dtype: DType) -> dict[str, EngineTensor]:
        """weight_packed (int32, least significant code first), weight_scale and weight_shape; stacks keep their dimensions."""
        codes, scales = arrays["codes"], arrays["scales"]
        rows, columns = codes.shape
        lead = shape[:-1] if len(shape) > 2 and matrix(shape)[1] == shape[-1] else (rows,)
        width = -(-columns * self.bits // 32)
        packed = np.zeros((rows, 4 * width), np.uint8)
        raised = codes.view(np.uint8) + np.uint8(1 << (self.bits - 1))
        if self.bits == 8:
            packed[:, :columns] = raised
        else:
            packed[:, : -(-columns // 2)] = raised[:, ::2]
            packed[:, : columns // 2] |= raised[:, 1::2] << np.uint8(4)
        data = np.ascontiguousarray(scales).view(np.uint8).reshape(-1)
        size = np.array(shape, "<i8")
        return {
            "weight_packed": EngineTensor("int32", (*lead, width), packed.reshape(-1)),
            "weight_scale": EngineTensor(dtype.name, (*lead, scales.shape[1]), data),
            "weight_shape": EngineTensor("int64", size.shape, size.view(np.uint8)),
        }
