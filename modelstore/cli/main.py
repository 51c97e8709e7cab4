"""The `modelstore` command. Nothing heavy is imported before a command runs, so that help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from modelstore.cli import (
    about,
    bench,
    checking,
    checkpoints,
    listing,
    loading,
    moving,
    naming,
    removing,
    saving,
    serving,
)
from modelstore.cli.cluster import clusters
from modelstore.cli.compression import comparing, compressing, distilling, evaluating, imatrix, restructuring
from modelstore.cli.demo.command import demo
from modelstore.cli.terminal.failures import Commands

EPILOG = (
    "A store is given by --store URL or MODELSTORE_URL. A reference is NAME[@VERSION-OR-TAG][:VARIANT]. "
    "Exit code: 0 done, 1 the work failed, 2 wrong usage, 3 verify or repair could not read what it was to check."
)

app = typer.Typer(
    name="modelstore",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it costs nothing to import, and reads the same in a file as on a screen
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Save a model once, sharded and losslessly compressed; read back any part of it, exactly.",
    epilog=EPILOG,
)

for command in (
    saving.save,
    loading.load,
    checkpoints.checkpoint,
    loading.cat,
    loading.export,
    compressing.compress,
    compressing.presets,
    restructuring.restructure,
    distilling.distill,
    imatrix.imatrix,
    comparing.compare,
    clusters.jobs,
    listing.ls,
    listing.show,
    listing.log,
    listing.diff,
    naming.tag,
    naming.untag,
    moving.copy,
    moving.rename,
    removing.rm,
    removing.gc,
    moving.du,
    checking.verify,
    checking.repair,
    serving.serve,
    demo,
    bench.bench,
    about.version,
):
    app.command()(command)


app.command("eval")(evaluating.evaluate)
app.add_typer(compressing.plan)
app.add_typer(clusters.cluster)
app.add_typer(serving.token)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelstore {about.installed('modelstore')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Set the options that every command has."""


def main() -> None:
    """Run the command line and exit."""
    app(prog_name="modelstore")
