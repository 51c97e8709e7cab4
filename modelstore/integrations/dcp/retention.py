"""Which versions of a series of checkpoints stay."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from modelstore.client import Store
from modelstore.errors import ConflictError, NotFoundError
from modelstore.format.answers.history import LogEntry

META = "dcp.checkpoint"  # of a version's meta: the id that it was saved under; "" for none
log = logging.getLogger("modelstore")


def superseded(history: Sequence[LogEntry], last: int, every: int | None) -> tuple[LogEntry, ...]:
    """The checkpoints that may go: not among the `last` newest, and of a number that `every` does not divide.

    Versions that were made otherwise stay, and so does a checkpoint that has another tag than its own id.
    """
    series = [entry for entry in history if entry.deleted is None and META in entry.meta]
    newest_first = sorted(series, key=lambda entry: -entry.version)
    return tuple(
        entry
        for entry in newest_first[last:]
        if not (every and entry.version % every == 0) and set(entry.tags) <= {entry.meta[META]}
    )


def retire(store: Store, model: str, last: int, every: int | None) -> None:
    """Delete the checkpoints that are superseded; one that was tagged or deleted meanwhile is left as it is."""
    for entry in superseded(store.log(model), last, every):
        try:
            for tag in entry.tags:
                store.untag(model, tag)
            store.delete(f"{model}@{entry.version}")
        except (ConflictError, NotFoundError) as error:
            log.warning("version %d of %s stays: %s", entry.version, model, error)
