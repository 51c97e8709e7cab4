"""What compressing costs as checkpoints grow: time by the gigabyte, and memory."""

from __future__ import annotations

import shutil
from functools import partial

from benchmarks.measure import Row, Setting, fresh, seconds, turns
from benchmarks.quantize import BUDGET, source

RECIPE = "int4"
SIZES = (0.5, 1, 2, 4)  # times --gb
TIME, MEMORY = 1.15, 1.15


def rows(setting: Setting) -> list[Row]:
    """The largest checkpoint against the smallest: seconds a GB, and the highest memory."""
    found = {}
    for share in SIZES:
        gb = share * setting.gb
        model, store = source(setting, gb)
        case = partial(
            *(fresh, "benchmarks.quantize:ours"),
            **{"model": str(model), "url": str(store), "recipe": RECIPE, "folder": str(setting.folder / "scratch")},
        )
        found |= turns(setting, {f"{gb:g} GB": case})
        shutil.rmtree(store)
    each = {name: seconds(runs) / (runs[0]["bytes"] / 1e9) for name, runs in found.items()}
    peaks = {name: max(run["peak_rss"] for run in runs) / 2**30 for name, runs in found.items()}
    first, last = next(iter(found)), list(found)[-1]
    work = f"{RECIPE} of {', '.join(found)}, memory={BUDGET}"
    slower, larger = each[last] / each[first], peaks[last] / peaks[first]
    note = "; ".join(f"{name}: {each[name]:.3f} s/GB, {peaks[name]:.2f} GiB" for name in found)
    return [
        Row(
            *(f"{work}: seconds a GB of weights", f"itself at {first}", f"{each[last]:.3f}", f"{each[first]:.3f}"),
            *(slower, f"≤ {TIME}×", slower <= TIME, note, found),
        ),
        Row(
            *(f"{work}: highest memory", f"itself at {first}", f"{peaks[last]:.2f} GiB", f"{peaks[first]:.2f} GiB"),
            *(larger, f"≤ {MEMORY}×", larger <= MEMORY),
        ),
    ]
