"""Sizes and speeds of the exact codecs on LLM-like weights, beside zstd and zipnn. One thread.

    python -m benchmarks.codec [DIR of safetensors] [--mb 64] [--repeat 5] [--json FILE]

Without a directory weights are made: per tensor a normal times log-normal factors of rows and columns, rounded to the dtype.
All codecs get the same chunks (4 MiB) with one call each, warmed up; the best of the repeats counts. Decoding writes into memory
that has been written before, or for peers, that can only return new memory, into what the allocator recycles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zstandard
from safetensors import safe_open

from modelstore.codecs.registry import codec
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES, FROM_SAFETENSORS

CHUNK = 4 << 20
MADE = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
ZIPNN = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


@dataclass(frozen=True)
class Row:
    dtype: str
    codec: str
    size: float  # of raw
    encode: float  # MB of raw a second
    decode: float


def made(name: str, size: int) -> Bytes:
    """`size` bytes of weights of that dtype."""
    rng = np.random.default_rng(0)
    columns = 2048
    rows = size // (columns * DTYPES[name].itemsize)
    scale = 1.0 if name.startswith("float8") else 0.02  # as quantizers scale: to the middle of the range
    w = rng.standard_normal((rows, columns), np.float32)
    w *= np.exp(0.2 * rng.standard_normal((rows, 1), np.float32)) * scale
    w *= np.exp(0.12 * rng.standard_normal(columns, np.float32))
    return w.astype(MADE[name]).reshape(-1).view(np.uint8)


def read(folder: Path, limit: int) -> dict[str, Bytes]:
    """The raw bytes of the tensors in a folder's safetensors files, by dtype, up to `limit` each."""
    parts: dict[str, list[Bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as f:
            names = list(f.keys())
            kinds = {n: FROM_SAFETENSORS[f.get_slice(n).get_dtype()].name for n in names}
        raw = np.memmap(path, np.uint8, "r")
        header = int(raw[:8].view("<u8")[0])
        table = json.loads(raw[8 : 8 + header].tobytes())
        for n in names:
            kind = kinds[n]
            if sum(p.size for p in parts.get(kind, [])) < limit:
                a, b = table[n]["data_offsets"]
                parts.setdefault(kind, []).append(np.array(raw[8 + header + a : 8 + header + b]))
    return {kind: np.concatenate(p)[:limit] for kind, p in parts.items()}


def clock(call: Callable[[Any], Any], inputs: Callable[[], Iterator[Any]], repeat: int) -> float:
    """Seconds that `call` takes for all inputs together, best of the repeats; making the inputs is not counted."""
    best = float("inf")
    for _ in range(repeat + 1):
        total = 0.0
        for item in inputs():
            start = time.perf_counter()
            call(item)
            total += time.perf_counter() - start
        best = min(best, total)
    return best


def ours(name: str, dtype: str, raw: Bytes, repeat: int, base: Bytes | None = None) -> Row:
    kind, made = DTYPES[dtype], codec(name)
    cuts = [slice(i, min(i + CHUNK, raw.size)) for i in range(0, raw.size, CHUNK)]

    def under(cut: slice) -> Bytes | None:
        return None if base is None else base[cut]

    def shape(cut: slice) -> tuple[int]:
        return ((cut.stop - cut.start) // kind.itemsize,)

    encoded = [made.encode(raw[c], shape(c), kind, under(c)) for c in cuts]
    out = np.ones_like(raw)
    encode = clock(lambda c: made.encode(raw[c], shape(c), kind, under(c)), lambda: iter(cuts), repeat)
    decode = clock(
        lambda x: made.decode(x[1], shape(x[0]), kind, out[x[0]].reshape(1, -1), under(x[0])),
        lambda: iter(zip(cuts, encoded, strict=True)),
        repeat,
    )
    assert np.array_equal(out, raw)
    size = sum(memoryview(p).nbytes for (p,) in encoded)
    return Row(dtype, name, size / raw.size, raw.size / encode / 1e6, raw.size / decode / 1e6)


def peer(
    name: str, dtype: str, raw: Bytes, repeat: int, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> Row:
    chunks = [raw[i : i + CHUNK] for i in range(0, raw.size, CHUNK)]

    def fresh() -> Iterator[bytearray]:  # zipnn reorders its input in place
        return (bytearray(c) for c in chunks)

    encoded = [bytes(encode(c)) for c in fresh()]
    assert all(bytes(decode(e)) == c.tobytes() for e, c in zip(encoded, chunks, strict=True))
    encoding, decoding = clock(encode, fresh, repeat), clock(decode, lambda: iter(encoded), repeat)
    size = sum(map(len, encoded)) / raw.size
    return Row(dtype, name, size, raw.size / encoding / 1e6, raw.size / decoding / 1e6)


def rows(dtype: str, raw: Bytes, repeat: int) -> Iterator[Row]:
    """All codecs on one dtype's weights."""
    yield ours("raw", dtype, raw, repeat)
    yield ours("lossless", dtype, raw, repeat)
    yield ours("packed", dtype, raw, repeat)
    if dtype in MADE:
        tuned = raw.view(MADE[dtype]).astype(np.float32)
        tuned += np.random.default_rng(1).standard_normal(tuned.size, np.float32) * (0.01 * np.nanstd(tuned))
        yield ours("delta", dtype, tuned.astype(MADE[dtype]).view(np.uint8), repeat, raw)
    packer, unpacker = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    yield peer("zstd-3", dtype, raw, repeat, packer.compress, unpacker.decompress)
    try:
        import zipnn
    except ImportError:
        print("zipnn is not installed: pip install modelstore[bench]")
        return
    if dtype in ZIPNN:
        z = zipnn.ZipNN(bytearray_dtype=ZIPNN[dtype], threads=1)
        yield peer("zipnn", dtype, raw, repeat, z.compress, z.decompress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--mb", type=int, default=64, help="MiB of each dtype")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    args = parser.parse_args()
    size = args.mb << 20
    data = read(args.folder, size) if args.folder else None
    done = []
    print(f"{'dtype':15}{'codec':10}{'of raw':>8}{'encode MB/s':>13}{'decode MB/s':>13}")
    for dtype in data or MADE:
        for row in rows(dtype, data[dtype] if data else made(dtype, size), args.repeat):
            print(f"{row.dtype:15}{row.codec:10}{row.size:8.4f}{row.encode:13.0f}{row.decode:13.0f}", flush=True)
            done.append(row)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in done], indent=1))


if __name__ == "__main__":
    main()
