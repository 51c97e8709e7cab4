"""Why a request gets no answer, in the Hub's words: its clients choose their exception by the header `X-Error-Code`."""

from __future__ import annotations

from collections.abc import Mapping

from modelstore.errors import (
    ConflictError,
    FormatError,
    ModelStoreError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)

REPO, REVISION, ENTRY, GATED = "RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (UnsupportedError, 422),
    (FormatError, 422),
    (StorageError, 503),
    (ValueError, 400),
    (TypeError, 400),
)


class RefusedError(ModelStoreError):
    """A request that is not answered: its HTTP status, the Hub's code where there is one, more headers, more of the answer."""

    kind = "refused"

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **more: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        self.more = more


def no_model(name: str) -> RefusedError:
    """The same for a model that is not there and for one that the caller may not know of."""
    return RefusedError(404, f"no model {name!r} for this token: check the name, and the token", REPO)


def refusal(error: Exception) -> RefusedError:
    """The answer to a request that raised this; 500 for unexpected errors."""
    if isinstance(error, RefusedError):
        return error
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 500 and not isinstance(error, ModelStoreError):
        return RefusedError(500, "the server met an error that it does not know: its log says more")
    return RefusedError(status, str(error), ENTRY if status == 404 else "")
