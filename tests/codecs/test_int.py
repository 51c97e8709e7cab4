"""`int`: the contract in every granularity and method; its arithmetic by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from modelstore.codecs.integer.codec import Int
from modelstore.codecs.loss import loss_of
from modelstore.codecs.numeric.numbers import numpy_dtype
from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import WeightContract, make

BF16 = DTYPES["bfloat16"]


class IntContract(WeightContract):
    idempotent = False  # the largest number of a group lies between two codes


class TestInt4(IntContract):
    codec = Int(group_size=64)


class TestInt3AffineClipped(IntContract):
    codec = Int(bits=3, symmetric=False, group_size=16, method="mse")


class TestInt4HalfQuadratic(IntContract):
    codec = Int(symmetric=False, group_size=64, method="hqq")


class TestInt2HalfQuadratic(IntContract):
    codec = Int(bits=2, group_size=16, method="hqq")
    floor = 8.0


class TestInt8Channel(IntContract):
    codec = Int(bits=8, granularity="channel")
    floor = 40.0


class TestInt4AffineChannelClipped(IntContract):
    codec = Int(symmetric=False, granularity="channel", method="mse")


class TestInt8Tensor(IntContract):
    codec = Int(bits=8, granularity="tensor")
    floor = 35.0


class TestInt8AffineTensorClipped(IntContract):
    codec = Int(bits=8, symmetric=False, granularity="tensor", method="mse")
    floor = 35.0


class TestInt4Block(IntContract):
    codec = Int(granularity="block", group_size=32, method="mse")


class TestInt8AffineBlock(IntContract):
    codec = Int(bits=8, symmetric=False, granularity="block", group_size=64)
    floor = 35.0


def encode(codec: Int, numbers: Any, dtype: str = "float32") -> list[bytes]:
    array = np.asarray(numbers, numpy_dtype(DTYPES[dtype]))
    planes = codec.encode(array.reshape(-1).view(np.uint8), array.shape, DTYPES[dtype])
    return [np.asarray(plane).tobytes() for plane in planes]


def sqnr(codec: Int, kind: str = "normal", shape: tuple[int, int] = (64, 640)) -> float:
    values = make(kind, shape, BF16, 5)
    out = np.empty((1, values.size), np.uint8)
    codec.decode(codec.encode(values, shape, BF16), shape, BF16, out)
    return loss_of(values, out[0], BF16).sqnr


def test_bytes_by_hand() -> None:
    row = [[-7.5, 7.0, 1.0, 0.5, 1.5]]
    codes, scale = encode(Int(4), row)  # codes -8 (half to even), 7, 1, 0, 2; each 8 higher as stored
    assert np.frombuffer(scale, np.float32).tolist() == [1.0]
    assert codes == bytes([0xF0, 0x89, 0x0A])
    codes, scale, zero = encode(Int(2, symmetric=False), [[0.0, 1.0, 2.0, 3.0, 3.0]])
    assert (codes, zero) == (bytes([0b11100100, 0b11]), b"\0")
    assert np.frombuffer(scale, np.float32).tolist() == [1.0]
    codes, _ = encode(Int(3), [[-3.5, 3.0, 0, 1, 2, -1, -2, -3, 3]])
    stored = [0, 7, 4, 5, 6, 3, 2, 1, 7]
    word = sum(code << 3 * i for i, code in enumerate(stored))
    assert codes == word.to_bytes(4, "little")
    codes, _ = encode(Int(8), [[-127.5, 3, 0]])
    assert codes == bytes([0, 131, 128])


def test_each_row_begins_a_byte() -> None:
    codes, scale = encode(Int(4), np.ones((5, 3)))
    assert (len(codes), len(scale)) == (10, 20)


def test_channels_share_a_scale_over_the_columns_and_blocks_over_rows_too() -> None:
    matrix = np.arange(1.0, 257.0).reshape(4, 64)
    assert np.frombuffer(encode(Int(8, granularity="channel"), matrix)[1], np.float32).tolist() == [
        np.float32(top) / np.float32(127.5) for top in (64, 128, 192, 256)
    ]
    assert np.frombuffer(encode(Int(8, granularity="tensor"), matrix)[1], np.float32).tolist() == [
        np.float32(256) / np.float32(127.5)
    ]
    blocks = encode(Int(8, granularity="block", group_size=32), np.vstack([matrix] * 16))[1]
    expected = np.array([[224, 256], [224, 256]], np.float32) / np.float32(127.5)
    assert np.frombuffer(blocks, np.float32).tolist() == expected.reshape(-1).tolist()


def test_blocks_do_not_span_matrices_of_a_stack() -> None:
    codec = Int(8, granularity="block", group_size=32)
    stack = np.ones((3, 40, 64)) * np.array([1.0, 2.0, 4.0])[:, None, None]
    scales = np.frombuffer(encode(codec, stack)[1], np.float32).reshape(3, 2, 2)
    assert (scales == np.array([1, 2, 4], np.float32)[:, None, None] / np.float32(127.5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group", "channel", "block", "tensor"])
def test_the_best_clip_loses_less_in_its_norm(granularity: str, symmetric: bool) -> None:
    """As the search is written down: each step tried by hand, and five that are no better end it."""
    shape = (6, 64)
    numbers = np.random.default_rng(3).standard_t(4, shape).astype(np.float32)
    found = encode(Int(3, symmetric, granularity, 32, "mse"), numbers)
    rows, columns = {"group": (1, 32), "channel": (1, 64), "block": (6, 32), "tensor": shape}[granularity]
    expected = []
    for top, left in product(range(0, 6, rows), range(0, 64, columns)):
        expected.append(best_clip(numbers[top : top + rows, left : left + columns], symmetric))
    assert np.frombuffer(found[1], np.float32).tolist() == [scale for scale, _ in expected]
    if not symmetric:
        assert (np.frombuffer(found[2], np.uint8) - 4.0).tolist() == [zero for _, zero in expected]


def best_clip(w: Any, symmetric: bool) -> tuple[np.float32, float]:
    """3 bits, in float64 but for the scale."""
    turned = symmetric and w.max() > -w.min()  # the longer side comes to lie below zero, where there is one more code
    w = -w if turned else w
    least, worse, best = np.inf, 0, (np.float32(1), 0.0)
    for i in range(21):
        p = np.float32(1) - np.float32(i) / np.float32(100)
        low, high = min(w.min(), np.float32(0)) * p, max(w.max(), np.float32(0)) * p
        scale = max(-low, high) / np.float32(3.5) if symmetric else (high - low) / np.float32(7)
        zero = 0.0 if symmetric else float(np.clip(np.rint(np.float32(-4) - low / scale), -4, 3))
        codes = np.clip(np.rint(w / scale + zero), -4, 3)
        loss = (np.abs((codes - zero) * scale - w).astype(np.float64) ** 2.4).sum()
        least, worse, best = (loss, 0, (scale, zero)) if loss < least else (least, worse + 1, best)
        if worse == 5:
            break
    return (-best[0], best[1]) if turned else best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_methods_lose_less_than_the_range(bits: int, symmetric: bool, granularity: str) -> None:
    plain, mse, hqq = (sqnr(Int(bits, symmetric, granularity, 64, how)) for how in ("minmax", "mse", "hqq"))
    assert mse > plain + 0.1
    assert hqq > plain + 0.1
    if bits == 2:
        assert hqq > mse + 0.5


def test_tiny_and_huge_scales_are_kept_apart_from_nothing_and_infinity() -> None:
    for dtype, tiny in (("float16", 2.0**-24), ("bfloat16", 2.0**-133), ("float32", 2.0**-149)):
        for codec in (Int(), Int(8), Int(8, symmetric=False), Int(method="mse"), Int(2, False, method="hqq")):
            numbers = np.zeros((1, 32))
            numbers[0, 3] = tiny
            planes = encode(codec, numbers, dtype)
            assert np.frombuffer(planes[1], numpy_dtype(DTYPES[dtype]))[0] != 0
            out = np.empty((1, 32 * DTYPES[dtype].itemsize), np.uint8)
            codec.decode(planes, (1, 32), DTYPES[dtype], out)
            assert float(out.reshape(-1).view(numpy_dtype(DTYPES[dtype]))[3]) == tiny


def test_infinities_take_the_last_codes_and_have_no_say_in_the_scale() -> None:
    row = [[np.inf, -np.inf, np.nan, 7.5, 1.0]]
    for method in ("minmax", "mse"):
        codes, scale = encode(Int(4, method=method), row)
        assert codes[0] == (0x0F if method == "minmax" else 0xF0), "by clipping, scales of either sign are found"
        assert codes[1] & 15 == 8
        assert abs(np.frombuffer(scale, np.float32)[0]) <= 1.0


def test_zero_points_that_are_no_codes_are_refused() -> None:
    codec = Int(2, symmetric=False)
    planes = encode(codec, np.ones((2, 8)))
    with pytest.raises(FormatError, match="'zero' holds 4"):
        codec.decode([*planes[:2], b"\4\0"], (2, 8), DTYPES["float32"], np.empty((2, 32), np.uint8))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 5}, "allowed are 2, 3, 4 and 8"),
        ({"bits": True}, "allowed are 2, 3, 4 and 8"),
        ({"symmetric": 1}, "allowed are true and false"),
        ({"granularity": "row"}, "known are tensor, channel, group, block"),
        ({"group_size": 12}, "not a multiple of 8 from 16 to 4096"),
        ({"group_size": 1 << 20}, "not a multiple of 8 from 16 to 4096"),
        ({"granularity": "block", "group_size": 1024}, "at most 512 columns"),
        ({"method": "best"}, "known are minmax, mse, hqq"),
        ({"method": "hqq", "granularity": "channel"}, "take mse"),
    ],
)
def test_parameters_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int(**params)
