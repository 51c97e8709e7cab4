"""`torch.distributed.checkpoint` over a store: what comes back, what is read, what is kept, what is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

import modelstore as ms
from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.answers.history import LogEntry
from modelstore.integrations.dcp.notes import FILE, BytesPlace, decoded, encoded
from modelstore.integrations.dcp.retention import META, superseded
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import contents, open_on
from tests.integrations.dcp import worlds

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Most tests are one process, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def run_all(target: Callable[..., None], *arguments: object, ranks: int) -> list[int | None]:
    """One process a rank, all together; their exit codes."""
    processes = [SPAWN.Process(target=target, args=(*arguments, rank)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_four_ranks_save_and_two_and_three_load(tmp_path: Path) -> None:
    assert run_all(worlds.save_all, str(tmp_path), ranks=4) == [0] * 4
    assert run_all(worlds.load_all, str(tmp_path), 2, ranks=2) == [0] * 2
    assert run_all(worlds.load_all, str(tmp_path), 3, ranks=3) == [0] * 3
    store = ms.open(str(tmp_path / "store"))
    for kind in worlds.KINDS:
        assert [version.tags for version in store.versions(f"run/{kind}")] == [("step-2",)]
        assert not store.verify(f"run/{kind}", deep=True).problems
    weights = {name.removeprefix("model."): value for name, value in store.load("run/fsdp", names=["model.*"]).items()}
    worlds.same(weights, torch.load(tmp_path / "fsdp.pt", weights_only=False)["model"], "model")


@pytest.mark.slow
def test_the_script_of_the_page_continues_where_it_stopped(tmp_path: Path) -> None:
    page = (Path(ms.__file__).parent.parent / "docs" / "dcp.md").read_text()
    (tmp_path / "train.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    (tmp_path / "more.py").write_text((tmp_path / "train.py").read_text().replace(", 40, 10", ", 50, 10"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    env = {**os.environ, "PYTHONPATH": str(Path(ms.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "2", "train.py"], cwd=tmp_path, env=env, check=True)
    store = ms.open(str(tmp_path / "store"))
    assert [version.tags for version in store.versions("acme/run-7")] == [("step-30",), ("step-40",)]
    subprocess.run([*launch, "1", "more.py"], cwd=tmp_path, env=env, check=True)
    assert [version.tags for version in store.versions("acme/run-7")] == [("step-40",), ("step-50",)]


def test_a_rank_killed_in_mid_save_leaves_nothing_visible(tmp_path: Path) -> None:
    assert run_all(worlds.killed_while_saving, str(tmp_path), ranks=2) == [3, -signal.SIGKILL]
    assert contents(ms.open(str(tmp_path / "store"))) == {}


def state(step: int = 1) -> dict[str, Any]:
    """A trainer's state: tensors, and plain values at several depths."""
    torch.manual_seed(0)
    weights = {
        "a": torch.randn(300, 40),
        "b": torch.randn(7).bfloat16(),
        "s": torch.tensor(float(step)),
        "e": torch.empty(0, 3),
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.2, "betas": (0.9, 0.9)}]
    return {"model": weights, "optim": {"param_groups": groups, "state": {0: {"m": weights["a"] * 2}}}, "step": step}


