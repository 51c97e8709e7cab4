"""Works that free space, on a storage that has none left: they write a little first, in space that was held for that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from modelstore.errors import StorageError
from modelstore.paths import FULL
from modelstore.storage.base import Storage

log = logging.getLogger("modelstore")
T = TypeVar("T")


def freeing(storage: Storage, work: Callable[[], T]) -> T:
    """The result of `work`; if the storage is full, it is done again in the space that was held, and the rest is held again.

    The work must be one that can be broken off and done again. `StorageError` if nothing was held, or it is not enough.
    """
    try:
        return work()
    except StorageError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        if not full or not storage.use_spare():
            raise
        log.warning("%s is full: the space that was held for this is used", storage.url)
    try:
        return work()
    finally:
        storage.hold_spare()
