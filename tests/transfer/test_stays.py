"""Weights that stay what they are: masks to the bit, and codes that are stored as the training computed with them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.compress.plan import weight_codec
from modelstore.transfer.keeping import _stored
from modelstore.transfer.loss import measure
from modelstore.transfer.stays import Mask
from modelstore.transfer.train import Training
from tests.transfer.conftest import text_of

transformers = pytest.importorskip("transformers")

FAST: dict[str, Any] = {"steps": 16, "tokens": 128, "length": 32, "rate": 3e-3}
IDS = (torch.arange(32) * 7 % 13)[None]


def logits(store: ms.Store, ref: str, out: Path) -> torch.Tensor:
    """Logits of a variant, as transformers computes them with the values that it reads."""
    store.export(ref, out, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    "keep", ["int4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int3", "int2", "int8", "int4-affine"))]
)
def test_stored_codes_are_those_of_the_training(
    store: ms.Store, novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    """The stored variant's logits are those of the student at its best step, bit for bit, and nearer to the teacher."""
    seen: dict[int, torch.Tensor] = {}
    real = Training._evaluate

    def evaluate(self: Training) -> None:
        with self.student.as_published(), torch.no_grad():
            seen[self.step] = self.student.module(IDS, use_cache=False).logits
        real(self)

    monkeypatch.setattr(Training, "_evaluate", evaluate)
    done = store.distill("small", novels, teacher="m", keep=keep, **FAST)
    assert done.variant == keep
    assert set(store["small@2"].record().variants) == {"original", keep}
    assert torch.equal(logits(store, f"small@2:{keep}", tmp_path / "out"), seen[done.best])
    best = next(one for one in done.curve if one.step == done.best)
    assert (best.kl or 0) < (done.curve[0].kl or 0)
    manifest = store[f"small@2:{keep}"].opened().manifest
    assert manifest.recipe["name"] == keep
    assert manifest.recipe["calibration"] == {
        "distilled": store.describe("small@2").metrics["distilled"]["data"]["digest"]
    }
    assert not store.verify(deep=True).problems


@pytest.mark.slow
def test_codes_of_a_variant_are_trained_on_by_its_own_scales(store: ms.Store, novels: Path) -> None:
    text = ms.Calibration(text_of(9, 600), samples=8, length=32)
    store.compress("m", "gptq2", calibration=text)
    done = store.distill("m:gptq2", novels, teacher="m", keep="gptq2", **{**FAST, "rate": 1e-2, "steps": 32})
    assert (done.parent, done.variant) == ("m@1:gptq2", "gptq2")
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (store[f"m@{version}:gptq2"].opened() for version in (1, 2))
    scales = []
    for opened in (before, after):
        tensor = opened.manifest.by_name[name]
        scales.append(_stored(opened, tensor, weight_codec(opened.manifest.codecs[tensor.codec])))
    assert np.array_equal(scales[0].scales, scales[1].scales)
    changed = [one.name for one in before.manifest.tensors if one.digest != after.manifest.by_name[one.name].digest]
    assert any(one.endswith("_proj.weight") for one in changed)
    with pytest.raises(ValueError, match="give keep='gptq2'"):
        store.distill("m@1:gptq2", novels, teacher="m", keep="int3", **FAST)
    with pytest.raises(ValueError, match="the student is a variant"):
        store.distill("m@1:gptq2", novels, teacher="m", **FAST)


