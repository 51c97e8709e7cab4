from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.codecs.look import Look
from modelstore.codecs.numeric import histogram
from modelstore.codecs.shared.deep import Deep
from modelstore.codecs.sparse import pruning
from modelstore.codecs.sparse.codec import Sparse
from modelstore.errors import FormatError
from modelstore.format.buffers import as_bytes
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import BF16, WeightContract, make

F32 = DTYPES["float32"]


class SparseContract(WeightContract):
    exact_size = False
    keeps_special = True
    floor = 5


class TestAllButZeros(SparseContract):
    codec = Sparse()
    floor = 100


class TestThreshold(SparseContract):
    codec = Sparse(threshold=0.01)
    size_factor = 2


class TestOverTheTensor(SparseContract):
    codec = Sparse(sparsity=0.5)


class TestOverRows(SparseContract):
    codec = Sparse(sparsity=0.7, scope="row")


class TestPattern(SparseContract):
    codec = Sparse(n=2, m=4)


class TestDeep(WeightContract):
    codec = Deep()
    exact_size = False
    idempotent = False
    floor = 9


class TestDeepOverRows(WeightContract):
    codec = Deep(scope="row", sparsity=0.6, rate=3.0)
    exact_size = False
    idempotent = False
    floor = 8


def decoded(codec: Any, w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    planes = codec.encode(w.view(np.uint8).reshape(-1), shape, F32)
    out = np.empty((1, w.nbytes), np.uint8)
    codec.decode(planes, shape, F32, out)
    return out.view(np.float32).reshape(w.shape)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=200), st.floats(0, 0.99), st.booleans())
def test_exactly_the_smallest_are_pruned_and_of_equals_the_later(found: list[int], sparsity: float, row: bool) -> None:
    w = np.array(found, np.float32) * np.float32(0.1)
    pruned = int(sparsity * w.size + 0.5)
    order = np.lexsort((-np.arange(w.size), np.abs(w)))
    expected = w.copy()
    expected[order[:pruned]] = 0
    got = decoded(Sparse(sparsity=sparsity, scope="row" if row else "tensor"), w, w.shape)
    assert np.array_equal(got, expected)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_n_of_every_m(n: int, more: int, columns: int, seed: int) -> None:
    m = n + more
    w = np.random.default_rng(seed).integers(-4, 5, (3, columns)).astype(np.float32)
    expected = np.zeros_like(w)
    for r in range(3):
        for a in range(0, columns, m):
            part = np.abs(w[r, a : a + m])
            best = np.lexsort((np.arange(part.size), -part))[:n] + a
            expected[r, best] = w[r, best]
    assert np.array_equal(decoded(Sparse(n=n, m=m), w, w.shape), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_one_threshold_for_many_tensors(dtype: str) -> None:
    d = DTYPES[dtype]
    tensors = [make("normal", (300 + 100 * i, 64), d, i) for i in range(3)]
    found = []
    for values in tensors:
        counts = histogram.empty(d)
        histogram.count(values, d, counts)
        found.append(pruning.magnitudes(counts, d))
    threshold = pruning.global_threshold(found, 0.6)
    total = kept = 0
    for values in tensors:
        n = values.size // d.itemsize
        keep = pruning.Pruning(threshold=threshold).fit(Look(lambda _, v=values: v, (n,), d))  # type: ignore[misc]
        total, kept = total + n, kept + int(keep(values, ((0, n),)).sum())
    assert kept / total == pytest.approx(0.4, abs=0.03 if d.itemsize == 1 else 0.002)


def test_masks_take_what_their_entropy_is() -> None:
    shape = (512, 512)
    values = make("normal", shape, BF16)
    for codec, bits in ((Sparse(sparsity=0.5), 1.0), (Sparse(sparsity=0.9), 0.469), (Sparse(n=2, m=4), 0.6462)):
        mask = as_bytes(codec.encode(values, shape, BF16)[0])
        assert 8 * mask.size / (512 * 512) < bits * 1.04 + 0.002


def test_a_bit_after_the_last_is_refused() -> None:
    codec = Sparse()
    values = make("normal", (3, 3), BF16)
    planes = codec.encode(values, (3, 3), BF16)
    more = codec.encode(make("normal", (2, 8), BF16), (2, 8), BF16)
    with pytest.raises(FormatError, match="after the last"):
        codec.decode([more[0], planes[1]], (3, 3), BF16, np.empty((3, 6), np.uint8))


WRONG: list[dict[str, Any]] = [
    {"sparsity": 1.0},
    {"sparsity": -0.1},
    {"threshold": -1.0},
    {"threshold": float("nan")},
    {"scope": "model"},
    {"n": 2},
    {"n": 4, "m": 4},
    {"n": 2, "m": 65},
    {"sparsity": 0.5, "threshold": 0.1},
    {"sparsity": 0.5, "n": 2, "m": 4},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parameters_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sparse(**wrong)
