"""Encoding on a GPU what gives the same bits there: which codecs do, and how."""

from __future__ import annotations

from collections.abc import Callable

from modelstore.codecs import check
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.weight import Encode, ReadValues, WeightCodec, matrix
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent

Fit = Callable[[ReadValues, Shape, DType], Encode]

_FLOATS = ("bfloat16", "float16", "float32", "float64")


def gains(codec: WeightCodec) -> bool:
    """Whether a GPU makes the same of a region, and sooner: groups, searched for their best clip. Pure."""
    return isinstance(codec, Int) and codec.granularity == "group" and codec.method == "mse"


def fit_on(codec: WeightCodec, device: str | None) -> Fit:
    """As `codec.fit`, with what is encoded afterwards encoded on a device of torch, where that gains something."""
    if device is None or not isinstance(codec, Int) or not gains(codec):
        return codec.fit
    return lambda read, shape, dtype: (
        _encoding(codec, dtype, device) if dtype.name in _FLOATS else codec.fit(read, shape, dtype)
    )


def _encoding(codec: Int, dtype: DType, device: str) -> Encode:
    return lambda values, region: encode(codec, values, region, dtype, device)


def encode(codec: Int, values: Bytes, region: Region, dtype: DType, device: str) -> tuple[Buffer, ...]:
    """A region's planes, as `Int.encode` makes them, bit for bit."""
    import torch

    from modelstore.codecs.integer.torch import quantize

    shape = extent(region)
    check.values(values, shape, dtype)
    rows, columns = matrix(shape)
    weight = torch.from_numpy(values).view(getattr(torch, dtype.name)).reshape(rows, columns).to(device)
    found = quantize(weight, codec.bits, codec.symmetric, codec.group_size, codec.method)
    scales, zeros = (x.to(torch.float32).cpu().numpy() for x in (found.scale, found.zero))
    return codec.pack(found.codes.cpu().numpy(), scales, zeros, dtype)
