"""What a mix of formats loses beside one format of its size: KL on another text, with rounded or with solved values.

python benchmarks/fitting.py MODEL --calibration emma.txt --text persuasion.txt [--method gptq] [--averages 2.5 3 3.5]

Mixes of 2, 3, 4 and 8 bits are made to the size of one format for all of so many bits, or to the middle between two such. One
thread. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import modelstore as ms


def uniform(bits: int, group: int, method: str | None) -> dict[str, Any]:
    """One rule for all linear layers."""
    codec = {"name": "int", "params": {"bits": bits, "group_size": group, "method": "mse"}}
    rule = {"targets": ["linear"], "codec": codec} | ({"method": {"name": method}} if method else {})
    return {"name": f"{method or 'clip'}-{bits}", "rules": [rule]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8192)
    parser.add_argument("--method")
    parser.add_argument("--averages", type=float, nargs="*", default=[2.5, 3.0, 3.5])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="modelstore-fitting-") as folder:
        store = ms.open(folder, threads=1)
        store.save("m", args.model)
        rows = store.compare(made(store, args), text=args.text, limit=args.limit, plot=args.plot)
    print("| variant | bytes | bits a weight | KL | perplexity |\n|---|---|---|---|---|")
    for row in rows:
        one = row.measured
        quality = f"{one.kl:.4f} ± {one.kl_error:.4f} | {one.perplexity:.2f}"
        print(f"| {row.variant} | {row.stored} | {row.bits:.2f} | {quality} |")


def made(store: ms.Store, args: argparse.Namespace) -> list[str]:
    """The variants."""
    data = ms.Calibration(args.calibration, samples=args.samples, length=args.length)
    name, given = args.method or "clip", {"calibration": data} if args.method else {}
    sizes, found = {}, []
    for bits in sorted({int(end) for average in args.averages for end in (average, average + 0.5)}):
        done = store.compress("m", uniform(bits, args.group, args.method), **given)
        sizes[bits] = done.variants[0].stored
        found.append(f"m:{name}-{bits}")
    begin = time.process_time()
    store.plan_fit("m", max(sizes.values()), method=args.method, calibration=data, measure=True)
    print(f"measured in {time.process_time() - begin:.1f} processor seconds")
    for average in args.averages:
        size = (sizes[int(average)] + sizes[int(average + 0.5)]) // 2
        plan = store.plan_fit("m", size, method=args.method, calibration=data)
        print(
            f"{average}: expected {plan.cost:.4f}, bits {' '.join(str(g.params.get('bits', '-')) for g in plan.groups)}"
        )
        store.compress("m", fit=size, method=args.method, calibration=data, variant=f"{name}-mix{average}")
        found.append(f"m:{name}-mix{average}")
    return found


if __name__ == "__main__":
    main()
