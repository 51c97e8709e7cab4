"""`compare`: one table over variants, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from modelstore.cli.compression.evaluating import HEADS, measures, of_text, task_of
from modelstore.cli.terminal import complete, output, units
from modelstore.cli.terminal.options import AsJson, Context, Debug, Limit, Memory, Quiet, StoreUrl, open_store

_HEADS = ("VARIANT", "RECIPE", "STORED", "BITS/WEIGHT")


def compare(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            autocompletion=complete.references,
            show_default=False,
            help="NAME[@VERSION-OR-TAG][:VARIANT]; of one alone, all variants of its version.",
        ),
    ],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="The text to predict, in UTF-8: one that the models were not trained on.",
        ),
    ],
    context: Context = 512,
    limit: Limit = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep what is found with the variants.")] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            show_default=False,
            help="Draw divergence over bytes into a .svg, .html, .png or .pdf file.",
        ),
    ] = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare variants: their sizes, and what each loses on a text.

    Each is compared to the original of its own version. Results that were measured before are not computed again. A star marks
    what no other beats in both size and divergence.
    """
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        found = opened.compare(refs, text=text, context=context, limit=limit, keep=keep, plot=plot, progress=report)
    if plot is not None:
        output.remark(f"drew {plot}", quiet=quiet or json)

    def lines() -> Iterator[str]:
        task = task_of(one.measured for one in found)
        rows = [
            (
                one.ref,
                one.recipe,
                units.size(one.stored),
                f"{one.bits:.2f}",
                *measures(one.measured, task),
                "*" if one.front else "",
            )
            for one in found
        ]
        heads = (*_HEADS, *HEADS[task], "FRONT")
        yield from output.table(rows, heads, right=range(2, len(heads) - 1))
        yield of_text(found[0].measured)

    output.result(found, lines(), as_json=json)
