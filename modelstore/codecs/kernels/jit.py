"""Numba, loaded when the first kernel is wanted, and kernels compiled once a machine.

Compiled code is kept beside the package, or in the user's cache folder where the package cannot be written. If neither can be
written, kernels are compiled again in each process (about half a second each), and nothing else changes. Running operations
hear (`telling`) when a kernel has to be compiled, and was not before: all of them may wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from modelstore.format.locks import Lock
from modelstore.format.progress import Progress

COMPILING = "compiling kernels, once on this machine"
_lock = Lock()  # Numba does not say that threads may load from its cache at once
_ours = threading.local()  # whether this thread compiles a kernel of this module: others may use Numba, too
_told: dict[int, Progress] = {}  # the works that go on in this process


@contextmanager
def telling(progress: Progress | None) -> Iterator[None]:
    """Tell `progress`, at the first kernel that is compiled within the block, that this goes on: as 0 bytes of 1."""
    work = id(progress)
    if progress is None or work in _told:  # a method of a store is one of its model's
        yield
        return
    _told[work] = progress
    try:
        yield
    finally:
        _told.pop(work, None)


@cache
def _listen() -> None:
    """Hear of it when Numba compiles, and does not find the code in its cache."""
    from numba.core import event

    class Compiling(event.Listener):
        def on_start(self, event: Any) -> None:  # noqa: ARG002
            if not getattr(_ours, "compiling", False):
                return
            for work in tuple(_told):
                if (progress := _told.pop(work, None)) is not None:
                    progress(0, 1, COMPILING)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Compiling())  # type: ignore[no-untyped-call]


def compiled(function: Callable[..., Any], *signatures: Any, reorder: bool = False) -> Callable[..., Any]:
    """`function` as machine code for exactly these Numba signatures; it releases the GIL and checks no bounds.

    `reorder` lets sums of floats be taken in any order, so that they vectorise: for statistics only, since their last
    bits then depend on the machine.
    """
    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    if reorder:
        options["fastmath"] = {"reassoc"}
    with _lock:
        _listen()
        _ours.compiling = True
        try:
            return numba.njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder to cache in, or one that is full
            return numba.njit(list(signatures), cache=False, **options)(function)
        finally:
            _ours.compiling = False
