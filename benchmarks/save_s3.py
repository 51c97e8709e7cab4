"""Saving to an S3 server within 1 GiB of working memory.

Ours reads the checkpoint's files; the peers begin with the tensors in memory, which is to their favour.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bucket as buckets
from benchmarks.measure import Row, Setting, Timer, fastest, fresh, rate, seconds, skipped, turns, warm
from benchmarks.peers import files

BUDGET = 1 << 30
SPARE = 0.6 * (1 << 30)
PEERS = {"safetensors": "safetensors save_file + upload", "dcp": "torch DCP, FsspecWriter"}
WORK = "save to S3, lossless, memory=1GiB"


def ours(model: str, url: str, codec: str) -> dict[str, Any]:
    """`store.save` from files in the page cache."""
    import torch  # noqa: F401

    import modelstore as ms
    from benchmarks.load import prepare

    prepare()
    warm(Path(model))
    store = ms.open(url, memory="1GiB")
    with Timer() as timer:
        saved = store.save("bench", model, codec=codec)  # type: ignore[arg-type]
    return {**timer.found, "stored": saved.stored}


def held(model: str) -> dict[str, Any]:
    """The model's tensors, in memory of their own."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for path in files(model) for name, tensor in load_file(path).items()}


def safetensors(model: str, bucket: str, folder: str) -> dict[str, Any]:
    """One file written locally, then sent up in parallel parts by obstore, the fastest of the clients tried."""
    import obstore
    from safetensors.torch import save_file

    tensors = held(model)
    store = buckets.obstore_store(bucket)
    path = Path(folder) / "upload.safetensors"
    path.unlink(missing_ok=True)
    with Timer() as timer:
        save_file(tensors, path)
        obstore.put(store, "out/model.safetensors", path, chunk_size=buckets.RANGE, max_concurrency=8)
    path.unlink()
    return timer.found


def dcp(model: str, bucket: str) -> dict[str, Any]:
    """torch's distributed checkpoint, one rank, through its fsspec writer and s3fs."""
    import s3fs  # noqa: F401
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    tensors = held(model)
    with Timer() as timer:
        checkpoint.save(tensors, storage_writer=FsspecWriter(f"s3://{bucket}/out"), no_dist=True)
    return timer.found


def rows(setting: Setting) -> list[Row]:
    """Speed against two writers, and the memory that ours took."""
    try:
        with buckets.made(setting.sweep) as bucket:
            return _rows(setting, bucket)
    except buckets.UnavailableError as why:
        return [skipped(WORK, words, "≥ 1× the fastest", str(why)) for words in PEERS.values()]


def _rows(setting: Setting, bucket: str) -> list[Row]:
    model = str(setting.model)

    def emptied(case: Any) -> Any:
        def run() -> Any:
            found = case()
            buckets.empty(bucket, sweep=setting.sweep)
            return found

        return run

    save = partial(fresh, "benchmarks.save_s3:ours", model=model, url=f"s3://{bucket}/store")
    cases = {
        "lossless": partial(save, codec="lossless"),
        "raw": partial(save, codec="raw"),
        "safetensors": partial(
            fresh, "benchmarks.save_s3:safetensors", model=model, bucket=bucket, folder=str(setting.folder)
        ),
        "dcp": partial(fresh, "benchmarks.save_s3:dcp", model=model, bucket=bucket),
    }
    found = turns(setting, {name: emptied(case) for name, case in cases.items()}, alone=False)
    took = {name: seconds(runs) for name, runs in found.items()}
    made = []
    for codec in ("lossless", "raw"):
        for peer, words in PEERS.items():
            ratio = took[peer] / took[codec]
            note = f"{fastest(found[peer]) / fastest(found[codec]):.2f} by the fastest run of each"
            speeds = rate(setting.nbytes, took[codec]), rate(setting.nbytes, took[peer])
            detail = {"ours": found[codec], "peer": found[peer]}
            work = WORK.replace("lossless", codec)
            made.append(Row(work, words, *speeds, ratio, "≥ 1×", ratio >= 1, note, detail))
        peak = max(run["peak_rss"] for run in found[codec])
        anonymous = max(run["peak_anonymous"] for run in found[codec])
        made.append(
            Row(
                f"save to S3, {codec}: highest memory (RSS)",
                "the budget, 1 GiB",
                f"{peak / 2**30:.2f} GiB",
                "—",
                peak / BUDGET,
                "≤ 1.6 GiB",
                peak <= BUDGET + SPARE,
                f"of it {anonymous / 2**30:.2f} GiB at most anonymous; the libraries loaded before are in it",
            )
        )
    return made
