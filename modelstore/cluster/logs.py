"""The log of hosts and the directory: one JSON object a line, in Ray's log of their process."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from modelstore.text import json_line

FIELDS = ("model", "chunk", "object", "peer")  # what a record may say beside its text


class JsonLines(logging.Formatter):
    """Records as JSON objects: time (Unix seconds), level, message, the process's own fields, and the record's."""

    def __init__(self, own: dict[str, str]) -> None:
        super().__init__()
        self._own = own

    def format(self, record: logging.LogRecord) -> str:
        said = {name: str(getattr(record, name)) for name in FIELDS if getattr(record, name, None) is not None}
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        return json_line({**line, **self._own, **said, **trace})


def log_as_json(stream: TextIO | None = None, **own: str) -> None:
    """Let this process log its package's records as JSON lines with fields of its own, such as `host` and `node`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(own))
    logger = logging.getLogger("modelstore")
    logger.handlers = [handler]
    logger.propagate = False
