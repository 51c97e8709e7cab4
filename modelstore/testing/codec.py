"""The contract of every exact codec: subclass `ExactCodecContract`, give `codec`, and pytest runs it all."""

from __future__ import annotations

import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.codecs.base import Codec
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.testing import contents

GUARD = 0xA5
SHAPES = [(), (0,), (3, 0), (1,), (7,), (63,), (64,), (65, 1), (5, 13), (2, 3, 5), (128, 9), (257,), (2049,), (3, 4097)]


def room(rows: int, row: int, gap: int = 0, offset: int = 0) -> tuple[Bytes, Bytes]:
    """(memory full of guard bytes, the 2-d view into it that decode may write)."""
    step = row + gap
    memory = np.full(offset + max(rows, 1) * step + 64, GUARD, np.uint8)
    flat = memory[offset : offset + rows * step]
    return memory, flat.reshape(rows, step)[:, :row] if step else np.empty((rows, 0), np.uint8)


def untouched(memory: Bytes, out: Bytes, offset: int) -> bool:
    """Whether all guard bytes outside `out` are still there."""
    mask = np.ones(memory.size, bool)
    if out.size:
        rows, row = out.shape
        step = out.strides[0] if rows > 1 else row
        for r in range(rows):
            mask[offset + r * step : offset + r * step + row] = False
    return bool((memory[mask] == GUARD).all())


def split_rows(shape: tuple[int, ...], dtype: DType) -> tuple[int, int]:
    """A region's rows and bytes of a row: its last dimension is a row."""
    n = int(np.prod(shape, dtype=np.int64))
    rows = n // shape[-1] if n and shape else 1
    return rows, n // rows * dtype.itemsize


