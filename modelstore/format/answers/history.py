"""Results for the history of a model: plain data."""

from __future__ import annotations

from modelstore.format.answers.brief import Result


class LogEntry(Result, frozen=True):
    """A version as its history tells it: who made it `of` what, when, against which `parent`, with which message.

    Sizes, codec and tensors are of its original. `deleted`: when (Unix seconds); None if it was not.
    """

    version: int
    created: float
    by: str
    message: str
    meta: dict[str, str]
    source: str
    parent: str
    codec: str
    tensors: int
    bytes: int
    stored: int
    variants: tuple[str, ...]
    tags: tuple[str, ...]
    deleted: float | None = None
