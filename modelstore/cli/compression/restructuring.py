"""`restructure` and `plan restructure`: smaller models cut out of a stored one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.compression.compressing import Length, Samples, Seed, Text, calibration_of, plan
from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.options import (
    AsJson,
    Debug,
    Memory,
    Message,
    NewTag,
    Quiet,
    Reference,
    StoreUrl,
    open_store,
    share_of,
)

if TYPE_CHECKING:
    from modelstore.format.answers.restructured import Restructured, RestructurePlan


class LayerMeasure(StrEnum):
    """How layers are compared."""

    kl = "kl"
    influence = "influence"


def amount_of(text: str | float) -> float | int:
    """The value of an option that takes a share such as 0.75 or 75%, or a count such as 24."""
    written = str(text).strip()
    if "%" in written or "." in written:
        return share_of(written)
    try:
        return int(written)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a share such as 0.75 or 75%, nor a count such as 24") from None


def layers_of(text: str | float) -> float | int | Sequence[int]:
    """The same, or numbers such as 0,1,2,5."""
    written = str(text).strip()
    if "," not in written:
        return amount_of(text)
    try:
        return tuple(int(one) for one in written.split(",") if one.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layers' numbers such as 0,1,2,5") from None


Layers = Annotated[
    float | None,  # or what its parser makes
    typer.Option(
        "--layers",
        metavar="AMOUNT",
        parser=layers_of,
        show_default=False,
        help="Layers to keep: a share (0.75), a count (24), or their numbers from 0 (0,1,2,5).",
    ),
]
Mlp = Annotated[
    float | None,
    typer.Option(
        "--mlp",
        metavar="AMOUNT",
        parser=amount_of,
        show_default=False,
        help="Neurons of each MLP to keep: a share, rounded to a multiple of 32, or a count.",
    ),
]
Heads = Annotated[
    float | None,
    typer.Option(
        "--heads",
        metavar="AMOUNT",
        parser=amount_of,
        show_default=False,
        help="Key/value heads of each layer to keep, with the query heads that use them: a share, or a count.",
    ),
]
Compared = Annotated[
    LayerMeasure | None,
    typer.Option(
        "--by",
        show_default=False,
        help="How layers are compared: kl (the divergence of the model without each; default up to 48 layers), or influence "
        "(how little each changes its input).",
    ),
]


def restructure(
    ref: Reference,
    to: Annotated[str, typer.Option("--to", metavar="NAME", show_default=False, help="The smaller model's name.")],
    layers: Layers = None,
    mlp: Mlp = None,
    heads: Heads = None,
    calibration: Text = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    by: Compared = None,
    correct: Annotated[
        bool,
        typer.Option(
            "--correct/--no-correct", help="Solve the weights that read neurons and heads again for those that stay."
        ),
    ] = True,
    tag: NewTag = None,
    message: Message = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Cut a smaller model out of a version: fewer layers, neurons and attention heads.

    It becomes the next version of the model --to, which transformers loads without custom code. Unchanged tensors keep their
    chunks.
    """
    text = calibration_of(calibration, samples, length, seed)
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        done = opened.restructure(
            ref,
            to,
            layers=layers,
            mlp=mlp,
            heads=heads,
            calibration=text,
            by=by.value if by else None,
            correct=correct,
            tag=tag,
            message=message,
            progress=report,
        )
    output.result(done, _done_lines(done), as_json=json)


@plan.command("restructure")
def plan_restructure(
    ref: Reference,
    layers: Layers = None,
    mlp: Mlp = None,
    heads: Heads = None,
    by: Compared = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what restructure would do. No weights are read."""
    opened = open_store(store, memory=memory)
    found = opened.plan_restructure(ref, layers=layers, mlp=mlp, heads=heads, by=by.value if by else None)
    output.result(found, _plan_lines(found), as_json=json)


def _plan_lines(found: RestructurePlan) -> Iterator[str]:
    yield from _counts(found)
    if found.passes:
        how = f", comparing layers by {found.by}" if found.by else ""
        yield f"it needs a text (--calibration), and reads the blocks' weights {units.count(found.passes, 'time')}{how}"
    else:
        yield "it needs no text"


def _done_lines(done: Restructured) -> Iterator[str]:
    saved = done.saved
    yield f"{saved.model}@{saved.version} was cut out of {done.parent} in {units.seconds(done.seconds)}"
    yield from _counts(done)
    for one in done.left_out:
        yield f"left out: layer {one.layer} (loss {one.loss:.4f})"
    yield f"written {units.size(saved.stored)}"


def _counts(found: RestructurePlan | Restructured) -> Iterator[str]:
    named = {
        "layers": found.layers,
        "neurons of each layer": found.neurons,
        "attention heads": found.heads,
        "key/value heads": found.key_heads,
    }
    for what, counts in named.items():
        if counts is not None and counts[0] != counts[1]:
            yield f"{what}: {counts[0]} → {counts[1]}"
    before, after = found.bytes
    yield f"weights: {units.size(before)} → {units.size(after)} ({units.share(after, before)})"
