"""The history of a model: who made its versions, when, of what, and what they said of them."""

from __future__ import annotations

from modelstore.client.base import Base, warn
from modelstore.errors import ModelStoreError
from modelstore.format.history import LogEntry
from modelstore.format.names import check_model
from modelstore.store.condemned import never_was
from modelstore.store.describe import log_entry


class History(Base):
    """The part of a store that tells what happened to a model."""

    def log(self, name: str) -> list[LogEntry]:
        """Every version of a model, newest first, deleted ones too: who made it, when, of what, with which message.

        What earlier releases saved says neither who nor of what. Of versions that cannot be read a warning says so.
        """
        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        records = [one for one in self.repo.catalog.versions(check_model(name), damaged) if not never_was(one)]
        if not records:
            self.repo.catalog.newest(name)  # says what is wrong
        tags = self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return [log_entry(record, tags) for record in reversed(records) if record.variants]
