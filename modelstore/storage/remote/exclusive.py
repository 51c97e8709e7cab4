"""Whether a server keeps the promise that its protocol makes: proved before the first write through it.

Some servers that speak like S3, and proxies before some that do better, take a conditional write and ignore its condition; two
writers would then overwrite each other's versions without a word. So nothing is written through a connection for which it
was not proved.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.format.locks import Lock
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import T, Verb, WrappingStorage

PROVED_FOR = 3600.0  # seconds; what answers at an address may be replaced while a process goes on
_proved: dict[str, float] = {}  # what leads to a server → when it was proved (monotonic), by this process
_lock = Lock()


def prove_exclusive_create(storage: Storage) -> None:
    """`UnsupportedError` unless the storage refuses to create an object that is there. Costs two writes and a delete."""
    key = f"jobs/probe-{secrets.token_hex(8)}.json"
    try:
        storage.create(key, b'{"probe":1}')
        if storage.create(key, b'{"probe":2}'):
            raise UnsupportedError(
                f"{storage.url} cannot be written to: the server, or a proxy before it, ignores 'If-None-Match: *', so that "
                "two writers could overwrite each other; reach it without that proxy, use a server that honours conditional "
                "writes, or only read it (read_only=True)",
                object=key,
            )
    finally:
        with suppress(ModelStoreError):  # garbage collection finds it
            storage.delete(key)


class ProvedStorage(WrappingStorage):
    """Proves, before the first write through it, that objects are created exclusively.

    `way` names what leads to the server: endpoint, bucket, client. A proof of this process is not repeated for an hour.
    """

    def __init__(self, inner: Storage, way: str) -> None:
        super().__init__(inner)
        self._way = way

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:  # noqa: ARG002
        if verb in ("create", "put"):
            self._prove()
        return act()

    def _prove(self) -> None:
        proved = _proved.get(self._way)
        if proved is not None and time.monotonic() - proved < PROVED_FOR:
            return
        with _lock:  # writers of one process that start together prove it once
            if _proved.get(self._way) == proved:
                prove_exclusive_create(self.inner)
                _proved[self._way] = time.monotonic()
