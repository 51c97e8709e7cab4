"""`ls`, `show`, `diff`: what is in a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.compression import evaluating
from modelstore.cli.terminal import complete, output, units
from modelstore.cli.terminal.options import AsJson, Debug, ModelName, Reference, StoreUrl, open_store

if TYPE_CHECKING:
    from modelstore.client import Store
    from modelstore.format.answers import results


def ls(
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF]",
            autocompletion=complete.references,
            show_default=False,
            help="NAME: list its versions. NAME@VERSION-OR-TAG: list its variants. Nothing: list all models.",
        ),
    ] = None,
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List models, versions or variants."""
    opened = open_store(store)
    if ref is None:
        _models(opened, str(store), json)
    elif "@" in ref:
        _variants(opened, ref, json)
    else:
        _versions(opened, ref, json)


def _models(opened: Store, url: str, json: bool) -> None:
    models = opened.models()
    if not models and not json:
        output.remark(f"no models in {url} yet; save one: modelstore save DIR NAME --store {url}")
        return
    heads = ("MODEL", "VERSIONS", "NEWEST", "SIZE", "STORED", "TAGS")
    rows = [
        (m.name, str(m.versions), f"@{m.newest}", units.size(m.bytes), units.size(m.stored), _tags(m.tags))
        for m in models
    ]
    output.result(models, output.table(rows, heads, right=(1, 2, 3, 4)), as_json=json)


def _versions(opened: Store, name: str, json: bool) -> None:
    versions = opened.versions(name)
    heads = ("VERSION", "CREATED", "SIZE", "STORED", "VARIANTS", "TAGS")
    rows = [
        (
            f"@{v.version}",
            units.moment(v.created),
            units.size(v.bytes),
            units.size(v.stored),
            ", ".join(v.variants),
            ", ".join(v.tags),
        )
        for v in versions
    ]
    output.result(versions, output.table(rows, heads, right=(0, 2, 3)), as_json=json)


def _variants(opened: Store, ref: str, json: bool) -> None:
    variants = opened.variants(ref)
    heads = ("VARIANT", "CODEC", "TENSORS", "SIZE", "STORED", "CREATED")
    rows = [
        (v.variant, v.codec, str(v.tensors), units.size(v.bytes), units.size(v.stored), units.moment(v.created))
        for v in variants
    ]
    output.result(variants, output.table(rows, heads, right=(2, 3, 4)), as_json=json)


def _tags(tags: dict[str, int]) -> str:
    return ", ".join(f"{tag} → @{version}" for tag, version in tags.items())


def show(
    ref: Reference,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too (--json always does).")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            show_default=False,
            help="Draw the quality of all variants of the version over their size into a .svg, .html, .png or .pdf file.",
        ),
    ] = None,
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describe what a reference names.

    Sizes, tensors, files, where it comes from, and what the version's variants are worth, as far as it was measured.
    """
    if plot is not None:
        from modelstore.search.picture import check_picture, draw

        check_picture(plot)
    opened = open_store(store)
    about = opened.describe(ref)
    at = f"{about.model}@{about.version}"
    if plot is not None:
        draw(evaluating.chart(opened.quality(at), at), plot)
        output.remark(f"drew {plot}", quiet=json)

    output.result(about, _details(about, tensors, lambda: opened.quality(at)), as_json=json)


def _details(about: results.Description, tensors: bool, quality: Callable[[], list[results.Quality]]) -> Iterator[str]:
    chunks = sum(t.chunks for t in about.tensors)
    facts = {
        "model": f"{about.model}@{about.version}:{about.variant}",
        "created": units.moment(about.created),
        "tags": ", ".join(about.tags),
        "size": units.size(about.bytes),
        "stored": f"{units.size(about.stored)} ({units.share(about.stored, about.bytes)})",
        "tensors": f"{len(about.tensors):,} in {units.count(chunks, 'chunk')}",
        "dtypes": ", ".join(sorted({t.dtype for t in about.tensors})),
        "codecs": ", ".join(sorted({t.codec for t in about.tensors})),
        "tied": ", ".join(f"{alias} = {name}" for alias, name in about.aliases.items()),
        "files": ", ".join(file.path for file in about.files),
        "parent": about.parent or "",
        "by": about.by,
        "from": about.source,
        "message": about.message,
        "meta": ", ".join(f"{key}={value}" for key, value in about.meta.items()),
    }
    yield from output.facts(facts)
    worth = quality()
    if len(worth) > 1 or any(one.measured for one in worth):
        yield ""
        yield from evaluating.table(worth)
    if tensors:
        rows = [
            (
                t.name,
                t.dtype,
                "×".join(map(str, t.shape)) or "scalar",
                t.codec,
                units.size(t.bytes),
                units.size(t.stored),
                str(t.chunks),
            )
            for t in about.tensors
        ]
        yield ""
        yield from output.table(
            rows, ("TENSOR", "DTYPE", "SHAPE", "CODEC", "SIZE", "STORED", "CHUNKS"), right=(4, 5, 6)
        )


def log(
    name: ModelName,
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell the history of a model: every version, newest first, deleted ones too."""
    entries = open_store(store).log(name)

    def lines() -> Iterator[str]:
        for at, entry in enumerate(entries):
            if at:
                yield ""
            gone = f"deleted {units.moment(entry.deleted)}" if entry.deleted is not None else ""
            marks = ", ".join(filter(None, [gone, *entry.tags]))
            yield f"version {entry.version}" + (f" ({marks})" if marks else "")
            stored = f"{units.size(entry.bytes)} in {units.count(entry.tensors, 'tensor')}, stored in {units.size(entry.stored)}"
            facts = {
                "  by": entry.by,
                "  date": units.moment(entry.created),
                "  from": entry.source,
                "  parent": entry.parent,
                "  codec": entry.codec,
                "  size": stored,
                "  variants": ", ".join(entry.variants) if len(entry.variants) > 1 else "",
                "  meta": ", ".join(f"{key}={value}" for key, value in entry.meta.items()),
            }
            yield from output.facts(facts)
            if entry.message:
                yield ""
                yield from (f"    {line}" for line in entry.message.splitlines())

    output.result(entries, lines(), as_json=json)


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", autocompletion=complete.references, show_default=False, help="The reference to compare from."
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B", autocompletion=complete.references, show_default=False, help="The reference to compare to."
        ),
    ],
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the tensors of two references.

    Digests are compared: no weights are read.
    """
    found = open_store(store).diff(a, b)

    def lines() -> Iterator[str]:
        yield from (f"+ {name}" for name in found.added)
        yield from (f"- {name}" for name in found.removed)
        yield from (f"~ {name}" for name in found.changed)
        if not (found.added or found.removed or found.changed):
            yield "no tensor differs"
            return
        yield (
            f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed; "
            f"{found.chunks_changed:,} of {units.count(found.chunks_total, 'chunk')}, "
            f"{units.size(found.bytes_changed)} of {units.size(found.bytes_total)} differ"
        )

    output.result(found, lines(), as_json=json)