def emptied(value: Any) -> Any:
    """The same structure with other values."""
    if isinstance(value, dict):
        return {key: emptied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [emptied(inner) for inner in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def test_tensors_and_plain_values_come_back() -> None:
    store = open_on(MemoryStorage("memory://dcp"))
    writer = ms.dcp.Writer(store, "run", message="first", meta={"team": "x"})
    dcp.save(state(), storage_writer=writer, checkpoint_id="step-1")
    found = emptied(state())
    dcp.load(found, storage_reader=ms.dcp.Reader(store, "run"), checkpoint_id="step-1")
    assert found["optim"]["param_groups"] == state()["optim"]["param_groups"]
    assert found["step"] == 1
    worlds.same(found["model"], state()["model"], "model")
    worlds.same(found["optim"]["state"], state()["optim"]["state"], "optim")
    assert writer.saved is not None
    (entry,) = store.log("run")
    assert (entry.version, entry.message, entry.tags) == (writer.saved.version, "first", ("step-1",))
    assert entry.meta == {"team": "x", META: "step-1"}


def test_any_version_is_read_as_a_checkpoint() -> None:
    """One that `save` made, and a variant of it; torch's own tools read it too."""
    store = open_on(MemoryStorage("memory://dcp-any"))
    weights = {"layer.weight": torch.randn(64, 64), "layer.bias": torch.randn(64)}
    store.save("m", weights)
    store.compress("m", "int8")
    for ref in ("m", "m@1:int8"):
        found = emptied(weights)
        dcp.load(found, storage_reader=ms.dcp.Reader(store, ref))
        worlds.same(found, store.load(ref), ref)


def test_other_dtypes_and_strides_of_targets_are_filled() -> None:
    store = open_on(MemoryStorage("memory://dcp-strides"))
    store.save("m", {"w": torch.arange(12.0).reshape(3, 4)})
    found = {"w": torch.zeros(4, 3, dtype=torch.float64).t()}
    dcp.load(found, storage_reader=ms.dcp.Reader(store, "m"))
    assert found["w"].equal(torch.arange(12.0, dtype=torch.float64).reshape(3, 4))


def test_a_load_reads_what_it_needs_and_no_more() -> None:
    storage = CountingStorage(MemoryStorage("memory://dcp-exact"))
    store = open_on(storage)
    whole = {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20)}
    dcp.save(whole, storage_writer=ms.dcp.Writer(store, "m", codec="raw"))
    fresh = open_on(storage)
    reader = ms.dcp.Reader(fresh, "m")
    reader.read_metadata()
    storage.reset()
    found = {"b": torch.zeros(1 << 20)}
    dcp.load(found, storage_reader=reader)
    assert found["b"].equal(whole["b"])
    assert whole["b"].nbytes <= storage.bytes["read"] <= 1.05 * whole["b"].nbytes


def test_boxes_are_filled() -> None:
    storage = CountingStorage(MemoryStorage("memory://fill"))
    store = open_on(storage)
    weight = torch.randn(4096, 512)
    store.save("m", {"w": weight}, codec="raw")
    model = store["m"]
    model.opened()
    storage.reset()
    rows, corner = torch.zeros(1024, 512), torch.zeros(2, 3, dtype=torch.float64)
    model.fill([("w", ((1024, 2048), (0, 512)), rows), ("w", ((0, 2), (5, 8)), corner)])
    assert rows.equal(weight[1024:2048])
    assert corner.equal(weight[0:2, 5:8].double())
    assert storage.bytes["read"] <= rows.nbytes + (2 << 20)
    with pytest.raises(ValueError, match=r"tensor 'w': region .* does not lie within"):
        model.fill([("w", ((4000, 5024), (0, 512)), rows)])
    with pytest.raises(ValueError, match="its target"):
        model.fill([("w", ((0, 1), (0, 512)), rows)])


def test_a_series_shares_what_did_not_change_and_keeps_what_it_is_told_to() -> None:
    store = open_on(MemoryStorage("memory://dcp-series"))
    writer = ms.dcp.Writer(store, "run", keep_last=2, keep_every=4)
    for step in range(1, 8):
        dcp.save(state(step), storage_writer=writer, checkpoint_id=f"step-{step}")
        if step == 2:
            assert writer.saved is not None
            assert writer.saved.stored < writer.saved.reused / 50
            store.tag("run@2", "best")
    assert [version.version for version in store.versions("run")] == [2, 4, 6, 7]
    found = emptied(state())
    dcp.load(found, storage_reader=ms.dcp.Reader(store, "run"), checkpoint_id="step-4")
    assert found["step"] == 4
    dcp.load(found, storage_reader=ms.dcp.Reader(store, "run@best"))
    assert found["step"] == 2


def entry(version: int, *tags: str, meta: dict[str, str] | None = None, deleted: float | None = None) -> LogEntry:
    """A version, as `log` tells it."""
    own = {META: f"step-{version}"} if meta is None else meta
    return LogEntry(version, 0.0, "", "", own, "", "", "raw", 1, 1, 1, ("original",), tags, deleted)


def test_what_is_superseded() -> None:
    history = [
        entry(9),
        entry(8, "step-8"),
        entry(7, "step-7", "best"),
        entry(6),
        entry(5),
        entry(4, meta={}),
        entry(3, deleted=1.0),
    ]
    assert [one.version for one in superseded(history, 1, None)] == [8, 6, 5]
    assert [one.version for one in superseded(history, 2, 3)] == [5]


class Repeating(DefaultSavePlanner):
    """Sends no plan, as one that caches does at its second save."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return [SavePlan([], usable=False) for _ in plans], metadata


class Forgetting(DefaultSavePlanner):
    """Makes a plan of its own in the end."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return SavePlan(new_plan.items)


class Noting(DefaultSavePlanner):
    """Keeps an object of its own in the metadata."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, Metadata(metadata.state_dict_metadata, planner_data=object())


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (torch.randn(3, 3).to_sparse(), {}, "tensor 'w' is sparse"),
        (torch.empty(3, device="meta"), {}, "tensor 'w' is on the meta device"),
        (torch.randn(3), {"planner": Repeating()}, "enable_plan_caching"),
        (torch.randn(3), {"planner": Forgetting()}, "Forgetting.finish_plan"),
        (torch.randn(3), {"planner": Noting()}, "planner_data"),
        (torch.randn(3), {"use_collectives": False}, "use_collectives=False"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(value: torch.Tensor, options: dict[str, Any], message: str) -> None:
    store = open_on(MemoryStorage("memory://dcp-refused"))
    with pytest.raises((dcp.CheckpointException, UnsupportedError)) as refused:
        dcp.save({"w": value}, storage_writer=ms.dcp.Writer(store, "m"), **options)
    assert message in str(refused.value)
    assert contents(store) == {}


def test_arguments_are_checked() -> None:
    store = open_on(MemoryStorage("memory://dcp-arguments"))
    with pytest.raises(TypeError, match=r"modelstore\.open"):
        ms.dcp.Writer("somewhere", "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_last"):
        ms.dcp.Writer(store, "m", keep_last=0)
    with pytest.raises(ValueError, match="give keep_last="):
        ms.dcp.Writer(store, "m", keep_every=5)
    with pytest.raises(ValueError, match="codec 'delta'"):
        ms.dcp.Writer(store, "m", codec="delta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tag '1000' is not valid"):
        dcp.save({"w": torch.ones(1)}, storage_writer=ms.dcp.Writer(store, "m"), checkpoint_id="1000")
    assert ms.dcp.Writer.validate_checkpoint_id("step-1")
    assert not ms.dcp.Writer.validate_checkpoint_id("a/b")
    assert ms.dcp.Reader.validate_checkpoint_id("3")
    assert not ms.dcp.Reader.validate_checkpoint_id("a b")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"format": 2, "values": {}, "paths": {}}',
        b'{"format": 1, "values": {"a": ["../x", 0, 1]}, "paths": {}}',
        b'{"format": 1, "values": {"a": ["f", 3, 1]}, "paths": {}}',
        b'{"format": 1, "values": {"a": ["f", -1, 1]}, "paths": {}}',
        b'{"format": 1, "values": {}, "paths": {"a": [1.5]}}',
    ],
)
def test_notes_that_are_not_valid(data: bytes) -> None:
    with pytest.raises(FormatError, match=FILE):
        decoded(data, ["f"])


def test_notes_come_back() -> None:
    values = {"a": BytesPlace("f", 0, 3)}
    notes = decoded(encoded(values, {"x.0": ("x", 0)}), ["f"])
    assert (notes.values, notes.paths) == (values, {"x.0": ("x", 0)})
