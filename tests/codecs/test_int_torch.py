"""`int` in torch: the bits of the kernels, on the CPU and, where there is one, on a CUDA device."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelstore.codecs.integer.codec import Int
from modelstore.codecs.integer.torch import Quantized, dequantize, quantize
from modelstore.format.buffers import as_bytes
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import KINDS, make

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_same_bits(dtype: str, method: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    d, shape = DTYPES[dtype], (24, 200)
    for bits, symmetric, size, kind in product((2, 3, 4, 8), (True, False), (16, 128), KINDS):
        raw = make(kind, shape, d)
        weight = torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)
        codec = Int(bits, symmetric, "group", size, method)
        planes = codec.encode(raw, shape, d)
        packed, scales, zeros = codec.layout.unplane(planes, shape, d)
        out = np.empty((1, raw.size), np.uint8)
        codec.decode(planes, shape, d, out)
        found = Quantized(*(x.cpu() for x in quantize(weight.to(device), bits, symmetric, size, method)))
        what = f"{bits} {symmetric} {size} {kind}"
        assert np.array_equal(found.scale.to(torch.float32).numpy(), scales), what
        assert np.array_equal(found.zero.numpy(), zeros), what
        assert np.array_equal(pack(found.codes.numpy(), bits), packed), what
        back = dequantize(Quantized(*(x.to(device) for x in found)), size, weight.dtype).cpu()
        assert back.contiguous().view(torch.uint8).numpy().tobytes() == as_bytes(out.reshape(-1)).tobytes(), what


class LikeCuda(TorchDispatchMode):
    """Divides by a number as CUDA does: times its reciprocal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return func(args[0], 1) * (1.0 / args[1])
        return func(*args, **(kwargs or {}))


def test_nothing_is_divided_by_a_number_that_a_gpu_would_take_the_reciprocal_of() -> None:
    """What only a GPU showed before."""
    with LikeCuda():
        assert not torch.equal(torch.arange(99.0) / 7.5, torch.arange(99.0) / torch.tensor(7.5)), "the trap is there"
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for bits, symmetric, method in product((2, 3, 4, 8), (True, False), ("minmax", "mse")):
        wanted = quantize(weight, bits, symmetric, 128, method)
        with LikeCuda():
            found = quantize(weight, bits, symmetric, 128, method)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (bits, symmetric, method)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit after bit, by hand."""
    stored = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    every = np.unpackbits(stored[..., None], axis=2, bitorder="little", count=bits)
    return np.packbits(every.reshape(len(codes), -1), axis=1, bitorder="little")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix of floats"):
        quantize(torch.zeros(4))
    with pytest.raises(ValueError, match="matrix of floats"):
        quantize(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="known are minmax and mse"):
        quantize(torch.zeros(4, 4), method="hqq")
