"""Factors found on data are those of least error for it, and are stored as they were found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelstore.calibrate.lowrank import Whitening, solve
from modelstore.calibrate.methods import WAYS, Layer
from modelstore.codecs.lowrank.codec import LowRank
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import full
from tests.calibrate.test_pruned import moments, weight

NONE = np.empty(0, np.uint8)  # values that are not looked at

SHAPES = [(24, 40), (40, 24), (32, 32)]


def product(planes: tuple[object, ...], shape: tuple[int, int], dtype: str = "float32") -> torch.Tensor:
    kind = DTYPES[dtype]
    out = np.empty((1, shape[0] * shape[1] * kind.itemsize), np.uint8)
    LowRank(ratio=0.5).decode(planes, shape, kind, out)  # type: ignore[arg-type]
    return torch.frombuffer(bytearray(out.tobytes()), dtype=getattr(torch, dtype)).float().reshape(shape)


def error(found: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    gap = (found - values).double()
    return float((gap @ hessian * gap).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_independent_inputs_give_the_codec_s_own_factors(shape: tuple[int, int], size: float) -> None:
    values, kind, codec = weight(*shape), DTYPES["float32"], LowRank(ratio=0.5)
    layer = Layer(values, codec, kind, {})
    found = WAYS["svd-llm"].solve(layer, Whitening.of(size * torch.eye(shape[1], dtype=torch.float64)))
    raw = np.frombuffer(values.numpy().tobytes(), np.uint8)
    plain = product(codec.encode(raw, shape, kind), shape)
    assert torch.allclose(product(found.encode(NONE, full(shape)), shape), plain, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_least_of_that_rank(shape: tuple[int, int]) -> None:
    values, inputs = weight(*shape), Whitening.of(moments(shape[1]).hessian)
    hessian = inputs.moments
    found = solve(values, inputs, 7, 0.0, torch.float32)
    assert found.left.shape == (shape[0], 7)
    assert found.right.shape == (7, shape[1])
    least = float((torch.linalg.svdvals(values.double() @ inputs.root)[7:] ** 2).sum())
    had = error(found.left @ found.right, values, hessian)
    assert had == pytest.approx(least, rel=1e-4)
    blind = solve(values, Whitening.of(torch.eye(shape[1], dtype=torch.float64)), 7, 0.0, torch.float32)
    assert had < 0.8 * error(blind.left @ blind.right, values, hessian)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_energy_is_that_of_what_the_layer_gives(shape: tuple[int, int]) -> None:
    values, inputs = weight(*shape), Whitening.of(moments(shape[1]).hessian)
    hessian = inputs.moments
    found = solve(values, inputs, 0, 0.9, torch.float32)
    whole = error(torch.zeros(shape), values, hessian)
    assert error(found.left @ found.right, values, hessian) <= 0.1001 * whole
    less = solve(values, inputs, len(found.right) - 1, 0.0, torch.float32)
    assert error(less.left @ less.right, values, hessian) > 0.1 * whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_left_factor_makes_up_for_the_rounded_right_one(shape: tuple[int, int], dtype: str) -> None:
    values, inputs = weight(*shape), Whitening.of(moments(shape[1]).hessian)
    hessian = inputs.moments
    exact = solve(values, inputs, 7, 0.0, torch.float32)
    found = solve(values, inputs, 7, 0.0, getattr(torch, dtype))
    right = exact.right.to(getattr(torch, dtype)).float()
    assert torch.equal(found.right, found.right.to(getattr(torch, dtype)).float())
    assert error(found.left @ found.right, values, hessian) <= 1.01 * error(exact.left @ right, values, hessian)


@pytest.mark.parametrize("shape", SHAPES)
def test_poor_inputs_give_factors_too(shape: tuple[int, int]) -> None:
    one = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    one[2, 2] = 5.0  # nothing comes but through one column
    broken = torch.eye(shape[1], dtype=torch.float64)
    broken[0, 1] = broken[1, 0] = 100
    for hessian in (torch.zeros_like(one), one, broken, moments(shape[1], rank=3).hessian):
        inputs = Whitening.of(hessian)
        assert inputs.known == (hessian is not broken and bool(hessian.any()))
        found = solve(weight(*shape), inputs, 4, 0.0, torch.bfloat16)
        assert torch.isfinite(found.left).all()
        assert torch.isfinite(found.right).all()
    nothing = solve(torch.zeros(shape), Whitening.of(one), 4, 0.0, torch.bfloat16)
    assert not (nothing.left @ nothing.right).any()


def test_regions_are_rows_of_one_and_columns_of_the_other() -> None:
    layer = Layer(weight(24, 40), LowRank(rank=5), DTYPES["bfloat16"], {})
    found = WAYS["svd-llm"].solve(layer, Whitening.of(moments(40).hessian))
    whole = product(found.encode(NONE, full((24, 40))), (24, 40), "bfloat16")
    assert torch.equal(product(found.encode(NONE, ((8, 20), (3, 30))), (12, 27), "bfloat16"), whole[8:20, 3:30])
