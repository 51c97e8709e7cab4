"""docs/codecs.md says enough to read every variant: a second decoder, written from that page only, gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from modelstore.codecs import registry
from modelstore.codecs.ladder.codec import Ladder
from modelstore.codecs.weight import FLOATS
from modelstore.format.dtypes import DTYPES
from tests.docs.test_format_spec import decode as lossless
from tests.docs.test_format_spec import unzstd

Bytes = NDArray[np.uint8]
Planes = Mapping[str, Bytes]
Floats = NDArray[np.float32]

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]  # fmt: skip


def kind(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype if dtype in ("float16", "float32", "float64") else getattr(ml_dtypes, dtype))


def floats(data: Bytes, dtype: str) -> Floats:
    return data.view(kind(dtype)).astype(np.float32)


def rounded(numbers: NDArray[Any], dtype: str) -> Bytes:
    return np.ascontiguousarray(numbers.astype(np.float32).astype(kind(dtype))).reshape(-1).view(np.uint8)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    if len(shape) > 3 or (len(shape) == 3 and shape[-1] <= 11):
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def height(shape: tuple[int, ...]) -> int:
    """Rows of one matrix of a stack."""
    stack = len(shape) > 2 and not (len(shape) > 3 or shape[-1] <= 11)
    return shape[-2] if stack else matrix(shape)[0]


def fields(data: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    """`count` numbers of `bits` bits, the first in the lowest."""
    found = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    return (found.astype(np.int64) << np.arange(bits)).sum(axis=1)


def scale_dtype(dtype: str) -> str:
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def spread(scales: NDArray[Any], shape: tuple[int, ...], granularity: str, group: int) -> NDArray[Any]:
    """A scale for every number of the matrix."""
    rows, columns = matrix(shape)
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if granularity == "block":
        high = height(shape)
        row = row // high * math.ceil(high / group) + row % high // group
        wide = math.ceil(columns / group)
        column = column // group
    else:
        wide = math.ceil(columns / group) if granularity == "group" else 1
        row = row * (granularity != "tensor")
        column = column // (group if granularity == "group" else columns)
    return scales.reshape(-1, wide)[row, column]


def read_int(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    bits, (rows, columns) = p.get("bits", 4), matrix(shape)
    line = math.ceil(columns * bits / 8)
    codes = np.stack([fields(row, bits, columns) for row in planes["codes"].reshape(rows, line)])
    where = shape, p.get("granularity", "group"), p.get("group_size", 128)
    scale = spread(floats(planes["scale"], scale_dtype(dtype)), *where)
    zero = spread(planes["zero"].astype(np.int64), *where) if "zero" in planes else 1 << (bits - 1)
    return rounded((codes - zero).astype(np.float32) * scale, dtype)


def read_fp8(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    codes = floats(planes["codes"], {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[p.get("format", "e4m3")])
    scale = floats(planes["scale"], scale_dtype(dtype))
    where = shape, p.get("granularity", "channel"), p.get("group_size", 128)
    return rounded(codes.reshape(matrix(shape)) * spread(scale, *where), dtype)


def four(planes: Planes, shape: tuple[int, ...], levels: list[float], scale: Floats, group: int, dtype: str) -> Bytes:
    rows, columns = matrix(shape)
    codes = np.stack([fields(row, 4, columns) for row in planes["codes"].reshape(rows, math.ceil(columns / 2))])
    return rounded(np.array(levels, np.float32)[codes] * spread(scale, shape, "group", group), dtype)


def read_nf4(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    return four(planes, shape, NF4, floats(planes["scale"], "bfloat16"), p.get("group_size", 64), dtype)


def read_mxfp4(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    return four(planes, shape, E2M1, np.exp2(planes["scale"].astype(np.float32) - 127), 32, dtype)


def read_nvfp4(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    scale = floats(planes["scale"], "float8_e4m3fn") / planes["global"].view(np.float32)[0]
    return four(planes, shape, E2M1, scale, 16, dtype)


def read_half(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    kept = dtype if SIZES[dtype] == 1 else p.get("dtype", "float16")
    raw = lossless(planes["data"], kept, math.prod(shape) * SIZES[kept])
    return raw if kept == dtype else rounded(floats(raw, kept), dtype)


def read_round(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    return lossless(planes["data"], dtype, math.prod(shape) * SIZES[dtype])


def signed(codes: NDArray[Any], planes: Planes, shape: tuple[int, ...], dtype: str, group: int) -> Bytes:
    """Codes of -1, 0 and 1 times the scales."""
    scale = floats(planes["scales"], dtype)
    every = spread(scale, shape, "group" if group else "channel", group or matrix(shape)[1])
    return rounded(np.where(codes.reshape(matrix(shape)) == 0, 0, codes.reshape(matrix(shape)) * every), dtype)


def read_binary(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    codes = 1 - 2 * fields(planes["codes"], 1, math.prod(shape))
    return signed(codes, planes, shape, dtype, p.get("group_size", 0))


def read_ternary(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    digits = planes["codes"].astype(np.int64)[:, None] // 3 ** np.arange(5) % 3
    return signed(digits.reshape(-1)[: math.prod(shape)] - 1, planes, shape, dtype, p.get("group_size", 0))


def indices(plane: Bytes, count: int, levels: int) -> NDArray[np.int64]:
    bits = max(1, (levels - 1).bit_length())
    if plane[0] == 0:
        return fields(plane[1:], bits, count)
    assert plane[0] == 1
    each = 8 // bits
    whole = lossless(plane[1:], "uint8", math.ceil(count / each))
    return (whole.astype(np.int64)[:, None] >> bits * np.arange(each) & (1 << bits) - 1).reshape(-1)[:count]


def read_kmeans(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    book = planes["codebook"].view(kind(dtype))
    return np.ascontiguousarray(book[indices(planes["indices"], math.prod(shape), len(book))]).view(np.uint8)


def masked(plane: Bytes, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    count = math.prod(shape)
    return fields(lossless(plane, "uint8", math.ceil(count / 8)), 1, count).astype(bool)


def read_sparse(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    mask = masked(planes["mask"], shape)
    out = np.zeros((mask.size, SIZES[dtype]), np.uint8)
    out[mask] = lossless(planes["values"], dtype, int(mask.sum()) * SIZES[dtype]).reshape(-1, SIZES[dtype])
    return out.reshape(-1)


def read_deep(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    mask, book = masked(planes["mask"], shape), planes["codebook"].view(kind(dtype))
    out = np.zeros(mask.size, kind(dtype))
    out[mask] = book[indices(planes["indices"], int(mask.sum()), len(book))]
    return out.view(np.uint8)


def read_lowrank(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    stored = {"float64": "float32", "float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16"}.get(dtype, dtype)
    rank, (rows, columns), high = int(planes["left"][:4].view("<u4")[0]), matrix(shape), height(shape)
    count = rows // high
    sizes = count * high * rank * SIZES[stored], count * rank * columns * SIZES[stored]
    left = floats(lossless(planes["left"][4:], stored, sizes[0]), stored).reshape(count, high, rank)
    right = floats(lossless(planes["right"], stored, sizes[1]), stored).reshape(count, rank, columns)
    out = np.zeros((count, high, columns), np.float32)
    for k in range(rank):
        out += left[:, :, k, None] * right[:, k, None, :]
    most = np.float32(min(float(ml_dtypes.finfo(kind(dtype)).max), float(np.finfo(np.float32).max)))
    return rounded(np.clip(out, -most, most), dtype)


# ---------------------------------------------------------------------- the ladder

BLOCK = 1 << 18


def read_packed(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    return lossless(planes["data"], dtype, math.prod(shape) * SIZES[dtype])


def nibbles(plane: Bytes, count: int) -> NDArray[np.int64]:
    assert plane[:4].tolist() == [1, 0, 0, 17]
    blocks = math.ceil(count / BLOCK)
    at, found = 4 + 4 * blocks, []
    for b, length in enumerate(plane[4 : 4 + 4 * blocks].view("<u4").tolist()):
        n = min(BLOCK, count - b * BLOCK)
        piece = plane[at : at + length]
        if length < math.ceil(n / 2):
            piece = np.frombuffer(unzstd(piece.tobytes()), np.uint8)
        found.append(fields(piece, 4, n))
        at += length
    assert at == len(plane)
    return np.concatenate(found)


def ordinal(words: NDArray[Any], bits: int) -> NDArray[Any]:
    low = (1 << (bits - 1)) - 1
    return np.where(words >> (bits - 1) & 1, words ^ low, words)


def read_ladder(planes: Planes, shape: tuple[int, ...], dtype: str, p: Mapping[str, Any]) -> Bytes:
    count = math.prod(shape)
    own, theirs = p.get("group_size", 128), p.get("codes_group_size", 0)

    def every(name: str, group: int) -> Floats:
        return spread(floats(planes[name], dtype), shape, "group", group).reshape(-1)

    h = nibbles(planes["high"], count)
    s4 = every("scale", theirs or own)
    if p["variant"] == "int4":
        return rounded((h - 8).astype(np.float32) * s4, dtype)
    low = nibbles(planes["low"], count)
    if theirs:
        given, s4, c = s4, every("own_scale", own), nibbles(planes["correction"], count)
        r = np.clip(np.rint(np.float32(given / s4) * np.float32(4096)), -(2**24), 2**24).astype(np.int64)
        guess = np.clip((h - 8) * r - 256 * (low - 8) + 2048 >> 12, -8, 7) + 8
        h = np.where(low > 8, guess - c, guess + c) & 15
    q = 16 * h + low - 136
    near = rounded(q.astype(np.float32) * floats(rounded(s4 / np.float32(16), dtype), dtype), dtype)
    if p["variant"] == "int8":
        return near
    data = planes["residual"]
    version, form, drop, log = data[:4].tolist()
    assert (version, log) == (1, 18)
    if form == 0:
        return lossless(data[4:], dtype, count * SIZES[dtype])
    return original(data, near, q, drop, dtype)


def original(data: Bytes, near: Bytes, q: NDArray[np.int64], drop: int, dtype: str) -> Bytes:
    """The residual of form 1."""
    width, count = SIZES[dtype], q.size
    bits, word = 8 * width, np.dtype(f"<u{width}")
    shift, bias = {"bfloat16": (0, 128), "float16": (4, 2056), "float32": (16, 8421376)}[dtype]
    blocks = math.ceil(count / BLOCK)
    zeros, patches, *sides = data[4:24].view("<u4").tolist()
    lengths, packed = data[24 : 24 + 4 * blocks].view("<u4").tolist(), data[24 + 4 * blocks : 24 + 5 * blocks].tolist()
    at, read = 24 + 5 * blocks, []
    for size, n, how in zip(sides, (zeros, patches, patches), (dtype, "uint32", dtype), strict=True):
        read.append(lossless(data[at : at + size], how, n * (4 if how == "uint32" else width)))
        at += size
    y = near.view(word).astype(np.int64)
    if drop:
        y = (y + (1 << drop >> 1)) & -(1 << drop) & (1 << bits) - 1
    stream = np.array([min(7, abs(int(v)).bit_length()) for v in range(-136, 136)])[q + 136]
    symbols, rests = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for b in range(blocks):
        here = slice(b * BLOCK, min(count, (b + 1) * BLOCK))
        n = here.stop - here.start
        sizes = [int((stream[here] == k).sum()) for k in range(8)]
        taken = [0, *(math.ceil(m / 2) if packed[b] >> k & 1 else m for k, m in enumerate(sizes[1:], 1))]
        rest = {"bfloat16": 0, "float16": math.ceil(n / 2), "float32": 2 * n}[dtype]
        whole = sum(taken) + (rest if drop else 0)
        piece = data[at : at + lengths[b]]
        if lengths[b] < whole:
            piece = np.frombuffer(unzstd(piece.tobytes()), np.uint8)
        assert len(piece) == whole
        at += lengths[b]
        tail = piece[sum(taken) :] if drop else data[at : at + rest]
        at += 0 if drop else rest
        for k in range(1, 8):
            part = piece[sum(taken[:k]) : sum(taken[: k + 1])]
            place = here.start + np.flatnonzero(stream[here] == k)
            symbols[place] = fields(part, 4, sizes[k]) + 120 if packed[b] >> k & 1 else part
        if dtype == "float16":
            rests[here] = fields(tail, 4, n)
        elif dtype == "float32":
            rests[here] = tail[:n].astype(np.int64) | tail[n:].astype(np.int64) << 8 if drop else tail.view("<u2")
    assert at == len(data)
    d = (symbols << shift | rests) - bias
    made = ordinal((ordinal(y, bits) + np.where(q < 0, -d, d)) & (1 << bits) - 1, bits)
    made[q == 0] = read[0].view(word)
    made[read[1].view("<u4")] = read[2].view(word)
    return made.astype(word).view(np.uint8)


READERS: dict[str, Callable[[Planes, tuple[int, ...], str, Mapping[str, Any]], Bytes]] = {
    "int": read_int,
    "fp8": read_fp8,
    "nf4": read_nf4,
    "mxfp4": read_mxfp4,
    "nvfp4": read_nvfp4,
    "half": read_half,
    "round": read_round,
    "binary": read_binary,
    "ternary": read_ternary,
    "kmeans": read_kmeans,
    "sparse": read_sparse,
    "deep": read_deep,
    "lowrank": read_lowrank,
    "ladder": read_ladder,
    "packed": read_packed,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("int", {}),
    ("int", {"bits": 3, "symmetric": False, "method": "mse", "group_size": 64}),
    ("int", {"bits": 8, "granularity": "channel"}),
    ("int", {"bits": 8, "granularity": "tensor", "symmetric": False}),
    ("int", {"bits": 2, "granularity": "block", "group_size": 16, "symmetric": False, "method": "hqq"}),
    ("fp8", {}),
    ("fp8", {"format": "e5m2", "granularity": "tensor"}),
    ("fp8", {"granularity": "block", "group_size": 16}),
    ("nf4", {}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("half", {}),
    ("half", {"dtype": "bfloat16"}),
    ("round", {"step": 0.01}),
    ("binary", {}),
    ("binary", {"group_size": 32}),
    ("ternary", {}),
    ("ternary", {"group_size": 32}),
    ("kmeans", {}),
    ("kmeans", {"levels": 7}),
    ("kmeans", {"rate": 2.0}),
    ("sparse", {"sparsity": 0.5}),
    ("sparse", {"n": 2, "m": 4}),
    ("deep", {}),
    ("lowrank", {"ratio": 0.4}),
    ("packed", {}),
]
SHAPES = [(70, 200), (3, 40, 72), (24, 5, 3, 3), (301,)]
LADDERS: list[dict[str, Any]] = [
    {"variant": variant, "codes_group_size": codes} for variant in ("original", "int8", "int4") for codes in (0, 64)
]


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Bytes:
    """Weights with outliers, zeros, and what is not finite where the dtype has it."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(0, 0.05, shape).astype(np.float32).reshape(-1)
    numbers[::97] *= 30
    numbers[: shape[-1] // 2] = 0
    numbers[-3] = np.nan
    numbers[-5] = -np.inf if dtype != "float8_e4m3fn" else 1
    with np.errstate(over="ignore"):
        return numbers.astype(kind(dtype)).view(np.uint8)


def test_every_compression_codec_has_a_reader() -> None:
    assert set(registry.names()) - {"raw", "lossless", "delta"} == READERS.keys()
    assert set(FLOATS) == SIZES.keys()
    assert {name for name, _ in CASES} | {"ladder"} == READERS.keys()


def check(name: str, params: Mapping[str, Any], raw: Bytes, shape: tuple[int, ...], dtype: str) -> None:
    codec = registry.codec(name, params)
    made = [np.frombuffer(bytes(plane), np.uint8) for plane in codec.encode(raw, shape, DTYPES[dtype])]
    names = registry.codec(name, {**params, "variant": "original"}).planes(DTYPES[dtype]) if name == "ladder" else None
    planes = dict(zip(names or codec.planes(DTYPES[dtype]), made, strict=True))
    out = np.empty((1, raw.size), np.uint8)
    codec.decode([planes[plane] for plane in codec.planes(DTYPES[dtype])], shape, DTYPES[dtype], out)
    with np.errstate(all="ignore"):
        found = READERS[name](planes, shape, dtype, params)
    assert found.tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(("name", "params"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_variants_are_read_from_the_page_alone(name: str, params: dict[str, Any], dtype: str) -> None:
    for shape in SHAPES:
        if registry.codec(name, params).refuses(shape, DTYPES[dtype]) is None:  # type: ignore[attr-defined]
            check(name, params, values(shape, dtype), shape, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("params", LADDERS, ids=lambda p: f"{p['variant']}-{p['codes_group_size']}")
def test_ladders_are_read_from_the_page_alone(params: dict[str, Any], dtype: str) -> None:
    for shape in (*SHAPES[:3], (700, 400)):  # the last has more than a block
        check("ladder", params, values(shape, dtype), shape, dtype)
    narrow = floats(values((700, 400), "bfloat16"), "bfloat16").astype(kind(dtype)).view(np.uint8)
    check("ladder", params, narrow, (700, 400), dtype)  # bits that were rounded away before
    sample = Ladder().encode(narrow, (700, 400), DTYPES[dtype])[3]
    assert dtype == "float16" or bytes(sample)[1] == 1, "the residual is of form 1"
