"""`checkpoint`: what a trainer saved beside the weights, as a file that `torch.load` reads."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import (
    AsJson,
    Cluster,
    Debug,
    Memory,
    Mirrors,
    Overwrite,
    Quiet,
    Reference,
    StoreUrl,
    open_store,
)
from modelstore.paths import from_home, in_the_way, new_file


def checkpoint(
    ref: Reference,
    out: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write, such as run.pt.", show_default=False),
    ],
    overwrite: Overwrite = False,
    store: StoreUrl = None,
    mirror: Mirrors = None,
    memory: Memory = None,
    cluster: Cluster = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a training checkpoint that was saved with --include all, as it was, into one file of torch.save.

    The whole checkpoint is in memory while it is written.
    """
    from modelstore.errors import ConflictError
    from modelstore.execute.export.replacing import check_no_store
    from modelstore.format.answers.results import Exported

    if "://" in out:
        raise usage(f"{out} is a URL: give a file on this machine")
    path, started = from_home(out).absolute(), time.monotonic()
    if problem := in_the_way(path):
        raise usage(problem)
    if not path.parent.is_dir():
        raise usage(f"there is no folder {path.parent}")
    check_no_store(path.parent, [path.name])
    taken = ConflictError(f"{path} exists: give another place, or replace it by overwrite=True", object=str(path))
    if not overwrite and os.path.lexists(path):
        raise taken  # before anything is read
    opened = open_store(store, memory=memory, mirrors=mirror, cluster=cluster)
    with output.progress(quiet=quiet) as report:
        value = opened.checkpoint(ref, progress=report)
    try:
        size = _write(path, value, overwrite)
    except FileExistsError:
        raise taken from None
    if kinds := sorted(_inert(value)):
        output.remark(
            f"of {', '.join(kinds)} only what they were made of is kept (modelstore.Inert): torch.load needs"
            " weights_only=False",
            quiet=quiet,
        )
    done = Exported(str(path), (path.name,), size, time.monotonic() - started)
    line = f"wrote {units.size(size)} to {done.path} in {units.seconds(done.seconds)}"
    output.result(done, [line], as_json=json)


def _write(path: Path, value: Any, overwrite: bool) -> int:
    """Write a file that is there whole or not at all; its bytes. `FileExistsError` if it must not be replaced."""
    import torch

    with new_file(path, replace=overwrite) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch says no more of a full disk
            if "write" not in str(error):
                raise
            raise OSError(errno.EIO, f"cannot write ({str(error).splitlines()[0]})", str(path)) from error
        size: int = file.tell()
    return size


def _inert(value: Any) -> set[str]:
    """The classes of objects in a structure that are not plain data."""
    from modelstore.format.structure import Inert

    found: set[str] = set()
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, Inert):
            found.add(item.kind)
            left += [item.args, item.state, item.items, item.elements]
        elif isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            left += item
    return found
