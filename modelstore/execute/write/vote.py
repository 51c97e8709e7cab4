"""A vote by objects in a store: several processes do a thing all together or not at all."""

from __future__ import annotations

import time

import msgspec

from modelstore.execute.write.journal import job_id
from modelstore.format.objects.record import JOBS
from modelstore.format.objects.sealed import seal, unseal
from modelstore.storage.base import SMALL, Storage

_EARLIER = {b"go": True, b"stop": False}  # what earlier releases wrote
MAX_RANKS = 100_000


class _Decision(msgspec.Struct, frozen=True):
    go: bool


class Vote:
    """One vote of `ranks` processes; `session` names it among them, and is used for no other.

    Each says that it is ready by making an object of its own. A process that sees that all are ready makes the decision "go";
    one that cannot go, or has waited `timeout` seconds, makes it "stop". The decision is one object, created only once, so all
    read the same one. A rank that is run again in the same session gets the decision that was made.
    """

    def __init__(
        self, storage: Storage, session: str, *, rank: int, ranks: int, timeout: float, poll: float = 0.05
    ) -> None:
        if not 1 <= ranks <= MAX_RANKS or not 0 <= rank < ranks:
            raise ValueError(f"rank={rank} of ranks={ranks} is not valid: ranks are counted from 0, up to {MAX_RANKS}")
        if not isinstance(session, str) or not session or len(session) > 1024:
            raise ValueError(f"session {str(session)[:80]!r} is not valid: give a text of 1 to 1024 characters")
        if not timeout > 0 or not poll > 0:
            raise ValueError(f"timeout={timeout} and poll={poll} must be positive numbers of seconds")
        self._storage = storage
        self._folder = f"{JOBS}{job_id(('together', session))}/"
        self._rank, self._ranks = rank, ranks
        self._timeout, self._poll = timeout, poll

    def __call__(self, ready: bool) -> bool:
        """Vote; whether all do it. Returns when it is decided, at the latest after `timeout` seconds and a few requests."""
        if not ready:
            return self._decide(False)
        self._storage.create(f"{self._folder}ready/{self._rank:06d}", b"ready")
        end = time.monotonic() + self._timeout
        wait = self._poll
        while True:
            found = [info.key.rpartition("/")[2] for info in self._storage.list(self._folder)]
            if "decision" in found:
                return self._read()
            if len(found) == self._ranks:
                return self._decide(True)
            left = end - time.monotonic()
            if left <= 0:
                return self._decide(False)
            time.sleep(min(wait, left))
            wait = min(2 * wait, 1.0)

    def _decide(self, go: bool) -> bool:
        self._storage.create(f"{self._folder}decision", seal(_Decision(go)))
        return self._read()

    def _read(self) -> bool:
        """The decision that counts: another process may have made it first."""
        key = f"{self._folder}decision"
        answer = self._storage.get(key, SMALL)
        if answer in _EARLIER:
            return _EARLIER[answer]
        return unseal(answer, _Decision, key, what="decision", advice="use another session").go
