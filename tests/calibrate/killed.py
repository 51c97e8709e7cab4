"""Calibrates a model of a store in processes that are killed one after the other, each at another step; then goes on to the end.

`python -m tests.calibrate.killed STORE` prints how each ended, and which blocks were solved by the last one.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

import modelstore as ms
from modelstore.calibrate.block import Solving
from modelstore.compress import job
from modelstore.compress.stages import Stages
from modelstore.execute.write.journal import Journal
from modelstore.execute.write.packs import PackWriter
from tests.helpers.language import TEXT

DATA = ms.Calibration(TEXT, samples=10, length=32)
RECIPE: dict[str, Any] = {
    "name": "solved",
    "rules": [
        {
            "targets": ["linear"],
            "codec": {"name": "int", "params": {"bits": 3, "group_size": 16, "method": "mse"}},
            "method": {"name": "gptq"},
        }
    ],
}
# What is called when a process dies, how many times it was called before in this process, and whether it is done first.
STEPS: dict[str, tuple[Any, str, int, bool]] = {
    "the second block's statistics": (Solving, "_gathered", 1, True),
    "its solving": (Solving, "_solved", 1, True),
    "its writing": (PackWriter, "write", 0, False),
    "between its pack and the journal": (Journal, "note", 1, False),  # a run that goes on notes that first
    "between the journal and its page": (Journal, "remark", 0, False),
    "passing on": (Stages, "pass_on", 1, True),
    "publishing": (job, "_publish", 0, False),
}


def dying(real: Callable[..., Any], before: int, done: bool) -> Callable[..., Any]:
    """A function that ends its process when it is called once more than `before` times."""
    calls: list[int] = []

    @functools.wraps(real)
    def call(*given: Any, **named: Any) -> Any:
        calls.append(1)
        last = len(calls) > before
        found = None if last and not done else real(*given, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call


def in_a_process(work: Callable[[], None]) -> int:
    """How a process ended that did the work: 0, or the signal."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(url: str) -> None:
    """Be killed at each step, and go on."""
    torch.set_num_threads(1)

    def run() -> None:
        ms.open(url).compress("m", RECIPE, calibration=DATA)

    def killed(step: str) -> Callable[[], None]:
        def work() -> None:
            owner, name, before, done = STEPS[step]
            setattr(owner, name, dying(getattr(owner, name), before, done))
            run()

        return work

    def last() -> None:
        solved: list[int] = []
        real = Solving.solve

        def counting(self: Solving, given: Any) -> Any:
            solved.append(self.number)
            return real(self, given)

        Solving.solve = counting  # type: ignore[method-assign]
        run()
        print(json.dumps({"solved": solved}))

    for step in STEPS:
        print(json.dumps({step: in_a_process(killed(step))}), flush=True)
    print(json.dumps({"end": in_a_process(last)}))


if __name__ == "__main__":
    main(sys.argv[1])
