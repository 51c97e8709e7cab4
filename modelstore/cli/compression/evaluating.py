"""`eval`: what variants of a language model predict, beside their size; and the picture that `show --plot` draws of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.terminal import complete, output, units
from modelstore.cli.terminal.options import AsJson, Context, Debug, Limit, Memory, Quiet, StoreUrl, open_store

if TYPE_CHECKING:
    from modelstore.format.answers.results import Measured, Quality
    from modelstore.search.picture import Chart

_HEADS = ("VARIANT", "STORED", "BITS/WEIGHT", "SQNR")
HEADS = {  # of what is measured, by the task of the model
    "tokens": ("PERPLEXITY", "KL", "TOP-1"),
    "vectors": ("COSINE", "NEIGHBOURS"),
    "classes": ("ACCURACY", "KL", "TOP-1"),
}
_ORIGINALS = {"tokens": ("ORIGINAL'S PERPLEXITY",), "vectors": (), "classes": ("ORIGINAL'S ACCURACY",)}


def evaluate(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            autocompletion=complete.references,
            show_default=False,
            help="NAME[@VERSION-OR-TAG][:VARIANT]; several variants of one version are compared with one run of the original.",
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="The text to predict, in UTF-8: one that the model was not trained on. Give it again for several texts.",
        ),
    ],
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline", help="Run the original too, and measure how far from it the variants are."
        ),
    ] = True,
    context: Context = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="TOKENS",
            min=1,
            show_default=False,
            help="From one window's start to the next one's: the context if not given.",
        ),
    ] = None,
    limit: Limit = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, show_default=False, help="Windows that are run together."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="The device that the model runs on, such as cuda.")
    ] = "cpu",
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep what is found with the variant.")] = True,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what variants of a model lose on a text.

    For a language model: perplexity, and against the original KL divergence (nats a token) and how often both think the same
    token likeliest, with standard errors over windows. For an encoder: the cosine of its vectors of the text's paragraphs with
    the original's, and how many of the ten nearest paragraphs stay. For a classifier: how often it agrees with the original, and
    how often it is right where the text is a .jsonl file of {"text": …, "label": …}. The arithmetic is float32. A language
    model that does not fit into half of --memory is run block by block, with the same result. Results that were measured
    before are not computed again.
    """
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        found = opened.eval(
            refs,
            text=[*text],
            context=context,
            stride=stride,
            limit=limit,
            baseline=baseline,
            keep=keep,
            batch=batch,
            device=device,
            progress=report,
        )

    def lines() -> Iterator[str]:
        for at in range(0, len(found), len(refs)):
            mine = found[at : at + len(refs)]
            task = mine[0].measured.task
            rows = [
                (f"{e.model}@{e.version}:{e.variant}", *measures(e.measured, task), *_original(e.measured))
                for e in mine
            ]
            heads = ("VARIANT", *HEADS[task], *_ORIGINALS[task])
            yield from output.table(rows, heads, right=range(1, len(heads)))
            known = "known before, " if all(e.known for e in mine) else ""
            yield f"{of_text(mine[0].measured)}: {known}{units.seconds(mine[0].seconds)}"

    output.result(found, lines(), as_json=json)


def table(found: Sequence[Quality]) -> Iterator[str]:
    """Lines of a table of variants: their sizes and what they are worth."""
    task = task_of(one.measured for one in found)
    rows = [
        (
            one.variant,
            units.size(one.stored),
            f"{one.bits:.2f}",
            f"{one.sqnr:.1f} dB" if one.sqnr is not None else "–",
            *measures(one.measured, task),
        )
        for one in found
    ]
    heads = (*_HEADS, *HEADS[task])
    yield from output.table(rows, heads, right=range(1, len(heads)))
    measured = next((one.measured for one in found if one.measured), None)
    if measured:
        yield f"evaluated on {of_text(measured)}"


def task_of(found: Iterable[Measured | None]) -> str:
    """The task that models were measured at; "tokens" if none was measured."""
    return next((one.task for one in found if one is not None), "tokens")


def of_text(measured: Measured) -> str:
    """The text that was predicted, or read in passages, and its settings."""
    if measured.task != "tokens":
        passages = units.count(measured.predicted, "passage")
        return f"{measured.text}, {passages} of at most {measured.context} tokens, {measured.dtype}"
    stride = f", stride {measured.stride}" if measured.stride != measured.context else ""
    return f"{measured.text}, {units.count(measured.tokens, 'token')} in windows of {measured.context}{stride}, {measured.dtype}"


def chart(found: Sequence[Quality], title: str) -> Chart:
    """Quality over bytes of a version's variants: their perplexity where it was measured, else their SQNR."""
    from modelstore.errors import UnsupportedError
    from modelstore.search.picture import Chart, Point

    perplexities = [(one, one.measured.perplexity) for one in found if one.measured and one.measured.perplexity]
    ratios = [(one, one.sqnr) for one in found if one.sqnr is not None]
    points = tuple(
        Point(one.stored, value, one.variant, f"{title}:{one.variant}") for one, value in perplexities or ratios
    )
    if not points:
        raise UnsupportedError(
            f"nothing was measured of {title} yet: compress it, or evaluate it with 'modelstore eval {title} --text FILE'"
        )
    measured = perplexities[0][0].measured if perplexities else None
    if measured is None:
        return Chart(title, "SQNR in dB, higher is better", points)
    values = [point.value for point in points]
    return Chart(f"{title}: {of_text(measured)}", "perplexity, lower is better", points, max(values) > 4 * min(values))


def measures(measured: Measured | None, task: str) -> tuple[str, ...]:
    """The measured values as cells, in the order of `HEADS` of the task."""
    if measured is None:
        return ("–",) * len(HEADS[task])
    if task == "vectors":
        return _number(measured.cosine, 5, measured.cosine_error), _percent(measured.neighbours)
    first = _percent(measured.accuracy)
    if task == "tokens":
        first = _number(measured.perplexity, 3, measured.perplexity_error)
    return first, _number(measured.kl, 5, measured.kl_error if measured.kl else None), _percent(measured.top1)


def _original(measured: Measured) -> tuple[str, ...]:
    """The values of the original as cells, in the order of `_ORIGINALS` of the task."""
    if measured.task == "vectors":
        return ()
    return (
        _percent(measured.baseline_accuracy)
        if measured.task == "classes"
        else _number(measured.baseline_perplexity, 3),
    )


def _percent(share: float | None) -> str:
    return f"{100 * share:.1f} %" if share is not None else "–"


def _number(value: float | None, digits: int, error: float | None = None) -> str:
    """A number, with its standard error where that is known."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
