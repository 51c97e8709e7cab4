"""The output of a command: a result on stdout, as text or as JSON; progress and remarks on stderr.

All of it passes here, and nothing that a name holds reaches a terminal as more than the characters that are seen.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from modelstore.cli.terminal import wording
from modelstore.format.progress import Progress
from modelstore.text import cells, json_line, shortened, shown

LINE = 80  # columns of a sentence in a file
NARROWEST = 14  # columns below which a text in a table is not shortened further
_NAME = 40  # columns of what a progress bar tells of


class Shown:
    """A stream that escapes what others write to it, such as warnings, log records, tracebacks and help."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks

    def write(self, text: str) -> int:
        """Write a text; line ends stay."""
        if not isinstance(text, str):
            raise TypeError(f"write a text, not {type(text).__name__}")  # so is a text stream told from one of bytes
        self._stream.write(shown(text, keep="\n"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drawn_on(stream: Any) -> Any:
    """The stream itself, for a program's own drawing, which escapes what names it draws."""
    return stream._stream if isinstance(stream, Shown) else stream


@contextmanager
def shown_streams() -> Iterator[None]:
    """Within the block, nothing is written to stdout and stderr but what can be seen."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (one if isinstance(one, Shown) else Shown(one) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def result(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: the value as one line of JSON, or the lines, which are only made if they are wanted."""
    if as_json:
        print(json_line(value))
    else:
        for line in shown_lines(lines):
            print(line)
    sys.stdout.flush()  # here, so that a reader that left is noticed while it can still be handled


def shown_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines as `result` prints them, for what is drawn again."""
    width = _width()
    return (folded(shown(line), width) for line in lines)


def remark(text: str, *, quiet: bool = False) -> None:
    """Say something that is not a result, unless asked to be quiet."""
    if not quiet:
        print(shown(wording.as_typed(text)), file=sys.stderr, flush=True)


def failure(text: str) -> None:
    """Say what went wrong: one line on stderr, or a traceback of several."""
    print("\n".join(map(shown, text.splitlines())), file=sys.stderr, flush=True)


def folded(line: str, width: int | None) -> str:
    """A line as several, where it is wider than the terminal."""
    if width is None or cells(line) <= width:
        return line
    width = width if cells(line) == len(line) else width // 2  # `textwrap` counts characters
    indent = len(line) - len(line.lstrip()) + 2
    rest = " " * min(indent, width // 2)
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=rest, drop_whitespace=True, break_on_hyphens=False))


def paragraph(text: str) -> Iterator[str]:
    """A sentence as lines that fit the terminal, or `LINE` columns where it goes elsewhere."""
    yield from folded(shown(text), _width() or LINE).split("\n")


def facts(named: dict[str, str]) -> Iterator[str]:
    """Lines of names and what they have; those that have nothing are left out, and long ones go on below themselves."""
    left = max(map(cells, named)) + 2
    width = _width()
    for name, value in ((name, shown(value)) for name, value in named.items() if value):
        line = name.ljust(left) + value
        if width is not None and cells(line) > width > 2 * left:
            space = width - left
            parts = textwrap.wrap(value, space if cells(value) == len(value) else space // 2, break_on_hyphens=False)
            yield from (f"{(name if i == 0 else '').ljust(left)}{part}" for i, part in enumerate(parts))
        else:
            yield line


def table(rows: Sequence[Sequence[str]], heads: Sequence[str], right: Iterable[int] = ()) -> Iterator[str]:
    """Lines of an aligned table; the columns whose index is in `right` are set flush right.

    On a terminal, none is wider than it: long texts lose their middle, and where that does not do, each row goes on in a
    second line.
    """
    flush = frozenset(right)
    body = [[shown(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(cells, column)) for column in zip(*body, strict=True)]
    room = _width()
    if room is not None:
        widths = _narrowed(widths, flush, room)
    lines = [list(range(len(widths)))] if room is None else _lines(widths, room)
    for row in body:
        for number, columns in enumerate(lines):
            done = [_set(row[i], widths[i], right=i in flush) for i in columns]
            line = ("    " if number else "") + "  ".join(done)
            if line.strip():
                yield line.rstrip()


def _set(cell: str, width: int, *, right: bool) -> str:
    cell = shortened(cell, width)
    space = " " * (width - cells(cell))
    return space + cell if right else cell + space


def _narrowed(widths: list[int], flush: frozenset[int], room: int) -> list[int]:
    """The widths with the widest texts made narrower, as far as that is wanted and of use."""
    made = [min(w, room - 4) for w in widths]
    while sum(made) + 2 * (len(made) - 1) > room:
        texts = [i for i, w in enumerate(made) if i not in flush and w > NARROWEST]
        if not texts:
            break
        made[max(texts, key=lambda i: made[i])] -= 1
    return made


def _lines(widths: Sequence[int], room: int) -> list[list[int]]:
    """Which columns go into which line of a row: as many as fit."""
    lines: list[list[int]] = [[]]
    used = 0
    for i, width in enumerate(widths):
        if lines[-1] and used + 2 + width > room:
            lines.append([])
            used = 4
        used += width + (2 if lines[-1] else 0)
        lines[-1].append(i)
    return lines


def _width() -> int | None:
    """Columns of the terminal that the result goes to; None if it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress | None]:
    """A callable that moves a progress bar on stderr; None if nobody looks: no terminal there, or `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=drawn_on(sys.stderr)), transient=True) as bar, shown_streams():
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(shortened(shown(what), _NAME), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
