"""Pruning on data gives what its definition gives, loses less than it says it does, and is stored as it was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelstore.calibrate.gptq import Factored, solve
from modelstore.calibrate.methods import WAYS, Layer
from modelstore.calibrate.pruned import Moments, lost, reconstructed, sparsegpt, wanda
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.integer.weighted import search
from modelstore.codecs.look import Look
from modelstore.codecs.sparse.codec import Sparse
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.format.dtypes import DTYPES
from modelstore.format.recipe import METHODS

NONE = np.empty(0, np.uint8)  # values that are not looked at

HALF, EACH_ROW, TWO_OF_FOUR = Pruning(sparsity=0.5), Pruning(sparsity=0.5, scope="row"), Pruning(n=2, m=4)


def moments(columns: int, seed: int = 0, rank: int | None = None) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, rank or columns, generator=generator)
    x = x @ torch.randn(rank or columns, columns, generator=generator)
    return Moments((x.T @ x).double())


def weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_sparsegpt(values: torch.Tensor, inputs: Moments, pruning: Pruning) -> torch.Tensor:
    factored = inputs.factored(pruning.m)
    assert factored is not None
    return sparsegpt(values, factored, pruning)


def direct(values: torch.Tensor, inputs: Moments, mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The definition: of one column after the other, let all that come later minimise the error of what the mask takes."""
    left = values.double().clone()
    damped = inputs.hessian + 0.01 * inputs.diagonal.mean() * torch.eye(len(inputs.hessian))
    rest = order.tolist()
    while rest:
        at = rest[0]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        gone = torch.where(mask[:, at], 0.0, left[:, at])
        left[:, rest] -= torch.outer(gone / inverse[0, 0], inverse[0])
        left[:, at] = torch.where(mask[:, at], left[:, at], 0.0)
        rest = rest[1:]
    return left


@pytest.mark.parametrize("pruning", [HALF, EACH_ROW, TWO_OF_FOUR], ids=["tensor", "row", "pattern"])
@pytest.mark.parametrize(("rows", "columns"), [(70, 48), (5, 200)])
def test_sparsegpt_is_the_direct_solution_under_its_mask(rows: int, columns: int, pruning: Pruning) -> None:
    values, inputs = weight(rows, columns), moments(columns)
    found = by_sparsegpt(values, inputs, pruning)
    factored = inputs.factored(pruning.m)
    assert factored is not None
    expected = direct(values, inputs, found != 0, factored.order)
    assert torch.allclose(found.double(), expected, atol=2e-3)
    alone = torch.where(found != 0, values, 0.0)
    assert lost(found, values, inputs.hessian).sum() < 0.8 * lost(alone, values, inputs.hessian).sum()


@pytest.mark.parametrize("columns", [16, 41, 150])
def test_nothing_pruned_is_the_identity(columns: int) -> None:
    values = weight(7, columns)
    assert torch.equal(by_sparsegpt(values, moments(columns), Pruning()), values)
    assert torch.equal(wanda(values, moments(columns), Pruning()), values)


def test_rounding_in_the_same_pass_loses_less_than_after_it() -> None:
    values, inputs = weight(20, 96), moments(96)
    scales = search(values, inputs.diagonal.float(), 4, 32, torch.float32).repeat_interleave(32, 1)
    factored = inputs.factored(4)
    assert factored is not None
    both = sparsegpt(values, factored, TWO_OF_FOUR, scales, 4)
    assert ((both.reshape(20, 24, 4) != 0).sum(2) <= 2).all()
    codes = both / scales
    assert torch.allclose(codes, codes.round().clamp(-8, 7), atol=1e-4)
    after = (sparsegpt(values, factored, TWO_OF_FOUR) / scales).round().clamp(-8, 7) * scales
    assert lost(both, values, inputs.hessian).sum() < lost(after, values, inputs.hessian).sum()


def test_nothing_pruned_and_rounded_is_gptq() -> None:
    """In the order of the columns."""
    values, inputs = weight(6, 96), moments(96)
    order = torch.argsort(inputs.diagonal, descending=True, stable=True)
    values, inputs = values[:, order], Moments(inputs.hessian[order][:, order])
    expected = solve(values, Factored.of(inputs.hessian), 4, 32, torch.float32)
    scales = torch.from_numpy(expected.scales).repeat_interleave(32, 1)
    factored = inputs.factored(0)
    assert factored is not None
    found = sparsegpt(values, factored, Pruning(), scales, 4)
    assert np.array_equal((found / scales).round().numpy(), expected.codes)


