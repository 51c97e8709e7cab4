"""Trains a student of a store in processes that are killed, each at another step; then goes on to the end.

`python -m tests.transfer.killed STORE DATA KEEP` prints how each process ended, and the step that the last one went on from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import modelstore as ms
from modelstore.transfer import publish
from modelstore.transfer.state import TrainingStates
from modelstore.transfer.train import Training
from tests.calibrate.killed import dying, in_a_process

HOW: dict[str, Any] = {"steps": 12, "tokens": 64, "length": 32, "rate": 3e-3, "checkpoint": 4, "teacher": "m"}
# What is called when a process dies, how many times it was called before in this process, and whether it is done first.
STEPS: dict[str, tuple[Any, str, int, bool]] = {
    "before anything is kept": (Training, "_one_step", 2, True),
    "between a step and its state": (TrainingStates, "keep", 0, False),
    "after a state": (TrainingStates, "keep", 0, True),
    "in the step after it": (Training, "_one_step", 0, False),
    "at the last step": (Training, "_one_step", 3, True),
    "publishing": (publish.Publishing, "publish", 0, False),
}


def main(url: str, data: str, keep: str) -> None:
    """Be killed at each step, and go on."""
    torch.set_num_threads(1)

    def run() -> None:
        done = ms.open(url).distill("small@1", data, keep=keep or None, **HOW)
        print(json.dumps({"resumed": done.resumed}))

    def killed(step: str) -> Callable[[], None]:
        def work() -> None:
            owner, name, before, done = STEPS[step]
            setattr(owner, name, dying(getattr(owner, name), before, done))
            run()

        return work

    for step in STEPS:
        print(json.dumps({step: in_a_process(killed(step))}), flush=True)
    print(json.dumps({"end": in_a_process(run)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
