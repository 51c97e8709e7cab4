"""The limits of an operation, and the receiver of its progress."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from modelstore.format.progress import Advance, Progress, meter

_PER_THREAD = 24 << 20  # working memory of one reading thread: encoded bytes, a decoded plane, a chunk for cut copies
_REMOTE_THREADS = 16


@dataclass(frozen=True)
class Limits:
    """The limits of an operation: bytes of working memory, and threads (None: as many as pay)."""

    memory: int
    threads: int | None = None

    def reading_threads(self, local: bool) -> int:
        """CPU-bound on local files; where requests wait for a network, more of them are in flight."""
        asked = self.threads or (os.cpu_count() or 1 if local else max(_REMOTE_THREADS, os.cpu_count() or 1))
        return max(1, min(asked, self.memory // _PER_THREAD))


@dataclass(frozen=True)
class Work:
    """One call's work, made once and handed along: its limits, and whom to tell of bytes done."""

    limits: Limits
    advance: Advance | None = None  # hears of bytes as they are done
    progress: Progress | None = None  # whom the caller gave: heard of through `begin`

    @property
    def memory(self) -> int:
        """Bytes of working memory."""
        return self.limits.memory

    def begin(self, total: int, what: str) -> Work:
        """The work, now that it is known how many bytes it will do."""
        return replace(self, advance=meter(self.progress, total, what))

    def done(self, nbytes: int) -> None:
        """Tell that bytes are done."""
        if self.advance is not None:
            self.advance(nbytes)

    def unheard(self) -> Work:
        """The same limits, for a part of the operation whose progress is reported otherwise."""
        return Work(self.limits)

    def within(self, memory: int, threads: int | None = None) -> Work:
        """The same work with other limits."""
        return replace(self, limits=Limits(memory, threads))
