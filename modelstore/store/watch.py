"""Watching a model: an iterator that gives each version as it becomes the newest, or the one that a tag names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType

from modelstore.errors import NotFoundError
from modelstore.format.answers.results import VersionInfo
from modelstore.format.names import Reference
from modelstore.format.objects.record import version_prefix
from modelstore.store.catalog import Catalog
from modelstore.store.describe import version_info


class Watch(Iterator[VersionInfo]):
    """Waits for versions; each `next` blocks until there is another than the last one. `close` ends it, from any thread.

    A look costs one request while nothing changes, and a few more when something did; between looks it waits `poll`
    seconds. Versions that came and went between two looks are not given. While the model, or the tag, is not there it waits.
    """

    def __init__(self, catalog: Catalog, model: str, tag: str | None, poll: float, since: int | None) -> None:
        if not 0 < poll < threading.TIMEOUT_MAX:
            raise ValueError(f"poll={poll} is not a positive number of seconds")
        self._catalog = catalog
        self._ref = Reference(model, tag=tag)
        self._poll = poll
        self._last = since
        self._seen: str | None = None  # the key of the record that was newest, where it says all
        self._closed = threading.Event()

    def __next__(self) -> VersionInfo:
        while not self._closed.is_set():
            found = self.look()
            if found is not None:
                return found
            self._closed.wait(self._poll)
        raise StopIteration

    def look(self) -> VersionInfo | None:
        """The version to give now, None if it is still the last one; does not wait."""
        ref = self._ref
        head = self._catalog.head(ref.name, ref.tag)
        if head is None or head == self._seen:
            return None
        if self._last is not None:
            self._catalog.open(again=True)  # versions of another store are none of this model
        try:
            record = self._catalog.resolve(ref)
        except NotFoundError:  # all versions were deleted, or the tag removed
            return None
        # If the newest record is of a deleted version, changes to older ones do not show in its key.
        seen = head if ref.tag is not None or head.startswith(version_prefix(ref.name, record.version)) else None
        if record.version == self._last:
            self._seen = seen
            return None
        info = version_info(record, self._catalog.tags(ref.name, []))
        self._last, self._seen = record.version, seen
        return info

    def close(self) -> None:
        """End the iteration; a waiting `next` returns immediately."""
        self._closed.set()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
