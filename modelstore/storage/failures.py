"""Which failures pass by themselves: the one place that tells a throttled request from a forbidden one."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from types import ModuleType

from modelstore.errors import ModelStoreError, NotFoundError, StorageError

_STATUS = re.compile(r"status code: (\d{3})")
_PASSING_STATUS = frozenset({408, 425, 429})
# Codes that arrive with a status which does not say so: RequestTimeout is a 400, a conditional conflict is a 409.
_PASSING_CODES = (
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "ServerBusy",
    "OperationTimedOut",
    "Throttl",
    "ConditionalRequestConflict",
    "OperationAborted",
    "reduce your request rate",
)
_PASSING_ERRNO = frozenset(
    {errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH}
)
_MISSING_CONTAINER = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")


class TransientStorageError(StorageError):
    """A failure that another attempt may mend: throttling, 5xx, a time-out, a dropped connection, a short body."""


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again.

    The client libraries wrap what happened, so the causes are looked at too; a status that forbids (403, 404, …)
    anywhere among them wins.
    """
    verdicts = [verdict for cause in _causes(error) if (verdict := _verdict(cause)) is not None]
    return bool(verdicts) and all(verdicts)


def failure(error: Exception, key: str, doing: str) -> ModelStoreError:
    """The store's error for what a client library raised, while `doing` something to the object `key`; retriable or not."""
    if isinstance(error, ModelStoreError):
        return error
    cause = error.__cause__ or error  # s3fs translates what the server said into less
    text = " ".join(str(cause).split("\n\nDebug source", 1)[0].split())[:300] or type(cause).__name__
    if any(code in text for code in _MISSING_CONTAINER):
        return StorageError(f"Could not {doing} {key!r}: the bucket or container does not exist ({text}).", object=key)
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"No object {key!r}.", object=key)
    kind = TransientStorageError if transient(error) else StorageError
    return kind(f"Could not {doing} {key!r}: {text}", object=key)


def mentions(error: BaseException, word: str) -> bool:
    """Whether the error, or one that caused it, speaks of `word`: a server's error code."""
    return any(word in str(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _verdict(error: BaseException) -> bool | None:
    """True passes, False stays, None says nothing."""
    if isinstance(error, ModelStoreError):
        return isinstance(error, TransientStorageError)
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError)):
        return False
    text = str(error)
    if any(code in text for code in _PASSING_CODES):
        return True
    if _of(
        error, "aiohttp.http_exceptions", "PayloadEncodingError"
    ):  # a short body; its code 400 is no server's status
        return True
    if (status := _status(error, text)) is not None:
        return status in _PASSING_STATUS or status >= 500
    if _of(error, "obstore.exceptions", "GenericError"):
        return "HTTP error" in text and "kind: Decode" not in text
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)):
        return True
    if _of(error, "botocore.exceptions", "HTTPClientError", "IncompleteReadError"):
        return True
    if _of(error, "botocore.parsers", "ResponseParserError"):  # a throttled answer can be cut short
        return True
    if _of(error, "aiohttp", "ClientConnectionError", "ClientPayloadError"):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    return None


def _status(error: BaseException, text: str) -> int | None:
    """The HTTP status that an error carries: botocore's response, an attribute as in aiohttp and azure, or obstore's text."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for attribute in ("status", "status_code", "code"):
        if isinstance(status := getattr(error, attribute, None), int) and 100 <= status < 600:
            return status
    found = _STATUS.search(text)
    return int(found.group(1)) if found else None


def _of(error: BaseException, module: str, *names: str) -> bool:
    """Whether the error is one of these classes of a library; one that is not loaded has raised nothing."""
    loaded: ModuleType | None = sys.modules.get(module)
    return loaded is not None and isinstance(error, tuple(getattr(loaded, name) for name in names))
