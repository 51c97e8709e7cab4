"""Names the objects that cannot be read, so that they do not keep others from being read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from modelstore.errors import (
    CorruptionError,
    FormatError,
    ModelStoreError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from modelstore.storage.base import SMALL, Storage

T = TypeVar("T")

DAMAGED = (FormatError, CorruptionError)  # something else is there than should be; not read is not damaged
Damaged = list[ModelStoreError]
UNREADABLE = (FormatError, CorruptionError, StorageError, UnsupportedError)


def listed(storage: Storage, key: str) -> bytes:
    """The bytes of a record that a listing has, and that nobody removes: if it cannot be had, it is damaged."""
    try:
        return storage.get(key, SMALL)
    except NotFoundError as error:
        raise CorruptionError(str(error), object=key) from error


@contextmanager
def naming(what: str, model: str) -> Iterator[None]:
    """An error within the block says of what it is, such as "version 3" of a model."""
    try:
        yield
    except UNREADABLE as error:
        raise type(error)(
            f"{what} of model {model!r} cannot be read: {error}", model=model, object=error.object
        ) from error


def noting(damaged: Damaged | None, act: Callable[[], T]) -> T | None:
    """The result of `act`; None, and the error in the list, if something cannot be read. Without a list it is raised."""
    try:
        return act()
    except UNREADABLE as error:
        if damaged is None:
            raise
        damaged.append(error)
        return None
