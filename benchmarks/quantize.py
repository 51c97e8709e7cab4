"""Rounding a checkpoint to integers: store to store, against other tools."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import checkpoint
from benchmarks.measure import Row, Setting, Timer, fastest, fresh, rate, seconds, skipped, turns

PRESETS = {8: "int8", 4: "int4-rtn"}
SCHEMES = {8: "W8A16", 4: "W4A16"}
BUDGET = "1GiB"
LIMIT = 2 << 30  # bytes of memory, all in all
SEARCHED = 24 << 20  # bytes of weights on which HQQ's search is timed
GOAL = "≥ 2×"


def source(setting: Setting, gb: float) -> tuple[Path, Path]:
    """A checkpoint of `gb` GB, and a store with it; both made where they are not there yet."""
    import modelstore as ms

    model, store = setting.folder / f"checkpoint-{gb:g}", setting.folder / f"compress-{gb:g}"
    checkpoint.make(model, gb)
    if not (store / "modelstore.json").exists():
        ms.open(str(store)).save("bench", model)
    return model, store


def ours(model: str, url: str, recipe: Any, folder: str, memory: str = BUDGET) -> dict[str, Any]:
    """`store.compress` in a copy of the store, whose packs are links to the same files; removed afterwards."""
    import torch

    import modelstore as ms
    from benchmarks.peers import prime_for

    small = ms.open("memory://prepare")
    small.save("bench", {"model.layers.0.mlp.up_proj.weight": torch.randn(1024, 1024).to(torch.bfloat16)})
    small.compress("bench", recipe)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(url, folder, copy_function=os.link)
    store = ms.open(folder, memory=memory)
    prime_for(model, folder)
    os.sync()
    with Timer() as timer:
        done = store.compress("bench", recipe)
    shutil.rmtree(folder)
    (metrics,) = done.metrics.values()
    return {**timer.found, "bytes": done.bytes, "stored": done.stored, "sqnr": metrics.get("sqnr")}


def rows(setting: Setting) -> list[Row]:
    """int8 with a scale a channel and int4 in groups of 128, plain rounding; and HQQ's search against ours."""
    model, store = source(setting, 2 * setting.gb)
    made = []
    for bits in PRESETS:
        made += _rounding(setting, str(model), str(store), bits)
    return [*made, _search(setting)]


def _rounding(setting: Setting, model: str, store: str, bits: int) -> list[Row]:
    scratch = str(setting.folder / "scratch")
    cases = {
        "ours": partial(fresh, "benchmarks.quantize:ours", model=model, url=store, recipe=PRESETS[bits], folder=scratch)
    }
    peers = {}
    if setting.llmcompressor is not None:
        for workers in (1, 2):
            name = f"llm-compressor model_free_ptq, folder to folder, {workers} worker{'s' * (workers > 1)}"
            peers[name] = partial(
                *(fresh, "benchmarks.quantizers:llmcompressor", None, setting.llmcompressor),
                **{"model": model, "folder": scratch, "scheme": SCHEMES[bits], "workers": workers},
            )
    peers["torchao IntxWeightOnly, in memory"] = partial(fresh, "benchmarks.quantizers:torchao", model=model, bits=bits)
    peers["HQQ quantizer without its search, in memory"] = partial(
        *(fresh, "benchmarks.quantizers:hqq"), model=model, bits=bits, optimize=False, limit=1 << 62
    )
    found = turns(setting, {**cases, **peers})
    mine = found["ours"]
    nbytes = mine[0]["bytes"]
    work = f"{PRESETS[bits]} of a checkpoint, store to store, memory={BUDGET}"
    made = []
    for peer in peers:
        ratio = seconds(found[peer]) / seconds(mine)
        speeds = rate(nbytes, seconds(mine)), rate(nbytes, seconds(found[peer]))
        peak = max(run["peak_rss"] for run in found[peer]) / 2**30
        note = f"{fastest(found[peer]) / fastest(mine):.2f} by the fastest run of each; the peer's highest memory {peak:.2f} GiB"
        detail = {"ours": mine, "peer": found[peer]}
        made.append(Row(work, peer, *speeds, ratio, GOAL, ratio >= 2, note, detail))
    if setting.llmcompressor is None:
        made.append(skipped(work, "llm-compressor", GOAL, "--llmcompressor names no Python that has it"))
    peak = max(run["peak_rss"] for run in mine)
    most = f"{LIMIT / 2**30:.0f} GiB"
    size = f"{peak / 2**30:.2f} GiB"
    made.append(Row(f"{work}: highest memory (RSS)", most, size, "—", peak / LIMIT, f"≤ {most}", peak <= LIMIT))
    return made


def _search(setting: Setting) -> Row:
    """Half-quadratic quantization by both, at a rate: the peer's takes minutes a GB, and is timed on a few tensors."""
    model, store = source(setting, setting.gb / 4)
    params = {"bits": 4, "symmetric": False, "group_size": 128, "method": "hqq"}
    recipe = {"name": "hqq", "rules": [{"targets": ["linear"], "codec": {"name": "int", "params": params}}]}
    mine = partial(
        *(fresh, "benchmarks.quantize:ours"),
        **{"model": str(model), "url": str(store), "recipe": recipe, "folder": str(setting.folder / "scratch")},
    )
    peer = partial(fresh, "benchmarks.quantizers:hqq", model=str(model), bits=4, optimize=True, limit=SEARCHED)
    found = turns(setting, {"ours": mine, "hqq": peer})
    speeds = {name: runs[0]["bytes"] / seconds(runs) for name, runs in found.items()}
    ratio = speeds["ours"] / speeds["hqq"]
    cells = (f"{speed / 1e9:.4f} GB/s" for speed in speeds.values())
    note = f"HQQ's on the first {found['hqq'][0]['bytes'] / 1e6:.0f} MB of the weights"
    work = "HQQ, 4 bits, groups of 128, store to store"
    return Row(work, "HQQ quantizer, in memory", *cells, ratio, GOAL, ratio >= 2, note, found)
