"""Packed exports of every class of transformers: loaded there, and compared with the dense export of the same variant.

    python benchmarks/exports.py TASK OUT [--formats int4 …] [--only llama …]

TASK: causal, masked, classify, seq2seq, vision or multimodal. Models are tiny and random, and of bfloat16 where they run in it.
Each result is a line of OUT/TASK.jsonl. "right": outputs differ by less than 3 %, and no parameter by more than 1 %; for W8A8 the
dense model is given activations that are rounded alike. "refused": the store says why. "skipped": transformers does not run
the tiny model. Needs transformers and compressed-tensors; 135 causal classes in all formats take 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

import modelstore as ms
from benchmarks.export_models import TASKS, Inputs, classes, inputs, made
from modelstore.errors import ModelStoreError

CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int", {"bits": 4, "group_size": 32}),
    "int8": ("int", {"bits": 8, "granularity": "channel"}),
    "fp8": ("fp8", {}),
    "fp8-block": ("fp8", {"granularity": "block"}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "int4-affine": ("int", {"bits": 4, "group_size": 32, "symmetric": False}),
}
FORMATS = ("int4", "int8", "W8A8", "fp8", "fp8-block", "mxfp4", "nvfp4", "int4-affine")
Result = tuple[str, str]


def flat(value: Any) -> list[torch.Tensor]:
    """All floats in what a model gives."""
    if torch.is_tensor(value):
        return [value.float().reshape(-1)] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = [one for key, one in value.items() if key != "past_key_values"]
    return [tensor for one in value for tensor in flat(one)] if isinstance(value, list | tuple) else []


def run(model: Any, given: Inputs) -> torch.Tensor:
    """What a model computes, its logits where it has such."""
    torch.manual_seed(7)
    with torch.no_grad():
        found = dict(model(**given))
    return torch.cat(flat(found["logits"] if torch.is_tensor(found.get("logits")) else found))


def prepared(kind: str, name: str, task: str, folder: Path) -> tuple[Inputs, torch.dtype]:
    """The model, saved; what it is given, and its dtype. An error where it does not run."""
    errors: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        shutil.rmtree(folder, ignore_errors=True)
        made(kind, name, task).to(dtype).save_pretrained(folder)
        model = loaded(name, folder, dtype)
        for values in inputs(model.config):
            given = {key: one.to(dtype) if one.is_floating_point() else one for key, one in values.items()}
            try:
                if torch.isfinite(run(model, given)).all():
                    return given, dtype
            except Exception as error:
                errors.append(f"{type(error).__name__} {str(error)[:60]}")
    raise ValueError(f"no input: {errors[:4]}")


def loaded(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder."""
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def round_alike(dense: Any, packed: Any) -> None:
    """Have a dense model's layers round their inputs as those of the packed one do."""
    layers = dict(dense.named_modules())
    for name, layer in packed.named_modules():
        said = getattr(layer, "quantization_scheme", None)
        if said is not None and said.input_activations is not None:
            layers[name].register_forward_pre_hook(
                lambda _, args, layer=layer, said=said: (
                    forward_quantize(layer, args[0], "input", said.input_activations),
                    *args[1:],
                )
            )


def compared(name: str, folder: Path, given: Inputs, dtype: torch.dtype, rounded: bool) -> Result:
    """The packed export beside the dense one."""
    dense = loaded(name, folder / "dense", dtype)
    try:
        packed = loaded(name, folder / "packed", dtype)
        found = run(packed, given)
    except Exception as error:
        return "failing", f"{type(error).__name__} {str(error)[:300]}"
    if rounded:
        round_alike(dense, packed)
    expected = run(dense, given)
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    there = packed.state_dict()
    other = [key for key, one in dense.state_dict().items() if not close(there.get(key), one)]
    return "right" if error < 0.03 and not other else "failing", f"{error:.3g} {other[:3]}"


def close(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether a parameter is the same, or nearly."""
    if found is None or found.shape != expected.shape:
        return False
    return bool((found.float() - expected.float()).norm() <= 0.01 * expected.float().norm())


def swept(store: ms.Store, name: str, folder: Path, given: Inputs, dtype: torch.dtype, form: str) -> Result:
    """One format of a model that is stored."""
    variant = "int8" if form == "W8A8" else form
    codec, params = CODECS[variant]
    for part in ("dense", "packed"):
        shutil.rmtree(folder / part, ignore_errors=True)
    try:
        if variant not in store.versions("m")[-1].variants:
            rule = {"targets": ["linear", "convolution"], "codec": {"name": codec, "params": params}}
            store.compress("m", {"name": "v", "rules": [rule]}, variant=variant)
        store.export(f"m:{variant}", folder / "packed", **({"activations": "int8"} if form == "W8A8" else {}))
    except (ModelStoreError, ValueError) as error:
        return "refused", str(error)
    store.export(f"m:{variant}", folder / "dense", dequantize=True)
    return compared(name, folder, given, dtype, form == "W8A8")


def main() -> None:
    """Sweep a task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--only", nargs="*", default=())
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str]] = Counter()
    with (options.out / f"{options.task}.jsonl").open("a") as lines:
        for kind, name in classes(options.task):
            if options.only and kind not in options.only:
                continue
            folder = options.out / name
            try:
                given, dtype = prepared(kind, name, options.task, folder / "m")
                store = ms.open(f"memory://{uuid.uuid4().hex}", threads=1)
                store.save("m", folder / "m")
                results = {form: swept(store, name, folder, given, dtype, form) for form in options.formats}
            except Exception as error:
                results = {"*": ("skipped", f"{type(error).__name__} {str(error)[:200]}")}
            shutil.rmtree(folder, ignore_errors=True)
            for form, (verdict, why) in results.items():
                counts[form, verdict] += 1
                lines.write(json.dumps([kind, name, form, verdict, why]) + "\n")
                print(kind, form, verdict, why[:160], flush=True)
    for (form, verdict), n in sorted(counts.items()):
        print(f"{form:12} {verdict:8} {n}")


if __name__ == "__main__":
    main()
