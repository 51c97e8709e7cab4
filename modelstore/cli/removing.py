"""`rm` and `gc`: take models out of sight, and free the space of what nothing refers to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import complete, output, units
from modelstore.cli.terminal.failures import FAILED, usage
from modelstore.cli.terminal.options import (
    AsJson,
    Debug,
    Grace,
    Memory,
    Quiet,
    StoreUrl,
    open_store,
    share_of,
)

if TYPE_CHECKING:
    from modelstore.format.answers.inventory import Compaction


def rm(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            autocompletion=complete.references,
            show_default=False,
            help="NAME@VERSION, NAME@VERSION:VARIANT, or with --all NAME.",
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Remove all versions of the model.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, even on a terminal.")] = False,
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove a version, a variant or a model.

    NAME@VERSION removes a version, NAME@VERSION:VARIANT one variant of it, NAME --all the whole model.

    A tagged version is refused: move or remove its tag first. The space is freed by `modelstore gc --delete`.
    """
    exact = "@" in ref
    if everything and (exact or ":" in ref):
        raise usage(f"--all removes every version: give the model's name alone, not {ref!r}")
    if not exact and not everything:
        raise usage(
            f"{ref!r} does not say which version: write NAME@VERSION, or --all to remove every version of a model"
        )
    opened = open_store(store)
    what = f"all versions of {ref}" if everything else ref
    if not yes and asks() and not typer.confirm(f"Remove {what}?", err=True):
        output.remark("nothing removed")
        raise typer.Exit(FAILED)
    opened.delete(ref, all=everything)
    output.result({"removed": ref, "all": everything}, [f"removed {what}; gc --delete frees the space"], as_json=json)


def asks() -> bool:
    """Whether there is somebody to ask: stdin is a terminal."""
    return sys.stdin.isatty()


def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the objects; without this, they are only listed and counted.")
    ] = False,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact",
            help="With --delete, rewrite packs that are mostly dead. Without it, only say what would be done.",
        ),
    ] = False,
    live_share: Annotated[
        float | None,
        typer.Option(
            "--live-share",
            metavar="SHARE",
            parser=share_of,
            show_default=False,
            help="With --compact: rewrite packs of which less than this share is live. 80% by default.",
        ),
    ] = None,
    grace: Grace = 86_400,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find, or delete, what nothing refers to.

    Objects that no version of any model refers to are listed; --delete deletes them, and frees their space. --compact frees
    the dead bytes within packs that something else needs: the live rest moves to new packs, and the old ones are deleted when
    the grace period is over.
    """
    if live_share is not None and not compact:
        raise usage("--live-share is for --compact: add that, or leave it out")
    with output.progress(quiet=quiet) as report:
        swept = open_store(store, memory=memory).gc(
            dry_run=not delete,
            grace=grace,
            compact=(True if live_share is None else live_share) if compact else False,
            progress=report,
        )

    def lines() -> Iterator[str]:
        if not quiet:
            rows = [(thing.key, units.size(thing.size)) for thing in swept.objects]
            yield from output.table(rows, ("OBJECT", "SIZE"), right=(1,)) if rows else ()
        what = f"{units.count(len(swept.objects), 'object')}, {units.size(swept.bytes)}"
        if delete:
            yield f"deleted {what}"
        else:
            yield f"would delete {what}; nothing was deleted" + (": add --delete" if swept.objects else "")
        if swept.young:
            yield f"{units.size(swept.young)} that nothing refers to are younger than the grace period: see --grace"
        if swept.compaction is not None:
            yield from _compacted(swept.compaction)
        elif swept.dead:
            yield f"{units.size(swept.dead)} are dead in packs that something else needs: see --compact"

    output.result(swept, lines(), as_json=json)
    for problem in swept.problems:
        output.remark(f"kept what this may refer to: {problem.message}", quiet=json)
    for said in swept.compaction.left if swept.compaction else ():
        output.remark(f"modelstore: {said}", quiet=quiet or json)


def _compacted(done: Compaction) -> Iterator[str]:
    sizes = f"{units.count(done.packs, 'pack')}, {units.size(done.before)}, as {units.size(done.after)}"
    if not done.packs:
        yield "no pack is to be rewritten"
    elif done.dry_run:
        yield f"would rewrite {sizes}; nothing was changed: add --delete"
    else:
        yield f"rewrote {sizes}; the old ones are deleted by gc --delete when the grace period is over"
