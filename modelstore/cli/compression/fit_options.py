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
        help="Instead of a recipe: the most bytes, such as 120MiB: as stored, or with --context in memory. A mix of formats.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        show_default=False,
        help="With --fit or a bound: how values are found: gptq or imatrix, for int. Rounded if not given.",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="PRESET",
        show_default=False,
        help="With --fit or a bound: a format that layers may get, such as int4. Several times. Int of 2 to 8 bits else.",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        min=0,
        show_default=False,
        help="Instead of a recipe: the most it may diverge from the original, a token, on --text. The smallest such mix.",
    ),
]
MaxIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase",
        metavar="SHARE",
        min=0,
        show_default=False,
        help="Instead of a recipe: the share by which its perplexity on --text may grow, such as 0.02. The smallest such mix.",
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
