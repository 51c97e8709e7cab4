"""packed: the contract of exact codecs, the sizes it is for, and every kind of escape."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from modelstore.codecs.base import Codec
from modelstore.codecs.exact import packed
from modelstore.codecs.exact.lossless import Lossless
from modelstore.codecs.exact.packed import FixedRate
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.dtypes import DTYPES
from modelstore.testing import contents
from modelstore.testing.codec import ExactCodecContract, hostile, room, untouched
from tests.codecs.test_exact import MIB, raw_bytes, size, weights

MADE = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def encoded(values: Bytes, dtype: str) -> Bytes:
    (plane,) = FixedRate().encode(values, (values.size // DTYPES[dtype].itemsize,), DTYPES[dtype])
    return as_bytes(plane)


class TestPacked(ExactCodecContract):
    codec: ClassVar[Codec] = FixedRate()

    @pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.697), ("float32", 0.85)])
    def test_size_of_weights(self, dtype: str, limit: float) -> None:
        values = raw_bytes(weights(2 * MIB), MADE[dtype])
        assert encoded(values, dtype)[0] == packed.VERSION
        assert size(self.codec, values, dtype) <= limit

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["bits", "zero", "constant", "steps", "sparse", "special"])
    def test_what_is_no_weights_is_as_small_as_lossless(self, dtype: str, kind: str) -> None:
        values = contents.make(kind, MIB, DTYPES[dtype], 0)
        assert size(self.codec, values, dtype) <= size(Lossless(), values, dtype) * 1.07

    @pytest.mark.parametrize("dtype", MADE)
    @pytest.mark.parametrize("n", [1024, 1025, 2047, 2048, 2049, 4033, 70_000])
    def test_tiles_and_their_borders(self, dtype: str, n: int) -> None:
        d = DTYPES[dtype]
        values = contents.make("normal", n * d.itemsize, d, n)
        assert encoded(values, dtype)[0] == packed.VERSION
        self.round_trip(values, (n,), d, values, gap=d.itemsize, off=3)

    @pytest.mark.parametrize("dtype", MADE)
    def test_every_exponent_beside_every_top(self, dtype: str) -> None:
        """One word in 20 has any exponent, sign and payload: zeros, denormals, infinities and NaN are among them."""
        d = DTYPES[dtype]
        rng = np.random.default_rng(0)
        for scale in (1e-39, 1e-38, 1e-20, 0.02, 1e20, 1e38):
            with np.errstate(over="ignore"):
                values = raw_bytes(rng.standard_normal(64 * 2048) * scale, MADE[dtype]).reshape(-1, d.itemsize)
            odd = rng.random(len(values)) < 0.05
            values[odd] = rng.integers(0, 256, (int(odd.sum()), d.itemsize), np.uint8)
            values = values.reshape(-1)
            assert encoded(values, dtype)[0] == packed.VERSION or not 1e-38 < scale < 1e38
            self.round_trip(values, (64 * 2048,), d, values)

    @pytest.mark.parametrize("dtype", MADE)
    def test_hostile_codes(self, dtype: str) -> None:
        """As `test_hostile_planes`, of an encoding long enough to have codes of a fixed width."""
        d = DTYPES[dtype]
        values = contents.make("normal", 1100 * d.itemsize, d, 3)
        values.reshape(-1, d.itemsize)[::37] = 0xFF
        good = encoded(values, dtype).tobytes()
        assert good[0] == packed.VERSION
        for bad in hostile(good)[:: len(good) // 400]:
            memory, out = room(220, 5 * d.itemsize, 4 * d.itemsize, 8)
            with suppress(FormatError):
                self.decode([bad], (1100,), d, out, values)
            assert untouched(memory, out, 8)

    def test_counts_that_do_not_fit_the_codes_are_refused(self) -> None:
        values = raw_bytes(weights(4 * 1024), ml_dtypes.bfloat16)
        good, n = encoded(values, "bfloat16"), values.size // 2
        tiles, _, fixed = packed._fixed(n, 2)
        at = fixed - 4 * tiles
        for first, second in ((1, -1), (2, -2)):
            bad = good.copy()
            counts = bad[at : at + 2 * tiles].view("<u2")
            counts[0] += np.uint16(first)
            counts[1] = np.uint16(int(counts[1]) + second)
            with pytest.raises(FormatError):
                self.codec.decode([bad], (n,), DTYPES["bfloat16"], np.zeros((1, values.size), np.uint8))

    def test_codes_of_another_dtype_are_refused(self) -> None:
        values = raw_bytes(weights(4 * 1024), ml_dtypes.bfloat16)
        for dtype in ("float16", "uint8", "float32"):
            shape = (values.size // DTYPES[dtype].itemsize,)
            with pytest.raises(FormatError):
                self.codec.decode(
                    [encoded(values, "bfloat16")], shape, DTYPES[dtype], np.zeros((1, values.size), np.uint8)
                )
