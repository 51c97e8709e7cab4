"""What the misses in docs/benchmarks.md rest on: the parts of a work, measured alone.

    python -m benchmarks.limits s3 --model DIR        # load from S3: the wire alone, with digests, with decoding
    python -m benchmarks.limits mapped --folder DIR   # a file in the page cache: as writes lay it out, and as a read does

`s3` needs the server that load-s3 needs. Seconds of processors are of this process (user, system) and of all others
(the server). `mapped` touches one byte of every page of a file of 1 GiB, through a plain map.
"""

from __future__ import annotations

import argparse
import mmap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bucket as buckets
from benchmarks.measure import Setting, Timer, fresh, reread, seconds, turns

HEADER = 40_008  # bytes before the tensors: they do not begin at a page
PARTS = {"the wire alone": (False, False), "and digests": (True, False), "and decoding": (True, True)}


def part(model: str, url: str, digests: bool, decoding: bool) -> dict[str, Any]:
    """`store.load` with parts of its work left out: its result is of no use then, but its time is."""
    import modelstore.execute.read.fetcher as fetch
    import modelstore.execute.read.reader as reading
    from benchmarks import load

    load.prepare()
    if not digests:
        fetch.matches = lambda *_: True  # type: ignore[attr-defined]
    if not decoding:
        reading.Reader.decode = lambda *_: None  # type: ignore[method-assign]
    return load.ours(model, url)


def s3(setting: Setting) -> None:
    """Where the time of a load from S3 goes."""
    import modelstore as ms

    with buckets.made(setting.sweep) as bucket:
        model = str(setting.model)
        buckets.upload(bucket, setting.model, "raw")
        url = f"s3://{bucket}/store"
        ms.open(url).save("bench", setting.model)
        sizes = {path.name: path.stat().st_size for path in sorted(setting.model.glob("*.safetensors"))}
        cases = {
            name: partial(fresh, "benchmarks.limits:part", model=model, url=url, digests=digests, decoding=decoding)
            for name, (digests, decoding) in PARTS.items()
        }
        cases["plain reads of the raw bytes"] = partial(
            fresh, "benchmarks.load_s3:ranges", model=model, bucket=bucket, sizes=sizes, threads=buckets.PARALLEL
        )
        found = turns(setting, cases, alone=False)
    for name, runs in found.items():
        run = sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
        print(
            f"{name:30s} {seconds(runs):.2f} s; processors: user {run['user']:.2f}, system {run['system']:.2f}, "
            f"others {run['others'] * run['seconds']:.2f} s"
        )


def touch(path: str) -> dict[str, Any]:
    """A file mapped, and one byte of each of its pages touched."""
    with Path(path).open("rb") as file:
        area = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages = np.frombuffer(area, np.uint8)
    with Timer() as timer:
        int(pages[::4096].sum())
    return timer.found


def mapped(setting: Setting) -> None:
    """What touching a cached file costs, by how it came into the cache."""
    size = 1 << 30
    data = np.random.default_rng(0).bytes(4 << 20)
    for piece in (64 << 10, 512 << 10, 4 << 20):
        path = setting.folder / f"written-{piece >> 10}"
        with path.open("wb", buffering=0) as file:
            file.write(b"x" * HEADER)
            for _ in range(size // piece):
                file.write(data[:piece])
        _touched(setting, path, f"written by {piece >> 10} KiB")
        reread(path.parent)
        _touched(setting, path, "the same, put out and read")
        path.unlink()


def _touched(setting: Setting, path: Path, words: str) -> None:
    runs = [fresh("benchmarks.limits:touch", path=str(path)) for _ in range(setting.repeat)]
    took, gb = seconds(runs), path.stat().st_size / 1e9
    print(f"{words:30s} {took * 1e3:6.1f} ms, {gb / took:6.1f} GB/s, {runs[0]['faults']} page faults")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("s3", "mapped"))
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face layout (s3)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="an empty folder on a disk (mapped)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    setting = Setting((args.model or args.folder).resolve(), args.folder.resolve(), args.repeat)
    {"s3": s3, "mapped": mapped}[args.what](setting)


if __name__ == "__main__":
    main()
