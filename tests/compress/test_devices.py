"""Groups encoded in torch on a device: the planes of the kernels, bit for bit, so that nobody sees who made them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.codecs.floating.half import Half
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.look import Look
from modelstore.codecs.weight import matrix
from modelstore.compress.devices import fit_on
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import full
from modelstore.testing.weight_codec import KINDS, make

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    size=st.sampled_from([16, 128]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from([(24, 200), (1, 16), (3, 5, 40), (8, 4, 3, 3), (130,), ()]),
)
def test_the_same_planes(
    device: str, bits: int, symmetric: bool, size: int, dtype: str, kind: str, shape: tuple[int, ...]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    codec, d = Int(bits, symmetric, "group", size, "mse"), DTYPES[dtype]
    raw = make(kind, shape, d)
    wanted = codec.encode(raw, shape, d)
    assert codec.on_device is not None
    found = codec.on_device(raw, shape, d, device)
    assert [np.asarray(plane).tobytes() for plane in found] == [np.asarray(plane).tobytes() for plane in wanted]
    assert matrix(shape)[0] * codec.layout.line(matrix(shape)[1]) == len(found[0])


def test_only_what_gains_goes_to_a_device() -> None:
    searched = Int(4, True, "group", 128, "mse")
    assert searched.on_device is not None
    for other in (
        Int(8, True, "channel"),
        Int(4, True, "group", 128, "minmax"),
        Int(4, True, "group", 64, "hqq"),
        Half(),
    ):
        assert other.on_device is None
        assert fit_on(other, "cuda") == other.fit
    assert fit_on(searched, None) == searched.fit
    narrow = DTYPES["float8_e4m3fn"]
    raw = make(KINDS[0], (8, 128), narrow)
    made = fit_on(searched, "cpu")(Look(lambda _: raw, (8, 128), narrow))(raw, full((8, 128)))
    assert np.asarray(made[0]).tobytes() == np.asarray(searched.encode(raw, (8, 128), narrow)[0]).tobytes()
