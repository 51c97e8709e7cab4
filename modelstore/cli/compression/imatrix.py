"""`imatrix`: how much each column of a model is used on a text, for `llama-quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelstore.cli.compression.compressing import Length, Samples, Seed, calibration_of
from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.options import AsJson, Debug, Memory, Overwrite, Quiet, Reference, StoreUrl, open_store


def imatrix(
    ref: Reference,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="The file to write; it ends in .gguf.")
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            "--calibration",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="The text, in UTF-8, on which the model is watched.",
        ),
    ],
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    store: StoreUrl = None,
    memory: Memory = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write llama.cpp's imatrix file: how much each column of a model's matrices is used on a text.

    llama-quantize --imatrix FILE weighs its rounding by it, also for types that export does not write, such as Q4_K_M. The
    model runs block by block, within --memory.
    """
    text = calibration_of(calibration, samples, length, seed)
    assert text is not None, "a text is given"
    opened = open_store(store, memory=memory)
    with output.progress(quiet=quiet) as report:
        done = opened.imatrix(ref, path, calibration=text, overwrite=overwrite, progress=report)
    line = f"wrote {units.size(done.bytes)} to {done.path} in {units.seconds(done.seconds)}"
    output.result(done, [line], as_json=json)
