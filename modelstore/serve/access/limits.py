"""How many requests a caller may make: so many a minute, and so many in parallel."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelstore.serve.refusals import RefusedError

_CALLERS = 10_000  # that are remembered; the one not seen for the longest is forgotten


@dataclass
class _Caller:
    left: float
    at: float
    running: int = 0


class CallerLimits:
    """Limits of each caller; for one event loop. None: no limit.

    A caller who made no request for a minute may make all requests of a minute without a pause.
    """

    def __init__(self, a_minute: int | None, at_once: int | None) -> None:
        self._a_minute = a_minute
        self._at_once = at_once
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    @contextmanager
    def request(self, caller: str) -> Iterator[None]:
        """One request of a caller; `RefusedError` (429), which says when to come again, where it is one too many."""
        if self._a_minute is None and self._at_once is None:
            yield
            return
        found = self._caller(caller)
        if self._at_once is not None and found.running >= self._at_once:
            raise _too_many(f"{self._at_once} requests at once", 1.0)
        if self._a_minute is not None:
            if found.left < 1:
                raise _too_many(f"{self._a_minute} requests a minute", (1 - found.left) * 60 / self._a_minute)
            found.left -= 1
        found.running += 1
        try:
            yield
        finally:
            found.running -= 1

    def _caller(self, name: str) -> _Caller:
        now, most = time.monotonic(), float(self._a_minute or 0)
        found = self._callers.setdefault(name, _Caller(most, now))
        self._callers.move_to_end(name)
        found.left = min(most, found.left + (now - found.at) * most / 60)
        found.at = now
        while len(self._callers) > _CALLERS:
            self._callers.popitem(last=False)
        return found


def _too_many(what: str, seconds: float) -> RefusedError:
    wait = max(1, round(seconds + 0.5))
    return RefusedError(429, f"this token is allowed {what}: try again in {wait} s", headers={"Retry-After": str(wait)})