@pytest.mark.parametrize("columns", [48, 150, 130])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 8)])
def test_of_every_pattern_so_many_are_kept(columns: int, n: int, m: int) -> None:
    values, inputs, pruning = weight(9, columns), moments(columns), Pruning(n=n, m=m)
    for found in (by_sparsegpt(values, inputs, pruning), wanda(values, inputs, pruning)):
        kept = (found != 0).int()
        for at in range(0, columns, m):
            assert (kept[:, at : at + m].sum(1) == min(n, columns - at)).all()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_the_share_that_is_pruned_is_exact(share: float) -> None:
    values, inputs = weight(11, 301), moments(301)
    over_all = by_sparsegpt(values, inputs, Pruning(sparsity=share))
    assert int((over_all == 0).sum()) == int(share * values.numel() + 0.5)
    for found in (by_sparsegpt, wanda):
        rows = found(values, inputs, Pruning(sparsity=share, scope="row"))  # type: ignore[operator]
        assert ((rows == 0).sum(1) == int(share * 301 + 0.5)).all()


@pytest.mark.parametrize("pruning", [EACH_ROW, TWO_OF_FOUR], ids=["row", "pattern"])
def test_wanda_with_equal_norms_is_magnitude(pruning: Pruning) -> None:
    values = weight(9, 150)
    kind, raw = DTYPES["float32"], values.numpy().tobytes()
    kept = pruning.fit(Look(lambda _: np.empty(0, np.uint8), (9, 150), kind))
    mask = kept(np.frombuffer(raw, np.uint8), ((0, 9), (0, 150))).reshape(9, 150)
    for level in (1.0, 1e-30, 1e30, 0.0):  # where nothing comes through at all, magnitude is all that is known
        found = wanda(values, Moments(level * torch.eye(150, dtype=torch.float64)), pruning)
        assert np.array_equal((found != 0).numpy(), mask != 0)
        assert torch.equal(found[found != 0], values[found != 0])


def test_wanda_looks_at_what_comes_through() -> None:
    values = torch.tensor([[3.0, 2.0, 1.0, 0.5]])
    inputs = Moments(torch.diag(torch.tensor([0.0, 1.0, 100.0, 1.0], dtype=torch.float64)))
    assert wanda(values, inputs, EACH_ROW).tolist() == [[0.0, 2.0, 1.0, 0.0]]


@pytest.mark.parametrize("rank", [None, 20], ids=["full", "rank 20"])
@pytest.mark.parametrize("pruning", [EACH_ROW, TWO_OF_FOUR], ids=["row", "pattern"])
def test_reconstruction_is_the_least_squares_under_the_mask(pruning: Pruning, rank: int | None) -> None:
    values, inputs = weight(6, 64), moments(64, rank=rank)
    for start in (wanda(values, inputs, pruning), by_sparsegpt(values, inputs, pruning)):
        found = reconstructed(start, values, inputs)
        assert torch.equal(found != 0, start != 0)
        assert (lost(found, values, inputs.hessian) <= lost(start, values, inputs.hessian)).all()
        damped = inputs.damped.double()
        for row in range(6):
            left = start[row] != 0
            expected = torch.linalg.solve(damped[left][:, left], (damped @ values[row].double())[left])
            best = torch.zeros(64, dtype=torch.float64)
            best[left] = expected
            least, had = (lost(one[None].float(), values[row : row + 1], damped) for one in (best, found[row]))
            assert float(had) <= 1.01 * float(least) + 1e-6


def test_recipes_and_methods_agree_on_the_codecs() -> None:
    assert {name: tuple(way.by_codec) for name, way in WAYS.items()} == {
        name: takes.codecs for name, takes in METHODS.items()
    }


def test_dead_columns_and_inputs_without_a_factor() -> None:
    values, inputs = weight(8, 32), moments(32)
    inputs.hessian[3] = inputs.hessian[:, 3] = 0
    assert torch.isfinite(by_sparsegpt(values, inputs, HALF)).all()
    broken = torch.eye(16, dtype=torch.float64)
    broken[0, 1] = broken[1, 0] = 100
    for reconstruct in (False, True):
        layer = Layer(weight(4, 16), Sparse(sparsity=0.5), DTYPES["float32"], {"reconstruct": reconstruct})
        solved = WAYS["sparsegpt"].solve(layer, Moments(broken))
        assert "no factor" in solved.note
        assert np.isfinite(decoded(solved.encode(NONE, ((0, 4), (0, 16))), (4, 16), "float32")).all()


