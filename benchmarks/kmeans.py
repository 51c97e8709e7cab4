"""Shared values with entropy-coded indices against integers in groups of 128: the error at no more bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks import ladder
from benchmarks.measure import Row, Setting, fresh, skipped

PEER = "int4"  # clipped for the least error
RATE = 4.1  # bits an index: the sixteenth that scales take in groups of 128 is nearly used
GOAL = "lower error in ≤ the bytes"
CODECS = {f"kmeans, rate={RATE}": {"rate": RATE}, "kmeans, 16 values": {"bits": 4}}


def case(model: str, folder: str) -> dict[str, dict[str, float]]:
    """Stored bits a weight and signal to noise in dB, of the tensors that are compressed."""
    import modelstore as ms

    shutil.rmtree(folder, ignore_errors=True)
    store = ms.open(folder)
    config = Path(model, "config.json").read_bytes()
    store.save("bench", ladder.weights(model), files={"config.json": config})
    recipes: dict[str, Any] = {PEER: PEER, "int4-rtn": "int4-rtn"}
    for i, (name, params) in enumerate(CODECS.items()):
        rule = {"targets": ["linear", "convolution"], "codec": {"name": "kmeans", "params": params}}
        recipes[name] = {"name": f"kmeans-{i}", "rules": [rule]}
    found = {}
    for name, recipe in recipes.items():
        done = store.compress("bench", recipe)
        (info,) = done.variants
        plan = store.plan_compression("bench", recipe)
        names = {choice.name for choice in plan.compressed}
        described = [t for t in store.describe(f"bench:{info.variant}").tensors if t.name in names]
        bits = 8 * sum(t.stored for t in described) / (sum(t.bytes for t in described) / 2)
        found[name] = {"bits": bits, "sqnr": done.metrics[info.variant]["sqnr"], "seconds": done.seconds}
    shutil.rmtree(folder)
    return found


def rows(setting: Setting) -> list[Row]:
    """Signal to noise against int4's, for each model; met only where the bytes are no more."""
    made = []
    if setting.real is None:
        made.append(skipped("kmeans of real weights", PEER, GOAL, "--real names no models"))
    for name, model in ladder.models(setting).items():
        found = fresh("benchmarks.kmeans:case", model=str(model), folder=str(setting.folder / "scratch"))
        peer = found[PEER]
        for codec in CODECS:
            ours = found[codec]
            error = 10 ** ((peer["sqnr"] - ours["sqnr"]) / 10)
            met = ours["bits"] <= peer["bits"] and error < 1
            cells = (f"{side['sqnr']:.2f} dB, {side['bits']:.3f} bits" for side in (ours, peer))
            note = (
                f"plain rounding (int4-rtn): {found['int4-rtn']['sqnr']:.2f} dB, {found['int4-rtn']['bits']:.3f} bits"
            )
            made.append(
                Row(f"{codec}, {name}: squared error", f"preset {PEER}, g128", *cells, error, GOAL, met, note, found)
            )
    return made