class ExactCodecContract:
    """Inherit, and give `codec`: one that gives back every bit."""

    codec: Codec

    def encode(self, values: Bytes, shape: tuple[int, ...], dtype: DType, base: Bytes) -> tuple[Buffer, ...]:
        return self.codec.encode(values, shape, dtype, base if self.codec.needs_base else None)

    def decode(self, planes: Any, shape: tuple[int, ...], dtype: DType, out: Bytes, base: Bytes) -> None:
        self.codec.decode(planes, shape, dtype, out, base if self.codec.needs_base else None)

    def round_trip(
        self, values: Bytes, shape: tuple[int, ...], dtype: DType, base: Bytes, gap: int = 0, off: int = 0
    ) -> None:
        before, before_base = values.copy(), base.copy()
        planes = self.encode(values, shape, dtype, base)
        assert len(planes) == len(self.codec.planes(dtype))
        stored = [as_bytes(p).copy() for p in planes]
        rows, row = split_rows(shape, dtype)
        memory, out = room(rows, row, gap, off)
        self.decode(planes, shape, dtype, out, base)
        assert out.tobytes() == before.tobytes()
        assert untouched(memory, out, off)
        assert np.array_equal(values, before)
        assert np.array_equal(base, before_base)
        assert all(np.array_equal(as_bytes(p), s) for p, s in zip(planes, stored, strict=True))

    def test_is_exact(self) -> None:
        assert self.codec.exact
        assert all(self.codec.planes(d) for d in DTYPES.values())

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: d.name)
    def test_every_dtype_shape_and_content(self, dtype: DType) -> None:
        for shape in SHAPES:
            n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for kind in contents.KINDS:
                values = contents.make(kind, n, dtype, seed=n)
                self.round_trip(values, shape, dtype, contents.nearby(values, n))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_round_trip(self, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(list(DTYPES.values())))
        shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        values = contents.make(data.draw(st.sampled_from(contents.KINDS)), n, dtype, data.draw(st.integers(0, 99)))
        near = data.draw(st.booleans())
        base = contents.nearby(values, 1) if near else contents.make("bits", n, dtype, 7)
        self.round_trip(values, shape, dtype, base, data.draw(st.integers(0, 33)), data.draw(st.integers(0, 17)))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex128", "int64", "uint8", "float8_e5m2"])
    @pytest.mark.parametrize("extra", [-1, 0, 1, 131073])
    def test_blocks_and_their_borders(self, dtype: str, extra: int) -> None:
        d = DTYPES[dtype]
        n = 131072 + extra
        values = contents.make("normal", n * d.itemsize, d, 1)
        self.round_trip(values, (n,), d, contents.nearby(values, 2))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "complex64"])
    def test_rows_of_a_larger_array(self, dtype: str) -> None:
        d = DTYPES[dtype]
        shape = (501, 777)
        values = contents.make("normal", 501 * 777 * d.itemsize, d, 1)
        for gap, off in ((d.itemsize * 100, 0), (1, 3), (d.itemsize * 3, 1)):
            self.round_trip(values, shape, d, contents.nearby(values, 2), gap, off)

    def test_rows_backwards_and_split_otherwise_than_the_shape(self) -> None:
        d = DTYPES["bfloat16"]
        values = contents.make("normal", 6000, d, 1)
        base = contents.nearby(values, 1)
        planes = self.encode(values, (30, 100), d, base)
        out = np.zeros((10, 600), np.uint8)[::-1]
        self.decode(planes, (30, 100), d, out, base)
        assert out.tobytes() == values.tobytes()

    def test_values_at_odd_addresses_and_read_only(self) -> None:
        d = DTYPES["float64"]
        memory = np.random.default_rng(0).integers(0, 256, 8 * 1000 + 3, np.uint8)
        values = memory[3:]
        values.flags.writeable = False
        self.round_trip(values, (1000,), d, values)

    def test_bytes_and_memoryviews_are_planes_too(self) -> None:
        d = DTYPES["bfloat16"]
        values = contents.make("normal", 4096, d, 1)
        planes = self.encode(values, (2048,), d, values)
        for kind in (bytes, bytearray, lambda b: memoryview(bytes(b))):
            _, out = room(1, 4096)
            self.decode([kind(as_bytes(p).tobytes()) for p in planes], (2048,), d, out, values)
            assert out.tobytes() == values.tobytes()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "float8_e4m3fn"])
    def test_same_bytes_in_same_bytes_out_from_any_thread(self, dtype: str) -> None:
        d = DTYPES[dtype]
        n = 300_000
        inputs = [contents.make("normal", n * d.itemsize, d, s) for s in range(4)]
        base = contents.make("normal", n * d.itemsize, d, 0)
        alone = [[as_bytes(p).tobytes() for p in self.encode(v, (n,), d, base)] for v in inputs]

        def work(i: int) -> bool:
            planes = self.encode(inputs[i % 4], (n,), d, base)
            _, out = room(1, n * d.itemsize)
            self.decode(planes, (n,), d, out, base)
            same = [as_bytes(p).tobytes() for p in planes] == alone[i % 4]
            return same and out.tobytes() == inputs[i % 4].tobytes()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(48)))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int16", "uint8"])
    @pytest.mark.parametrize("kind", ["normal", "zero"])
    def test_hostile_planes(self, dtype: str, kind: str) -> None:
        """Every single-byte change, truncation and extension: refused, or an answer of the right size in its place."""
        d = DTYPES[dtype]
        n = 150
        values = contents.make(kind, n * d.itemsize, d, 3)
        base = contents.nearby(values, 1)
        planes = [as_bytes(p).tobytes() for p in self.encode(values, (n,), d, base)]
        for i, good in enumerate(planes):
            for bad in hostile(good):
                changed = [*planes[:i], bad, *planes[i + 1 :]]
                memory, out = room(n // 5, 5 * d.itemsize, 4 * d.itemsize, 8)
                with suppress(FormatError):
                    self.decode(changed, (n,), d, out, base)
                assert untouched(memory, out, 8)

    def test_a_wrong_number_of_planes_is_refused(self) -> None:
        d = DTYPES["int8"]
        values = np.zeros(4, np.uint8)
        planes = self.encode(values, (4,), d, values)
        for wrong in ((), (*planes, *planes)):
            with pytest.raises(FormatError):
                self.decode(wrong, (4,), d, np.zeros((1, 4), np.uint8), values)

    def test_the_planes_of_another_shape_or_dtype_are_refused(self) -> None:
        d = DTYPES["bfloat16"]
        values = contents.make("normal", 4000, d, 1)
        planes = self.encode(values, (2000,), d, values)
        with pytest.raises(FormatError):
            self.decode(planes, (1999,), d, np.zeros((1, 3998), np.uint8), values[:3998])
        with pytest.raises(FormatError):
            self.decode(planes, (2001,), d, np.zeros((1, 4002), np.uint8), np.zeros(4002, np.uint8))

    def test_wrong_arguments_are_named(self) -> None:
        d = DTYPES["bfloat16"]
        values = np.zeros(4, np.uint8)
        with pytest.raises(ValueError, match="values"):
            self.encode(values, (3,), d, values)
        planes = self.encode(values, (2,), d, values)
        for out in (np.zeros(4, np.uint8), np.zeros((4, 1), np.uint8), np.zeros((1, 6), np.uint8)):
            with pytest.raises(ValueError, match="out"):
                self.decode(planes, (2,), d, out, values)

    def test_memory_is_bounded(self) -> None:
        d = DTYPES["bfloat16"]
        n = 4 << 20
        values = contents.make("normal", 2 * n, d, 1)
        base = contents.nearby(values, 1)
        _, out = room(1, 2 * n)
        self.decode(self.encode(values, (n,), d, base), (n,), d, out, base)  # scratch memory exists
        tracemalloc.start()
        try:
            planes = self.encode(values, (n,), d, base)
            assert tracemalloc.get_traced_memory()[1] < 2 * n + (2 << 20)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            self.decode(planes, (n,), d, out, base)
            assert tracemalloc.get_traced_memory()[1] - held < 2 << 20
        finally:
            tracemalloc.stop()


def hostile(good: bytes) -> list[bytes]:
    """All single-byte replacements (three each), truncations and some extensions of an encoding, and random pairs of changes."""
    rng = random.Random(0)
    bad = [good[:i] for i in range(len(good))] + [good + b"\0", good + good, good + bytes(1000)]
    for i in range(len(good)):
        bad += [good[:i] + bytes([good[i] ^ x]) + good[i + 1 :] for x in (1, 0x80, rng.randrange(1, 256))]
    for _ in range(300):
        changed = bytearray(good)
        for _ in range(2):
            changed[rng.randrange(len(good))] = rng.randrange(256)
        bad.append(bytes(changed))
    return bad
