"""The memory that a calibration takes, block by block: the peak of the process while each is solved and passed on. Linux.

python benchmarks/calibration_memory.py MODEL --calibration emma.txt [--recipe gptq4] [--samples 24] [--memory 512MiB]

One thread. Imports are in it: the first line says what they take, with the model opened and no weight read.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch

import modelstore as ms
from modelstore.compress.stages import Stages


def status(key: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at most since it was last asked to forget."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def main() -> None:
    """Calibrate, and tell."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("model")
    args.add_argument("--calibration", required=True)
    args.add_argument("--recipe", default="gptq4")
    args.add_argument("--samples", type=int, default=24)
    args.add_argument("--memory", default="512MiB")
    given = args.parse_args()
    torch.set_num_threads(1)
    read = Stages.stored
    peaks: list[int] = []

    def stored(self: Stages, stage: int, *more: object) -> dict[str, torch.Tensor]:
        peaks.append(status("VmHWM"))
        print(f"before block {stage}: peak {peaks[-1]} MiB, now {status('VmRSS')} MiB", flush=True)
        Path("/proc/self/clear_refs").write_text("5")
        return read(self, stage, *more)  # type: ignore[arg-type]

    Stages.stored = stored  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as folder:
        store = ms.open(folder, memory=given.memory)
        store.save("m", given.model)
        text = ms.Calibration(given.calibration, samples=given.samples, length=512)
        store.compress("m", given.recipe, calibration=text)
        print(f"end: peak {max(status('VmHWM'), *peaks[1:])} MiB")


if __name__ == "__main__":
    main()
