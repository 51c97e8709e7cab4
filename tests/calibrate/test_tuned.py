"""Tuned rounding begins with the codes that were found; the block then gives more nearly what it gave, or nothing is changed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.calibrate.gptq import Factored, solve
from modelstore.calibrate.tuned import Block, Rounding, tune
from modelstore.format.recipe import recipe
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT
from tests.helpers.stores import open_on

GROUP = 16


def parts(bits: int, stored: torch.dtype, rows: int = 24, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """A weight, what comes to it, and its codes by plain rounding; the last group is shorter."""
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, columns, generator=draw)
    x = 0.2 * torch.randn(8, 32, columns, generator=draw) + 0.2 * torch.randn(8, 32, 1, generator=draw)
    return weight, x, solve(weight, Factored.of(torch.eye(columns, dtype=torch.float64)), bits, GROUP, stored)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_begins_with_the_codes_that_were_found(bits: int, stored: torch.dtype) -> None:
    weight, _, start = parts(bits, stored)
    again = Rounding.of(weight, start, bits, GROUP, stored).solved(start.damping)
    assert np.array_equal(again.codes, start.codes)
    assert np.array_equal(again.scales, start.scales)


def block_of(weight: torch.Tensor, x: torch.Tensor) -> tuple[Block, torch.nn.Parameter]:
    """A layer with a bend behind it, so that its loss is no plain sum over rows."""
    parameter = torch.nn.Parameter(torch.empty_like(weight))
    mix = torch.randn(weight.shape[0], weight.shape[0], generator=torch.Generator().manual_seed(9))

    def given(by: torch.Tensor, those: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.silu(x[list(those)] @ by.T) @ mix

    def loss(those: Sequence[int]) -> torch.Tensor:
        return (given(parameter, those) - given(weight, those)).square().mean()

    return Block({"w": parameter}, loss, len(x)), parameter


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_block_gives_more_nearly_what_it_gave(bits: int, batch: int) -> None:
    weight, x, start = parts(bits, torch.bfloat16)
    rounding = Rounding.of(weight, start, bits, GROUP, torch.bfloat16)
    block, parameter = block_of(weight, x)

    def lost() -> float:
        parameter.data.copy_(rounding.values())
        with torch.no_grad():
            return float(block.loss(range(4)))

    before = lost()
    assert tune(block, {"w": rounding}, 60, batch, 0.1)
    assert lost() < 0.9 * before
    found = rounding.solved(start.damping)
    half = 1 << (bits - 1)
    assert found.codes.min() >= -half
    assert found.codes.max() < half
    scales = torch.from_numpy(found.scales)
    assert torch.equal(scales, scales.bfloat16().float()), "as they are stored"
    assert torch.equal(scales.sign(), torch.from_numpy(start.scales).sign())


def test_what_gains_nothing_is_said() -> None:
    """A weight that its codes give exactly has nothing to gain."""
    _, x, start = parts(4, torch.float32)
    exact = torch.from_numpy(start.codes).float() * torch.from_numpy(start.scales).repeat_interleave(GROUP, 1)[:, :40]
    rounding = Rounding.of(exact, start, 4, GROUP, torch.float32)
    block, _ = block_of(exact, x)
    assert not tune(block, {"w": rounding}, 5, 1, 0.1)


def made(name: str, method: dict[str, Any]) -> dict[str, Any]:
    codec = {"name": "int", "params": {"bits": 2, "group_size": GROUP, "method": "mse"}}
    return {"name": name, "rules": [{"targets": ["linear"], "codec": codec, "method": method}]}


def test_a_tuned_variant_loses_less_and_is_the_same_each_time(folder: Path) -> None:
    data = ms.Calibration(TEXT, samples=10, length=32)
    told = {"steps": 40, "reach": 0.2}
    contents = []
    for _ in range(2):
        store = open_on(MemoryStorage(uuid.uuid4().hex))
        store.save("m", folder)
        store.compress("m", made("tuned", {"name": "tuned", "params": told}), calibration=data)
        contents.append(store["m:tuned"].opened().manifest.content)
    assert contents[0] == contents[1]
    store.compress("m", made("solved", {"name": "gptq"}), calibration=data)
    tuned, solved = store.eval(["m:tuned", "m:solved"], text=TEXT, context=32)
    assert tuned.measured.kl < solved.measured.kl
    assert store["m:tuned"].opened().manifest.content != store["m:solved"].opened().manifest.content


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"reach": 0.0}, "reach=0.0"),
        ({"reach": 2.0}, "reach=2.0"),
        ({"reach": float("nan")}, "reach=nan"),
        ({"rate": 1.0}, "no parameter 'rate'"),
        ({"steps": 1.5}, "no int"),
    ],
)
def test_what_tuning_is_told_is_checked(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipe(made("tuned", {"name": "tuned", "params": params}))


def test_rules_that_tune_differently_are_refused() -> None:
    """The layers of a block are tuned together."""
    found = made("tuned", {"name": "tuned"})
    found["rules"].insert(
        0, {**found["rules"][0], "targets": ["*q_proj*"], "method": {"name": "tuned", "params": {"steps": 9}}}
    )
    with pytest.raises(ValueError, match="tuned together"):
        recipe(found)
