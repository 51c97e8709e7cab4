from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.codecs.signs.codec import Binary, Ternary
from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import WeightContract, make

F32 = DTYPES["float32"]


class TestBinary(WeightContract):
    codec = Binary()
    floor = 3.5
    shape = (9, 200)

    def test_each_row_is_its_sign_times_its_mean_magnitude(self) -> None:
        w = np.random.default_rng(1).standard_normal(self.shape).astype(np.float32)
        found = self.round_trip(w.view(np.uint8).reshape(-1), self.shape, F32).view(np.float32).reshape(self.shape)
        alpha = np.abs(w).astype(np.float64).mean(axis=1, keepdims=True).astype(np.float32)
        assert np.array_equal(found, np.where(w < 0, -alpha, alpha))


class TestBinaryInGroups(WeightContract):
    codec = Binary(group_size=64)
    floor = 3.5


class TestTernary(WeightContract):
    codec = Ternary()
    floor = 6.5

    def test_each_row_has_three_values(self) -> None:
        w = np.random.default_rng(2).standard_normal((7, 301))
        found = self.round_trip(w.astype(np.float32).view(np.uint8).reshape(-1), w.shape, F32).view(np.float32)
        for row, got in zip(w.astype(np.float32), found.reshape(w.shape), strict=True):
            large = np.abs(row) > np.float32(0.7 * np.abs(row).astype(np.float64).mean())
            scale = np.float32(np.abs(row[large]).astype(np.float64).mean())
            assert np.array_equal(got == 0, ~large)
            np.testing.assert_allclose(got[large], np.sign(row[large]) * scale, rtol=1e-6)

    def test_bytes_beyond_five_digits_are_refused(self) -> None:
        planes = self.encode(make("normal", (4, 10), F32), (4, 10), F32)
        with pytest.raises(FormatError, match="below 243"):
            self.decode([np.full(8, 243, np.uint8), planes[1]], (4, 10), F32)


class TestTernaryInGroups(WeightContract):
    codec = Ternary(group_size=128)
    floor = 6.5


@pytest.mark.parametrize("made", [Binary, Ternary])
@pytest.mark.parametrize("columns", [-1, 1, 7, True, 64.0])
def test_wrong_groups_are_named(made: type[Binary | Ternary], columns: object) -> None:
    with pytest.raises(ValueError, match="columns"):
        made(group_size=columns)  # type: ignore[arg-type]


@given(st.integers(1, 70), st.integers(0, 9))
def test_digits_to_base_3(n: int, seed: int) -> None:
    from modelstore.codecs.kernels.codes import packing

    codes = np.random.default_rng(seed).integers(0, 3, n).astype(np.uint8)
    packed = np.empty(-(-n // 5), np.uint8)
    packing().pack_trits(codes, packed)
    padded = np.concatenate([codes, np.zeros(-n % 5, np.uint8)]).reshape(-1, 5)
    assert np.array_equal(packed, padded @ np.array([1, 3, 9, 27, 81]))
    back = np.empty(n, np.uint8)
    packing().unpack_trits(packed, back)
    assert np.array_equal(back, codes)
