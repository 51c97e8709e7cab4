from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.codecs.loss import loss_of
from modelstore.codecs.numeric import histogram
from modelstore.codecs.shared import clusters, indices
from modelstore.codecs.shared.clusters import Numbers
from modelstore.codecs.shared.kmeans import KMeans
from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from modelstore.testing.weight_codec import BF16, WeightContract, make


class TestKMeans(WeightContract):
    codec = KMeans()
    floor = 19.5
    idempotent = False  # in float32 a bin of the histogram stands for many numbers
    exact_size = False


class TestKMeans8(WeightContract):
    codec = KMeans(bits=8)
    floor = 40
    idempotent = False
    exact_size = False


class TestLevels(WeightContract):
    codec = KMeans(levels=3)
    floor = 7
    idempotent = False
    exact_size = False


class TestRate(WeightContract):
    codec = KMeans(rate=3.0)
    floor = 15.5
    exact_size = False
    idempotent = False
    zeros = True


@pytest.mark.parametrize("rate", [1.0, 1.6, 2.0, 3.0, 4.0, 5.0, 6.5])
@pytest.mark.parametrize("tail", [False, True])
def test_a_rate_is_kept(rate: float, tail: bool) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_t(4, 1 << 19) if tail else rng.standard_normal(1 << 19)).astype(np.float16)
    planes = KMeans(rate=rate).encode(w.view(np.uint8), w.shape, DTYPES["float16"])
    assert 0.93 * rate < 8 * len(planes[0]) / w.size <= 1.01 * rate


def test_a_rate_is_what_is_stored_and_better_than_plain_int4() -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(0, 0.4, (512, 1)))
    w = (rng.standard_normal((512, 1024)) * 0.02 * scales).astype(np.float32)
    import ml_dtypes

    w = w.astype(ml_dtypes.bfloat16)
    values = w.view(np.uint8).reshape(-1)
    codec = KMeans(rate=4.125)
    planes = codec.encode(values, w.shape, BF16)
    stored = 8 * sum(len(plane) for plane in planes) / w.size
    assert 4.0 < stored <= 4.125
    out = np.empty((512, 2048), np.uint8)
    codec.decode(planes, w.shape, BF16, out)
    groups = w.astype(np.float32).reshape(-1, 128)
    step = np.abs(groups).max(axis=1, keepdims=True) / 7.5
    plain = (np.clip(np.round(groups / step), -8, 7) * step).astype(ml_dtypes.bfloat16)
    ours = loss_of(values, out.reshape(-1), BF16).sqnr
    assert ours > loss_of(values, plain.view(np.uint8).reshape(-1), BF16).sqnr + 2


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9, unique=True), st.integers(2, 4))
def test_clusters_against_all_partitions(found: list[int], levels: int) -> None:
    values = np.sort(np.array(found, np.float64))
    numbers = Numbers.of(values, np.ones(values.size, np.int64))
    n = min(levels, values.size)
    least = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(values, cuts))
        for cuts in itertools.combinations(range(1, values.size), n - 1)
    )
    book = clusters.kmeans(numbers, levels)
    assert len(book[0]) <= levels
    assert numbers.error(book) >= least - 1e-9  # Lloyd's may end in a local optimum, never below the global one
    nearest = np.abs(values[:, None] - book[0]).min(axis=1)
    assert np.isclose(numbers.error(book), (nearest**2).sum())


def test_normal_weights_come_to_the_known_optimum() -> None:
    x = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    counts = histogram.empty(DTYPES["float32"])
    histogram.count(x.view(np.uint8), DTYPES["float32"], counts)
    numbers = Numbers.of(*histogram.numbers(counts, DTYPES["float32"]))
    for levels, distortion in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)):  # Max (1960)
        assert numbers.error(clusters.kmeans(numbers, levels)) / x.size == pytest.approx(distortion, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_few_values_are_kept_to_the_last_bit(dtype: str) -> None:
    d = DTYPES[dtype]
    few = make("normal", (16,), d)
    values = few.reshape(16, -1)[np.random.default_rng(0).integers(0, 16, 5000)].reshape(-1)
    planes = KMeans().encode(values, (5000,), d)
    out = np.empty((1, values.size), np.uint8)
    KMeans().decode(planes, (5000,), d, out)
    if d.itemsize <= 2:
        assert np.array_equal(out[0], values)
    else:
        assert loss_of(values, out[0], d).sqnr > 60


@given(st.integers(1, 3000), st.integers(1, 256), st.booleans(), st.integers(0, 9))
def test_indices_come_back(n: int, levels: int, skewed: bool, seed: int) -> None:
    drawn = np.random.default_rng(seed).random(n)
    found = ((drawn**8 if skewed else drawn) * levels).astype(np.uint8)
    plane = indices.encode(found, levels)
    assert plane.size <= 1 + -(-n * indices.width(levels) // 8)
    assert np.array_equal(indices.decode(plane, n, levels), found)
    if indices.width(int(found.max())) == indices.width(levels) and found.max():
        with pytest.raises(FormatError):
            indices.decode(plane, n, int(found.max()))


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 9}, {"levels": 1}, {"levels": 257}, {"rate": 9.0}, {"rate": -1.0}]
)
def test_wrong_parameters_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KMeans(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of them"):
        KMeans(levels=4, rate=2.0)
