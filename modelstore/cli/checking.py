"""`verify` and `repair`: whether what is stored is what was saved, and what to do where it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.failures import FAILED, UNREAD, explain
from modelstore.cli.terminal.options import AsJson, Debug, Memory, OptionalReference, Quiet, StoreUrl, open_store
from modelstore.errors import StorageError

_FEW = 5  # problems of one object that are told one by one
# The advice that problems have in common, which is said once, and digests, whose beginning tells objects apart.
_ADVICE = re.compile(r"[:;] run 'modelstore repair[^']* --from URL' with another copy of the store$")
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

if TYPE_CHECKING:
    from modelstore.format.answers.results import Problem, Report


def verify(
    ref: OptionalReference = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every tensor too, and check it against the digest of what was saved.")
    ] = False,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every stored chunk against its digest.

    Exit code 1 where something is wrong, 3 where nothing is known to be, but not all could be read.
    """
    opened = open_store(store, memory=memory)
    try:
        with output.progress(quiet=quiet) as report:
            found = opened.verify(ref, deep=deep, progress=report)
    except StorageError as error:  # not even what there is to check could be read, and nothing is written
        explain(error, as_json=json)
        raise typer.Exit(UNREAD) from None
    _end(found, json, quiet)


def repair(
    ref: OptionalReference = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL",
            show_default=False,
            help="A store that holds the same models; without it, only what this store holds twice can be repaired.",
        ),
    ] = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Replace what is damaged by good copies.

    Exit code 1 where something stays damaged, 3 where nothing does, but not all could be read.
    """
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        found = opened.repair(ref, source=source, progress=report)
    _end(found, json, quiet)


def _end(found: Report, json: bool, quiet: bool) -> None:
    """Print what was found, and end as it says."""
    _result(found, json)
    if any(_ADVICE.search(problem.message) for problem in found.problems):
        output.remark(
            "modelstore: 'modelstore repair --from URL' repairs this from another copy of the store",
            quiet=quiet or json,
        )
    if not found.ok:
        raise typer.Exit(FAILED if found.damaged else UNREAD)


def _result(found: Report, json: bool) -> None:
    if json:
        import msgspec

        output.result({"ok": found.ok} | msgspec.to_builtins(found), (), as_json=True)
    else:
        output.result(found, _lines(found), as_json=False)


def _told(problem: Problem) -> str:
    """A problem for people: without repetitions, and with digests cut short; `--json` has all of it."""
    return f"{problem.kind}: {_short(_ADVICE.sub('', problem.message))}"


def _short(text: str) -> str:
    return _DIGEST.sub(r"\1…", text)


def _lines(found: Report) -> Iterator[str]:
    for _, group in groupby(found.problems, key=lambda one: (one.object, one.tensor is not None)):
        alike = list(group)
        for problem in alike[:_FEW]:
            yield from output.paragraph(_told(problem))
        if left := alike[_FEW:]:
            of = _short(left[0].object or "the same")
            yield from output.paragraph(f"and {units.count(len(left), 'more problem')} of {of}: --json names all")
    for note in found.notes:
        yield from output.paragraph(note)
    if found.repaired:
        yield f"repaired {units.count(len(found.repaired), 'object')}"
    checked = f"{units.count(found.tensors, 'tensor')}, {units.count(found.chunks, 'chunk')}, {units.size(found.bytes)}"
    yield f"{'ok' if found.ok else units.count(len(found.problems), 'problem')}: checked {checked}"
