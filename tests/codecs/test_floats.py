"""Rounding and the float formats, each under the contract; against ml_dtypes number by number."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from modelstore.codecs.floating.fp4 import E2M1, Mxfp4, Nvfp4
from modelstore.codecs.floating.fp8 import Fp8
from modelstore.codecs.floating.half import Half
from modelstore.codecs.floating.nf4 import LEVELS, Nf4
from modelstore.codecs.floating.rounded import Round
from modelstore.codecs.loss import loss_of
from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.scaled import E4M3, E5M2, Grid
from modelstore.codecs.weight import WeightCodec
from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import WeightContract, make

F32 = DTYPES["float32"]


class TestRound(WeightContract):
    codec = Round(2.0**-9)
    exact_size = False
    size_factor = 1.6
    keeps_special = True
    floor = 30.0


class TestHalf(WeightContract):
    codec = Half()
    exact_size = False
    keeps_special = True
    floor = 60.0


class TestBfloat16(WeightContract):
    codec = Half("bfloat16")
    exact_size = False
    keeps_special = True
    floor = 50.0


class TestFp8Channel(WeightContract):
    codec = Fp8()
    idempotent = False  # a scale rounded to 8 bits may come out the next one
    floor = 30.0


class TestFp8Tensor(WeightContract):
    codec = Fp8(granularity="tensor")
    idempotent = False
    floor = 30.0


class TestFp8Block(WeightContract):
    codec = Fp8(granularity="block")
    idempotent = False
    floor = 30.0


class TestFp8SmallBlockE5m2(WeightContract):
    codec = Fp8("e5m2", "block", 16)
    idempotent = False
    floor = 24.0


class TestNf4(WeightContract):
    codec = Nf4()
    floor = 19.0


class TestMxfp4(WeightContract):
    codec = Mxfp4()
    floor = 16.0


class TestNvfp4(WeightContract):
    codec = Nvfp4()
    idempotent = False
    floor = 19.0


@pytest.mark.parametrize("how", [E4M3, E5M2], ids=lambda h: h.dtype)
def test_float8_is_rounded_as_ml_dtypes_does(how: scaled.Format8) -> None:
    kind = scaled.numpy_dtype_of(how.dtype)
    codes = np.arange(256, dtype=np.uint8)
    levels = np.unique(codes.view(kind).astype(np.float32))
    levels = levels[np.isfinite(levels)]
    halfway = (levels[1:] + levels[:-1]) / 2
    rng = np.random.default_rng(0)
    some = rng.standard_normal(5000).astype(np.float32) * np.exp2(rng.integers(-20, 8, 5000)).astype(np.float32)
    near = [np.nextafter(halfway, np.float32(s)) for s in (-np.inf, np.inf)]
    numbers = np.concatenate(
        [levels, halfway, *near, some, np.float32([0.0, -0.0, 1e-30, 1e30, -1e30, np.inf, -np.inf])]
    )
    grid = Grid(1, numbers.size, numbers.size)
    got = scaled.encode8(numbers.view(np.uint8), F32, grid, np.ones((1, 1), np.float32), how)
    expected = np.clip(numbers, -how.most, how.most).astype(kind)
    assert np.array_equal(got, expected.view(np.uint8))
    out = np.empty((1, numbers.size * 4), np.uint8)
    scaled.decode8(got, grid, np.ones((1, 1), np.float32), how, F32, out)
    assert out.tobytes() == expected.astype(np.float32).tobytes()


def test_float4_is_rounded_as_ml_dtypes_does() -> None:
    levels = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    halfway = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(halfway, np.float32(s)) for s in (-np.inf, np.inf)]
    numbers = np.concatenate([levels, halfway, *near, np.linspace(0, 9, 1001, dtype=np.float32)])
    numbers = np.concatenate([numbers, -numbers])
    grid = Grid(1, numbers.size, 2 * numbers.size)
    got = scaled.encode4(numbers.view(np.uint8), F32, grid, np.ones((1, 1), np.float32), E2M1)
    codes = np.stack([got & 15, got >> 4], axis=1).reshape(-1)[: numbers.size]
    expected = np.clip(numbers, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(codes, expected.view(np.uint8))
    assert np.float32(E2M1.levels).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist() == list(range(16))


def test_nf4_takes_the_nearest_level() -> None:
    numbers = np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)
    numbers[:, 0] = 1
    codes, scale = Nf4().encode(numbers.reshape(-1).view(np.uint8), numbers.shape, F32)
    assert (scale.view(ml_dtypes.bfloat16) == 1).all()
    got = np.stack([codes & 15, codes >> 4], axis=1).reshape(8, 64)
    distance = np.abs(numbers[..., None] - np.float32(LEVELS))
    assert np.allclose(np.take_along_axis(distance, got[..., None].astype(int), -1)[..., 0], distance.min(-1))


def test_mxfp4_follows_the_rule_of_the_specification() -> None:
    numbers = np.zeros((4, 32), np.float32)
    numbers[0, 3] = 6.0  # 2^2 … : exponent 0
    numbers[1, 3] = 7.9  # saturates at 6
    numbers[2, 3] = 8.0
    codes, scale = Mxfp4().encode(numbers.reshape(-1).view(np.uint8), numbers.shape, F32)
    assert scale.tolist() == [127, 127, 128, 127]
    out = np.empty((4, 128), np.uint8)
    Mxfp4().decode((codes, scale), numbers.shape, F32, out)
    assert out.view(np.float32)[:, 3].tolist() == [6.0, 6.0, 8.0, 0.0]


def test_codes_that_are_no_numbers_are_refused() -> None:
    for codec, bad in ((Fp8(), 0x7F), (Fp8("e5m2"), 0x7C), (Fp8("e5m2"), 0xFF)):
        codes, scale = codec.encode(make("normal", (3, 70), F32), (3, 70), F32)
        wrong = codes.copy()
        wrong[77] = bad
        with pytest.raises(FormatError, match="NaN or infinity"):
            codec.decode((wrong, scale), (3, 70), F32, np.empty((3, 280), np.uint8))


def test_rounding_gives_whole_numbers() -> None:
    numbers = np.float32([0.5, 1.5, 2.5, -0.4, 7.9, 1e9 + 64, np.nan, np.inf])
    planes = Round().encode(numbers.view(np.uint8), (8,), F32)
    out = np.empty((1, 32), np.uint8)
    Round().decode(planes, (8,), F32, out)
    assert np.array_equal(
        out.view(np.float32)[0], np.float32([0, 2, 2, 0, 8, 1e9 + 64, np.nan, np.inf]), equal_nan=True
    )


@pytest.mark.parametrize(
    ("make_codec", "word"),
    [
        (lambda: Fp8("e3m4"), "format"),
        (lambda: Fp8(granularity="row"), "granularity"),
        (lambda: Fp8(group_size=100), "group_size"),
        (lambda: Nf4(7), "group_size"),
        (lambda: Half("float8"), "dtype"),
        (lambda: Round(0.0), "step"),
        (lambda: Round(float("nan")), "step"),
    ],
)
def test_wrong_parameters_are_named(make_codec: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make_codec()  # type: ignore[operator]


@pytest.mark.parametrize(
    "codec",
    [Fp8(), Fp8(granularity="tensor"), Fp8("e5m2", "block", 48), Nf4(), Nf4(4080), Mxfp4(), Nvfp4()],
    ids=lambda c: c.name,
)
def test_rows_longer_than_a_tile(codec: WeightCodec) -> None:
    """Cut into tiles, a long row decodes as the same row cut into short ones does, where groups are the same."""
    d = DTYPES["bfloat16"]
    for columns in (3 * scaled.TILE, 2 * scaled.TILE + 1777):
        values = make("normal", (2, columns), d)
        decoded = np.empty((2, 2 * columns), np.uint8)
        codec.decode(codec.encode(values, (2, columns), d), (2, columns), d, decoded)
        assert loss_of(values, decoded.reshape(-1), d).sqnr > 16
        spaced = np.zeros((2, 2 * columns + 6), np.uint8)
        codec.decode(codec.encode(values, (2, columns), d), (2, columns), d, spaced[:, 2:-4])
        assert np.array_equal(spaced[:, 2:-4], decoded)
        if codec in (Nf4(), Mxfp4(), Nvfp4(), Fp8(granularity="tensor")) and columns % 256 == 0:
            short = (2 * columns // 256, 256)
            again = np.empty((short[0], 512), np.uint8)
            codec.decode(codec.encode(values, short, d), short, d, again)
            assert again.tobytes() == decoded.tobytes()
