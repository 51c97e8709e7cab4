from __future__ import annotations

import numpy as np
import pytest
import torch

from modelstore.codecs.look import Look, ReadValues
from modelstore.codecs.lowrank import codec as lowrank
from modelstore.codecs.lowrank import decompose
from modelstore.codecs.lowrank.codec import LowRank
from modelstore.codecs.sparse.codec import within
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import Shape
from modelstore.testing.weight_codec import WeightContract, make

F32 = DTYPES["float32"]


class LowRankContract(WeightContract):
    exact_size = False
    idempotent = False
    robust = False
    largest = False
    size_factor = 1.5
    floor = 0.1


class TestRank(LowRankContract):
    codec = LowRank(rank=4)


class TestRatio(LowRankContract):
    codec = LowRank(ratio=0.4)
    floor = 1


class TestEnergy(LowRankContract):
    codec = LowRank(energy=0.3)
    size_factor = 4
    floor = 1.4


def decoded(codec: LowRank, w: np.ndarray) -> np.ndarray:
    planes = codec.encode(w.view(np.uint8).reshape(-1), w.shape, F32)
    out = np.empty((1, w.nbytes), np.uint8)
    codec.decode(planes, w.shape, F32, out)
    return out.view(np.float32).reshape(w.shape)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (300, 40)])
def test_it_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(decoded(LowRank(rank=10), w), (u[:, :10] * s[:10]) @ v[:10], atol=2e-5)
    share = np.cumsum(s**2) / (s**2).sum()
    needed = int(np.searchsorted(share, 0.4)) + 1
    planes = LowRank(energy=0.4).encode(w.view(np.uint8).reshape(-1), shape, F32)
    assert lowrank.factors(planes, shape, F32)[2] == needed


def test_a_matrix_of_low_rank_comes_back() -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((50, 3)) @ rng.standard_normal((3, 70))).astype(np.float32)
    np.testing.assert_allclose(decoded(LowRank(rank=5), w), w, atol=1e-5)


def test_a_convolution_is_a_kernel_into_fewer_channels_and_one_of_a_single_point() -> None:
    shape: Shape = (24, 8, 3, 3)
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    planes = LowRank(rank=6).encode(w.view(np.uint8).reshape(-1), shape, F32)
    left, right, rank = lowrank.factors(planes, shape, F32)
    one = torch.from_numpy(right.view(np.float32).reshape(rank, 8, 3, 3).copy())
    two = torch.from_numpy(left.view(np.float32).reshape(24, rank, 1, 1).copy())
    x = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.conv2d(x, torch.from_numpy(decoded(LowRank(rank=6), w)))
    pair = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, one), two)
    torch.testing.assert_close(pair, whole, atol=1e-4, rtol=1e-4)


def test_each_matrix_of_a_stack_has_factors_of_its_own() -> None:
    w = np.random.default_rng(0).standard_normal((3, 30, 40)).astype(np.float32)
    found = decoded(LowRank(rank=4), w)
    for i in range(3):
        assert np.array_equal(found[i], decoded(LowRank(rank=4), np.ascontiguousarray(w[i])))


def test_a_large_matrix_is_read_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "BAND", 4096)
    for shape in ((200, 64), (64, 200), (3, 40, 64)):
        values = make("normal", shape, F32)
        largest = 0
        inner = within(values, shape, F32).read

        def read(region: tuple[tuple[int, int], ...], inner: ReadValues = inner) -> Bytes:
            nonlocal largest
            found = inner(region)
            largest = max(largest, found.size)
            return found

        encode = LowRank(rank=5).fit(Look(read, shape, F32))
        assert largest <= 4096
        planes = encode(values, tuple((0, n) for n in shape))
        out = np.empty((1, values.size), np.uint8)
        LowRank(rank=5).decode(planes, shape, F32, out)
        w = values.view(np.float32).reshape(shape)
        np.testing.assert_allclose(out.view(np.float32).reshape(shape), decoded(LowRank(rank=5), w), atol=1e-6)


@pytest.mark.parametrize("shape", [(160, 96), (96, 160), (128, 128)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_space_that_is_looked_for_holds_what_the_eigenvectors_hold(
    shape: tuple[int, int], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(shape)
    steep = (rng.standard_normal((shape[0], 12)) * 2.0 ** -np.arange(12)) @ rng.standard_normal((12, shape[1]))
    for w in (flat * size, (steep + flat / 100) * size, steep * size, np.zeros(shape)):
        w = w.astype(np.float32)
        exact = decoded(LowRank(rank=20), w).astype(np.float64)
        with monkeypatch.context() as patch:
            patch.setattr(decompose, "_SHORT", 8)
            patch.setattr(decompose, "_MORE", 8)
            assert decompose._searches(min(shape), 20)
            found = decoded(LowRank(rank=20), w).astype(np.float64)
        least, error = (((part / size - w.astype(np.float64) / size) ** 2).sum() for part in (exact, found))
        assert error <= least * 1.03 + 1e-9 * (w.astype(np.float64) / size).__pow__(2).sum()


def test_factors_of_a_stack_are_made_as_its_regions_come(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 32, 48)
    values = make("normal", shape, F32)
    whole = LowRank(rank=4).fit(within(values, shape, F32))(values, tuple((0, n) for n in shape))
    made = []
    real = decompose.factors
    monkeypatch.setattr(decompose, "factors", lambda *args: made.append(1) or real(*args))
    monkeypatch.setattr(lowrank, "_HELD", 0)
    encode = LowRank(rank=4).fit(within(values, shape, F32))
    assert not made
    out = np.empty((1, values.size), np.uint8)
    LowRank(rank=4).decode(whole, shape, F32, out)
    each = values.size // 6
    for i in range(6):
        region = ((i, i + 1), (0, 32), (0, 48))
        one = np.empty((1, each), np.uint8)
        LowRank(rank=4).decode(encode(values[i * each : (i + 1) * each], region), (1, 32, 48), F32, one)
        assert np.array_equal(one[0], out[0, i * each : (i + 1) * each])
        assert len(made) == i + 1


def test_what_would_not_be_smaller_is_refused() -> None:
    codec = LowRank(rank=32)
    assert "no rank below" in str(codec.refuses((32, 100), F32))
    assert "not smaller" in str(codec.refuses((60, 60), F32))
    assert codec.refuses((100,), F32) == "is not a matrix"
    assert codec.refuses((100, 100), F32) is None


@pytest.mark.parametrize("wrong", [{}, {"rank": -1}, {"energy": 1.0}, {"ratio": -0.5}, {"rank": 3, "ratio": 0.5}])
def test_wrong_parameters_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy|ratio"):
        LowRank(**wrong)  # type: ignore[arg-type]
