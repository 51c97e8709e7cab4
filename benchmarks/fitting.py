"""What a mix of formats loses beside one format of its size: KL on another text, with rounded and with solved values.

python benchmarks/fitting.py MODEL --calibration emma.txt --text persuasion.txt [--group 128] [--plot front.svg]

Uniform variants of 2, 3 and 4 bits (least-error clip, and GPTQ) give the sizes; mixes are made of 2, 3, 4 and 8 bits to
the size of 3 bits, and to the middle between 2 and 3, and 3 and 4. One thread. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import modelstore as ms

BITS = (2, 3, 4)


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
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = ms.Calibration(args.calibration, samples=args.samples, length=args.length)
    with tempfile.TemporaryDirectory(prefix="modelstore-fitting-") as folder:
        store = ms.open(folder, threads=1)
        store.save("m", args.model)
        made = []
        for method in (None, "gptq"):
            given = {"calibration": data} if method else {}
            sizes = {}
            for bits in BITS:
                done = store.compress("m", uniform(bits, args.group, method), **given)
                sizes[bits] = done.variants[0].stored
                made.append(done.variants[0].variant)
            begin = time.process_time()
            store.plan_fit("m", sizes[3], method=method, calibration=data, measure=True)
            print(f"measuring, {method or 'clip'}: {time.process_time() - begin:.1f} processor seconds")
            budgets = {"2.5": (sizes[2] + sizes[3]) // 2, "3.0": sizes[3], "3.5": (sizes[3] + sizes[4]) // 2}
            for name, size in budgets.items():
                plan = store.plan_fit("m", size, method=method, calibration=data)
                done = store.compress(
                    "m", fit=size, method=method, calibration=data, variant=f"{method or 'clip'}-mix{name}"
                )
                made.append(done.variants[0].variant)
                print(
                    f"{made[-1]}: expected {plan.cost:.4f}, {''.join(str(g.params.get('bits', '-')) for g in plan.groups)}"
                )
        rows = store.compare([f"m:{name}" for name in made], text=args.text, limit=args.limit, plot=args.plot)
        print("| variant | bytes | bits a weight | KL | perplexity |\n|---|---|---|---|---|")
        for row in rows:
            one = row.measured
            print(
                f"| {row.variant} | {row.stored} | {row.bits:.2f} | {one.kl:.4f} ± {one.kl_error:.4f} | {one.perplexity:.2f} |"
            )


if __name__ == "__main__":
    main()
