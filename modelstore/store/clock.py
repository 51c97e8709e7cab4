"""The storage's own clock: no decision is made by that of a client, which may be days off."""

from __future__ import annotations

import uuid

from modelstore.errors import StorageError
from modelstore.format.objects.record import JOBS
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
