"""Evaluating block by block: the same figures as with the whole model, and one block in memory at a time."""

from __future__ import annotations

import math
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.compress.evaluate import question
from modelstore.compress.evaluate import run as evaluate_run
from modelstore.compress.evaluate import score as ev
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.spool import Spool
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def store(folder: Path) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    opened.compress("m", "nf4")
    return opened


@pytest.mark.parametrize("kept", [True, False])
def test_block_by_block_gives_the_same_figures(store: ms.Store, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    how: dict[str, Any] = {"text": TEXT, "context": 32, "stride": 24, "keep": False}
    if not kept:  # the original is run beside the variant
        monkeypatch.setattr(ev, "keeps", lambda *_: False)
    whole = store.eval(["m", "m:nf4"], **how)
    monkeypatch.setattr(question, "float32_bytes", lambda _: 1 << 50)
    monkeypatch.setattr(evaluate_run, "ready_model", None)  # is not used
    streamed = store.eval(["m", "m:nf4"], **how)
    assert [one.measured for one in streamed] == [one.measured for one in whole]
    assert whole[1].measured.kl


def test_only_the_rows_of_its_tokens_are_widened(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "float32_bytes", lambda _: 1 << 50)
    make, rows = Stages.values, []

    def values(self: Stages, stage: int, stored: Any) -> dict[str, torch.Tensor]:
        made = make(self, stage, stored)
        if stage == 0:
            rows.append((len(made[self.skeleton.table]), len(stored[self.skeleton.table])))
        return made

    monkeypatch.setattr(Stages, "values", values)
    store.eval(["m"], text=TEXT[:60], context=8, keep=False)
    assert rows
    assert all(few < every // 2 for few, every in rows)


def test_a_block_is_let_go_before_the_next_is_read(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "float32_bytes", lambda _: 1 << 50)
    placed: list[weakref.ref[torch.Tensor]] = []
    read, make = Stages.stored, Stages.values

    def stored(self: Stages, stage: int) -> dict[str, torch.Tensor]:
        assert not [one for one in placed if one() is not None], f"weights are left when stage {stage} is read"
        found = read(self, stage)
        placed.extend(weakref.ref(one) for one in found.values())
        return found

    def values(self: Stages, stage: int, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = make(self, stage, given)
        placed.extend(weakref.ref(one) for name, one in found.items() if name not in self._buffers)
        return found

    monkeypatch.setattr(Stages, "stored", stored)
    monkeypatch.setattr(Stages, "values", values)
    store.eval("m", text=TEXT, context=32, keep=False)
    assert placed


def test_a_model_that_cannot_be_streamed_says_what_it_needs(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "float32_bytes", lambda _: 1 << 50)
    monkeypatch.setattr(
        "modelstore.architecture.classes.skeleton._SHARED", {"hidden_size": "its layers share what this test says"}
    )
    with pytest.raises(UnsupportedError, match=f"share what this test says: to evaluate .*memory={1 << 51}"):
        store.eval("m", text=TEXT, context=32)


def test_a_spool_gives_back_what_it_was_given() -> None:
    spool = Spool(5000)
    given = [torch.randn(n, 7).to(dtype) for n in (1, 90, 40, 0, 3) for dtype in (torch.float32, torch.bfloat16)]
    for one in given:
        spool.append(one)
    assert spool._file is not None
    for at in (*range(len(given)), 2, 0, 5):
        assert torch.equal(spool[at], given[at])
        assert spool[at].dtype == given[at].dtype
    spool.close()
    assert not len(spool)


def test_standard_errors_are_those_of_windows(store: ms.Store) -> None:
    """Of equal windows the error of a mean is that of the windows' means; and the figures have it."""
    sums = [(31, 50.0), (31, 61.0), (31, 47.5), (31, 58.25)]
    means = torch.tensor([value / n for n, value in sums], dtype=torch.float64)
    assert ev.standard_error(sums) == pytest.approx(float(means.std() / math.sqrt(len(sums))))
    assert ev.standard_error(sums[:1]) is None
    assert ev.standard_error([(3, math.nan), (3, 1.0)]) is None
    found = store.eval("m:nf4", text=TEXT, context=32).measured
    assert found.kl_error
    assert found.perplexity_error
    assert store.eval("m", text=TEXT, context=32).measured.kl_error == 0
    short = store.eval("m:nf4", text=TEXT, context=32, limit=20).measured
    assert (short.kl_error, short.perplexity_error) == (None, None)