def test_a_mask_stays_to_the_bit(store: ms.Store, novels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights were 0, they are, and so are gradients and moments; all others may move."""
    store.compress("m", "sparse50")
    zeros: list[bool] = []
    real = Training._one_step

    def step(self: Training) -> None:
        real(self)
        for one in self.student.weights.values():
            if isinstance(one.stays, Mask):
                gone = one.stays._gone
                moments = self._optimizer.state[one.master]
                values = (one.master, moments["exp_avg"], moments["exp_avg_sq"])
                zeros.extend(not bool(value[gone].any()) for value in values)

    monkeypatch.setattr(Training, "_one_step", step)
    done = store.distill("m:sparse50", novels, teacher="m@1", keep="mask", **FAST)
    assert zeros
    assert all(zeros)
    assert (done.curve[-1].kl or 0) < (done.curve[0].kl or 0)
    before, after = store.load("m@1:sparse50"), store.load("m@2")
    pruned = [name for name, one in before.items() if one.dim() > 1 and (one == 0).float().mean() > 0.4]
    assert len(pruned) == 14
    for name in pruned:
        assert not after[name][before[name] == 0].any(), name
        assert (after[name] != before[name]).any(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_to_float32(store: ms.Store, novels: Path, dtype: str) -> None:
    whole = store.distill("small@1", novels, teacher="m", **FAST)
    half = store.distill("small@1", novels, teacher="m", dtype=dtype, **FAST)
    assert half.skipped == 0
    assert half.curve != whole.curve
    assert half.curve[0] == whole.curve[0]  # what is held out is judged in float32
    assert half.curve[-1].kl == pytest.approx(whole.curve[-1].kl, rel=0.1)


def test_a_step_that_overflows_has_no_effect(store: ms.Store, novels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is scaled so far that gradients overflow in float16: those steps leave all weights alone, and the scale is halved
    until they do not.
    """
    moved: list[bool] = []
    scales: list[float] = []
    init, real = Training.__init__, Training._one_step

    def begin(self: Training, *given: Any) -> None:
        init(self, *given)
        self._scaler = torch.amp.GradScaler("cpu", 2.0**40)

    def step(self: Training) -> None:
        before = [one.detach().clone() for one in self.student.masters()]
        scales.append(self._scaler.get_scale())
        real(self)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, self.student.masters(), strict=True)))

    monkeypatch.setattr(Training, "__init__", begin)
    monkeypatch.setattr(Training, "_one_step", step)
    done = store.distill("small", novels, teacher="m", dtype="float16", **{**FAST, "steps": 60})
    assert 0 < done.skipped < 40
    assert not moved[0]
    assert moved[-1]
    assert moved[:-1] == [after >= before for before, after in pairwise(scales)]
    assert moved.count(False) == done.skipped
    assert min(scales) == 2.0 ** (40 - done.skipped)
    assert store.describe("small").metrics["distilled"]["skipped"] == done.skipped


def test_blocks_of_logits_give_the_whole_gradient(store: ms.Store) -> None:
    """In blocks of a few tokens the loss and its gradients are those of all logits together."""
    from modelstore.compress.evaluate.model import evaluated, ready_model
    from modelstore.plan.work import Limits
    from modelstore.transfer import loss
    from modelstore.transfer.head import SplitModel

    made = []
    for name in ("m", "small"):
        opened = store[name].opened()
        made.append(ready_model(opened, evaluated(opened), Limits(1 << 28), dtype="float32", device="cpu"))
    teacher, student = made
    ids = torch.randint(0, 13, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = teacher(ids).logits[:, :-1].log_softmax(-1)
    found = student(ids).logits[:, :-1].log_softmax(-1)
    kl = (known.exp() * (known - found)).sum() / 46
    ce = -found.gather(-1, ids[:, 1:, None]).sum() / 46
    (kl + 0.5 * ce).backward()
    wanted = {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}
    student.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_LOGITS", 4 * 90 * 5)  # five tokens
        parts = SplitModel(student), SplitModel(teacher)
        sums = loss.descend(*parts, ids, 0.5, 46, lambda one: one)
        measured = measure(*parts, ids)
    assert (sums.kl, sums.ce) == pytest.approx((kl.item(), ce.item()), rel=1e-5)
    assert (measured.kl, measured.ce) == pytest.approx((kl.item(), ce.item()), rel=1e-5)
    for name, one in student.named_parameters():
        assert one.grad is not None
        assert torch.allclose(one.grad, wanted[name], rtol=1e-4, atol=1e-6), name
