"""The one tree of errors: what is wrong, where, and what to do, in one sentence.

    ModelStoreError
    ├── NotFoundError      no such model, version, variant, tag, tensor or object
    ├── ConflictError      another writer won, or the change would break what depends on it
    ├── CorruptionError    bytes that do not match their digest, and no good copy
    ├── FormatError        something read is not valid: a manifest, pack, record or checkpoint
    ├── StorageError       the storage failed, after retries
    ├── UnsupportedError   valid, but nothing here can do it
    └── CancelledError     the work was told to stop

Wrong arguments are `ValueError` or `TypeError`.
"""

from __future__ import annotations

from modelstore.text import shown


class ModelStoreError(Exception):
    """Base of all errors of a store; `kind` is stable and meant for programs.

    `model`, `tensor`, `chunk` (an index in the tensor's grid) and `object` (a key in the store, or a path) say
    where, each None if it does not apply.
    """

    kind = "error"

    def __init__(
        self,
        message: str,
        *,
        model: str | None = None,
        tensor: str | None = None,
        chunk: int | None = None,
        object: str | None = None,
    ) -> None:
        super().__init__(shown(message))
        self.model = model
        self.tensor = tensor
        self.chunk = chunk
        self.object = object

    def as_dict(self) -> dict[str, str | int]:
        """The error as plain data, for `--json` and logs: kind, message and the places known."""
        places = {"model": self.model, "tensor": self.tensor, "chunk": self.chunk, "object": self.object}
        return {"kind": self.kind, "message": str(self)} | {k: v for k, v in places.items() if v is not None}


class NotFoundError(ModelStoreError):
    """No such model, version, variant, tag, tensor or object."""

    kind = "not_found"


class ConflictError(ModelStoreError):
    """Another writer won, or the change would break something that depends on it."""

    kind = "conflict"


class CorruptionError(ModelStoreError):
    """Stored bytes do not match their digest, and no good copy was found."""

    kind = "corruption"


class FormatError(ModelStoreError):
    """Something read is not valid: a manifest, a pack, a record, a checkpoint."""

    kind = "format"


class StorageError(ModelStoreError):
    """The storage failed, after retries."""

    kind = "storage"


class UnsupportedError(ModelStoreError):
    """A valid request that nothing here can fulfil."""

    kind = "unsupported"


class CancelledError(ModelStoreError):
    """The work was told to stop."""

    kind = "cancelled"
