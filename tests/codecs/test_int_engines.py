"""`int` against compressed-tensors: the same scales, codes and packing, and decompressed to the same bits."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from modelstore.codecs.integer.codec import Int
from modelstore.codecs.integer.view import without_zero_points
from modelstore.codecs.weight import EngineTensor
from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.testing.weight_codec import make

pytest.importorskip("compressed_tensors", reason="compressed-tensors is in the dev extra")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

SHAPE = (48, 256)
EXPORTED = [
    Int(bits, symmetric, granularity, 64, method)
    for bits, symmetric, granularity, method in product(
        (2, 3, 4, 8), (True, False), ("group", "channel", "tensor"), ("minmax", "mse")
    )
]
NAMED = {"ids": str}


def scheme(codec: Int) -> QuantizationScheme:
    assert codec.view is not None
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**codec.view.scheme()))


def tensor(part: EngineTensor) -> torch.Tensor:
    return torch.from_numpy(part.data.copy()).view(getattr(torch, part.dtype)).reshape(part.shape)


def parts(codec: Int, values: Bytes, shape: tuple[int, ...], dtype: DType) -> dict[str, torch.Tensor]:
    view = codec.view
    assert view is not None
    arrays = view.arrays(codec.encode(values, shape, dtype), shape, dtype)
    return {name: tensor(part) for name, part in view.parts(arrays, shape, dtype).items()}


def decoded(codec: Int, planes: tuple[Buffer, ...], shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
    out = np.empty((1, int(np.prod(shape)) * dtype.itemsize), np.uint8)
    codec.decode(planes, shape, dtype, out)
    return torch.from_numpy(out.reshape(-1)).view(getattr(torch, dtype.name)).reshape(shape)


def compressor(codec: Int) -> Any:
    assert codec.view is not None
    return BaseCompressor.get_value_from_registry(codec.view.format)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    raw = [x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


@pytest.mark.parametrize("codec", EXPORTED, **NAMED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 16, 192), (7, 64)], **NAMED)
def test_decompressed_to_the_same_bits(codec: Int, dtype: str, shape: tuple[int, ...]) -> None:
    d = DTYPES[dtype]
    values = make("normal", shape, d)
    state = parts(codec, values, shape, d)
    assert set(state) == set(compressor(codec).compression_param_names(scheme(codec)))
    expected = decoded(codec, codec.encode(values, shape, d), shape, d)
    if len(shape) == 2:
        found = compressor(codec).decompress(state, scheme(codec))["weight"]
        assert same(found, expected)
    else:
        for i in range(shape[0]):  # an expert of a stack is a weight of its own
            one = {name: part[i] if name != "weight_shape" else part[1:] for name, part in state.items()}
            assert same(compressor(codec).decompress(one, scheme(codec))["weight"], expected[i])


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_zero_points_they_are_the_same_numbers(bits: int, granularity: str) -> None:
    codec = Int(bits, False, granularity, 64, "minmax")
    assert codec.view is not None
    view = without_zero_points(codec.view)
    if bits == 8:
        assert view is None  # there are no more bits
        return
    assert view is not None
    assert without_zero_points(view) is None  # it has none
    d = DTYPES["bfloat16"]
    shifted = torch.from_numpy(make("normal", SHAPE, d)).view(torch.bfloat16) + 0.5  # zero points far from the middle
    planes = codec.encode(shifted.view(torch.uint8).numpy(), SHAPE, d)
    state = {name: tensor(part) for name, part in view.parts(view.arrays(planes, SHAPE, d), SHAPE, d).items()}
    said = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**view.scheme()))
    assert (said.weights.symmetric, said.weights.num_bits) == (True, 4 if bits < 4 else 8)
    found = BaseCompressor.get_value_from_registry(view.format).decompress(state, said)["weight"]
    assert same(found, decoded(codec, planes, SHAPE, d))


@pytest.mark.parametrize("codec", [c for c in EXPORTED if c.method == "minmax" and c.granularity != "tensor"], **NAMED)
def test_the_same_scales_zero_points_and_packing(codec: Int) -> None:
    """What compressed-tensors makes of the same weights in float32, in which it computes as we do."""
    d = DTYPES["float32"]
    values = make("normal", SHAPE, d)
    weight = torch.from_numpy(values.copy()).view(torch.float32).reshape(SHAPE)
    args = scheme(codec).weights
    groups = weight.unflatten(1, (-1, codec.group_size if codec.granularity == "group" else SHAPE[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale}
    if not codec.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    theirs = compressor(codec).compress(state, scheme(codec))
    ours = parts(codec, values, SHAPE, d)
    assert set(ours) == set(theirs)
    assert all(same(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("codec", [Int(4, s, g, 64) for s in (True, False) for g in ("group", "channel")], **NAMED)
def test_slices_of_ranks(codec: Int) -> None:
    """Regions' arrays, put together and cut along rows or columns, decompress to the slice of the decoded weight."""
    d = DTYPES["bfloat16"]
    view = codec.view
    assert view is not None
    values = make("normal", SHAPE, d)
    planes = codec.encode(values, SHAPE, d)
    arrays, whole = view.arrays(planes, SHAPE, d), decoded(codec, planes, SHAPE, d)
    cells = view.cells(SHAPE)
    for rows, columns in ((slice(8, 31), slice(0, 256)), (slice(0, 48), slice(64, 192))):
        extent = (rows.stop - rows.start, columns.stop - columns.start)
        cut = {}
        for name, array in arrays.items():
            high, wide = cells[name]
            box = (
                rows if high else slice(None),
                slice(columns.start // wide, columns.stop // wide) if wide else slice(None),
            )
            cut[name] = array[box]
        state = {name: tensor(part) for name, part in view.parts(cut, extent, d).items()}
        assert same(compressor(codec).decompress(state, scheme(codec))["weight"], whole[rows, columns].contiguous())


def test_which_format() -> None:
    assert Int(8, True, "channel").view.format == "pack-quantized"
    assert Int(8, True, "tensor").view.format == "pack-quantized"
    assert Int(8, True, "group").view.format == "pack-quantized"
    assert Int(8, False, "channel").view.format == "pack-quantized"
    assert Int(4, True, "channel").view.format == "pack-quantized"
    assert Int(4, True, "block").view is None


@pytest.mark.parametrize("shape", [(256,), (8, 4, 3, 3), (8, 100)], **NAMED)
def test_what_engines_have_no_layout_for(shape: tuple[int, ...]) -> None:
    view = Int().view
    with pytest.raises(UnsupportedError, match="dequantize it"):
        view.cells(shape)
