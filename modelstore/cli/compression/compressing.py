"""`compress`, `plan compress` and `presets`: compressed variants of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli.compression import fitting
from modelstore.cli.compression.fit_options import (
    Batch,
    Context,
    Device,
    Engine,
    Fit,
    Formats,
    Judged,
    MaxIncrease,
    MaxKl,
    Method,
)
from modelstore.cli.terminal import output, swapped, units
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import AsJson, Cluster, Debug, Memory, Quiet, Reference, StoreUrl, open_store
from modelstore.paths import explained, read_named

_LARGEST = 16 << 20  # bytes of a recipe

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration
    from modelstore.client import Store
    from modelstore.format.answers.looks import Looks
    from modelstore.format.answers.results import CompressionPlan

Recipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        show_default=False,
        help="A preset, such as int8 or int4 ('modelstore presets' lists them), or a recipe's .json file. Or: --fit, --max-kl.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="TARGET",
        show_default=False,
        help="Compress these too: a kind (embedding, head, router, norm, bias), or a pattern of names. Several times.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="TARGET",
        show_default=False,
        help="Keep these as they are: a kind, or a pattern of names such as 'model.layers.0.*'. Several times.",
    ),
]
Codes = Annotated[
    str | None,
    typer.Option(
        "--codes",
        metavar="DIR",
        show_default=False,
        help="For ladder: int4 codes of GPTQ or the like, a directory of compressed-tensors, GPTQ or AWQ, or a stored variant.",
    ),
]

Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize",
        help="Compress a checkpoint that is quantized already (float8 with scales, mxfp4) from its dequantized values.",
    ),
]

Text = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="The text, in UTF-8, that a recipe such as gptq4 looks at, and on which --fit measures what formats cost.",
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", metavar="N", min=1, help="Windows that are cut out of the calibration's text.")
]
Length = Annotated[int, typer.Option("--length", metavar="TOKENS", min=2, help="Tokens of such a window.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Draws where the windows lie.")]

plan = typer.Typer(name="plan", help="Print what a command would do, and do nothing.", no_args_is_help=True)


def compress(
    ref: Reference,
    recipe: Recipe = None,
    fit: Fit = None,
    max_kl: MaxKl = None,
    max_perplexity_increase: MaxIncrease = None,
    judged: Judged = None,
    method: Method = None,
    formats: Formats = None,
    context: Context = None,
    batch: Batch = None,
    engine: Engine = None,
    device: Device = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant", metavar="NAME", show_default=False, help="The variant's name: the recipe's if not given."
        ),
    ] = None,
    codes: Codes = None,
    include: Include = None,
    skip: Skip = None,
    requantize: Requantize = False,
    calibration: Text = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    store: StoreUrl = None,
    memory: Memory = None,
    cluster: Cluster = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a compressed variant of a version.

    The original stays exact. A compression that was interrupted goes on when it is started again.
    """
    text = calibration_of(calibration, samples, length, seed)
    opened = open_store(store, memory=memory, cluster=cluster)
    with output.progress(quiet=quiet) as report, _told_apart(opened, "compress", ref, recipe):
        done = opened.compress(
            ref,
            _recipe(recipe),
            fit=fit,
            max_kl=max_kl,
            max_perplexity_increase=max_perplexity_increase,
            text=judged,
            method=method,
            formats=formats or (),
            context=context,
            batch=batch,
            engine=engine,
            device=device,
            variant=variant,
            codes=codes,
            include=include or (),
            skip=skip or (),
            requantize=requantize,
            calibration=text,
            progress=report,
        )

    def lines() -> Iterator[str]:
        yield (
            f"compressed {units.count(done.compressed, 'tensor')} of {done.model}@{done.version} "
            f"({units.size(done.bytes)}) in {units.seconds(done.seconds)}, kept {done.kept} as they are"
        )
        for made in done.variants:
            loss = done.metrics.get(made.variant, {}).get("sqnr")
            quality = f", error {loss} dB below the signal" if loss is not None else ""
            yield (
                f"{made.variant}: {units.size(made.stored)} ({units.share(made.stored, made.bytes)} of "
                f"{units.size(made.bytes)}){quality}"
            )
        yield f"written {units.size(done.stored)}"
        for variant, metrics in done.metrics.items():
            for name, why in metrics.get("data_free", {}).items():
                yield f"without data: {name}, since {why}"
            for name, count in metrics.get("nonfinite", {}).items():
                yield f"warning: {name} has {units.count(count, 'value')} that are not finite; see docs on {variant}"

    output.result(done, lines(), as_json=json)


