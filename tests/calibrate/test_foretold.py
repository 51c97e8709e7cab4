"""What a calibration would do is said before a weight is read; and samples run in numbers that shapes alone decide."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore.architecture.classes.skeleton import Skeleton
from modelstore.calibrate.shards import activations, per_run, runs_of
from modelstore.calibrate.statistics import Inputs
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.read.reader import Reader
from modelstore.storage.memory import MemoryStorage
from tests.calibrate.killed import DATA, RECIPE
from tests.helpers.language import TEXT
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")


def test_the_plan_says_what_is_run_kept_and_left_without_data(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with_norms = {**RECIPE, "rules": [{**RECIPE["rules"][0], "targets": ["linear", "embedding"]}]}
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "stored", lambda *_: pytest.fail("weights were read"))
        patch.setattr(Reader, "stream", lambda *_, **__: pytest.fail("weights were read"))
        plan = store.plan_compression("m", with_norms, calibration=ms.Calibration(TEXT, samples=2, length=40))
    looks = plan.looks
    assert looks is not None
    assert (looks.samples, looks.length, looks.blocks, looks.passes) == (2, 40, 2, 2)
    assert looks.spool == 2 * 4 * 2 * 40 * 32
    made = store.compress("m", with_norms, calibration=ms.Calibration(TEXT, samples=2, length=40))
    assert looks.data_free == made.metrics["solved"]["data_free"]
    assert set(looks.data_free) == {
        "model.embed_tokens.weight",
        *(f"model.layers.{at}.mlp.down_proj.weight" for at in range(2)),
    }
    assert looks.solved == len(plan.compressed) - 3 == 12


def test_without_a_text_the_plan_tells_of_as_many_samples_as_are_taken_else(store: ms.Store) -> None:
    looks = store.plan_compression("m", "gptq4").looks
    assert looks is not None
    assert (looks.samples, looks.length) == (128, 512)
    assert store.plan_compression("m", "int4-g32").looks is None
    with pytest.raises(ValueError, match="looks at no data"):
        store.plan_compression("m", "int4-g32", calibration=DATA)
    with pytest.raises(ValueError, match="give a longer text"):
        store.plan_compression("m", "gptq4", calibration=ms.Calibration("the sea", length=32))


def test_a_run_has_as_many_samples_as_shapes_say(folder: Path) -> None:
    model = Skeleton(transformers.AutoModelForCausalLM.from_pretrained(folder))
    ids = torch.zeros(19, 32, dtype=torch.int64)
    one = activations([tuple(each.shape) for each in model.widest.parameters()], 32, 4, 1)
    assert one == 4 * 32 * (4 * 32 + 3 * 48 + 4 * 32)
    assert [len(part) for part in runs_of(ids, model, one)] == [8, 8, 3]
    with pytest.raises(UnsupportedError, match="a sample of 32 tokens takes up to 1 MiB"):
        runs_of(ids, model, one - 1)
    assert activations([(64, 96, 32), (8,)], 10, 2, 4) == 4 * 10 * (4 * 96 + 2 * 10)
    assert [per_run(size << 20) for size in (1, 16, 30, 64, 65, 200)] == [8, 8, 4, 2, 1, 1]


def test_the_memory_of_a_store_does_not_change_the_bytes(folder: Path) -> None:
    found = []
    for memory in ("64MiB", "1GiB"):
        store = open_on(MemoryStorage(uuid.uuid4().hex), memory=memory)
        store.save("m", folder)
        store.compress("m", RECIPE, calibration=DATA)
        found.append(store["m:solved"].opened().manifest.content)
    assert found[0] == found[1]


@pytest.mark.parametrize("columns", [40, 256, 700])
def test_sums_are_those_of_outer_products(columns: int) -> None:
    """Each pair of columns is summed once."""
    inputs, parts = Inputs(columns), [torch.randn(33, columns, generator=torch.manual_seed(at)) for at in range(3)]
    assert all(inputs.add(part) for part in parts)
    whole = torch.cat(parts).double()
    assert inputs.count == 99
    found = inputs.taken()
    assert torch.equal(found, found.T)
    assert torch.allclose(found, whole.T @ whole, rtol=1e-5, atol=1e-4)
    assert not Inputs(columns).add(torch.full((1, columns), torch.inf))
