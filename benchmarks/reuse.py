"""What it costs that a save reads and checks every pack that it refers to: a second version where 1 % changed.

    python benchmarks/reuse.py make FOLDER [--mb 512] [--codec lossless]     a store with one version, and the second one's source
    python benchmarks/reuse.py second FOLDER                                 saves the second version into a copy; prints seconds

To compare two checkouts, run `second` with each in turn (PYTHONPATH names the checkout) and take the ratio pair by pair. The
folder is made once, by either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 2048, 2048


def make(folder: Path, megabytes: int, codec: str) -> None:
    """The store with a first version, and the changed source."""
    import modelstore as ms

    random = torch.Generator().manual_seed(0)
    count = max(2, megabytes * 2**20 // (2 * ROWS * COLUMNS))
    tensors = {f"layers.{i}.weight": torch.randn(ROWS, COLUMNS, generator=random).bfloat16() for i in range(count)}
    save_file(tensors, folder / "first.safetensors")
    ms.open(folder / "store").save("m", folder / "first.safetensors", codec=codec)  # type: ignore[arg-type]
    for i in range(0, count, 100):
        tensors[f"layers.{i}.weight"] += 1
    save_file(tensors, folder / "second.safetensors")
    (folder / "codec").write_text(codec)


def second(folder: Path) -> None:
    """Save the second version into a copy of the store, whose objects are the same files until they are replaced."""
    import modelstore as ms

    copy = folder / f"copy-{os.getpid()}"
    shutil.copytree(folder / "store", copy, copy_function=os.link)
    try:
        store = ms.open(copy)
        began = time.perf_counter()
        saved = store.save("m", folder / "second.safetensors", codec=(folder / "codec").read_text())  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": round(seconds, 3), "stored": saved.stored, "reused": saved.reused}), flush=True)
    finally:
        shutil.rmtree(copy)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "second"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--codec", choices=("lossless", "raw"), default="lossless")
    options = parser.parse_args()
    if options.what == "make":
        options.folder.mkdir(parents=True)
        make(options.folder, options.mb, options.codec)
    else:
        second(options.folder)


if __name__ == "__main__":
    sys.exit(main())
