"""How far a work is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # whom a caller gives: bytes done, bytes in all, what is being done
Advance = Callable[[int], None]  # whom a work tells: bytes done since it told last


def meter(progress: Progress | None, total: int, what: str) -> Advance | None:
    """A counter of bytes that reports the sum so far; None if nobody listens.

    The total is never 0, so that a caller may divide by it: where it is not known, it grows with what is done.
    """
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, max(total, done, 1), what)

    progress(0, max(total, 1), what)
    return count
