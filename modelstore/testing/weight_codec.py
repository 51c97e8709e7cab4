"""The contract of every codec that compresses weights: subclass `WeightContract`, give `codec`, and pytest runs it all."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.codecs.look import Look, Statistics
from modelstore.codecs.loss import Loss, loss_of
from modelstore.codecs.numeric.numbers import numpy_dtype
from modelstore.codecs.weight import FLOATS
from modelstore.errors import FormatError
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Region, Shape, full, size
from modelstore.testing.codec import room, split_rows, untouched

KINDS = ("normal", "zero", "constant", "outlier", "special", "subnormal", "huge")
SHAPES: tuple[Shape, ...] = (
    (),
    (1,),
    (300,),
    (1, 77),
    (77, 1),
    (5, 150),  # ragged against every group
    (3, 256),
    (130, 131),
    (3, 4, 64),  # a stack of matrices
    (2, 3, 150),
    (8, 6, 5),  # a convolution of one dimension
    (6, 4, 3, 3),
)
USUAL: Shape = (96, 640)  # on which the error is measured
BF16 = DTYPES["bfloat16"]


def make(kind: str, shape: Shape, dtype: DType, seed: int = 0) -> Bytes:
    """Raw bytes of a tensor that holds that kind of numbers."""
    rng = np.random.default_rng(seed)
    n = math.prod(shape)
    how = numpy_dtype(dtype)
    info = ml_dtypes.finfo(how)  # type: ignore[no-untyped-call]
    top = float(info.max)
    spread = 1.0 if dtype.itemsize == 1 else 0.02
    numbers = rng.standard_normal(n) * spread
    if kind == "zero":
        numbers[:] = 0
    elif kind == "constant":
        numbers[:] = 0.3
    elif kind == "outlier" and n:
        numbers[rng.integers(n)] = min(1000 * spread, top)
    elif kind == "special":
        place = rng.random(n)
        numbers[place < 0.02] = np.nan
        numbers[(place >= 0.02) & (place < 0.03)] = np.inf
        numbers[(place >= 0.03) & (place < 0.04)] = -np.inf
    elif kind == "subnormal":
        return (rng.integers(-7, 8, n) * float(info.smallest_subnormal)).astype(how).view(np.uint8)
    elif kind == "huge" and n:
        numbers = rng.uniform(-1, 1, n) * top
        numbers[rng.integers(n)] = -top
    return numbers.astype(how).view(np.uint8)


def finite(values: Bytes, dtype: DType) -> bool:
    """Whether all numbers are."""
    return bool(np.isfinite(values.view(numpy_dtype(dtype)).astype(np.float64)).all())


def cuts(shape: Shape, units: Shape, most: int = 4) -> list[Region]:
    """The tensor in regions whose borders are multiples of the units, at most `most` along a dimension."""
    along = []
    for n, unit in zip(shape, units, strict=True):
        step = unit * max(1, -(-n // (unit * most)))
        along.append([(a, min(n, a + step)) for a in range(0, n, step)])
    return list(product(*along))


class WeightContract:
    """These fields say what a codec promises beyond the interface."""

    codec: Any  # a Codec and WeightCodec
    exact_size: ClassVar[bool] = True  # size() is what is stored; else it is so within `size_factor` either way
    size_factor: ClassVar[float] = 1.3
    idempotent: ClassVar[bool] = True  # what was decoded is encoded again without any loss
    regional: ClassVar[bool] = True  # encoded in regions through fit(), values are those of the whole
    robust: ClassVar[bool] = True  # NaN and infinities do not spoil the numbers beside them
    keeps_special: ClassVar[bool] = False  # NaN and infinities come back as themselves
    largest: ClassVar[bool] = True  # finite to the end of the dtype's range
    zeros: ClassVar[bool] = True  # zeros come back as zeros
    floor: ClassVar[float] = 15.0  # dB of SQNR that normal numbers keep
    usual: ClassVar[Shape] = USUAL

    def shapes(self) -> list[Shape]:
        """The shapes that the codec does not refuse."""
        return [shape for shape in SHAPES if self.codec.refuses(shape, BF16) is None]

    def encode(self, values: Bytes, shape: Shape, dtype: DType) -> list[Bytes]:
        planes: tuple[Buffer, ...] = self.codec.encode(values, shape, dtype)
        return [as_bytes(plane) for plane in planes]

    def decode(self, planes: Any, shape: Shape, dtype: DType, gap: int = 0, off: int = 0) -> Bytes:
        """Decoded into rows some way apart, and shown to write nothing between them."""
        rows, row = split_rows(shape, dtype)
        memory, out = room(rows, row, gap, off)
        self.codec.decode(planes, shape, dtype, out)
        assert untouched(memory, out, off)
        return np.ascontiguousarray(out).reshape(-1)

    def round_trip(self, values: Bytes, shape: Shape, dtype: DType) -> Bytes:
        return self.decode(self.encode(values, shape, dtype), shape, dtype)

    def test_it_says_what_it_is(self) -> None:
        from modelstore.codecs import registry

        assert not self.codec.exact
        assert not self.codec.needs_base
        params = {field.name: getattr(self.codec, field.name) for field in dataclasses.fields(self.codec)}
        made = registry.codec(self.codec.name, params)
        assert made == self.codec
        assert hash(made) == hash(self.codec)
        for shape in self.shapes():
            units = self.codec.group(shape)
            assert len(units) == len(shape)
            assert all(isinstance(n, int) and n >= 1 for n in units)

    def test_what_it_refuses(self) -> None:
        for name in ("int8", "uint8", "int64", "bool", "complex64", "float8_e8m0fnu", "float4_e2m1fn_x2"):
            assert self.codec.refuses((64, 64), DTYPES[name])
        assert self.codec.refuses((0, 64), BF16)
        assert self.codec.refuses((64, 0), BF16)
        for name in FLOATS:
            assert self.codec.refuses(self.usual, DTYPES[name]) is None

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_shape_and_content(self, dtype: str) -> None:
        d = DTYPES[dtype]
        for shape, kind in product(self.shapes(), KINDS):
            what = f"{shape} {kind}"
            values = make(kind, shape, d)
            before = values.copy()
            values.flags.writeable = False
            planes = self.encode(values, shape, d)
            kept = [plane.tobytes() for plane in planes]
            assert np.array_equal(values, before), what
            assert len(planes) == len(self.codec.planes(d)), what
            self.check_size(planes, shape, d)
            decoded = self.decode(planes, shape, d, 3 * d.itemsize, 2)
            assert [plane.tobytes() for plane in planes] == kept, what
            if not (kind == "special" and self.keeps_special) and not (kind == "huge" and not self.largest):
                assert finite(decoded, d), what
            if kind == "zero" and self.zeros:
                assert not decoded.view(numpy_dtype(d)).astype(np.float64).any(), what

    def check_size(self, planes: list[Bytes], shape: Shape, dtype: DType) -> None:
        stored, said = sum(plane.size for plane in planes), self.codec.size(shape, dtype)
        if self.exact_size:
            assert stored == said, f"{shape} {dtype.name}: {stored} bytes stored, {said} said"
        elif shape == self.usual:
            assert stored / self.size_factor <= said <= stored * self.size_factor

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
    def test_the_loss_is_bounded(self, dtype: str) -> None:
        d = DTYPES[dtype]
        values = make("normal", self.usual, d)
        planes = self.encode(values, self.usual, d)
        self.check_size(planes, self.usual, d)
        decoded = self.decode(planes, self.usual, d)
        assert loss_of(values, decoded, d).sqnr >= self.floor
        again = self.round_trip(decoded, self.usual, d)
        if self.idempotent:
            assert np.array_equal(again, decoded)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_what_is_not_finite_does_not_spoil_the_rest(self, dtype: str) -> None:
        if not self.robust:
            pytest.skip("the codec does not promise it")
        d = DTYPES[dtype]
        values = make("special", self.usual, d)
        decoded = self.round_trip(values, self.usual, d)
        loss = loss_of(values, decoded, d)
        assert loss.nonfinite
        assert Loss(loss.signal, loss.noise).sqnr >= self.floor

    def test_little_memory_and_no_statistics_give_the_same_bytes(self) -> None:
        shape = (130, 1024)
        values = make("outlier", shape, BF16)
        if self.codec.refuses(shape, BF16) is not None:
            pytest.skip("the codec takes no such matrix")
        look = Look(partial(boxes.cut, values, shape, BF16.itemsize), shape, BF16)
        least = dataclasses.replace(look, memory=self.codec.memory(shape, BF16) or 256 << 10, statistics=Statistics())
        free, bound = (
            [as_bytes(plane).tobytes() for plane in self.codec.fit(one)(values, full(shape))] for one in (look, least)
        )
        assert bound == free

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_in_regions_as_in_one(self, dtype: str) -> None:
        if not self.regional:
            pytest.skip("the codec does not promise it")
        d = DTYPES[dtype]
        for shape, kind in product([*self.shapes(), (260, 300), (2, 130, 256)], ("normal", "outlier", "special")):
            if self.codec.refuses(shape, d) is not None:
                continue
            values = make(kind, shape, d)

            def read(region: Region, values: Bytes = values, shape: Shape = shape) -> Bytes:
                return boxes.cut(values, shape, d.itemsize, region)

            encode = self.codec.fit(Look(read, shape, d))
            whole = [as_bytes(plane).tobytes() for plane in encode(values, full(shape))]
            assert whole == [plane.tobytes() for plane in self.encode(values, shape, d)], f"{shape} {kind}"
            expected = self.decode(whole, shape, d)
            decoded = np.empty_like(values)
            for region in cuts(shape, self.codec.group(shape)):
                extent = tuple(b - a for a, b in region)
                part = self.decode(encode(read(region), region), extent, d)
                assert part.size == size(region) * d.itemsize
                boxes.paste(part, decoded, shape, d.itemsize, region)
            assert decoded.tobytes() == expected.tobytes(), f"{shape} {kind} in regions"

    def test_always_the_same_from_any_thread(self) -> None:
        values = [make("normal", self.usual, BF16, seed) for seed in range(3)]
        alone = []
        for v in values:
            planes = self.encode(v, self.usual, BF16)
            alone.append(([p.tobytes() for p in planes], self.decode(planes, self.usual, BF16).tobytes()))

        def work(i: int) -> bool:
            planes = self.encode(values[i % 3], self.usual, BF16)
            decoded = self.decode(planes, self.usual, BF16)
            return ([p.tobytes() for p in planes], decoded.tobytes()) == alone[i % 3]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(24)))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
    def test_odd_addresses_rows_and_kinds_of_buffer(self, dtype: str) -> None:
        d = DTYPES[dtype]
        shape = self.usual
        values = make("normal", shape, d)
        memory = np.zeros(values.size + 1, np.uint8)
        memory[1:] = values
        planes = self.encode(values, shape, d)
        assert [p.tobytes() for p in self.encode(memory[1:], shape, d)] == [p.tobytes() for p in planes]
        expected = self.decode(planes, shape, d)
        for kind in (bytes, bytearray, lambda b: memoryview(bytes(b)), lambda b: as_bytes(b"\0" + bytes(b))[1:]):
            odd = [kind(plane.tobytes()) for plane in planes]
            assert np.array_equal(self.decode(odd, shape, d, 1, 1), expected)
        rows, row = split_rows(shape, d)
        backwards = np.zeros((rows, row), np.uint8)[::-1]
        self.codec.decode(planes, shape, d, backwards)
        assert backwards.tobytes() == expected.tobytes()
        other = np.zeros((1, rows * row), np.uint8)
        self.codec.decode(planes, shape, d, other)
        assert other.tobytes() == expected.tobytes()

    def test_wrong_arguments_are_named(self) -> None:
        shape, (rows, row) = self.usual, split_rows(self.usual, BF16)
        values = make("normal", shape, BF16)
        with pytest.raises(ValueError, match="values"):
            self.codec.encode(values[2:], shape, BF16)
        planes = self.encode(values, shape, BF16)
        for out in (
            np.zeros(rows * row, np.uint8),
            np.zeros((rows, row + 2), np.uint8),
            np.zeros((rows * row, 1), np.uint8),
        ):
            with pytest.raises(ValueError, match="out"):
                self.codec.decode(planes, shape, BF16, out)

    def test_other_planes_are_refused(self) -> None:
        planes = self.encode(make("normal", self.usual, BF16), self.usual, BF16)
        rows, row = split_rows(self.usual, BF16)
        for wrong in ([], [*planes, *planes], planes[:-1] or [np.empty(0, np.uint8)]):
            with pytest.raises(FormatError):
                self.decode(wrong, self.usual, BF16)
        for shape in ((rows + 1, row // 2), (rows, row // 2 + 512)):
            with pytest.raises(FormatError):
                self.decode(planes, shape, BF16)

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_mutated_planes_give_an_error_or_values(self, data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from([s for s in self.shapes() if math.prod(s) < 2000]))
        d = DTYPES[data.draw(st.sampled_from(["bfloat16", "float32", "float8_e4m3fn"]))]
        planes = [p.tobytes() for p in self.encode(make(data.draw(st.sampled_from(KINDS)), shape, d), shape, d)]
        for _ in range(data.draw(st.integers(1, 3))):
            i = data.draw(st.integers(0, len(planes) - 1))
            planes[i] = mutated(planes[i], data)
        with suppress(FormatError):
            self.decode(planes, shape, d, 2 * d.itemsize, 5)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_any_shape(self, data: st.DataObject) -> None:
        shape = tuple(data.draw(st.lists(st.integers(1, 40), max_size=4)))
        d = DTYPES[data.draw(st.sampled_from(FLOATS))]
        if self.codec.refuses(shape, d) is not None:
            return
        values = make(data.draw(st.sampled_from(KINDS)), shape, d, data.draw(st.integers(0, 99)))
        planes = self.encode(values, shape, d)
        self.check_size(planes, shape, d)
        self.decode(planes, shape, d, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)))


def mutated(plane: bytes, data: st.DataObject) -> bytes:
    """The plane with something set, inserted, deleted, cut off or added."""
    at = data.draw(st.integers(0, len(plane)))
    how = data.draw(st.sampled_from(["set", "insert", "delete", "cut", "add", "fill"]))
    if how == "set":
        return plane[:at] + bytes([data.draw(st.integers(0, 255))]) + plane[at + 1 :]
    if how == "insert":
        return plane[:at] + data.draw(st.binary(min_size=1, max_size=9)) + plane[at:]
    if how == "delete":
        return plane[:at] + plane[at + data.draw(st.integers(1, 9)) :]
    if how == "cut":
        return plane[:at]
    if how == "add":
        return plane + bytes(data.draw(st.integers(1, 2000)))
    return bytes([data.draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))]) * len(plane)
