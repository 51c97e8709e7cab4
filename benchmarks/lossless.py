"""The lossless codec on the model's own weights, one thread: the rows of `codec`, as goals."""

from __future__ import annotations

from typing import Any

from benchmarks import codec
from benchmarks.measure import Row, Setting, fresh, wait_for_quiet

SAMPLE = 64 << 20


def case(model: str, repeat: int) -> dict[str, Any]:
    """Sizes and MB/s of each codec on the model's first bf16 weights, the best of the repeats."""
    from pathlib import Path

    raw = codec.read(Path(model), SAMPLE)["bfloat16"]
    rows = [row for row in codec.rows("bfloat16", raw, repeat) if row.codec in ("lossless", "zipnn", "zstd-3")]
    return {row.codec: {"size": row.size, "encode": row.encode, "decode": row.decode} for row in rows}


def rows(setting: Setting) -> list[Row]:
    """Size, and both speeds against zipnn and zstd."""
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with setting.alone():
        wait_for_quiet(setting.quiet)
        found = fresh("benchmarks.lossless:case", one_thread, model=str(setting.model), repeat=setting.repeat)
    ours = found["lossless"]
    made = [
        Row(
            "lossless bf16, size of raw",
            "zipnn",
            f"{ours['size']:.4f}",
            f"{found['zipnn']['size']:.4f}",
            ours["size"] / found["zipnn"]["size"],
            "≤ 0.672 of raw",
            ours["size"] <= 0.672,
            detail=found,
        )
    ]
    for what, goal in (("encode", 2.0), ("decode", 3.0)):
        for peer, needed in (("zipnn", goal), ("zstd-3", None)):
            ratio = ours[what] / found[peer][what]
            speeds = (f"{n / 1e3:.2f} GB/s" for n in (ours[what], found[peer][what]))
            met = ratio >= (needed or 1.0)
            words = f"≥ {needed}×" if needed else "≥ 1×"
            made.append(Row(f"lossless bf16, {what}, 1 thread", peer, *speeds, ratio, words, met))
    return made
