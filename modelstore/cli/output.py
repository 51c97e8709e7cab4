"""What a command prints: a result on stdout, as text or as JSON; progress and remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Report = Callable[[int, int, str], None]


def result(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: the value as one line of JSON, or the lines, which are only made if they are wanted."""
    if as_json:
        import msgspec

        print(msgspec.json.encode(value).decode())
    else:
        for line in lines:
            print(line)
    sys.stdout.flush()  # here, so that a reader that left is noticed while it can still be handled


def remark(text: str, *, quiet: bool = False) -> None:
    """Say something that is no result, unless asked to be quiet."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]], heads: Sequence[str], right: Iterable[int] = ()) -> Iterator[str]:
    """Lines of an aligned table; the columns whose index is in `right` are set flush right."""
    flush = frozenset(right)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [
            cell.rjust(w) if i in flush else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Report | None]:
    """A callable that moves a progress bar on stderr; None where nobody looks: no terminal there, or `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
