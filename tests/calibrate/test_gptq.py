"""GPTQ gives what its definition gives, and codes go into `int` as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelstore.calibrate.gptq import Factored, factor, solve
from modelstore.calibrate.methods import WAYS, Layer
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.integer.weighted import search
from modelstore.format.dtypes import DTYPES


def inputs(columns: int, seed: int = 0) -> torch.Tensor:
    """The sum of outer products of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (x.T @ x).double()


def direct(weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """The definition: round the column through which most comes, let all others minimise the error, and again."""
    half, left = 1 << (bits - 1), weight.double().clone()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    codes = torch.zeros_like(weight)
    rest = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    while rest:
        at = rest[0]
        scale = scales[:, at // group].double()
        codes[:, at] = (left[:, at] / scale).round().clamp(-half, half - 1)
        lost = left[:, at] - codes[:, at] * scale
        inverse = torch.linalg.inv(damped[rest][:, rest])
        left[:, rest] -= torch.outer(lost / inverse[0, 0], inverse[0])
        rest = rest[1:]
    return codes


@pytest.mark.parametrize(("rows", "columns", "group", "bits"), [(70, 48, 16, 4), (5, 200, 64, 3), (3, 40, 16, 2)])
def test_the_column_loop_is_the_direct_solution(rows: int, columns: int, group: int, bits: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    hessian = inputs(columns)
    found = solve(weight, Factored.of(hessian), bits, group, torch.float32)
    expected = direct(weight, hessian, torch.from_numpy(found.scales), group, bits)
    same = float((torch.from_numpy(found.codes) == expected).double().mean())
    assert same > 0.999  # float32 decides ties of the halves otherwise
    assert found.damping == 0.01

    def error(codes: torch.Tensor) -> float:
        wide = torch.from_numpy(found.scales).repeat_interleave(group, 1)[:, :columns]
        lost = (codes * wide - weight).double()
        return float((lost @ hessian * lost).sum())

    half = 1 << (bits - 1)
    wide = torch.from_numpy(found.scales).repeat_interleave(group, 1)[:, :columns]
    assert error(torch.from_numpy(found.codes)) < 0.8 * error((weight / wide).round().clamp(-half, half - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_independent_inputs_give_plain_rounding(bits: int) -> None:
    weight = torch.randn(67, 150)
    found = solve(weight, Factored.of(torch.eye(150, dtype=torch.float64)), bits, 64, torch.bfloat16)
    scales = search(weight, torch.ones(150), bits, 64, torch.bfloat16)
    assert torch.equal(torch.from_numpy(found.scales), scales)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    half, wide = 1 << (bits - 1), scales.repeat_interleave(64, 1)[:, :150]
    assert np.array_equal(found.codes, (weight / wide).round().clamp(-half, half - 1).to(torch.int8).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_clip_weighted_by_what_comes_through_loses_less_of_it(bits: int) -> None:
    """Each column by itself, in the norm that the clip is looked for in: never more than any other clip."""
    weight = torch.randn(20, 150, generator=torch.Generator().manual_seed(3))
    through = torch.rand(150, generator=torch.Generator().manual_seed(4)) ** 8
    codec, kind, half = Int(bits=bits, group_size=64, method="mse"), DTYPES["float32"], 1 << (bits - 1)
    layer = Layer(weight, codec, kind, {})

    def values(moments: torch.Tensor) -> torch.Tensor:
        way = WAYS["imatrix"]
        planes = way.solve(layer, way.prepare(moments)).encode(np.empty(0, np.uint8), ((0, 20), (0, 150)))
        out = np.empty((1, 4 * weight.numel()), np.uint8)
        codec.decode(planes, (20, 150), kind, out)
        return torch.from_numpy(out.view(np.float32).reshape(20, 150).copy())

    def lost(found: torch.Tensor) -> float:
        return float(((found - weight).abs() ** 2.4 * through).sum())

    one, any_input = values(torch.diag(through.double())), values(torch.eye(150, dtype=torch.float64))
    assert lost(one) < 0.98 * lost(any_input)
    scales = search(weight, torch.ones(150), bits, 64, torch.float32).repeat_interleave(64, 1)[:, :150]
    assert torch.equal(any_input, (weight / scales).round().clamp(-half, half - 1) * scales)
    assert torch.equal(values(torch.zeros(150, 150, dtype=torch.float64)), any_input)


def test_dead_and_dependent_columns() -> None:
    hessian = inputs(32)
    hessian[3] = hessian[:, 3] = 0
    hessian[5], hessian[:, 5] = hessian[4], hessian[:, 4]  # one column twice
    hessian[5, 5] = hessian[4, 5] = hessian[5, 4] = hessian[4, 4]
    found = solve(torch.randn(8, 32), Factored.of(hessian), 4, 16, torch.float32)
    assert found.damping is not None
    assert not found.codes[:, 3].any()


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_codes_do_not_depend_on_the_scale_of_the_inputs(c: float) -> None:
    """With columns through which nothing comes as well."""
    hessian = inputs(64)
    hessian[::4] = hessian[:, ::4] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    one, other = (solve(weight, Factored.of(each), 4, 16, torch.float32) for each in (hessian, c * hessian))
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.scales, other.scales)
    assert one.damping == other.damping == 0.01


def test_dead_columns_change_nothing_for_the_others() -> None:
    hessian, live = inputs(64), torch.arange(64) % 4 != 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    alone = factor(hessian[live][:, live], torch.arange(48), torch.zeros(48, dtype=torch.bool))[0]
    hessian[~live] = hessian[:, ~live] = 0
    both = factor(hessian, torch.arange(64), ~live)[0]
    assert alone is not None
    assert both is not None
    assert torch.allclose(both[live][:, live], alone)
    nothing = solve(weight, Factored.of(torch.zeros(64, 64, dtype=torch.float64)), 4, 16, torch.float32)
    assert not nothing.codes.any()


def test_sums_without_a_factor_are_rounded_plainly() -> None:
    broken = torch.eye(16, dtype=torch.float64)
    broken[0, 1] = broken[1, 0] = 100
    assert factor(broken, torch.arange(16), torch.zeros(16, dtype=torch.bool)) == (None, None)
    weight = torch.randn(4, 16)
    found = solve(weight, Factored.of(broken), 4, 16, torch.float32)
    assert found.damping is None
    wide = torch.from_numpy(found.scales).repeat_interleave(16, 1)
    assert np.array_equal(found.codes, (weight / wide).round().clamp(-8, 7).to(torch.int8).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 64), (3, 41), (2, 150)])
def test_given_codes_are_stored_as_they_are(bits: int, shape: tuple[int, int]) -> None:
    codec, kind = Int(bits=bits, group_size=32), DTYPES["float32"]
    half = 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, shape).astype(np.int8)
    scales = np.random.default_rng(1).standard_normal((shape[0], -(-shape[1] // 32))).astype(np.float32)
    planes = codec.encode_with(codes, scales, shape, kind)
    out = np.empty((1, 4 * codes.size), np.uint8)
    codec.decode(planes, shape, kind, out)
    wide = scales.repeat(32, 1)[:, : shape[1]]
    assert np.array_equal(out.view(np.float32).reshape(shape), codes * wide)
    assert [len(bytes(one)) for one in planes] == list(codec.layout.sizes(shape, kind))
    if bits < 8:
        with pytest.raises(ValueError, match="beyond"):
            codec.encode_with(np.full(shape, half, np.int8), scales, shape, kind)
    with pytest.raises(ValueError, match="not those of"):
        codec.encode_with(codes, scales[:, :0], shape, kind)


@pytest.mark.parametrize("group", [16, 24, 40])
def test_weights_with_inputs_as_rows_lose_what_others_lose(group: int) -> None:
    """One group a row and one scale alike: then both are the same problem; and in groups they lose less than plain rounding."""
    hessian, weight = inputs(48), torch.randn(40, 48, generator=torch.Generator().manual_seed(5))
    found = solve(weight.T.contiguous(), Factored.of(hessian), 3, group, torch.float32, across=True)
    assert found.codes.shape == (48, 40)
    assert found.scales.shape == (48, -(-40 // group))
    wide = torch.from_numpy(found.scales).repeat_interleave(group, 1)[:, :40]

    def lost(codes: torch.Tensor) -> float:
        moved = (codes * wide).T - weight
        return float(((moved.double() @ hessian) * moved).sum())

    plain = (weight.T / wide).round().clamp(-4, 3)
    assert lost(torch.from_numpy(found.codes).float()) < 0.8 * lost(plain)


@pytest.mark.parametrize("across", [False, True])
def test_outputs_are_solved_a_few_at_a_time(across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no code: outputs are no business of each other."""
    weight = torch.randn((64, 50) if across else (50, 64), generator=torch.Generator().manual_seed(5))
    inputs_ = Factored.of(inputs(64))
    one = solve(weight, inputs_, 4, 16, torch.float32, across=across)
    monkeypatch.setattr("modelstore.calibrate.gptq._OUTPUTS", 17)
    other = solve(weight, inputs_, 4, 16, torch.float32, across=across)
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.scales, other.scales)