@plan.command("compress")
def plan_compress(
    ref: Reference,
    recipe: Recipe = None,
    fit: Fit = None,
    method: Method = None,
    formats: Formats = None,
    context: Context = None,
    batch: Batch = None,
    engine: Engine = None,
    device: Device = None,
    codes: Codes = None,
    include: Include = None,
    skip: Skip = None,
    requantize: Requantize = False,
    calibration: Text = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="With --fit: measure now what formats cost, and keep that with the original."),
    ] = False,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print what compress would do, tensor by tensor.

    No weights are read, unless --measure is given. For a recipe that looks at data, it says what is run, how much waits
    between blocks, and which tensors are left without data.
    """
    text = calibration_of(calibration, samples, length, seed)
    opened = open_store(store, memory=memory)
    also: dict[str, Any] = {"include": include or (), "skip": skip or ()}
    if fit is not None:
        if recipe is not None or codes is not None or requantize:
            raise usage("--fit chooses formats itself: leave out RECIPE, --codes and --requantize")
        with output.progress(quiet=quiet) as report:
            fitted = opened.plan_fit(
                ref,
                fit,
                method=method,
                formats=formats or (),
                context=context,
                batch=batch,
                engine=engine,
                device=device,
                calibration=text,
                measure=measure,
                progress=report,
                **also,
            )
        output.result(fitted, fitting.lines(fitted), as_json=json)
        return
    if recipe is None:
        raise usage("say what is to be made: a RECIPE such as int4, or --fit SIZE")
    if method is not None or formats or measure or any(one is not None for one in (context, batch, engine, device)):
        raise usage(
            "--method, --format, --context, --batch, --engine, --device and --measure are for --fit: a recipe says itself what "
            "becomes of each tensor"
        )
    with _told_apart(opened, "plan compress", ref, recipe):
        found = opened.plan_compression(
            ref, _named(recipe), codes=codes, requantize=requantize, calibration=text, **also
        )
    output.result(found, _plan_lines(found), as_json=json)


def presets(json: AsJson = False, debug: Debug = False) -> None:
    """List the recipes that have names."""
    import modelstore as ms

    known = ms.presets()
    rows = [(name, recipe.description) for name, recipe in known.items()]
    output.result(known, output.table(rows, ("PRESET", "WHAT IT DOES")), as_json=json)


def _plan_lines(found: CompressionPlan) -> Iterator[str]:
    rows = [
        (
            choice.name,
            choice.kind,
            "×".join(map(str, choice.shape)) or "scalar",
            _codec(choice.codec.name, choice.codec.params) if choice.codec else "kept",
            units.size(choice.bytes),
            units.size(choice.stored),
            units.size(choice.expected),
            choice.reason,
        )
        for choice in found.choices
    ]
    heads = ("TENSOR", "KIND", "SHAPE", "CODEC", "SIZE", "STORED NOW", "THEN", "WHY")
    yield from output.table(rows, heads, right=(4, 5, 6))
    yield (
        f"{len(found.compressed)} of {units.count(len(found.choices), 'tensor')} would be compressed: "
        f"{units.size(found.bytes)}, stored in {units.size(found.stored)} now, in about {units.size(found.expected)} then"
    )
    if found.requantized:
        yield (
            f"the checkpoint is quantized by {found.requantized}: it is compressed from its dequantized values, and the errors "
            "of both add up"
        )
    if found.looks is not None:
        yield from _looks_lines(found.looks)


def _looks_lines(looks: Looks) -> Iterator[str]:
    yield (
        f"it looks at {units.count(looks.samples, 'sample')} of {looks.length} tokens: {looks.passes} passes through each of "
        f"{units.count(looks.blocks, 'block')}, with up to {units.size(looks.spool)} of activations between them; "
        f"{units.count(looks.solved, 'tensor')} are found so"
    )
    for name, why in looks.data_free.items():
        yield f"without data: {name}, since {why}"


def calibration_of(text: Path | None, samples: int, length: int, seed: int) -> Calibration | None:
    """A text, and how it is cut."""
    import modelstore as ms

    if text is None and (samples, length, seed) != (128, 512, 0):
        raise usage("--samples, --length and --seed say how a text is cut: give it with --calibration FILE")
    return ms.Calibration(text, samples, length, seed) if text is not None else None


def _told_apart(opened: Store, command: str, ref: str, text: str | None) -> AbstractContextManager[None]:
    import modelstore as ms

    if text is None:
        return nullcontext()

    def names_recipe(one: str) -> bool:
        return one.endswith(".json") or one in ms.presets()

    return swapped.told(opened, command, (ref, text), ("REF", "RECIPE"), second=names_recipe)


def _codec(name: str, params: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in params.items())])


def _recipe(text: str | None) -> str | dict[str, Any] | None:
    return None if text is None else _named(text)


def _named(text: str) -> str | dict[str, Any]:
    """The preset's name as it is, or what a file of JSON holds."""
    if not text.endswith(".json"):
        return text
    import msgspec

    from modelstore.format.recipe import recipe

    try:
        found = msgspec.json.decode(read_named(text, _LARGEST))
    except FileNotFoundError:
        raise usage(f"there is no file {text}") from None
    except OSError as error:
        raise usage(f"{text} cannot be read: {explained(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise usage(f"{text} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise usage(f"{text} holds no recipe: write an object with name and rules")
    try:
        recipe(found)
    except ValueError as error:
        raise usage(f"{text}: {error}") from None
    return found
