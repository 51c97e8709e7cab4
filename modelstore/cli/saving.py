"""`save`: a model into the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import complete, output, units
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import (
    AsJson,
    Cluster,
    Debug,
    Memory,
    ModelName,
    NewTag,
    Quiet,
    StoreUrl,
    lasting,
    open_store,
)
from modelstore.format.names import is_model
from modelstore.paths import from_home
from modelstore.sources.checkpoints.checkpoint import BESIDE

if TYPE_CHECKING:
    from modelstore.format.answers.results import LeftOut, Saved

_SHOWN = 8  # entries that were left out


class StorageCodec(StrEnum):
    """How an original is stored: all give back every bit."""

    lossless = "lossless"
    packed = "packed"
    raw = "raw"
    delta = "delta"


class Ack(StrEnum):
    """When a save is done."""

    storage = "storage"
    memory = "memory"


class Include(StrEnum):
    """The parts of a checkpoint that can be saved."""

    model = "model"
    all = "all"


class Gguf(StrEnum):
    """How a GGUF file is saved."""

    dequantize = "dequantize"
    blocks = "blocks"


class GridOption(StrEnum):
    """How tensors are cut into chunks."""

    auto = "auto"
    whole = "whole"


def save(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, a model of the Hub (hf://ORG/NAME[@REVISION]), a .safetensors or GGUF file, "
            "or a checkpoint file or folder of PyTorch or Zarr.",
            show_default=False,
        ),
    ],
    name: ModelName,
    tag: NewTag = None,
    parent: Annotated[
        str | None,
        typer.Option(
            "--parent",
            metavar="REF",
            autocompletion=complete.references,
            show_default=False,
            help="Reuse the chunks of this version too, besides those of NAME's newest. "
            "With --codec delta, store the difference to it. auto: find the nearest version in the store.",
        ),
    ] = None,
    codec: Annotated[
        StorageCodec,
        typer.Option(
            "--codec",
            help="lossless: exact and smallest. packed: exact, loaded soonest. raw: the bytes as they are. "
            "delta: exact, as the difference to --parent.",
        ),
    ] = StorageCodec.lossless,
    grid: Annotated[
        GridOption,
        typer.Option(
            "--grid",
            help="auto: cut tensors so that slices read little. whole: each tensor in one piece, with --codec raw.",
        ),
    ] = GridOption.auto,
    include: Annotated[
        Include,
        typer.Option(
            "--include",
            help="model: the weights alone. all: of a training checkpoint also the optimizer's state and every plain value.",
        ),
    ] = Include.model,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            show_default=False,
            help="Which dict of a checkpoint is the model, where it has several: keys joined by dots.",
        ),
    ] = None,
    gguf: Annotated[
        Gguf | None,
        typer.Option(
            "--gguf",
            show_default=False,
            help="For a GGUF file, dequantize: the numbers (default). blocks: its blocks as they are, to be exported again.",
        ),
    ] = None,
    ack: Annotated[
        Ack,
        typer.Option(
            "--ack",
            help="storage: done when it is there. memory, with --cluster: when two nodes have it, which store it then.",
        ),
    ] = Ack.storage,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", show_default=False, help="A description; log shows it."),
    ] = None,
    meta: Annotated[
        list[str] | None,
        typer.Option(
            "--meta", metavar="KEY=VALUE", show_default=False, help="An entry to keep with it; repeat for more."
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--files",
            metavar="NAME=FILE",
            show_default=False,
            help="A file to keep beside the weights, such as tokenizer.json=path/to/it, also instead of one that SOURCE has; "
            "repeat for more.",
        ),
    ] = None,
    cluster: Cluster = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Save a model as the next version of NAME.

    Only what the store does not hold yet is written. A save that was interrupted goes on when it is started again.
    """
    from modelstore.sources.hub import hub_id

    there = from_home(source).exists()
    if not there and is_model(source) and not is_model(name) and from_home(name).exists():
        raise usage(f"SOURCE and NAME are swapped: write modelstore save {name} {source}")
    if hub_id(source) is None and not there:
        raise usage(f"there is no file or folder {source}: give what is to be saved, then the model's name")
    entries, beside = _entries("--meta", "KEY=VALUE", meta or ()), _entries("--files", "NAME=FILE", files or ())
    lasting(store)
    opened = open_store(store, memory=memory, cluster=cluster)
    with output.progress(quiet=quiet) as report:
        saved = opened.save(
            name,
            source,
            codec=codec.value,
            grid=grid.value,
            tag=tag,
            parent=parent,
            include=include.value,
            key=key,
            gguf=gguf.value if gguf else None,
            ack=ack.value,
            message=message,
            meta=entries,
            files=beside,
            progress=report,
        )
    what = f"saved {saved.model}@{saved.version}" if saved.durable else f"two nodes have {saved.model}, and store it"
    size = f"{units.count(saved.tensors, 'tensor')}, {units.size(saved.bytes)}"
    lines = [f"{what}: {size} in {units.seconds(saved.seconds)}"]
    if not quiet:
        lines += _remarks(saved)
    output.result(saved, lines, as_json=json)


def _remarks(saved: Saved) -> Iterator[str]:
    written = f"{units.size(saved.stored)} ({units.share(saved.stored, saved.bytes)} of the model)"
    yield f"written {written}, already there {units.size(saved.reused)}"
    if saved.left_out:
        yield f"not saved: {_named(saved.left_out)}"
    yield from saved.remarks
    if any(item.why == BESIDE for item in saved.left_out):
        yield "--include all keeps what lies beside a state dict"


def _entries(option: str, form: str, texts: Sequence[str]) -> dict[str, str]:
    """The values of a repeated option, by name."""
    entries: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
        if key in entries:
            raise typer.BadParameter(f"{key!r} is given twice: give it once", param_hint=option)
        entries[key] = value
    return entries


def _named(left_out: Sequence[LeftOut]) -> str:
    """The entries that were left out, by reason; the rest is counted."""
    largest = sorted(left_out, key=lambda one: -one.bytes)[:_SHOWN]
    shown = [f"{one.name} ({one.why}{f', {units.size(one.bytes)}' if one.bytes else ''})" for one in largest]
    more = len(left_out) - len(shown)
    return ", ".join(shown) + (f" and {more} more (--json names all)" if more else "")
