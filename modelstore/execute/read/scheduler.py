"""A scheduler: runs read jobs in parallel, in order, within a budget, and hands out what they fill as it becomes ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Generic, TypeVar

from modelstore.format.progress import Advance
from modelstore.plan.read import ReadJob
from modelstore.storage.pool import Pool

T = TypeVar("T")


def schedule(
    jobs: Iterator[ReadJob],
    costs: Sequence[int],
    begin: Callable[[int], T],
    run: Callable[[ReadJob, dict[int, T]], None],
    *,
    threads: int,
    memory: int | None,
    progress: Advance | None = None,
) -> Iterator[tuple[int, T]]:
    """Each want's place in the list and its result, made by `begin` and filled by `run`, as they become ready.

    `jobs` come in the order of the wants; `costs` has the bytes of these. Started wants that are not yet taken cost at most
    `memory` (None: any amount), except that one want above it is admitted alone. `run` works in `threads` threads.
    """
    wants = _Wants(costs, begin)
    pending: dict[Future[None], ReadJob] = {}
    pool = Pool(threads, thread_name_prefix="modelstore-read")
    try:
        job = next(jobs, None)
        while True:
            while job is not None and len(pending) < 2 * threads and wants.fits(job, memory, running=bool(pending)):
                wants.begin(job)
                pending[pool.submit(run, job, wants.targets)] = job
                job = next(jobs, None)
            if job is None:
                wants.begin_rest()
            ready = wants.ready()
            for index in ready:
                yield index, wants.targets.pop(index)
                wants.taken(index)
            if ready:
                continue
            if not pending:
                assert not wants.left, "a tensor was not finished"
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                finished = pending.pop(future)
                future.result()
                wants.finish(finished)
                if progress:
                    progress(finished.nbytes)
    finally:
        pool.give_up()
        pool.shutdown()


class _Wants(Generic[T]):
    """The started wants that are not yet taken, and their cost."""

    def __init__(self, costs: Sequence[int], begin: Callable[[int], T]) -> None:
        self.targets: dict[int, T] = {}
        self.left: dict[int, int] = {}  # chunks not finished, of the wants that were started
        self._costs = costs
        self._begin = begin
        self._next = 0  # the lowest want that is not started
        self._complete = 0  # wants below it do not have any more chunks to come
        self._held = 0

    def fits(self, job: ReadJob, memory: int | None, *, running: bool) -> bool:
        """Whether a job may start: its wants must fit in memory; one alone always may."""
        fresh = {chunk.want for chunk in job.chunks} - self.targets.keys()
        busy = running or any(n == 0 and i < self._complete for i, n in self.left.items())  # else waiting never ends
        return memory is None or not fresh or not busy or self._held + sum(self._costs[i] for i in fresh) <= memory

    def begin(self, job: ReadJob) -> None:
        """Start all wants up to a job's last, and count its chunks."""
        highest = job.chunks[-1].want
        self._start(highest + 1)
        self._complete = max(self._complete, highest)
        for chunk in job.chunks:
            self.left[chunk.want] += 1

    def begin_rest(self) -> None:
        """Start the wants after those of the last job: they have no chunks."""
        self._start(len(self._costs))
        self._complete = len(self._costs)

    def finish(self, job: ReadJob) -> None:
        """Count off a job's chunks."""
        for chunk in job.chunks:
            self.left[chunk.want] -= 1

    def ready(self) -> list[int]:
        """The complete wants; each is given once."""
        found = [i for i, n in self.left.items() if n == 0 and i < self._complete]
        for index in found:
            del self.left[index]
        return found

    def taken(self, index: int) -> None:
        """Give back the budget of a want that was handed out."""
        self._held -= self._costs[index]

    def _start(self, end: int) -> None:
        for index in range(self._next, end):
            self.targets[index] = self._begin(index)
            self.left[index] = 0
            self._held += self._costs[index]
        self._next = max(self._next, end)
