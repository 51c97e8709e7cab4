"""How engines take integer weights: the names, shapes and packing of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.integer.planes import IntLayout
from modelstore.codecs.numeric import scaled
from modelstore.codecs.weight import EngineTensor, EngineView, is_convolution, matrix
from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

_Arrays = Mapping[str, NDArray[Any]]
_MOST_BITS = 8


@dataclass(frozen=True, slots=True)
class PackedView:
    """pack-quantized: `weight_packed` in int32, `weight_scale`, `weight_shape`; affine: `weight_zero_point`, packed downwards.

    8 bits are packed too: vLLM takes int8 weights in int-quantized only beside int8 activations. A tensor's one scale is
    given to engines once for each channel, which they all know.
    """

    layout: IntLayout

    @property
    def format(self) -> str:
        """As `EngineView.format`."""
        return "pack-quantized"

    def scheme(self) -> dict[str, Any]:
        """As `EngineView.scheme`."""
        grouped = self.layout.granularity == "group"
        return {
            "num_bits": self.layout.bits,
            "type": "int",
            "symmetric": self.layout.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.layout.group_size if grouped else None,
            "dynamic": False,
        }

    def cells(self, shape: Shape) -> Mapping[str, tuple[int, int]]:
        """As `EngineView.cells`. `UnsupportedError` if engines have no layout for such a weight."""
        if len(shape) < 2 or is_convolution(shape):
            raise UnsupportedError(
                f"engines take matrices and stacks of them, which {list(shape)} is not: dequantize it"
            )
        size = self.layout.group_size
        if self.layout.granularity == "group" and shape[-1] % size:
            raise UnsupportedError(
                f"engines take rows of whole groups of {size} only, and {shape[-1]} columns are none: dequantize it"
            )
        cell = {"tensor": (0, 0), "channel": (1, 0), "group": (1, size)}[self.layout.granularity]
        return {"codes": (1, 1)} | dict.fromkeys(self.layout.names[1:], cell)

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """As `EngineView.arrays`: codes uint8 (rows, columns), scale in its dtype, zero uint8, both (rows, groups).

        Codes and zero points are stored ones: 2^(bits - 1) above what they stand for.
        """
        from modelstore.codecs.kernels import bits

        self.cells(shape)
        packed = self.layout.unplane(planes, shape, dtype)[0]
        codes = np.empty(matrix(shape), np.uint8)
        bits.kernels()[1](packed, self.layout.bits, codes)
        grid = self.layout.grid(shape)
        kind = scaled.numpy_dtype_of(scaled.scale_dtype(dtype))
        count = grid[0] * grid[1]
        found = {"codes": codes, "scale": check.plane(planes[1], count * kind.itemsize, "scale").view(kind)}
        if not self.layout.symmetric:
            found["zero"] = check.plane(planes[2], count, "zero")
        return found | {name: found[name].reshape(grid) for name in self.layout.names[1:]}

    def _scale(self, arrays: _Arrays, shape: Shape, dtype: DType) -> EngineTensor:
        scale = self._rows(arrays["scale"], shape)
        return EngineTensor(scaled.scale_dtype(dtype), (*shape[:-1], scale.shape[1]), _raw(scale))

    def _rows(self, array: NDArray[Any], shape: Shape) -> NDArray[Any]:
        """With a row for each row of the weight."""
        return np.broadcast_to(array, (matrix(shape)[0], array.shape[1]))

    def parts(self, arrays: _Arrays, shape: Shape, dtype: DType) -> dict[str, EngineTensor]:
        """As `EngineView.parts`. A row, and of zero points a column, ends with a whole word, filled up with zeros."""
        self.cells(shape)
        packed = self._pack(arrays["codes"])
        found = {
            "weight_packed": EngineTensor("int32", (*shape[:-1], packed.shape[1]), _raw(packed)),
            "weight_scale": self._scale(arrays, shape, dtype),
            "weight_shape": EngineTensor("int64", (len(shape),), _raw(np.array(shape, np.int64))),
        }
        if not self.layout.symmetric:
            zero = self._rows(arrays["zero"], shape).reshape(-1, shape[-2], arrays["zero"].shape[1])
            stack = np.stack([self._pack(one.T).T for one in zero])
            found["weight_zero_point"] = EngineTensor("int32", (*shape[:-2], *stack.shape[1:]), _raw(stack))
        return found

    def _pack(self, codes: NDArray[Any]) -> NDArray[np.int32]:
        from modelstore.codecs.kernels import bits

        out = np.zeros((len(codes), -(-codes.shape[1] * self.layout.bits // 32) * 4), np.uint8)
        bits.kernels()[0](np.ascontiguousarray(codes), self.layout.bits, out)
        return out.view(np.int32)


@dataclass(frozen=True, slots=True)
class Int8View(PackedView):
    """int-quantized: `weight` in int8, `weight_scale` [rows, 1]; engines take it beside int8 activations only."""

    @property
    def format(self) -> str:
        """As `EngineView.format`."""
        return "int-quantized"

    def parts(self, arrays: _Arrays, shape: Shape, dtype: DType) -> dict[str, EngineTensor]:
        """As `EngineView.parts`."""
        self.cells(shape)
        weight = EngineTensor("int8", shape, _raw(arrays["codes"] ^ np.uint8(128)))
        return {"weight": weight, "weight_scale": self._scale(arrays, shape, dtype)}


@dataclass(frozen=True, slots=True)
class WiderView(PackedView):
    """pack-quantized without zero points: each code less its zero point, in more bits, by the same scale. The same numbers."""

    stored: IntLayout

    def arrays(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> dict[str, NDArray[Any]]:
        """As `EngineView.arrays`, without zero points."""
        found = PackedView(self.stored).arrays(planes, shape, dtype)
        middle = np.uint8(1 << (self.layout.bits - 1))
        above = np.repeat(middle - found.pop("zero"), self.stored.cell(shape)[1], axis=1)
        found["codes"] += above[:, : found["codes"].shape[1]]  # modulo 256; what comes is in the bits of the layout
        return found


def without_zero_points(view: EngineView) -> EngineView | None:
    """The same numbers without zero points, in 4 or 8 bits, which engines have kernels for; None if that cannot be.

    A code less its zero point takes one bit more than a code, so that 8 bits with zero points have no other form.
    """
    if not isinstance(view, PackedView) or view.layout.symmetric or view.layout.bits == _MOST_BITS:
        return None
    bits = 4 if view.layout.bits < 4 else _MOST_BITS
    return WiderView(replace(view.layout, bits=bits, symmetric=True), view.layout)


def beside_int8(view: EngineView) -> EngineView | None:
    """The same weights as engines take them beside int8 activations; None if these are not 8 bits, symmetric, by channel."""
    scheme = view.scheme()
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    if not isinstance(view, PackedView) or any(scheme[key] != value for key, value in wanted.items()):
        return None
    return Int8View(view.layout)


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
