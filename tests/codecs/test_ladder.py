"""The ladder: the original exactly, whatever its bits; int8 and int4 as an engine has them; damage refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.codecs import registry
from modelstore.codecs.exact.lossless import Lossless
from modelstore.codecs.ladder.codec import Ladder
from modelstore.codecs.ladder.codes import PLANES
from modelstore.codecs.ladder.planes import BLOCK
from modelstore.codecs.numeric.numbers import numpy_dtype
from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Shape, slices
from modelstore.testing import contents, weight_codec
from modelstore.testing.codec import hostile, room, split_rows, untouched
from modelstore.testing.weight_codec import KINDS, SHAPES, WeightContract, mutated

NAMES = ("bfloat16", "float16", "float32")
ORIGINAL, INT8, INT4 = (Ladder(variant) for variant in PLANES)


def normal(shape: Shape, dtype: DType, seed: int = 0) -> Bytes:
    return weight_codec.make("normal", shape, dtype, seed)


def decode(codec: Ladder, planes: Any, shape: Shape, dtype: DType, gap: int = 0, off: int = 0) -> Bytes:
    rows, row = split_rows(shape, dtype)
    memory, out = room(rows, row, gap, off)
    try:
        codec.decode([bytes(as_bytes(p)) for p in planes], shape, dtype, out)
    finally:
        assert untouched(memory, out, off)
    return np.ascontiguousarray(out).reshape(-1)


def assert_exact(values: Bytes, shape: Shape, dtype: DType, gap: int = 0, off: int = 0) -> tuple[Any, ...]:
    planes = ORIGINAL.encode(values, shape, dtype)
    assert np.array_equal(decode(ORIGINAL, planes, shape, dtype, gap, off), values)
    return planes


class _Steps(WeightContract):
    """int8 and int4 as what they are to their readers: lossy codecs of three dtypes."""

    exact_size = False
    regional = False  # shown below: encode makes more planes than these read
    idempotent = False  # 119 * s8, rounded, need not give s8 again

    def encode(self, values: Bytes, shape: Shape, dtype: DType) -> list[Bytes]:
        if dtype.name not in NAMES:
            pytest.skip("a dtype that the ladder refuses")
        planes = self.codec.encode(values, shape, dtype)
        return [as_bytes(plane) for plane in planes[: len(self.codec.planes(dtype))]]

    def test_what_it_refuses(self) -> None:
        for name, dtype in DTYPES.items():
            assert (self.codec.refuses(self.usual, dtype) is None) == (name in NAMES)
        for shape in ((), (4096,), (0, 64), (64, 0), (4096, 2), (64, 3, 3, 3)):
            assert self.codec.refuses(shape, DTYPES["bfloat16"])

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_mutated_planes_give_an_error_or_values(self, data: st.DataObject) -> None:
        mutate(self.codec, data)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_any_shape(self, data: st.DataObject) -> None:
        shape = tuple(data.draw(st.lists(st.integers(1, 40), max_size=4)))
        d = DTYPES[data.draw(st.sampled_from(NAMES))]
        planes = self.encode(weight_codec.make(data.draw(st.sampled_from(KINDS)), shape, d, 1), shape, d)
        self.decode(planes, shape, d, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)))


class TestInt8(_Steps):
    codec = INT8
    floor = 35.0


class TestInt4(_Steps):
    codec = INT4
    floor = 15.0


@pytest.mark.parametrize("shape", [(260, 300), (2, 130, 256), (96, 40, 3)])
def test_in_regions_as_in_one(shape: Shape) -> None:
    d = DTYPES["bfloat16"]
    values = weight_codec.make("outlier", shape, d)
    box = values.view("V2").reshape(shape)
    planes = ORIGINAL.encode(values, shape, d)
    for codec in (ORIGINAL, INT8, INT4):
        whole = decode(codec, planes[: len(codec.planes(d))], shape, d).view("V2").reshape(shape)
        for region in weight_codec.cuts(shape, codec.group(shape)):
            extent = tuple(b - a for a, b in region)
            part = np.ascontiguousarray(box[slices(region)]).reshape(-1).view(np.uint8)
            stored = codec.encode(part, extent, d)[: len(codec.planes(d))]
            assert decode(codec, stored, extent, d).tobytes() == whole[slices(region)].tobytes()


def mutate(codec: Ladder, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([s for s in SHAPES if math.prod(s) < 2000]))
    d = DTYPES[data.draw(st.sampled_from(NAMES))]
    encoded = codec.encode(weight_codec.make(data.draw(st.sampled_from(KINDS)), shape, d), shape, d)
    planes = [as_bytes(p).tobytes() for p in encoded[: len(codec.planes(d))]]
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(planes) - 1))
        planes[i] = mutated(planes[i], data)
    with suppress(FormatError):
        decode(codec, planes, shape, d, 2 * d.itemsize, 5)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_originals_give_an_error_or_values(data: st.DataObject) -> None:
    mutate(ORIGINAL, data)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_planes(name: str) -> None:
    """Every single-byte change, truncation and extension of every plane."""
    d, shape = DTYPES[name], (3, 60)
    planes = [as_bytes(p).tobytes() for p in assert_exact(normal(shape, d), shape, d)]
    for i, good in enumerate(planes):
        for bad in hostile(good):
            with suppress(FormatError):
                decode(ORIGINAL, [*planes[:i], bad, *planes[i + 1 :]], shape, d, 2 * d.itemsize, 3)


def test_codes_that_do_not_fit_their_residual_are_refused() -> None:
    d, shape = DTYPES["bfloat16"], (64, 256)
    planes = [as_bytes(p) for p in assert_exact(normal(shape, d, 1), shape, d)]
    others = [as_bytes(p) for p in assert_exact(normal(shape, d, 2), shape, d)]
    with pytest.raises(FormatError):
        decode(ORIGINAL, [planes[0], others[1], others[2], planes[3]], shape, d)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_bit_pattern(name: str) -> None:
    """All 65,536, in order, shuffled, and each alone in a group of ordinary weights."""
    d = DTYPES[name]
    every = np.arange(1 << 16, dtype=np.uint16)
    assert_exact(every.view(np.uint8), (512, 128), d)
    assert_exact(np.random.default_rng(0).permutation(every).view(np.uint8), (256, 256), d)
    for start in range(0, 1 << 16, 1 << 13):  # few enough at a time that the groups around them stay ordinary
        weights = normal((8192, 128), d, start).view(np.uint16).reshape(8192, 128).copy()
        weights[:, 77] = every[start : start + 8192]
        assert_exact(weights.reshape(-1).view(np.uint8), (8192, 128), d)


@pytest.mark.parametrize("name", NAMES)
def test_every_content_and_shape_is_exact(name: str) -> None:
    d = DTYPES[name]
    for shape in (*SHAPES, (0, 4), (2049, 129)):
        n = math.prod(shape)
        for kind in contents.KINDS:
            assert_exact(contents.make(kind, n * d.itemsize, d, 3), shape, d, 3, 1)
        if n:
            for kind in KINDS:
                assert_exact(weight_codec.make(kind, shape, d), shape, d)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bits_in_any_shape_are_exact(data: st.DataObject) -> None:
    d = DTYPES[data.draw(st.sampled_from(NAMES))]
    shape = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = normal(shape, d, 1).reshape(-1, d.itemsize).copy()
    wild = rng.random(len(values)) < data.draw(st.sampled_from([0.0, 0.01, 0.1, 1.0]))
    values[wild] = rng.integers(0, 256, (int(wild.sum()), d.itemsize), np.uint8)
    codec = Ladder("original", data.draw(st.sampled_from([2, 32, 128, 1024])))
    planes = codec.encode(values.reshape(-1), shape, d)
    gap, off = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    assert np.array_equal(decode(codec, planes, shape, d, gap, off), values.reshape(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, BLOCK), (3, BLOCK // 2 + 1), (5, BLOCK // 4 + 131)])
def test_several_blocks(name: str, shape: Shape) -> None:
    d = DTYPES[name]
    values = normal(shape, d)
    planes = assert_exact(values, shape, d, 6, 3)
    whole = decode(INT8, planes[:3], shape, d)
    assert np.array_equal(whole, expected(planes, shape, d, 8))


def expected(planes: Any, shape: Shape, d: DType, bits: int, group: int = 128) -> Bytes:
    """What the codes say, by NumPy and ml_dtypes alone."""
    codec = Ladder("int8" if bits == 8 else "int4", group)
    assert codec.view is not None
    arrays = codec.view.arrays(planes[: 3 if bits == 8 else 2], shape, d)
    columns = arrays["codes"].shape[1]
    scales = np.repeat(arrays["scales"].astype(np.float32), group, axis=1)[:, :columns]
    numbers = (arrays["codes"].astype(np.float32) * scales).astype(numpy_dtype(d))
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_definition(name: str, kind: str) -> None:
    d, shape = DTYPES[name], (33, 300)
    values = weight_codec.make(kind, shape, d)
    planes = ORIGINAL.encode(values, shape, d)
    for bits, codec in ((8, INT8), (4, INT4)):
        decoded = decode(codec, planes[: 3 if bits == 8 else 2], shape, d)
        assert np.array_equal(decoded, expected(planes, shape, d, bits))
    view = INT8.view
    assert view is not None
    arrays = view.arrays(planes[:3], shape, d)
    numbers = np.nan_to_num(
        values.view(numpy_dtype(d)).astype(np.float32).reshape(shape), nan=0, posinf=np.inf, neginf=-np.inf
    )
    s8 = np.repeat(arrays["scales"].astype(np.float32), 128, axis=1)[:, :300]
    with np.errstate(over="ignore"):
        assert np.array_equal(arrays["codes"], np.clip(np.rint(numbers / s8), -128, 119).astype(np.int8))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_product_is_rounded_as_ml_dtypes_does(name: str) -> None:
    """Codes by every finite scale: the float16 of the kernels, subnormals included, is the real one."""
    d = DTYPES[name]
    how = numpy_dtype(d)
    scales = np.arange(1 << 16, dtype=np.uint16)
    scales = scales[np.isfinite(scales.view(how).astype(np.float32))]
    codes = np.tile(np.arange(16, dtype=np.uint8), (scales.size, 8))
    high = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1)
    shape = (scales.size, 128)
    empty = as_bytes(INT4.encode(np.zeros(scales.size * 256, np.uint8), shape, d)[1])
    pieces = -(-high.size // (BLOCK // 2))
    lengths = np.full(pieces, BLOCK // 2, "<u4")
    lengths[-1] = high.size - (pieces - 1) * (BLOCK // 2)
    plane = np.concatenate([empty[:4], lengths.view(np.uint8), high])
    decoded = decode(INT4, [scales.view(np.uint8), plane], shape, d)
    with np.errstate(over="ignore"):
        want = ((codes.astype(np.float32) - 8) * scales.view(how).astype(np.float32)[:, None]).astype(how)
    assert np.array_equal(decoded, np.ascontiguousarray(want).reshape(-1).view(np.uint8))


def test_sizes_on_ordinary_weights() -> None:
    """Gaussian rows of unlike spread: the three together at little above the original alone."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((512, 2048)) * rng.lognormal(-4, 0.3, (512, 1))
    most = {"bfloat16": 11.3, "float16": 14.8, "float32": 27.6}
    for name, how in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
        d = DTYPES[name]
        values = numbers.astype(how).view(np.uint8).reshape(-1)
        planes = assert_exact(values, (512, 2048), d)
        stored = sum(as_bytes(p).size for p in planes)
        assert stored * 8 / numbers.size < most[name]
        assert abs(stored / ORIGINAL.size((512, 2048), d) - 1) < 0.05
        if name == "bfloat16":
            alone = as_bytes(Lossless().encode(values, (512, 2048), d)[0]).size
            assert stored <= 0.5 * (alone + numbers.size * (8.125 + 4.125) / 8)


