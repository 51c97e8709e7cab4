"""How far a work is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # whom a caller gives: bytes done, bytes in all, what is being done
Advance = Callable[[int], None]  # whom a work tells: bytes done since it told last


def meter(progress: Progress | None, total: int, what: str) -> Advance | None:
    """A counter of bytes that reports the sum so far; None where nobody listens."""
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, max(total, done), what)

    progress(0, total, what)
    return count
