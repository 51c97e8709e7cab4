"""Loading from an S3 server into memory of one's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bucket as buckets
from benchmarks.measure import Row, Setting, Timer, fastest, fresh, rate, seconds, skipped, turns
from benchmarks.peers import files, outcome, prime_for, runai_environment

WORK = "load from S3, lossless"
GOALS = {
    "s3fs": ("s3fs cat_file + safetensors load", 3.0),
    "runai": ("runai-model-streamer S3, owned tensors", 1.3),
    "ranges": ("plain parallel ranged reads of the raw bytes", 1.2),
}


def s3fs_safetensors(model: str, bucket: str, names: list[str], check: bool = False) -> dict[str, Any]:
    """Each file whole, by s3fs, and its tensors made one's own as safetensors does from bytes."""
    import s3fs
    import torch  # noqa: F401
    from safetensors.torch import load

    fs = s3fs.S3FileSystem()
    tensors = {}
    prime_for(model)
    with Timer() as timer:
        for name in names:
            tensors.update(load(fs.cat_file(f"{bucket}/raw/{name}")))
    return outcome(timer, tensors, check)


def ranges(model: str, bucket: str, sizes: dict[str, int], threads: int) -> dict[str, Any]:
    """The best plain reader: 8 MiB ranges of every file, in parallel, into one map of huge pages. No tensors, no digests."""
    import numpy as np
    import obstore

    from modelstore.execute.memory import Arena

    store = buckets.obstore_store(bucket)
    prime_for(model)
    with Timer() as timer:
        out = Arena().allocate(sum(sizes.values()))
        jobs, at = [], 0
        for name, size in sizes.items():
            for start in range(0, size, buckets.RANGE):
                n = min(buckets.RANGE, size - start)
                jobs.append((f"raw/{name}", start, out[at + start : at + start + n]))
            at += size

        def read(key: str, start: int, part: Any) -> None:
            data = obstore.get_range(store, key, start=start, length=len(part))
            part[:] = np.frombuffer(data, np.uint8)

        buckets.in_parallel(read, jobs, threads)
    return timer.found


def rows(setting: Setting) -> list[Row]:
    """Ours against three readers."""
    try:
        with buckets.made(setting.sweep) as bucket:
            return _rows(setting, bucket)
    except buckets.UnavailableError as why:
        return [skipped(WORK, words, f"≥ {goal}×", str(why)) for words, goal in GOALS.values()]


def _rows(setting: Setting, bucket: str) -> list[Row]:
    import modelstore as ms

    model = str(setting.model)
    sizes = {Path(path).name: Path(path).stat().st_size for path in files(model)}
    buckets.upload(bucket, setting.model, "raw")
    url = f"s3://{bucket}/store"
    ms.open(url).save("bench", setting.model)
    cases = {
        "ours": partial(fresh, "benchmarks.load:ours", model=model, url=url),
        "s3fs": partial(fresh, "benchmarks.load_s3:s3fs_safetensors", model=model, bucket=bucket, names=list(sizes)),
        "runai": partial(
            fresh,
            "benchmarks.peers:runai",
            runai_environment(),
            model=model,
            owned=True,
            paths=[f"s3://{bucket}/raw/{name}" for name in sizes],
        ),
    }
    digests = {name: case(check=True)["digest"] for name, case in cases.items()}
    if len(set(digests.values())) != 1:
        raise RuntimeError(f"the loaders disagree about the bytes: {digests}")
    plain = partial(fresh, "benchmarks.load_s3:ranges", model=model, bucket=bucket, sizes=sizes)
    cases |= {f"ranges, {n} threads": partial(plain, threads=n) for n in (16, 32)}
    found = turns(setting, cases, alone=False)
    took = {name: seconds(runs) for name, runs in found.items()}
    best = min((name for name in took if name.startswith("ranges")), key=took.__getitem__)
    made = []
    for peer, (words, goal) in GOALS.items():
        name = best if peer == "ranges" else peer
        ratio = took[name] / took["ours"]
        note = f"{fastest(found[name]) / fastest(found['ours']):.2f} by the fastest run of each"
        speeds = rate(setting.nbytes, took["ours"]), rate(setting.nbytes, took[name])
        detail = {"ours": found["ours"], "peer": found[name]}
        made.append(Row(WORK, words, *speeds, ratio, f"≥ {goal}×", ratio >= goal, note, detail))
    return made
