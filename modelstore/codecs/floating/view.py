"""How engines take float8 and float4 weights: the names, shapes and dtypes of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.numeric import scaled
from modelstore.codecs.weight import EngineTensor, is_convolution, matrix
from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

_Arrays = Mapping[str, NDArray[Any]]


def _weights(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs."""
    common = {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    return common | more


@dataclass(frozen=True, slots=True)
class Fp8View:
    """float-quantized: `weight` in float8_e4m3fn, `weight_scale` [1], [rows, 1] or [rows / block, columns / block]."""

    granularity: str
    block: int

    @property
    def format(self) -> str:
        """As `EngineView.format`."""
        return "float-quantized"

    def scheme(self) -> dict[str, Any]:
        """As `EngineView.scheme`."""
        if self.granularity == "block":
            return _weights(8, "block", group_size=None, block_structure=[self.block, self.block])
        return _weights(8, self.granularity, group_size=None)

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:
        """As `EngineView.cells`. `UnsupportedError` for blocks in a stack of matrices."""
        scale = {"tensor": (0, 0), "channel": (1, 0), "block": (self.block, self.block)}[self.granularity]
        if self.granularity == "block" and len(shape) > 2 and not is_convolution(shape):
            raise UnsupportedError(
                f"engines have no layout for blocks in a stack of matrices, {list(shape)}: dequantize it"
            )
        return {"codes": (1, 1), "scale": scale}

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """As `EngineView.arrays`: codes uint8 (rows, columns), scale in its dtype (rows, columns of scales)."""
        self.cells(shape)
        codes, scale = check.planes(planes, ("codes", "scale"))
        rows, columns = matrix(shape)
        high, wide = {
            "tensor": (1, 1),
            "channel": (rows, 1),
            "block": (-(-rows // self.block), -(-columns // self.block)),
        }[self.granularity]
        data = check.plane(codes, rows * columns, "codes")
        kind = scaled.numpy_dtype_of(scaled.scale_dtype(dtype))
        scales = check.plane(scale, high * wide * kind.itemsize, "scale").view(kind)
        return {"codes": data.reshape(rows, columns), "scale": scales.reshape(high, wide)}

    def parts(self, arrays: _Arrays, shape: Shape, dtype: DType) -> dict[str, EngineTensor]:
        """As `EngineView.parts`."""
        scale = arrays["scale"]
        size = (1,) if self.granularity == "tensor" else scale.shape
        return {
            "weight": EngineTensor("float8_e4m3fn", shape, _raw(arrays["codes"])),
            "weight_scale": EngineTensor(scaled.scale_dtype(dtype), size, _raw(scale)),
        }


@dataclass(frozen=True, slots=True)
class _Packed:
    """`weight_packed`: two codes a byte, the first in the low bits; `weight_scale`: a byte a block; whole blocks only."""

    width = 0

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:
        """As `EngineView.cells`. `UnsupportedError` if rows are not whole blocks."""
        columns = matrix(shape)[1]
        if columns % self.width:
            raise UnsupportedError(
                f"engines take rows of whole blocks of {self.width} only, and {columns} columns are none: dequantize it"
            )
        return {"codes": (1, 1), "scale": (1, self.width)}

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        """As `EngineView.arrays`: codes uint8 (rows, columns), scale uint8 (rows, blocks)."""
        self.cells(shape)
        rows, columns = matrix(shape)
        data = check.plane(planes[0], rows * columns // 2, "codes").reshape(rows, -1)
        codes = np.empty((rows, columns), np.uint8)
        codes[:, ::2] = data & 15
        codes[:, 1::2] = data >> 4
        scales = check.plane(planes[1], rows * columns // self.width, "scale")
        return {"codes": codes, "scale": scales.reshape(rows, -1)}

    def _parts(self, arrays: _Arrays, shape: Shape, kind: str) -> dict[str, EngineTensor]:
        self.cells(shape)
        rows, columns = matrix(shape)
        codes = arrays["codes"]
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        return {
            "weight_packed": EngineTensor("uint8", (rows, columns // 2), _raw(packed)),
            "weight_scale": EngineTensor(kind, (rows, columns // self.width), _raw(arrays["scale"])),
        }


@dataclass(frozen=True, slots=True)
class Mxfp4View(_Packed):
    """mxfp4-pack-quantized: `weight_packed`, and `weight_scale` in uint8, E8M0's bits."""

    width = 32

    @property
    def format(self) -> str:
        """As `EngineView.format`."""
        return "mxfp4-pack-quantized"

    def scheme(self) -> dict[str, Any]:
        """As `EngineView.scheme`."""
        return _weights(4, "group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """As `EngineView.arrays`."""
        return _Packed.arrays(self, check.planes(planes, ("codes", "scale")), shape, dtype)

    def parts(self, arrays: _Arrays, shape: Shape, dtype: DType) -> dict[str, EngineTensor]:  # noqa: ARG002
        """As `EngineView.parts`."""
        return self._parts(arrays, shape, "uint8")


@dataclass(frozen=True, slots=True)
class Nvfp4View(_Packed):
    """nvfp4-pack-quantized: `weight_packed`, `weight_scale` in float8_e4m3fn, `weight_global_scale` float32 [1]."""

    width = 16

    @property
    def format(self) -> str:
        """As `EngineView.format`."""
        return "nvfp4-pack-quantized"

    def scheme(self) -> dict[str, Any]:
        """As `EngineView.scheme`."""
        return _weights(
            4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn", zp_dtype="torch.float8_e4m3fn"
        )

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:
        """As `EngineView.cells`."""
        return {**_Packed.cells(self, shape), "global": (0, 0)}

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """As `EngineView.arrays`: of `_Packed`, and global float32 (1, 1)."""
        planes = check.planes(planes, ("codes", "scale", "global"))
        found = _Packed.arrays(self, planes, shape, dtype)
        return found | {"global": scaled.unplane(planes[2], (1, 1), "float32", "global")}

    def parts(self, arrays: _Arrays, shape: Shape, dtype: DType) -> dict[str, EngineTensor]:  # noqa: ARG002
        """As `EngineView.parts`."""
        found = self._parts(arrays, shape, "float8_e4m3fn")
        return found | {"weight_global_scale": EngineTensor("float32", (1,), _raw(arrays["global"]))}


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
