"""The store against its peers, in one table.

    python benchmarks/run.py [--only ROW …] [--model DIR] [--gb 2] [--repeat 5] [--json FILE]

Without `--model` a Llama-like bf16 checkpoint of `--gb` GB is made. Rows that speak S3 need a server that AWS_ENDPOINT_URL
names, with its keys in the AWS variables; they make a bucket of their own and remove it. docs/benchmarks.md says what each
row means.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import checkpoint
from benchmarks.measure import Row, Setting, as_json

ROWS = {  # in the order in which they run
    "codec": "lossless:rows",
    "load": "load:owned",
    "mapped": "load:mapped",
    "load-s3": "load_s3:rows",
    "save-s3": "save_s3:rows",
    "slices": "slices:rows",
    "versions": "versions:rows",
    "live": "live:rows",
    "steps": "steps:rows",
    "rollout": "rollout:rows",
    "manifests": "manifests:rows",
    "ladder": "ladder:rows",
    "quantize": "quantize:rows",
    "quality4": "quality4:rows",
    "kmeans": "kmeans:rows",
    "scaling": "scaling:rows",
    "cluster": "cluster:rows",
    "ranks": "ranks:rows",
    "faults": "faults:rows",
    "placement": "placement:rows",
    "host": "host:rows",
    "serve": "serve:rows",
    "dcp": "dcp:rows",
}
PEERS = (
    *("torch", "safetensors", "runai-model-streamer", "zipnn", "zstandard", "s3fs", "obstore", "numpy", "numba"),
    *("torchao", "hqq", "gguf", "transformers"),
)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "python": platform.python_version(),
        "packages": {name: found(name) for name in PEERS},
    }


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("work", "against", "ours", "peer", "ratio", "goal", "met?")
    cells = [head]
    for row in rows:
        ratio = "—" if row.ratio is None else f"{row.ratio:.3g}"
        met = {True: "yes", False: "no", None: "—" if row.ratio else "skipped"}[row.met]
        cells.append((row.work, row.against, row.ours, row.peer, ratio, row.goal, met))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]

    def line(values: tuple[str, ...]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(head), rule, *map(line, cells[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face layout with bf16 safetensors")
    parser.add_argument("--gb", type=float, default=2, help="size of the checkpoint that is made where none is given")
    parser.add_argument(
        "--real", type=Path, help="a folder with the real models smollm2-rg and minilm, for compression"
    )
    parser.add_argument("--text", type=Path, help="a text on which perplexity is measured")
    parser.add_argument("--llmcompressor", type=Path, help="the Python of an environment that has llmcompressor")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each contender; the medians are compared")
    parser.add_argument("--folder", type=Path, help="where stores are made, and kept (default: a temporary folder)")
    parser.add_argument(
        "--json", type=Path, help="add the rows to this file, in the place of earlier ones of the same work"
    )
    parser.add_argument("--lock", type=Path, help="a file locked during measurements, for others to wait on")
    parser.add_argument(
        "--sweep", help="a command after which the S3 server has freed what was deleted, where it is slow to"
    )
    parser.add_argument(
        "--quiet", type=float, default=20, help="seconds to wait at most, before each run, for an idle machine"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelstore-bench-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        model = args.model
        if model is None:
            model = folder / f"checkpoint-{args.gb:g}"
            checkpoint.make(model, args.gb)
        setting = Setting(
            *(model.resolve(), folder, args.repeat, args.lock, args.sweep, args.quiet, args.gb),
            *(args.real, args.text, args.llmcompressor),
        )
        done: list[Row] = []
        failed = False
        for name in args.only:
            module, _, function = ROWS[name].partition(":")
            print(f"{name} …", file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                fresh = getattr(importlib.import_module(f"benchmarks.{module}"), function)(setting)
            except Exception as error:  # the other rows are still wanted
                print(f"  {name} failed: {error}", file=sys.stderr)
                failed = True
                continue
            done += fresh
            print(f"  {time.monotonic() - started:.0f} s\n{table(fresh)}", file=sys.stderr, flush=True)
            if args.json:
                keep(args.json, name, setting, fresh)
    print(table(done))
    for row in done:
        if row.note:
            print(f"- {row.work}, {row.against}: {row.note}")
    raise SystemExit(failed)


def keep(path: Path, name: str, setting: Setting, rows: list[Row]) -> None:
    """Put a row's result into the file, at once: later ones may fail."""
    all_rows = json.loads(path.read_text()) if path.exists() else {}
    all_rows[name] = {
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "bytes": setting.nbytes,
        "repeat": setting.repeat,
        "machine": machine(),
        "rows": [as_json(row) for row in rows],
    }
    path.write_text(json.dumps({key: all_rows[key] for key in ROWS if key in all_rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
