"""What calibrated variants cost and lose beside those that look at the weights alone: perplexity and KL on another text.

python benchmarks/calibration.py MODEL --calibration emma.txt --text persuasion.txt [--bits 4 3 2] [--group 64]

Each bit width is made by GPTQ, by the least-error clip (`mse`) and by plain rounding (`minmax`), in groups, embeddings and heads
kept. One thread. Seconds are those of the processor for the whole of `compress`; imports and compiling come before.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import modelstore as ms

WAYS = ("gptq", "mse", "minmax")


def recipe(bits: int, group: int, way: str) -> dict[str, Any]:
    """One rule for all linear layers."""
    params = {"bits": bits, "group_size": group, "method": "mse" if way == "gptq" else way}
    rule: dict[str, Any] = {"targets": ["linear"], "codec": {"name": "int", "params": params}}
    return {"name": f"{way}{bits}", "rules": [rule | ({"method": {"name": "gptq"}} if way == "gptq" else {})]}


def measure(args: argparse.Namespace, folder: str) -> list[str]:
    """The rows of the table."""
    store = ms.open(folder, threads=1)
    store.save("m", args.model)
    data = ms.Calibration(args.calibration, samples=args.samples, length=args.length)
    first = ms.Calibration(args.calibration, samples=1, length=32)
    for way in WAYS:  # what is compiled and imported
        made = recipe(8, args.group, way) | {"name": f"first-{way}"}
        store.compress("m", made, **({"calibration": first} if way == "gptq" else {}))
    rows = []
    for bits in args.bits:
        for way in WAYS:
            begin = time.process_time()
            store.compress("m", recipe(bits, args.group, way), **({"calibration": data} if way == "gptq" else {}))
            seconds = time.process_time() - begin
            (found,) = store.eval([f"m:{way}{bits}"], text=args.text, limit=args.limit)
            one = found.measured
            quality = f"{one.perplexity:.2f} ± {one.perplexity_error:.2f} | {one.kl:.4f} ± {one.kl_error:.4f}"
            rows.append(f"| {bits} | {way} | {quality} | {seconds:.1f} |")
    rows.append(f"\noriginal: perplexity {one.baseline_perplexity:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="modelstore-calibration-") as folder:
        print("| bits | how | perplexity | KL | processor s |\n|---|---|---|---|---|")
        print("\n".join(measure(args, folder)))
    print(f"peak RSS with evaluation: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
