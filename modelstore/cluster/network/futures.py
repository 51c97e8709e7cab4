"""Answers that are on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, wait
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """The result or error of `work`, once it is there, in a thread of its own: one that hangs takes none away from others."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="modelstore-ask").start()
    return future


def answers(asked: Mapping[K, Future[R]], seconds: float) -> dict[K, R]:
    """The answers that come within so many seconds, all together; failed and silent ones are left out."""
    wait(asked.values(), timeout=seconds)
    return {key: future.result() for key, future in asked.items() if future.done() and future.exception() is None}
