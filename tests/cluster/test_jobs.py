"""How a compression is divided among workers: decided from the manifest and the view alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

import modelstore as ms
from modelstore.cluster.pieces import pieces
from modelstore.cluster.work import compression, jobs
from modelstore.compress.job import Portion
from modelstore.errors import CancelledError
from modelstore.format.answers.cluster_results import JobStatus
from modelstore.format.objects.manifest import CodecSpec
from modelstore.plan.placement import Member, View

INT = CodecSpec("int", {"bits": 8, "granularity": "channel"})


def tensors(layers: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    return {name: (torch.randn(512, 512, generator=g) * 0.02).to(torch.bfloat16) for name in names}


def manifest_of(store: ms.Store, ref: str) -> Any:
    return store[ref].opened().manifest


@pytest.fixture
def url(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", tensors())
    return str(tmp_path / "store")


@pytest.mark.parametrize("size", [1, 512 * 512 * 2, 5 * 512 * 512, 1 << 40])
def test_portions_are_all_tensors_in_order(url: str, size: int) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    made = list(compression.portions(whole, manifest, size))
    assert [name for part in made for name in part.specs] == list(tensors())
    assert all(part.job == "j" and part.specs for part in made)
    limit = max(size, 512 * 512 * 2)
    assert all(sum(manifest.by_name[name].nbytes for name in part.specs) <= limit for part in made)


def test_portions_become_smaller_towards_the_end(url: str) -> None:
    """So that nobody begins a long one when the others have nothing left to do."""
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    counts = [len(part.specs) for part in compression.portions(whole, manifest, 4 * 512 * 512 * 2)]
    assert counts == [3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_worker_takes_a_part_of_a_gpu_where_that_gains_something() -> None:
    searched = CodecSpec("int", {"bits": 4, "granularity": "group", "method": "mse"})
    portion = Portion("j", ("int4",), {"a": INT, "b": searched})
    assert compression.gpu_share(portion, {"CPU": 2.0}) == 0
    assert compression.gpu_share(portion, {"CPU": 2.0, "GPU": 1.0}) == 0.1
    assert compression.gpu_share(portion, {"CPU": 2.0, "GPU": 0.05}) == 0, "none is free"
    assert compression.gpu_share(Portion("j", ("int8",), {"a": INT}), {"GPU": 1.0}) == 0
    ladder = Portion("j", ("original", "int8", "int4"), {"a": CodecSpec("ladder", {})})
    assert compression.gpu_share(ladder, {"GPU": 1.0}) == 0


def test_work_goes_where_most_of_its_chunks_are_at_home(url: str) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    assert compression.nearest(whole, manifest, View(1)) is None
    assert compression.nearest(whole, manifest, View(1, (Member("a", "n"),))) == "n"
    heavy = View(1, (Member("a", "n", weight=1e-9), Member("b", "o")))
    assert compression.nearest(whole, manifest, heavy) == "o"
    assert len(pieces(manifest, range(3))) == 3


class Doubling:
    """A task that is no compression: portions are numbers, each of which is worth twice itself."""

    job, model, version, variants, title = "j", "m", 1, ("v",), "double"

    def portions(self) -> list[int]:
        return [1, 3, 2]

    def nbytes(self, portion: int) -> int:
        return 10 * portion

    def nearest(self, portion: int, view: View) -> str | None:
        return view.members[0].node if portion == 3 else None

    def gpus(self, portion: int, free: Mapping[str, float]) -> float:
        return 0.5 * (portion == 1) * free["GPU"]

    def first(self, portion: int) -> str:
        return f"tensor {portion}"

    def work(self) -> Callable[[int, str | None], int]:
        return lambda portion, device: 2 * portion  # noqa: ARG005


class Workers:
    """What `jobs` wants of Ray: one worker, which works when it is waited for, on what came last."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.told: list[JobStatus | None] = []
        self.cancelled = False

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.options.append(given)
            return SimpleNamespace(remote=lambda *arguments: partial(function, *arguments))

        return SimpleNamespace(options=options)

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return refs[-1:], refs[:-1]

    def get(self, ref: Callable[[], int]) -> int:
        return ref()

    def cancel(self, *_: Any, **__: Any) -> None:
        self.options.append({"cancelled": True})

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1, "GPU": 1}

    cluster_resources = available_resources

    def get_gpu_ids(self) -> list[int]:
        return []

    def report(self, _: float, __: Any, status: JobStatus | None, job: str) -> bool:
        self.told.append(status)
        return self.cancelled


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(jobs, "ray", made)
    monkeypatch.setattr(jobs, "_NICE", 0)  # the work is done in this process
    monkeypatch.setattr(jobs, "ask_directory_once", made.report)
    monkeypatch.setattr(jobs, "Session", lambda: SimpleNamespace(view=lambda fresh: View(1, (Member("a", "ab" * 28),))))  # noqa: ARG005
    return made


def test_any_task_is_a_job(workers: Workers) -> None:
    done: list[int] = []
    assert jobs.run(Doubling(), done.append) == 12
    assert sum(done) == 60
    assert [given["num_gpus"] for given in workers.options] == [0, 0, 0.5], (
        "the largest first, as each portion wants it"
    )
    assert [given["scheduling_strategy"] != "SPREAD" for given in workers.options] == [True, False, False]
    assert {given["name"] for given in workers.options} == {"double"}
    *during, last = workers.told
    assert [status.finished for status in during if status] == [1, 2, 3]
    assert during[-1] is not None
    assert (during[-1].done, during[-1].bytes, during[-1].variants) == (60, 60, ("v",))
    assert last is None, "that it ended is told, too"


def test_a_task_that_is_cancelled_leaves_nothing_under_way(workers: Workers) -> None:
    workers.cancelled = True
    with pytest.raises(CancelledError, match="job j was cancelled"):
        jobs.run(Doubling())
    assert workers.options[-1] == {"cancelled": True}
    assert workers.told[-1] is None
