"""Options of `compress` and its plan that speak of mixes of formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        show_default=False,
        help="Instead of a recipe: find the best mix of formats within this size, such as 120MiB; with --context, "
        "within this memory.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        show_default=False,
        help="With --fit or a bound: find the values of int formats by gptq or imatrix. By default they are rounded.",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="PRESET",
        show_default=False,
        help="With --fit or a bound: a format that layers may get, such as int4. May be given several times. By "
        "default int of 2 to 8 bits.",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        min=0,
        show_default=False,
        help="Instead of a recipe: find the smallest mix of formats that diverges from the original by at most "
        "this per token of --text.",
    ),
]
MaxIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase",
        metavar="SHARE",
        min=0,
        show_default=False,
        help="Instead of a recipe: find the smallest mix of formats that raises perplexity on --text by at most "
        "this share, such as 0.02.",
    ),
]
Judged = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="With --max-kl or --max-perplexity-increase: the text that mixes are judged on, another one than --calibration.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        min=1,
        show_default=False,
        help="With --fit: count bytes as an engine holds them, with the KV cache of so many tokens, activations and logits.",
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        show_default=False,
        help="With --context: sequences at a time, 1 if not given.",
    ),
]
Engine = Annotated[
    Literal["transformers", "vllm", "llama.cpp"] | None,
    typer.Option(
        "--engine",
        show_default=False,
        help="With --fit or a bound: use only formats that this engine runs: transformers, vllm or llama.cpp.",
    ),
]
Device = Annotated[
    Path | None,
    typer.Option(
        "--device",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="With --fit: a device, described in JSON: its bytes, the formats that it runs, and seconds that were measured.",
    ),
]
