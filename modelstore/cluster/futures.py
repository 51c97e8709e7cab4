"""Answers that are on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, wait
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """What `work` returns or raises, once it has, in a thread of its own: one that hangs takes none away from others."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="modelstore-ask").start()
    return future


def answers(asked: Mapping[K, Future[R]], seconds: float) -> dict[K, R]:
    """What those say who answer within so many seconds, all together; who fails, or is silent, is left out."""
    wait(asked.values(), timeout=seconds)
    return {key: future.result() for key, future in asked.items() if future.done() and future.exception() is None}
