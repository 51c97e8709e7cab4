"""Jobs: a task on a model that workers all over a cluster share, in portions, in a bounded window.

A worker notes in the store what it finished; the driver only learns that it is done. So if the same job is started again,
after the death of a worker, a node or the driver, it continues from the finished portions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelstore.cluster.control.protocol import Control
from modelstore.cluster.control.session import Session
from modelstore.cluster.network.calls import ask_directory, ask_directory_once
from modelstore.errors import CancelledError, ModelStoreError, StorageError
from modelstore.format.answers.cluster_results import JobStatus
from modelstore.format.progress import Advance
from modelstore.plan.placement import View

_AHEAD = 2  # portions submitted for each core of the cluster
_RETRIES = 3
_REPORT = 5.0  # seconds that the directory may take to be told
_LOOK = 1.0  # seconds between two looks at whether the job was cancelled
_NICE = 15  # at which workers run: hosts, whom readers wait for, come first

P = TypeVar("P")


class Task(Protocol[P]):
    """The work of a job. A portion of it is plain data, and is the same however many workers there are."""

    @property
    def job(self) -> str:
        """The job's id: of the same task it is the same."""

    @property
    def model(self) -> str:
        """The model that it is about, of this `version`."""

    @property
    def version(self) -> int:
        """The model's version."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that it makes."""

    @property
    def title(self) -> str:
        """Ray's name for a portion's work: "compress acme/llama"."""

    def portions(self) -> Sequence[P]:
        """The work to do. Those of most bytes are started first: one that is started last would be waited for."""

    def nbytes(self, portion: P) -> int:
        """Bytes of a portion, for the progress."""

    def nearest(self, portion: P, view: View) -> str | None:
        """The node on which a portion is best worked on; None if it is all the same."""

    def gpus(self, portion: P, free: Mapping[str, float]) -> float:
        """The share of a GPU that a worker takes for a portion, given the cluster's free resources."""

    def first(self, portion: P) -> str:
        """The first tensor of a portion, by which an error says where it is."""

    def work(self) -> Callable[[P, str | None], int]:
        """Do a portion's work, in a process of its own, and on a device of torch if there is one; note it in the store, and
        return the bytes that are newly stored. Plain data; doing it twice is as doing it once.
        """


def run(task: Task[P], progress: Advance | None = None) -> int:
    """Have workers do all of a task; bytes that they newly stored.

    `CancelledError` if somebody cancelled the job; a worker's error, where it failed again and again. The portions finished
    by then stay noted.
    """
    view = Session().view(fresh=True)
    portions = sorted(task.portions(), key=task.nbytes, reverse=True)
    sizes = [task.nbytes(portion) for portion in portions]
    status = JobStatus(task.job, task.model, task.version, task.variants, sum(sizes), 0, len(portions), 0, 0.0)
    open_: dict[Any, int] = {}
    stored = done = finished = 0
    started = time.monotonic()
    left = iter(range(len(portions)))
    try:
        while True:
            while len(open_) < _window() and (at := next(left, None)) is not None:
                open_[_submit(task, portions[at], view)] = at
            if not open_:
                return stored
            ready, _ = ray.wait(list(open_), num_returns=1, timeout=_LOOK)
            fresh = 0
            for ref in ready:
                at = open_.pop(ref)
                stored += _result(ref, task.first(portions[at]))
                fresh, finished = fresh + sizes[at], finished + 1
            done, seconds = done + fresh, time.monotonic() - started
            status = msgspec.structs.replace(status, done=done, finished=finished, seconds=seconds)
            cancelled = _report(status)
            if progress and fresh:
                progress(fresh)
            if cancelled:
                raise CancelledError(
                    f"job {task.job} was cancelled; the same call goes on from what is finished", model=task.model
                )
    finally:
        for ref in open_:
            ray.cancel(ref, force=True)
        _report(None, task.job)


def _submit(task: Task[P], portion: P, view: View) -> Any:
    node = task.nearest(portion, view)
    near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True) if node else "SPREAD"
    remote: Any = ray.remote(_work).options(
        num_cpus=1,
        num_gpus=task.gpus(portion, ray.available_resources()),  # type: ignore[no-untyped-call]
        max_retries=_RETRIES,
        retry_exceptions=[StorageError],
        scheduling_strategy=near,
        name=task.title,
    )
    return remote.remote(task.work(), portion)


def _window() -> int:
    """Portions that should be under way now: nodes may have come since the last time."""
    return max(2, _AHEAD * int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _work(work: Callable[[P, str | None], int], portion: P) -> int:
    """Runs in a worker: a portion's work, on the GPU that this process was given a share of, if it was."""
    import torch

    os.nice(max(0, _NICE - os.nice(0)))
    return work(portion, "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else None)


def _result(ref: Any, first: str) -> int:
    try:
        return int(ray.get(ref))
    except ModelStoreError:
        raise
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"workers failed {_RETRIES + 1} times at tensors {first!r} and those after it "
            f"({str(error).strip().splitlines()[-1][:200]}): the same call goes on from what is finished",
            tensor=first,
        ) from None


def _report(status: JobStatus | None, job: str = "") -> bool:
    """Tell the directory how far a job is, or that it ended; whether it must be cancelled."""
    try:
        return ask_directory_once(_REPORT, Control.report, status, job)
    except (StorageError, ray.exceptions.RayError):  # it is away: nobody can see or cancel the job meanwhile
        return False


def jobs() -> list[JobStatus]:
    """The jobs that run on the connected cluster."""
    return ask_directory(Control.jobs)


def cancel(job: str) -> bool:
    """Ask the driver of a job to stop; whether there is such a job."""
    return ask_directory(Control.cancel, job)
