"""Loading from a warm page cache: into memory of one's own, and mapped."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Setting, Timer, fastest, fresh, rate, reread, seconds, turns, warm

KINDS: dict[str, dict[str, str]] = {
    "packed": {"codec": "packed"},
    "lossless": {"codec": "lossless"},
    "raw": {"codec": "raw"},
    "raw whole": {"codec": "raw", "grid": "whole"},
}
PEERS = {
    "safetensors": "safetensors load_file + clone",
    "runai clone": "runai-model-streamer (page cache) + clone",
    "runai": "runai-model-streamer as it comes (O_DIRECT)",
    "runai cached": "runai-model-streamer (page cache), no clone",
}
GOALS = {"packed": (1.3, 1.5), "lossless": (3.0, 1.2), "raw": (5.0, 2.0), "raw whole": (5.0, 2.0)}


def store(setting: Setting, kind: str) -> str:
    """A local store with the model as `kind`, made where it is not there yet."""
    import modelstore as ms

    url = str(setting.folder / f"store-{kind.replace(' ', '-')}")
    if not Path(url, "modelstore.json").exists():
        ms.open(url).save("bench", setting.model, **KINDS[kind])  # type: ignore[arg-type]
    return url


def ours(model: str, url: str, ref: str = "bench", check: bool = False) -> dict[str, Any]:
    """`store.load`, every chunk's digest checked."""
    import torch  # noqa: F401

    import modelstore as ms
    from benchmarks.peers import outcome, prime_for

    prepare()
    opened = ms.open(url)
    prime_for(model, *([] if "://" in url else [url]))
    with Timer() as timer:
        tensors = opened.load(ref)
    return outcome(timer, tensors, check)


def prepare() -> None:
    """Load what is loaded once a process, by saving and loading a small model: modules, and the kernels' machine code."""
    import torch

    import modelstore as ms

    store = ms.open("memory://prepare")
    store.save("bench", {"w": torch.randn(1 << 20).to(torch.bfloat16)})
    store.load("bench")
    with suppress(ImportError):
        import obstore  # noqa: F401


def ours_touch(url: str) -> dict[str, Any]:
    """`store.load(mmap=True)`, and one byte of every page touched."""
    import torch

    import modelstore as ms
    from benchmarks.peers import touch

    with tempfile.TemporaryDirectory() as folder:
        small = ms.open(folder)
        small.save("bench", {"w": torch.zeros(1 << 20, dtype=torch.bfloat16)}, codec="raw", grid="whole")
        touch(small.load("bench", mmap=True))
    warm(Path(url))
    opened = ms.open(url)
    with Timer() as timer:
        tensors = opened.load("bench", mmap=True)
        total = touch(tensors)
    return {**timer.found, "tensors": len(tensors), "touched": total}


def owned(setting: Setting) -> list[Row]:
    """Rows of loading into memory of one's own."""
    model = str(setting.model)
    cases = {kind: partial(fresh, "benchmarks.load:ours", model=model, url=store(setting, kind)) for kind in KINDS}
    runai = partial(fresh, "benchmarks.peers:runai", model=model)
    cached = {"RUNAI_STREAMER_FS_STRATEGY": "io_uring_buffered,sync_buffered"}
    cases |= {
        "safetensors": partial(fresh, "benchmarks.peers:safetensors_clone", model=model),
        "runai clone": partial(runai, cached, owned=False),
        "runai": partial(runai, owned=True),
        "runai cached": partial(runai, cached, owned=True),
    }
    digests = {name: case(check=True)["digest"] for name, case in cases.items()}
    if len(set(digests.values())) != 1:
        raise RuntimeError(f"the loaders disagree about the bytes: {digests}")
    found = turns(setting, cases)
    took = {name: seconds(runs) for name, runs in found.items()}
    rows = []
    for kind in KINDS:
        for peer in (name for name in cases if name not in KINDS):
            goal = GOALS[kind][peer != "safetensors"]
            ratio = took[peer] / took[kind]
            speeds = rate(setting.nbytes, took[kind]), rate(setting.nbytes, took[peer])
            note = f"{fastest(found[peer]) / fastest(found[kind]):.2f} by the fastest run of each"
            detail = {"ours": found[kind], "peer": found[peer]}
            work = f"load from page cache, {kind}"
            rows.append(Row(work, PEERS[peer], *speeds, ratio, f"≥ {goal}×", ratio >= goal, note, detail))
    return rows


def mapped(setting: Setting) -> list[Row]:
    """The rows of loading lazily: against the checkpoint's own files, and against the very pack that ours maps.

    How fast a cached file can be touched depends on the size of the folios that hold it, and that on how it came into
    the cache: by writes of this size or that, or by a read. So all files are put out of the cache first, and read.
    """
    url = store(setting, "raw whole")
    same = setting.folder / "same-packs"
    same.mkdir(exist_ok=True)
    for pack in sorted(Path(url, "packs").rglob("*.safetensors")):
        if pack.stat().st_size > 1 << 20 and not (same / pack.name).exists():
            (same / pack.name).hardlink_to(pack)
    reread(Path(url), setting.model)
    touched = "benchmarks.peers:safetensors_touch"
    found = turns(
        setting,
        {
            "mapped": partial(fresh, "benchmarks.load:ours_touch", url=url),
            "safetensors": partial(fresh, touched, model=str(setting.model)),
            "same pack": partial(fresh, touched, model=str(same)),
        },
    )
    if len({run["touched"] for runs in found.values() for run in runs}) != 1:
        print("the mapped tensors differ", file=sys.stderr)
        raise SystemExit(1)
    ours = seconds(found["mapped"])
    rows = []
    for peer, words in (("safetensors", "safetensors load_file"), ("same pack", "safetensors load_file of our pack")):
        ratio = seconds(found[peer]) / ours
        speeds = rate(setting.nbytes, ours), rate(setting.nbytes, seconds(found[peer]))
        detail = {"ours": found["mapped"], "peer": found[peer]}
        work = "load mapped (mmap=True), one byte a page touched"
        rows.append(Row(work, words, *speeds, ratio, "≥ 0.9×", ratio >= 0.9, detail=detail))
    return rows
