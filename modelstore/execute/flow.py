"""Runs read jobs in parallel, in order, within a budget, and hands out what they fill as it becomes ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from modelstore.plan.read import ReadJob
from modelstore.storage.pool import Pool

T = TypeVar("T")


def flow(
    jobs: Iterator[ReadJob],
    costs: Sequence[int],
    begin: Callable[[int], T],
    run: Callable[[ReadJob, dict[int, T]], None],
    *,
    threads: int,
    memory: int | None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, T]]:
    """Each want's place in the list and what was made for it by `begin` and filled by `run`, as they become ready.

    `jobs` come in the order of the wants, of which `costs` has the bytes. What is begun and not yet taken costs at most
    `memory` (None: any amount), except that one want above it is let through alone. `run` works in `threads` threads.
    """
    targets: dict[int, T] = {}
    left: dict[int, int] = {}  # chunks not finished, of the wants begun
    last = -1  # the highest want of which a chunk was submitted; those below it have no more to come
    held = 0
    pending: dict[Future[None], ReadJob] = {}

    def start(index: int) -> None:
        nonlocal held
        targets[index] = begin(index)
        left[index] = 0
        held += costs[index]

    pool = Pool(threads, thread_name_prefix="modelstore-read")
    try:
        job = next(jobs, None)
        ended = False
        while True:
            while job is not None and len(pending) < 2 * threads:
                fresh = {c.want for c in job.chunks} - targets.keys()
                cost = sum(costs[i] for i in fresh)
                busy = pending or any(n == 0 and i < last for i, n in left.items())  # else waiting would never end
                if memory is not None and fresh and busy and held + cost > memory:
                    break
                upto = job.chunks[-1].want
                for index in range(last + 1, upto + 1):
                    start(index)
                last = max(last, upto)
                for chunk in job.chunks:
                    left[chunk.want] += 1
                pending[pool.submit(run, job, targets)] = job
                job = next(jobs, None)
            if job is None and not ended:
                ended = True
                for index in range(last + 1, len(costs)):
                    start(index)
                last = len(costs)
            ready = [i for i, n in left.items() if n == 0 and i < last]
            for index in ready:
                del left[index]
                target = targets.pop(index)
                yield index, target
                del target
                held -= costs[index]
            if ready:
                continue
            if not pending:
                assert not left, "a tensor was not finished"
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                finished = pending.pop(future)
                future.result()
                for chunk in finished.chunks:
                    left[chunk.want] -= 1
                if progress:
                    progress(finished.nbytes)
    finally:
        pool.give_up()
        pool.shutdown()
