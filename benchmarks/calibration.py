"""What calibrated variants cost and lose beside those that look at the weights alone: perplexity and KL on another text.

python benchmarks/calibration.py MODEL --calibration emma.txt --text persuasion.txt [--bits 4 3 2] [--group 64] [--only NAME …]

Each bit width is made by GPTQ, by AWQ, by a clip weighted by what comes through each column (`imatrix`), the least-error clip
(`mse`) and by plain rounding (`minmax`), in groups; half of the weights, and two of every four, are pruned by magnitude, by
Wanda, by SparseGPT, and by that with reconstruction; factors of half the numbers are those of the weights, and of SVD-LLM.
Embeddings and heads are kept. One thread. Seconds are those of the processor for the whole of `compress`; imports and compiling
come before. `--only`: rows whose names hold one of these words.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import modelstore as ms


class Row(NamedTuple):
    """What is stored, how it is found, and by which codec and method."""

    what: str
    how: str
    codec: dict[str, Any]
    method: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The variant's."""
        return f"{self.how}-{self.what}".replace(" ", "-").replace("%", "percent").replace("+", "and")

    @property
    def recipe(self) -> dict[str, Any]:
        """One rule for all linear layers."""
        rule = {"targets": ["linear"], "codec": self.codec, "method": self.method}
        return {"name": self.name, "rules": [rule]}


def rounded(bits: int, group: int) -> list[Row]:
    """Codes of so many bits."""
    codec = {"name": "int", "params": {"bits": bits, "group_size": group, "method": "mse"}}
    plain = {"name": "int", "params": {"bits": bits, "group_size": group, "method": "minmax"}}
    what = f"{bits} bits"
    return [
        Row(what, "gptq", codec, {"name": "gptq"}),
        Row(what, "awq", codec, {"name": "awq"}),
        Row(what, "imatrix", codec, {"name": "imatrix"}),
        Row(what, "mse", codec, None),
        Row(what, "minmax", plain, None),
    ]


def pruned(what: str, pattern: dict[str, Any], rows: dict[str, Any]) -> list[Row]:
    """Weights that are left; `rows`: the pattern of what looks at each row."""
    each, whole = {"name": "sparse", "params": rows}, {"name": "sparse", "params": pattern}
    again = {"name": "sparsegpt", "params": {"reconstruct": True}}
    return [
        Row(what, "magnitude", each, None),
        Row(what, "wanda", each, {"name": "wanda"}),
        Row(what, "sparsegpt", whole, {"name": "sparsegpt"}),
        Row(what, "sparsegpt + reconstruction", whole, again),
    ]


def every(bits: list[int], group: int) -> list[Row]:
    """All rows of the table."""
    half, of_four, thin = {"sparsity": 0.5}, {"n": 2, "m": 4}, {"name": "lowrank", "params": {"ratio": 0.5}}
    found = [row for one in bits for row in rounded(one, group)]
    found += pruned("50 %", half, half | {"scope": "row"}) + pruned("2 of 4", of_four, of_four)
    return [*found, Row("half rank", "svd", thin, None), Row("half rank", "svd-llm", thin, {"name": "svd-llm"})]


def measure(args: argparse.Namespace, folder: str) -> None:
    """Print the rows of the table, each as it is there."""
    store = ms.open(folder, threads=1)
    store.save("m", args.model)
    data = ms.Calibration(args.calibration, samples=args.samples, length=args.length)
    first = ms.Calibration(args.calibration, samples=1, length=32)
    rows = every(args.bits, args.group)
    rows = [row for row in rows if not args.only or any(word in row.name for word in args.only)]
    for row in {(row.how, row.codec["name"]): row for row in rows}.values():  # what is compiled and imported
        store.compress(
            "m", row.recipe | {"name": f"first-{row.name}"}, **({"calibration": first} if row.method else {})
        )
    for row in rows:
        begin = time.process_time()
        store.compress("m", row.recipe, **({"calibration": data} if row.method else {}))
        seconds = time.process_time() - begin
        (found,) = store.eval([f"m:{row.name}"], text=args.text, limit=args.limit)
        one = found.measured
        quality = f"{one.perplexity:.2f} ± {one.perplexity_error:.2f} | {one.kl:.4f} ± {one.kl_error:.4f}"
        print(f"| {row.what} | {row.how} | {quality} | {seconds:.1f} |", flush=True)
    print(f"\noriginal: perplexity {one.baseline_perplexity:.2f}")


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
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="modelstore-calibration-") as folder:
        print("| stored | how | perplexity | KL | processor s |\n|---|---|---|---|---|")
        measure(args, folder)
    print(f"peak RSS with evaluation: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
