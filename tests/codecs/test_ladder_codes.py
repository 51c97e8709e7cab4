"""The ladder with int4 codes from elsewhere: int4 is they, bit for bit; int8 and the original are as without them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelstore.codecs.ladder.codec import Ladder
from modelstore.codecs.ladder.codes import GIVEN_PLANES
from modelstore.codecs.ladder.planes import BLOCK
from modelstore.codecs.numeric.numbers import numpy_dtype
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Shape
from modelstore.testing import weight_codec
from modelstore.testing.codec import hostile
from modelstore.testing.weight_codec import KINDS, mutated
from tests.codecs import quantizers
from tests.codecs.test_ladder import NAMES, decode, normal

OWN = {variant: Ladder(variant) for variant in GIVEN_PLANES}


def raw(scales: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(scales).reshape(-1).view(np.uint8)


def floats(values: Bytes, shape: Shape, d: DType) -> NDArray[np.float32]:
    return values.view(numpy_dtype(d)).astype(np.float32).reshape(shape)


def read(variant: str, planes: Any, shape: Shape, d: DType, group: int, own: int = 128) -> Bytes:
    codec = Ladder(variant, own, group)
    return decode(codec, planes[: len(codec.planes(d))], shape, d, 2 * d.itemsize, 5)


def check(values: Bytes, shape: Shape, d: DType, codes: NDArray[np.int8], scales: NDArray[Any], group: int) -> Any:
    """The planes, after all three variants are what they should be."""
    planes = Ladder("original", 128, group).encode_with(values, shape, d, codes, raw(scales))
    assert read("original", planes, shape, d, group).tobytes() == values.tobytes()
    own = OWN["original"].encode(values, shape, d)
    assert read("int8", planes, shape, d, group).tobytes() == decode(OWN["int8"], own[:3], shape, d).tobytes()
    with np.errstate(over="ignore"):
        want = (codes.astype(np.float32) * quantizers.spread(scales, group, shape[1])).astype(numpy_dtype(d))
    assert read("int4", planes, shape, d, group).tobytes() == want.tobytes()
    assert [as_bytes(planes[i]).tobytes() for i in (2, 4, 5)] == [as_bytes(own[i]).tobytes() for i in (0, 2, 3)]
    return planes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_error_feedback(name: str, group: int) -> None:
    d, shape = DTYPES[name], (96, 384)
    values = normal(shape, d, 5)
    weights = floats(values, shape, d)
    scales = (quantizers.largest(weights, group) / 7.5).astype(numpy_dtype(d))
    codes = quantizers.feedback(weights, scales, group)
    assert (codes != quantizers.nearest(weights, scales, group)).mean() > 0.05
    planes = check(values, shape, d, codes, scales, group)
    for bits, variant in ((4, "int4"), (8, "int8")):
        view = Ladder(variant, 128, group).view
        assert view is not None
        assert (view.group, view.bits) == (group if bits == 4 else 128, bits)
    view = Ladder("int4", 128, group).view
    assert view is not None
    arrays = view.arrays(planes[:2], shape, d)
    assert np.array_equal(arrays["codes"], codes)
    assert arrays["scales"].tobytes() == scales.tobytes()


def bits(planes: Any, count: int) -> float:
    return 8 * sum(as_bytes(plane).size for plane in planes) / count


@pytest.mark.parametrize(("way", "most"), [("feedback", 1.0), ("clipped", 0.7), ("feedback and clipped", 1.1)])
def test_what_they_cost(way: str, most: float) -> None:
    d, shape = DTYPES["bfloat16"], (512, 512)
    random = np.random.default_rng(0)
    numbers = random.standard_normal(shape) * random.lognormal(-4, 0.3, (512, 1))
    values = np.ascontiguousarray(numbers.astype(numpy_dtype(d))).reshape(-1).view(np.uint8)
    weights = floats(values, shape, d)
    how = numpy_dtype(d)
    scales = (
        quantizers.clipped(weights, 128, how)
        if "clipped" in way
        else (quantizers.largest(weights, 128) / 7.5).astype(how)
    )
    codes = (quantizers.feedback if "feedback" in way else quantizers.nearest)(weights, scales, 128)
    planes = check(values, shape, d, codes, scales, 128)
    own = OWN["original"].encode(values, shape, d)
    more = bits(planes, weights.size) - bits(own, weights.size)
    assert more < most + 0.15  # the given codes themselves take more than the ladder's own where they are clipped
    assert bits(planes[3:4], weights.size) < most
    assert abs(bits(planes, weights.size) * weights.size / 8 / Ladder("original", 128, 128).size(shape, d) - 1) < 0.1


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_codes_for_any_values(data: st.DataObject) -> None:
    d = DTYPES[data.draw(st.sampled_from(NAMES))]
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 300)))
    group = data.draw(st.sampled_from([2, 6, 32, 64, 128, 256, 1000]))
    values = weight_codec.make(data.draw(st.sampled_from(KINDS)), shape, d, 2)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = random.integers(-8, 8, shape).astype(np.int8)
    exponents = random.integers(-60, 60, (shape[0], -(-shape[1] // group)))
    scales = (random.choice([-1, 0, 1, 1, 1], exponents.shape) * 2.0**exponents).astype(np.float32)
    scales = np.clip(scales, -6e4, 6e4).astype(numpy_dtype(d))
    check(values, shape, d, codes, scales, group)


@pytest.mark.parametrize("name", NAMES)
def test_several_blocks(name: str) -> None:
    d, shape = DTYPES[name], (3, BLOCK // 2 + 1)
    values = normal(shape, d)
    weights = floats(values, shape, d)
    scales = (quantizers.largest(weights, 64) / 7).astype(numpy_dtype(d))
    check(values, shape, d, quantizers.nearest(weights, scales, 64), scales, 64)


def test_without_codes_int4_is_rounded_to_nearest() -> None:
    d, shape = DTYPES["bfloat16"], (33, 300)
    values = normal(shape, d)
    planes = Ladder("original", 128, 32).encode(values, shape, d)
    assert read("original", planes, shape, d, 32).tobytes() == values.tobytes()
    own = Ladder("int4", 32)
    assert (
        read("int4", planes, shape, d, 32).tobytes()
        == decode(own, own.encode(values, shape, d)[:2], shape, d).tobytes()
    )


def test_what_does_not_fit_is_refused() -> None:
    d, shape = DTYPES["bfloat16"], (2, 128)
    values, codec = normal(shape, d), Ladder("original", 128, 128)
    good, scale = np.zeros(shape, np.int8), np.full(2, 0x3C00, np.uint16).view(np.uint8)
    for codes in (good[:1], good.astype(np.int16), good + np.int8(8), good - np.int8(9)):
        with pytest.raises(ValueError, match="codes"):
            codec.encode_with(values, shape, d, codes, scale)
    for wrong in (scale[:2], np.full(2, 0x7F80, np.uint16).view(np.uint8)):
        with pytest.raises(ValueError, match="scale"):
            codec.encode_with(values, shape, d, good, wrong)
    with pytest.raises(ValueError, match="has no codes_group_size"):
        OWN["original"].encode_with(values, shape, d, good, scale)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_planes(name: str) -> None:
    """Every single-byte change, truncation and extension of what is not the ladder's own; anything else at random."""
    d, shape = DTYPES[name], (3, 60)
    codec = Ladder("original", 128, 32)
    planes = [as_bytes(p).tobytes() for p in codec.encode(normal(shape, d), shape, d)]
    for i in range(4):
        for bad in hostile(planes[i]):
            with suppress(FormatError):
                decode(codec, [*planes[:i], bad, *planes[i + 1 :]], shape, d, 2 * d.itemsize, 3)
    for variant in GIVEN_PLANES:
        with pytest.raises(FormatError, match="planes are stored where there are"):
            decode(Ladder(variant, 128, 32), planes[:3], shape, d)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_planes_give_an_error_or_values(data: st.DataObject) -> None:
    d, shape = DTYPES[data.draw(st.sampled_from(NAMES))], (5, 130)
    codec = Ladder(data.draw(st.sampled_from(list(GIVEN_PLANES))), 128, 64)
    planes = [as_bytes(p).tobytes() for p in codec.encode(normal(shape, d), shape, d)[: len(codec.planes(d))]]
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(planes) - 1))
        planes[i] = mutated(planes[i], data)
    with suppress(FormatError):
        decode(codec, planes, shape, d, 2 * d.itemsize, 5)