NARROWER = [("float16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float16")]


def rounded(shape: Shape, name: str, narrow: str, seed: int = 0) -> Bytes:
    """Weights that were in a narrower dtype before."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(shape) * rng.lognormal(-4, 0.3, (shape[0], 1))
    made = numbers.astype(numpy_dtype(DTYPES[narrow])).astype(np.float32).astype(numpy_dtype(DTYPES[name]))
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8)


@pytest.mark.parametrize(("name", "narrow"), NARROWER)
def test_numbers_that_were_rounded_before_cost_no_more_than_then(name: str, narrow: str) -> None:
    """The bits that a narrower format does not have are not stored, nor guessed at."""
    d, shape = DTYPES[name], (512, 2048)
    planes = assert_exact(rounded(shape, name, narrow), shape, d)
    before = ORIGINAL.encode(rounded(shape, narrow, narrow), shape, DTYPES[narrow])
    sizes = [8 * sum(as_bytes(p).size for p in made[1:]) / math.prod(shape) for made in (planes, before)]
    assert sizes[0] < sizes[1] + 0.35
    assert as_bytes(planes[3])[2] > 0
    int8 = decode(INT8, planes[:3], shape, d)
    assert np.array_equal(int8, expected(planes, shape, d, 8))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bits_among_rounded_numbers_are_exact(data: st.DataObject) -> None:
    name, narrow = data.draw(st.sampled_from(NARROWER))
    d, shape = DTYPES[name], data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rounded(shape, name, narrow).reshape(-1, d.itemsize).copy()
    wild = rng.random(len(values)) < data.draw(st.sampled_from([0.0, 0.03, 0.1]))
    values[wild] = rng.integers(0, 256, (int(wild.sum()), d.itemsize), np.uint8)
    assert_exact(values.reshape(-1), shape, d, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)))


@pytest.mark.parametrize(("name", "narrow"), NARROWER)
def test_hostile_residuals_of_rounded_numbers(name: str, narrow: str) -> None:
    d, shape = DTYPES[name], (4, 90)
    planes = [as_bytes(p).tobytes() for p in assert_exact(rounded(shape, name, narrow), shape, d)]
    assert planes[3][2] > 0
    for bad in hostile(planes[3]):
        with suppress(FormatError):
            decode(ORIGINAL, [*planes[:3], bad], shape, d, 2 * d.itemsize, 3)


def test_what_gains_nothing_is_kept_as_values() -> None:
    d = DTYPES["bfloat16"]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)
    planes = assert_exact(noise, (512, 256), d)
    assert as_bytes(planes[3]).size <= noise.size + 100
    infinite = normal((512, 256), d).view(np.uint16).copy()
    infinite[::7] = 0x7F80  # far above the largest code
    planes = assert_exact(infinite.view(np.uint8), (512, 256), d)
    assert as_bytes(planes[3])[1] == 0  # the values themselves
    assert as_bytes(planes[3]).size < 0.75 * infinite.nbytes
    zeros = assert_exact(np.zeros(1 << 18, np.uint8), (512, 256), d)
    assert sum(as_bytes(p).size for p in zeros[1:]) < 1000


def test_same_bytes_from_any_thread() -> None:
    d, shape = DTYPES["bfloat16"], (300, 1000)
    inputs = [normal(shape, d, s) for s in range(3)]
    alone = [[as_bytes(p).tobytes() for p in ORIGINAL.encode(v, shape, d)] for v in inputs]

    def work(i: int) -> bool:
        planes = ORIGINAL.encode(inputs[i % 3], shape, d)
        same = [as_bytes(p).tobytes() for p in planes] == alone[i % 3]
        return same and np.array_equal(decode(ORIGINAL, planes, shape, d), inputs[i % 3])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(18)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64, 256), (64, 320), (3, 32, 128)])
def test_engines_take_it(bits: int, shape: Shape) -> None:
    """What is exported, unpacked by the rule of the format; and by the library, where it is installed."""
    d = DTYPES["bfloat16"]
    codec = INT8 if bits == 8 else INT4
    planes = ORIGINAL.encode(normal(shape, d), shape, d)[: 3 if bits == 8 else 2]
    view = codec.view
    assert view is not None
    parts = view.parts(view.arrays(planes, shape, d), shape, d)
    words = parts["weight_packed"].data.view("<u4").reshape(-1, parts["weight_packed"].shape[-1])
    each = 32 // bits
    codes = (words[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)).reshape(len(words), -1)
    codes = codes[:, : shape[-1]].astype(np.int16) - 2 ** (bits - 1)
    assert parts["weight_packed"].shape[-1] == -(-shape[-1] // each)
    assert np.array_equal(codes, view.arrays(planes, shape, d)["codes"])
    assert parts["weight_shape"].data.view("<i8").tolist() == list(shape)
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    import torch

    state = {
        name: torch.from_numpy(part.data.copy()).view(getattr(torch, part.dtype)).reshape(part.shape)
        for name, part in parts.items()
    }
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**view.scheme()))
    if shape[-1] % 128 or len(shape) > 2:
        return  # the library refuses groups that do not divide the columns
    weight = library.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert weight.dtype == torch.bfloat16
    assert np.array_equal(weight.contiguous().view(torch.uint8).numpy().reshape(-1), decode(codec, planes, shape, d))


def test_parameters() -> None:
    for params in (
        {"variant": "int3"},
        {"group_size": 0},
        {"group_size": 127},
        {"group_size": 1 << 20},
        {"codes_group_size": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(params))):
            registry.codec("ladder", params)
    assert registry.codec("ladder").exact
    assert not registry.codec("ladder", {"variant": "int8"}).exact
    with pytest.raises(UnsupportedError, match="float64"):
        ORIGINAL.encode(np.zeros(512, np.uint8), (1, 64), DTYPES["float64"])
