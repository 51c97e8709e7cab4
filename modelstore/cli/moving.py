"""`copy`, `rename` and `du`: models in other stores, under other names, and what they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import complete, output, swapped, units
from modelstore.cli.terminal.failures import FAILED, usage
from modelstore.cli.terminal.options import (
    AsJson,
    Debug,
    Memory,
    Mirrors,
    ModelName,
    Quiet,
    StoreUrl,
    lasting,
    open_store,
)

if TYPE_CHECKING:
    from modelstore.format.answers.inventory import Copied, StoreUsage


def copy(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[REF] DEST",
            autocompletion=complete.references,
            show_default=False,
            help="NAME[@VERSION-OR-TAG][:VARIANT], and the store to copy it to; with --all NAME or nothing, and the store.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", show_default=False, help="The model's name in the other store."),
    ] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Copy all variants of the version.")] = False,
    tags: Annotated[
        bool, typer.Option("--tags", help="Let the tags that name the version name it there, too; they move there.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Copy all versions of NAME, or of every model, with all variants and tags."),
    ] = False,
    store: StoreUrl = None,
    mirror: Mirrors = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a version to another store, as it is stored.

    Content that is already there is not sent. A copy that was interrupted goes on when it is started again. The original comes
    along with a variant. A version keeps its number where that is free in the other store.

    Exit code 1 where something was left out, as it is damaged or does not fit what is there.
    """
    if len(what) > 2 or (len(what) == 1 and not everything):
        raise usage("copy takes a reference and a store, copy REF DEST; or with --all a store alone")
    ref, target = (what[0], what[1]) if len(what) == 2 else (None, what[0])
    lasting(target)
    opened = open_store(store, memory=memory, mirrors=mirror)
    if ref is None and target in {model.name for model in opened.models()}:
        raise usage(
            f"{target} is a model of this store: say where to, copy {target} DEST --all (or ./{target}, a folder)"
        )
    with output.progress(quiet=quiet) as report, swapped.told(opened, "copy", (ref, target), ("REF", "DEST")):
        done = opened.copy(ref, target, name=name, variants=variants, tags=tags, all=everything, progress=report)
    output.result(done, _copied(done, target), as_json=json)
    for said in done.left_out:
        output.remark(f"modelstore: left out {said}", quiet=quiet or json)
    if done.left_out:
        raise typer.Exit(FAILED)


def _copied(done: Copied, target: str) -> Iterator[str]:
    for one in done.versions:
        added = ", ".join(variant for variant in one.variants if variant != "original" or not one.new)
        now = f"{one.model}@{one.version}"
        if one.new:
            yield f"copied {one.source}{f' as {now}' if now != one.source else ''}{f', with {added}' if added else ''}"
        elif one.variants:
            yield f"copied {added} of {one.source}{f' to {now}' if now != one.source else ''}"
        else:
            yield f"{one.source} is there{f' as {now}' if now != one.source else ''}"
    if done.tags:
        yield f"tags there: {', '.join(done.tags)}"
    yield (
        f"sent {units.count(done.packs, 'pack')}, {units.size(done.sent)}, to {target} in {units.seconds(done.seconds)}; "
        f"already there {units.size(done.there)}"
    )


def rename(
    old: ModelName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name that it gets.", show_default=False)],
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give a model, with all its versions, variants and tags, another name.

    No weights are read or written. Each version is there under one name or both at every instant; what was interrupted is
    finished by the same command.
    """
    done = open_store(store).rename(old, new)
    moved = {before: now for before, now in done.versions.items() if before != now}
    lines = [f"renamed {old} to {new}: {units.count(len(done.versions), 'version')}"]
    if moved:
        numbers = ", ".join(f"@{before} is now @{now}" for before, now in moved.items())
        lines.append(f"{numbers}: no number is given twice under one name")
    output.result(done, lines, as_json=json)


def du(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=complete.names,
            show_default=False,
            help="A model, whose versions and variants are listed; all models where none is given.",
        ),
    ] = None,
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what models take: all that each holds, and what nothing else holds.

    `gc` frees the bytes that only this model holds, after it is removed. Manifests are read, no weights.
    """
    found = open_store(store).du(name)
    output.result(found, _usage(found, name), as_json=json)
    for said in found.problems:
        output.remark(f"modelstore: not counted: {said}", quiet=json)


def _usage(found: StoreUsage, name: str | None) -> Iterator[str]:
    listed = found.models if name is None else (*found.models, *found.versions, *found.variants)
    rows = [(one.name, *map(units.size, (one.bytes, one.alone, one.bytes - one.alone))) for one in listed]
    yield from output.table(rows, ("NAME", "STORED", "ALONE", "SHARED"), right=(1, 2, 3))
    if name is None:
        yield ""
        facts = {
            "live": (found.live, ""),
            "dead": (found.dead, "in packs that are needed: see gc --compact"),
            "unused": (found.unused, "needed by nothing: see gc --delete"),
            "manifests": (found.manifests, ""),
            "in all": (found.total, "with records"),
        }
        for key, (size, what) in facts.items():
            yield f"{key.ljust(9)}  {units.size(size).rjust(8)}  {what}".rstrip()
