"""Encoding on a GPU what gives the same bits there."""

from __future__ import annotations

from collections.abc import Callable

from modelstore.codecs.look import Look
from modelstore.codecs.weight import Encode, EncodeOn, WeightCodec
from modelstore.format.dtypes import DType
from modelstore.format.region import extent

FitTensor = Callable[[Look], Encode]

_FLOATS = ("bfloat16", "float16", "float32", "float64")


def fit_on(codec: WeightCodec, device: str | None) -> FitTensor:
    """As `codec.fit`, with what is encoded afterwards encoded on a device of torch, where that gains something."""
    encode = codec.on_device
    if device is None or encode is None:
        return codec.fit
    return lambda look: _encoding(encode, look.dtype, device) if look.dtype.name in _FLOATS else codec.fit(look)


def _encoding(encode: EncodeOn, dtype: DType, device: str) -> Encode:
    return lambda values, region: encode(values, extent(region), dtype, device)
