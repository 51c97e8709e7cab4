"""`distill` and `plan distill`: students that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.compression.compressing import Seed, plan
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
)

if TYPE_CHECKING:
    from modelstore.format.answers.distilled import Distilled, DistillPlan


class Precision(StrEnum):
    """How products are computed."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="PATH",
        show_default=False,
        help="A text to train on, or a folder of them: .txt, .md, .jsonl, .parquet. Several times.",
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="REF",
        show_default=False,
        help="The model to learn from, of the same vocabulary. Without one the student learns the text alone.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of the optimizer.")]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="WHAT",
        show_default=False,
        help="mask: weights that are 0 stay 0. A preset of codes, such as int4: train the model as it is when stored so.",
    ),
]
HeldOut = Annotated[
    list[Path] | None,
    typer.Option(
        "--held-out",
        metavar="PATH",
        show_default=False,
        help="Texts to judge by, of another source than the data. Without one, a part of the data. Several times.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=2, help="Tokens of a step.")]
Length = Annotated[int, typer.Option("--length", metavar="TOKENS", min=2, help="Tokens of a window.")]


def distill(
    ref: Reference,
    data: Data,
    teacher: Teacher = None,
    steps: Steps = 500,
    keep: Keep = None,
    held_out: HeldOut = None,
    tokens: Tokens = 1024,
    length: Length = 256,
    rate: Annotated[float, typer.Option("--rate", metavar="RATE", help="The highest learning rate.")] = 3e-4,
    ce: Annotated[
        float,
        typer.Option("--ce", metavar="WEIGHT", min=0, help="The weight of the cross entropy beside the divergence."),
    ] = 0.0,
    dtype: Annotated[
        Precision, typer.Option("--dtype", help="How products are computed; weights stay float32.")
    ] = Precision.float32,
    seed: Seed = 0,
    checkpoint: Annotated[
        int, typer.Option("--checkpoint", metavar="STEPS", min=1, help="How often the state of the training is stored.")
    ] = 50,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where it is computed: cpu, cuda:0.")
    ] = "cpu",
    tag: NewTag = None,
    message: Message = None,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model, the student, to predict as a teacher does.

    The result is the student's next version. A training that was interrupted goes on when it is started again.
    """
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        done = opened.distill(
            ref,
            list(data),
            teacher=teacher,
            steps=steps,
            keep=keep,
            held_out=list(held_out) if held_out else None,
            tokens=tokens,
            length=length,
            rate=rate,
            ce=ce,
            dtype=dtype.value,
            seed=seed,
            checkpoint=checkpoint,
            device=device,
            tag=tag,
            message=message,
            progress=report,
        )
    output.result(done, _done_lines(done), as_json=json)


@plan.command("distill")
def plan_distill(
    ref: Reference,
    data: Data,
    teacher: Teacher = None,
    steps: Steps = 500,
    keep: Keep = None,
    held_out: HeldOut = None,
    tokens: Tokens = 1024,
    length: Length = 256,
    seed: Seed = 0,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what distill would do. No weights are read."""
    opened = open_store(store, memory=memory)
    found = opened.plan_distill(
        ref,
        list(data),
        teacher=teacher,
        steps=steps,
        keep=keep,
        held_out=list(held_out) if held_out else None,
        tokens=tokens,
        length=length,
        seed=seed,
    )
    output.result(found, _plan_lines(found), as_json=json)


def _plan_lines(found: DistillPlan) -> Iterator[str]:
    how = f"to predict as {found.teacher} does" if found.teacher else "on the text alone"
    yield f"{found.parameters:,} numbers of {found.model}@{found.version} would be trained {how}, in {units.size(found.memory)}"
    yield f"{found.steps:,} steps look at {found.tokens:,} tokens; the data has {found.data:,}, and {found.held_out:,} held out"
    if found.kept:
        yield f"{units.count(len(found.kept), 'weight')} would stay {found.keep}"
    elif found.keep:
        yield "weights that are 0 would stay 0"
    yield from found.remarks


def _done_lines(done: Distilled) -> Iterator[str]:
    saved, first = done.saved, done.curve[0]
    best = next(one for one in done.curve if one.step == done.best)
    of = f" from {done.teacher}" if done.teacher else ""
    yield f"{saved.model}@{saved.version} was trained{of}, and has the weights of step {done.best}"
    if done.variant:
        yield f"variant {done.variant} has the codes of that step"
    if first.kl is not None and best.kl is not None:
        yield f"held-out divergence: {first.kl:.4f} → {best.kl:.4f} nats a token"
    yield f"held-out cross entropy: {first.ce:.4f} → {best.ce:.4f} nats a token"
    if done.skipped:
        yield f"{units.count(done.skipped, 'step')} overflowed and had no effect"
    if done.stopped:
        yield f"stopped early: {done.stopped}"
    yield f"written {units.size(saved.stored)} in {units.seconds(done.seconds)}"
