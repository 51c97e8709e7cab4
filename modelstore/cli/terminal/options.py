"""The options that commands share, and the way from them to an open store. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import complete
from modelstore.cli.terminal.failures import usage
from modelstore.format.units import parse_duration, parse_size

if TYPE_CHECKING:
    from modelstore.client import Store


def size_of(text: str | int) -> int:
    """The value of an option that takes a size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def duration_of(text: str | float) -> float:
    """The value of an option that takes a time."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def share_of(text: str | float) -> float:
    """The value of an option that takes a share: 0.8, or 80%."""
    number, percent, rest = str(text).strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 < share <= 1:
        raise typer.BadParameter(
            f"{text!r} is not a share: write a number above 0 and up to 1, or a percentage such as 80%"
        )
    return share


StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="MODELSTORE_URL",
        metavar="URL",
        show_default=False,
        help="The store's place: a folder, or a URL such as s3://bucket/models.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result (and an error, on stderr) as one line of JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress bar and no remarks: only the result, and errors.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=size_of,
        show_default=False,
        help="Working memory to stay within, such as 1GiB or 512MB.",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        show_default=False,
        help="Work through the hosts of a Ray cluster: auto (the one that this machine belongs to), or HOST:PORT.",
    ),
]
Mirrors = Annotated[
    list[str] | None,
    typer.Option(
        "--mirror",
        metavar="URL",
        show_default=False,
        help="A copy of the store. What is lost or damaged here is read from the copy, and repaired. May be given several times.",
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        metavar="TIME",
        parser=duration_of,
        show_default=False,
        help="Keep objects younger than this, which a running save may still need, such as 90s, 12h or 7d. One day by default.",
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=complete.names, help="The model's name: NAME or ORG/NAME.", show_default=False
    ),
]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        autocompletion=complete.references,
        help="NAME[@VERSION-OR-TAG][:VARIANT]. By default the original of the newest version.",
        show_default=False,
    ),
]
OptionalReference = Annotated[
    str | None,
    typer.Argument(
        metavar="[REF]",
        autocompletion=complete.references,
        help="NAME[@VERSION-OR-TAG][:VARIANT]; the whole store where none is given.",
        show_default=False,
    ),
]
Context = Annotated[int, typer.Option("--context", metavar="TOKENS", min=2, help="Tokens of a window.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="TOKENS", min=2, show_default=False, help="Only so many tokens of the text."),
]
NewTag = Annotated[
    str | None, typer.Option("--tag", metavar="TAG", show_default=False, help="Let this tag name the new version.")
]
Message = Annotated[
    str | None,
    typer.Option("--message", "-m", metavar="TEXT", show_default=False, help="What is said of the version in log."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


def lasting(place: str | None) -> None:
    """Refuse a place to write to that ends with the command."""
    if place is not None and place.lower().startswith("memory://"):
        raise typer.BadParameter("memory:// ends with this command: give a folder, or a URL like s3://bucket/folder")


def open_store(
    url: str | None, *, memory: int | None = None, mirrors: Sequence[str] | None = None, cluster: str | None = None
) -> Store:
    """The store a command works on; wrong usage where none was named."""
    if not url:
        raise usage("no store given: add --store URL, or set MODELSTORE_URL (a folder will do: --store ./store)")
    import modelstore as ms

    return ms.open(url, memory=memory, mirrors=tuple(mirrors or ()), cluster=cluster)