def with_dead(columns: int, dead: torch.Tensor, c: float = 1.0) -> Moments:
    """Moments of inputs of which nothing comes through some columns."""
    hessian = c * moments(columns).hessian
    hessian[dead] = hessian[:, dead] = 0
    return Moments(hessian)


@pytest.mark.parametrize("c", [1e-6, 1e-3, 1e6])
@pytest.mark.parametrize("pruning", [HALF, EACH_ROW, TWO_OF_FOUR], ids=["tensor", "row", "pattern"])
def test_masks_do_not_depend_on_the_scale_of_the_inputs(pruning: Pruning, c: float) -> None:
    values, dead = weight(8, 160), torch.arange(160) % 4 == 0
    for way in (by_sparsegpt, wanda):
        one, other = (way(values, with_dead(160, dead, each), pruning) for each in (1.0, c))
        assert torch.equal(one != 0, other != 0)
        assert torch.allclose(one, other, atol=1e-5)
        assert not one[:, dead].any()
        for found, scaled in ((one, 1.0), (other, c)):
            again = reconstructed(found, values, with_dead(160, dead, scaled))
            assert torch.equal(again != 0, found != 0)


@pytest.mark.parametrize("c", [1e-6, 1e6])
@pytest.mark.parametrize("params", [{"sparsity": 0.5, "n": 0, "m": 0}, {"sparsity": 0.0, "n": 2, "m": 4}])
def test_pruned_codes_do_not_depend_on_the_scale_of_the_inputs(params: dict[str, float], c: float) -> None:
    codec, dead, kind = Int(bits=4, group_size=32), torch.arange(160) % 4 == 0, DTYPES["float32"]
    values = weight(8, 160)
    values[:, dead] *= 100  # no scale is as wide as these
    found = []
    for each in (1.0, c):
        planes = (
            WAYS["sparsegpt"]
            .solve(Layer(values, codec, kind, params), with_dead(160, dead, each))
            .encode(NONE, ((0, 8), (0, 160)))
        )
        out = np.empty((1, 4 * values.numel()), np.uint8)
        codec.decode(planes, (8, 160), kind, out)
        found.append(out.view(np.float32).reshape(8, 160).copy())
    assert np.array_equal(found[0], found[1])
    assert not found[0][:, dead.numpy()].any()
    assert np.abs(found[0] - values.numpy())[:, ~dead.numpy()].mean() < 1


@pytest.mark.parametrize("dead", [slice(0, 130), slice(170, 300), slice(0, 300, 3)], ids=["first", "last", "among"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_dead_weights_count_in_the_share_wherever_they_lie(dead: slice, share: float, scope: str) -> None:
    """And where more are dead than the share, nothing else is pruned."""
    gone = torch.zeros(300, dtype=torch.bool)
    gone[dead] = True
    found = by_sparsegpt(weight(10, 300), with_dead(300, gone), Pruning(sparsity=share, scope=scope))
    assert not found[:, gone].any()
    due = max(share, float(gone.double().mean()))
    if scope == "row":
        assert ((found == 0).sum(1) == int(due * 300 + 0.5)).all()
    assert int((found == 0).sum()) == int(due * 3000 + 0.5)


def test_through_a_layer_without_inputs_nothing_comes() -> None:
    nothing = Moments(torch.zeros(32, 32, dtype=torch.float64))
    for pruning in (HALF, EACH_ROW, TWO_OF_FOUR):
        assert not by_sparsegpt(weight(4, 32), nothing, pruning).any()


def decoded(planes: tuple[object, ...], shape: tuple[int, int], dtype: str) -> np.ndarray:
    kind = DTYPES[dtype]
    out = np.empty((1, shape[0] * shape[1] * kind.itemsize), np.uint8)
    Sparse().decode(planes, shape, kind, out)  # type: ignore[arg-type]
    return torch.frombuffer(bytearray(out.tobytes()), dtype=getattr(torch, dtype)).float().reshape(shape).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_found_is_stored_region_by_region(dtype: str) -> None:
    layer = Layer(weight(12, 40) * 1e5, Sparse(n=2, m=4), DTYPES[dtype], {"reconstruct": True})
    solved = WAYS["sparsegpt"].solve(layer, moments(40))
    whole = decoded(solved.encode(NONE, ((0, 12), (0, 40))), (12, 40), dtype)
    assert np.isfinite(whole).all()
    assert ((whole != 0).reshape(12, 10, 4).sum(2) <= 2).all()
    parts = [decoded(solved.encode(NONE, ((a, a + 4), (8, 40))), (4, 32), dtype) for a in (0, 4, 8)]
    assert np.array_equal(np.concatenate(parts), whole[:, 8:])
