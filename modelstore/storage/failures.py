"""A client library's error as the store's own: one sentence that names the store, the object, the cause and what to do."""

from __future__ import annotations

from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, StorageError
from modelstore.storage.remote.causes import cause_of, chain

_WRITES = ("create", "write")


class TransientStorageError(StorageError):
    """A failure that another attempt may cure: throttling, 5xx, a time-out, a dropped connection, a short body.

    `unreachable`: nobody answered at all.
    """

    unreachable = False


class UnknownHostError(StorageError):
    """No host has the name: a wrong endpoint, unless it has answered before."""


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(error, ModelStoreError):
        return isinstance(error, TransientStorageError)
    return bool(cause_of(error).passes)


def failure(error: BaseException, key: str, doing: str, url: str) -> ModelStoreError:
    """The store's error for what a client library raised, while `doing` something to the object `key` in `url`."""
    if isinstance(error, ModelStoreError):
        return error
    cause = cause_of(error)
    if isinstance(error, FileNotFoundError) and not cause.no_bucket:
        return NotFoundError(f"no object {key!r} in {url}", object=key)
    nothing = doing in _WRITES and (cause.refused or cause.no_bucket)  # can be written there, whatever the object
    message = f"cannot write into {url}: {cause}" if nothing else f"cannot {doing} {key!r} in {url}: {cause}"
    if cause.passes:
        passing = TransientStorageError(message, object=key)
        passing.unreachable = cause.unreachable
        return passing
    return (UnknownHostError if cause.unreachable else StorageError)(message, object=key)


def cannot_open(error: BaseException, url: str) -> StorageError:
    """The store's error for what a client raised that connects when it is made; `url` without secrets."""
    cause = cause_of(error)
    kind = TransientStorageError if cause.passes else StorageError
    return kind(f"cannot open {url}: {cause}")


def ends_before(url: str, key: str, end: int) -> CorruptionError:
    """The error of an object that is shorter than what is read of it."""
    return CorruptionError(f"object {key!r} in {url} ends before byte {end:,}", object=key)


def mentions(error: BaseException, word: str) -> bool:
    """Whether the error, or one that caused it, speaks of `word`: a server's error code."""
    return any(word in str(cause) for cause in chain(error))
