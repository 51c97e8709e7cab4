"""Whether a server keeps the promise that its protocol makes."""

from __future__ import annotations

import secrets

from modelstore.errors import UnsupportedError
from modelstore.storage.base import Storage


def prove_exclusive_create(storage: Storage) -> None:
    """`UnsupportedError` unless the storage refuses to create an object that is there; for once, when a store is made.

    Some servers that speak like S3 take a conditional write and ignore its condition. Costs two writes and a delete.
    """
    key = f"jobs/probe-{secrets.token_hex(8)}.json"  # where garbage collection finds it, should this be killed
    try:
        storage.create(key, b"first")
        if storage.create(key, b"second"):
            raise UnsupportedError(
                f"{storage.url} cannot hold a store: its server ignores 'If-None-Match: *', so that two writers could"
                " overwrite each other. Use a server that honours conditional writes.",
                object=key,
            )
    finally:
        storage.delete(key)
