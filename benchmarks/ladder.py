"""The ladder: original, int8 and int4 in one set of bytes, against the three stored apart; its speed against zipnn's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import codec
from benchmarks.measure import Row, Setting, fresh, skipped, wait_for_quiet
from benchmarks.quantize import source

APART = ("int8", "int4")  # presets, beside the lossless original
BITS, SHARE = 11.2, 0.5
SAMPLE = 64 << 20  # raw bytes on which speeds are measured
CHUNK = 4 << 20
GOALS = {"decode": 1.0, "encode": 0.7}


def models(setting: Setting) -> dict[str, Path]:
    """Real models where there are some, and a generated one."""
    real = {f"{name}, bf16": setting.real / name for name in ("smollm2-rg", "minilm")} if setting.real else {}
    return {**{n: p for n, p in real.items() if p.exists()}, "generated, bf16": source(setting, setting.gb / 2)[0]}


def weights(model: str) -> dict[str, Any]:
    """The tensors, those of float32 rounded to bfloat16."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.peers import files

    found = {name: tensor for path in files(model) for name, tensor in load_file(path).items()}
    return {n: t.to(torch.bfloat16) if t.dtype == torch.float32 else t for n, t in found.items()}


def sizes(model: str, folder: str) -> dict[str, float]:
    """Stored bits a weight, of the tensors that have a ladder: as the ladder, and of each variant apart."""
    import modelstore as ms

    shutil.rmtree(folder, ignore_errors=True)
    tensors = weights(model)
    config = Path(model, "config.json").read_bytes()
    store = ms.open(folder)
    for name in ("ladder", "apart"):
        store.save(name, tensors, files={"config.json": config})
    store.compress("ladder", "ladder")
    for preset in APART:
        store.compress("apart", preset)
    described = store.describe("ladder").tensors
    wanted = [t.name for t in described if t.codec == "ladder"]
    numbers = sum(tensors[name].numel() for name in wanted)
    loaded = store.load("ladder", names=wanted)
    assert all(np.array_equal(_raw(loaded[name]), _raw(tensors[name])) for name in wanted), "not the same bits"

    def bits(ref: str) -> float:
        stored = {t.name: t.stored for t in store.describe(ref).tensors}
        return 8 * sum(stored[name] for name in wanted) / numbers

    found = {"ladder": bits("ladder"), "lossless": bits("apart"), "weights": numbers}
    found |= {preset: bits(f"apart:{preset}") for preset in APART}
    found |= {f"ladder {variant}": bits(f"ladder:{variant}") for variant in ("int8", "int4")}
    shutil.rmtree(folder)
    return found


def _raw(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()


def chunks(model: str) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Raw bytes and shape of pieces of linear weights: whole rows, about as large as a store's chunks."""
    from modelstore.architecture.kinds import Its, kinds

    left = SAMPLE
    for name, tensor in weights(model).items():
        shape = tuple(tensor.shape)
        its = Its(str(tensor.dtype).removeprefix("torch."), shape)
        if kinds({name: its})[name] != "linear" or left <= 0:
            continue
        rows = max(1, CHUNK // (2 * shape[1]))
        for start in range(0, shape[0], rows):
            piece = tensor[start : start + rows]
            left -= 2 * piece.numel()
            yield _raw(piece).reshape(-1).copy(), (piece.shape[0], shape[1])


def speeds(model: str, repeat: int) -> dict[str, dict[str, float]]:
    """MB/s of encoding and decoding the same pieces, the best of the repeats, one thread."""
    import zipnn

    from modelstore.codecs.ladder.codec import Ladder
    from modelstore.format.dtypes import DTYPES

    kind, made = DTYPES["bfloat16"], Ladder()
    pieces = list(chunks(model))
    planes = [made.encode(raw, shape, kind) for raw, shape in pieces]
    outs = [np.ones((1, raw.size), np.uint8) for raw, _ in pieces]
    encode = codec.clock(lambda p: made.encode(p[0], p[1], kind), lambda: iter(pieces), repeat)
    jobs = [(p, shape, out) for p, (_, shape), out in zip(planes, pieces, outs, strict=True)]
    decode = codec.clock(lambda j: made.decode(j[0], j[1], kind, j[2]), lambda: iter(jobs), repeat)
    assert all(np.array_equal(out[0], raw) for out, (raw, _) in zip(outs, pieces, strict=True))
    found = {"ladder": _speed(pieces, encode, decode)}
    for variant, count in (("int8", 3), ("int4", 2)):
        part = Ladder(variant)
        took = codec.clock(lambda j, p=part, n=count: p.decode(j[0][:n], j[1], kind, j[2]), lambda: iter(jobs), repeat)
        found[f"ladder {variant}"] = {"decode": sum(raw.size for raw, _ in pieces) / took / 1e6}
    z = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
    packed = [bytes(z.compress(bytearray(raw))) for raw, _ in pieces]
    encode = codec.clock(z.compress, lambda: (bytearray(raw) for raw, _ in pieces), repeat)  # it reorders its input
    decode = codec.clock(z.decompress, lambda: iter(packed), repeat)
    return found | {"zipnn": _speed(pieces, encode, decode)}


def _speed(pieces: list[tuple[Any, tuple[int, int]]], encode: float, decode: float) -> dict[str, float]:
    size = sum(raw.size for raw, _ in pieces)
    return {"encode": size / encode / 1e6, "decode": size / decode / 1e6}


def rows(setting: Setting) -> list[Row]:
    """Bits a weight of all three together, and both speeds, for each model."""
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    made = []
    if setting.real is None:
        made.append(skipped("ladder of real weights", "stored apart", f"≤ {BITS} bits", "--real names no models"))
    for name, model in models(setting).items():
        found = fresh("benchmarks.ladder:sizes", model=str(model), folder=str(setting.folder / "scratch"))
        apart = found["lossless"] + sum(found[preset] for preset in APART)
        share, all_three = found["ladder"] / apart, f"{found['ladder']:.2f} bits"
        work = f"ladder: original, int8 and int4, {name}"
        note = ", ".join(f"{key} {value:.2f}" for key, value in found.items() if key != "weights")
        made.append(
            Row(
                work,
                "bits a weight",
                all_three,
                "—",
                found["ladder"] / BITS,
                f"≤ {BITS} bits",
                found["ladder"] <= BITS,
                note,
            )
        )
        parts = "lossless + " + " + ".join(APART) + " apart"
        made.append(
            Row(work, parts, all_three, f"{apart:.2f} bits", share, f"≤ {SHARE}×", share <= SHARE, detail=found)
        )
    for name, model in models(setting).items():
        with setting.alone():
            wait_for_quiet(setting.quiet)
            speed = fresh("benchmarks.ladder:speeds", one_thread, model=str(model), repeat=setting.repeat)
        made += [_against_zipnn(name, what, goal, speed) for what, goal in GOALS.items()]
    return made


def _against_zipnn(name: str, what: str, goal: float, speed: dict[str, dict[str, float]]) -> Row:
    ratio = speed["ladder"][what] / speed["zipnn"][what]
    cells = (f"{speed[side][what] / 1e3:.2f} GB/s" for side in ("ladder", "zipnn"))
    note = ", ".join(f"int{bits} {speed[f'ladder int{bits}']['decode'] / 1e3:.2f} GB/s" for bits in (8, 4))
    work = f"ladder, {what} original, 1 thread, {name}"
    note = f"decoding of parts: {note}" if what == "decode" else ""
    return Row(work, "zipnn", *cells, ratio, f"≥ {goal:g}×", ratio >= goal, note, speed)
