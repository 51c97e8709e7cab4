"""What each preset costs and what it is worth: bits a weight, perplexity, divergence from the original, speed.

    python -m benchmarks.quality MODEL --text FILE [--limit 4096] [--context 512] [--presets int8 int4 …] [--json FILE]

MODEL is a Hugging Face folder of a language model, FILE a text that it was not trained on. Every preset makes a variant of it in
a temporary store; all variants are evaluated on the same tokens in float32 and compared with one run of the original, whose
predictions are kept if they fit `--memory`. Speeds are of one thread on the model's own linear layers: MB/s of their raw bytes,
the best of `--repeat` rounds. "dominated" names a preset that has no more bytes and no worse perplexity. Results go into the
JSON file by the model's name, beside those of other models that are there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import modelstore as ms
from modelstore.codecs.look import Look
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.plan import weight_codec
from modelstore.errors import ModelStoreError
from modelstore.format.answers.results import CompressionPlan
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import full

HERE = Path(__file__).parent
SAMPLE = 32 << 20  # raw bytes of weights that speeds are measured on


def speeds(store: ms.Store, plan: CompressionPlan, repeat: int) -> dict[str, float]:
    """MB/s of encoding and decoding the first tensors that a plan compresses, one thread, each tensor as one region."""
    encode = decode = 0.0
    nbytes = 0
    for choice in plan.compressed:
        if nbytes >= SAMPLE:
            break
        assert choice.codec is not None
        codec, dtype = weight_codec(choice.codec), DTYPES[choice.dtype]
        model = store["m"].opened()
        raw = model.reader.region(model.tensor(choice.name), full(choice.shape))
        nbytes += raw.nbytes
        took = [one_round(codec, raw, choice.shape, dtype) for _ in range(repeat)]
        encode += min(seconds for seconds, _ in took)
        decode += min(seconds for _, seconds in took)
    return {"encode_mb_s": round(nbytes / encode / 1e6), "decode_mb_s": round(nbytes / decode / 1e6)}


def one_round(codec: WeightCodec, raw: Any, shape: tuple[int, ...], dtype: Any) -> tuple[float, float]:
    """Seconds to fit and encode a tensor, and to decode it."""
    region = full(shape)
    out = np.zeros((1, raw.size), np.uint8)
    started = time.perf_counter()
    planes = codec.fit(Look(lambda part: _part(raw, part, shape, dtype), shape, dtype))(raw, region)
    encoded = time.perf_counter()
    codec.decode([np.frombuffer(plane, np.uint8) for plane in planes], shape, dtype, out)
    return encoded - started, time.perf_counter() - encoded


def _part(raw: Any, region: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    box = raw.view(f"V{dtype.itemsize}").reshape(shape)[tuple(slice(a, b) for a, b in region)]
    return np.ascontiguousarray(box).reshape(-1).view(np.uint8)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every preset on the model; those that could not be made, with the reason."""
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="modelstore-quality-", dir=args.folder) as folder:
        store = ms.open(folder, memory=args.memory)
        store.save("m", args.model)
        plain = store.quality("m")[0]
        fast: dict[str, dict[str, float]] = {}
        for name in args.presets:
            try:
                plan = store.plan_compression("m", name)
                if name != "ladder":
                    fast[name] = speeds(store, plan, args.repeat)
                    store.compress("m", name)
            except (ModelStoreError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
                missing[name] = f"{type(error).__name__}: {error}"[:200]
                print(f"{name}: cannot be made ({missing[name]})", flush=True)
        variants = [info.variant for info in store.variants("m")]
        started = time.monotonic()
        found = store.eval(
            [f"m:{variant}" for variant in variants], text=args.text, context=args.context, limit=args.limit
        )
        seconds = time.monotonic() - started
        if "ladder" in args.presets and "ladder" not in missing:
            try:  # a version of its own: its variants have the names of presets
                store.save("ladder", args.model)
                store.compress("ladder", "ladder")
                names = ["int8", "int4"]
                more = store.eval(
                    [f"ladder:{name}" for name in names], text=args.text, context=args.context, limit=args.limit
                )
                found += [_renamed(one, f"ladder {one.variant}") for one in more]
                variants += [f"ladder {name}" for name in names]
            except (ModelStoreError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
                missing["ladder"] = f"{type(error).__name__}: {error}"[:200]
        quality = {one.variant: one for one in store.quality("m")}
        if "ladder int8" in variants:
            quality |= {f"ladder {one.variant}": one for one in store.quality("ladder")}
        for one in found:
            size = quality[one.variant]
            rows.append(
                {
                    "preset": one.variant,
                    "bits": round(size.bits, 3),
                    "stored": size.stored,
                    "sqnr": size.sqnr,
                    "perplexity": one.measured.perplexity,
                    "kl": one.measured.kl,
                    "top1": one.measured.top1,
                    **fast.get(one.variant, {}),
                }
            )
    for row in rows:
        row["dominated_by"] = dominating(row, rows) if row["preset"] != "original" else []  # nothing else is exact
    first = found[0].measured
    return {
        "text": first.text,
        "tokens": first.tokens,
        "context": first.context,
        "weights": plain.weights,
        "seconds": round(seconds),
        "rows": sorted(rows, key=lambda row: -row["stored"]),
        "missing": missing,
    }


def _renamed(one: Any, variant: str) -> Any:
    import msgspec

    return msgspec.structs.replace(one, variant=variant)


def dominating(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The presets that have no more bytes and no worse perplexity, and are better in one of both."""

    def worth(one: dict[str, Any]) -> tuple[int, float]:
        return one["stored"], one["perplexity"] if one["perplexity"] is not None else float("inf")

    size, loss = worth(row)
    return [
        one["preset"] for one in rows if worth(one) != (size, loss) and worth(one)[0] <= size and worth(one)[1] <= loss
    ]


def table(found: dict[str, Any]) -> str:
    """The rows as a table of Markdown, largest first."""
    lines = [
        "| preset | bits/weight | SQNR, dB | perplexity | KL | top-1 | encode, MB/s | decode, MB/s | dominated by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = (
            row["preset"],
            f"{row['bits']:.2f}",
            _cell(row["sqnr"], ".1f"),
            _cell(row["perplexity"], ".2f"),
            _cell(row["kl"], ".4f"),
            _cell(row["top1"] and 100 * row["top1"], ".1f", " %"),
            _cell(row.get("encode_mb_s"), "d"),
            _cell(row.get("decode_mb_s"), "d"),
            ", ".join(row["dominated_by"][:3]) + (" …" if len(row["dominated_by"]) > 3 else ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name} could not be made: {why}" for name, why in found["missing"].items()]
    return "\n".join(lines)


def _cell(value: Any, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if value is not None else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--presets", nargs="*", default=[name for name, one in ms.presets().items() if not one.calibrated]
    )
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary store lies")
    parser.add_argument("--json", type=Path, default=HERE / "quality.json")
    args = parser.parse_args()
    found = measure(args)
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    args.json.write_text(json.dumps(known | {args.model.name: found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
