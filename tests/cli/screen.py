"""A terminal that commands run on, and a store that answers with names of one's choice."""

from __future__ import annotations

import logging
import os
import pty
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from modelstore.cli.main import app
from modelstore.client import Store
from modelstore.format import recipe
from modelstore.format.answers import cluster_results, inventory, results
from modelstore.format.answers.comparison import Compared
from modelstore.format.answers.distilled import Distilled, DistillPlan
from modelstore.format.answers.history import LogEntry
from modelstore.format.answers.restructured import Restructured, RestructurePlan
from modelstore.format.objects import manifest


def filled(kind: Any, text: str) -> Any:
    """A value of a type in which every text is this one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: filled(hints[field.name], text) for field in msgspec.structs.fields(kind)})
    if origin is typing.Literal:
        return args[0]
    if origin in (list, tuple):
        return origin(filled(arg, text) for arg in args if arg is not Ellipsis)
    if origin is dict:
        return {filled(args[0], text): 1 if args[1] is Any else filled(args[1], text)}
    if origin in (typing.Union, types.UnionType):
        return filled([arg for arg in args if arg is not type(None)][-1], text)
    if kind in (bool, int, float):
        return kind(1)
    return b"" if kind is bytes else text


HOMES = {
    "results": results,
    "cluster_results": cluster_results,
    "recipe": recipe,
    "manifest": manifest,
    "inventory": inventory,
    "LogEntry": LogEntry,
    "Compared": Compared,
    "Distilled": Distilled,
    "DistillPlan": DistillPlan,
    "Restructured": Restructured,
    "RestructurePlan": RestructurePlan,
    "Any": Any,
}


class Answers:
    """Stands in for a store: every method answers with a result full of one text, and tells of it, and logs it."""

    def __init__(self, text: str, error: Exception | None = None) -> None:
        self.text, self.error, self.url = text, error, text

    def __getattr__(self, name: str) -> Callable[..., Any]:
        declared = str(getattr(Store, name).__annotations__.get("return"))

        def answer(*_: object, progress: Callable[[int, int, str], None] | None = None, **__: object) -> Any:
            logging.getLogger("modelstore").warning("%s is told of", self.text)
            warnings.warn(self.text, stacklevel=1)
            if progress:
                progress(1, 2, self.text)
            if self.error:
                raise self.error
            try:
                kind = eval(declared, HOMES)
            except NameError:
                return None
            return filled(kind, self.text)

        return answer


@contextmanager
def terminal() -> Iterator[tuple[Any, list[bytes]]]:
    """A stream to a pseudoterminal, and what arrived there, complete when the block is left."""
    ours, theirs = pty.openpty()
    arrived: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end was closed
            while data := os.read(ours, 65536):
                arrived.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(theirs, "w", encoding="utf-8", buffering=1)
    try:
        yield stream, arrived
    finally:
        stream.close()
        reader.join()
        os.close(ours)


class Screen(typing.NamedTuple):
    """What a command left: its exit code, and what it wrote to two terminals of 80 columns."""

    code: int
    out: str
    err: str


def on_screen(args: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Run a command with stdout and stderr on terminals."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "25")
    monkeypatch.setenv("TERM", "xterm")
    handler: logging.Handler | None = None
    with terminal() as (out, out_bytes), terminal() as (err, err_bytes), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(warnings, "showwarning", _showwarning)
        handler = _Last()
        logging.getLogger("modelstore").addHandler(handler)
        try:
            code = app(list(args), standalone_mode=False)
        finally:
            logging.getLogger("modelstore").removeHandler(handler)
    out_text, err_text = (b"".join(data).decode("utf-8", "surrogateescape") for data in (out_bytes, err_bytes))
    return Screen(code or 0, out_text.replace("\r\n", "\n"), err_text.replace("\r\n", "\n"))


class _Last(logging.Handler):
    """What `logging.lastResort` does, which under tests never has to."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _showwarning(message: object, *_: object) -> None:
    """What Python does; tests have warnings recorded instead."""
    print(f"Warning: {message}", file=sys.stderr)
