"""The storage's own clock: no decision is made by that of a client, which may be days off."""

from __future__ import annotations

import uuid

from modelstore.errors import StorageError
from modelstore.format.record import JOBS
from modelstore.storage.base import Storage

REFRESH = 12 * 3600  # seconds


def now(storage: Storage) -> float:
    """The time (Unix seconds) by the storage's clock: that of an object made for it. Three requests."""
    folder = f"{JOBS}clock-{uuid.uuid4().hex}/"
    key = f"{folder}now.json"
    storage.create(key, b"{}")
    info = next(storage.list(folder, limit=1), None)  # S3 lists milliseconds, and answers whole seconds for one object
    storage.delete(key)
    if info is None:
        raise StorageError(f"object {key} was removed as soon as it was made: run this again", object=key)
    return info.modified


class Youth:
    """Whether an object is young enough to be left alone by collections of the usual grace; the clock is read once, if at all.

    This saves work and nothing else: what a save relies on is proved when it is published, whatever the clocks say.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._since: float | None = None

    def __call__(self, modified: float) -> bool:
        """Whether what was last written then (Unix seconds by the storage's clock) is younger than twelve hours."""
        if self._since is None:
            self._since = now(self._storage) - REFRESH
        return modified >= self._since
