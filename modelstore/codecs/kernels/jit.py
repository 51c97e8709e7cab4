"""Numba, loaded when the first kernel is wanted, and kernels compiled once a machine.

Compiled code is kept beside the package, or in the user's cache folder where the package cannot be written. Where
neither can be, kernels are compiled anew in each process (about half a second each), and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modelstore.format.locks import Lock

_lock = Lock()  # Numba does not say that threads may load from its cache at once


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
        try:
            return numba.njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder to cache in, or one that is full
            return numba.njit(list(signatures), cache=False, **options)(function)
