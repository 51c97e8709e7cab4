"""What 4 bits cost a real language model: ours and other tools', perplexity of the same text by the same code.

What other tools make of the linear layers is dequantized to float32 and evaluated as a model of its own.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Setting, fresh, skipped

LIMIT = 8192  # tokens
CONTEXT = 512
HQQ = {
    "name": "hqq4-g128",
    "rules": [
        {
            "targets": ["linear"],
            "codec": {
                "name": "int",
                "params": {"bits": 4, "symmetric": False, "group_size": 128, "method": "hqq"},
            },
        }
    ],
}
OURS: dict[str, Any] = {"int4 (MSE clip)": "int4", "int4-affine (MSE clip)": "int4-affine", "HQQ, g128": HQQ}
NARROW: dict[str, Any] = {"int4-g32 (MSE clip)": "int4-g32"}  # as many bits as Q4_0
PEERS = {
    "hqq": "HQQ, 4 bits, g128",
    "torchao": "torchao IntxWeightOnly, 4 bits, symmetric, g128 (g64 where 128 does not divide)",
    "torchao affine": "torchao IntxWeightOnly, 4 bits, asymmetric, g128 (g64 where 128 does not divide)",
}
Q4_0 = {"gguf": "GGUF Q4_0 (groups of 32)"}
GOAL = "≤ 1× the increase"


def mine(model: str, text: str, folder: str, recipe: Any) -> dict[str, float]:
    """The perplexity of one of our variants, and of the original (recipe None); stored bits a weight."""
    import modelstore as ms

    shutil.rmtree(folder, ignore_errors=True)
    store = ms.open(folder)
    store.save("bench", model)
    if recipe is None:
        return {"perplexity": _perplexity(store, "bench", text)}
    done = store.compress("bench", recipe)
    (info,) = done.variants
    names = {choice.name for choice in store.plan_compression("bench", recipe).compressed}
    described = [t for t in store.describe(f"bench:{info.variant}").tensors if t.name in names]
    bits = 16 * sum(t.stored for t in described) / sum(t.bytes for t in described)
    found = {"perplexity": _perplexity(store, f"bench:{info.variant}", text), "bits": bits}
    shutil.rmtree(folder)
    return found


def theirs(model: str, text: str, folder: str, tool: str) -> dict[str, float]:
    """The perplexity of the model whose linear layers were quantized by another tool."""
    from safetensors.torch import load_file

    import modelstore as ms
    from benchmarks.peers import files
    from benchmarks.quantizers import is_linear, restored

    shutil.rmtree(folder, ignore_errors=True)
    tensors = {name: tensor for path in files(model) for name, tensor in load_file(path).items()}
    tensors = {name: restored(tool, tensor) if is_linear(name) else tensor for name, tensor in tensors.items()}
    others = {path.name: path for path in Path(model).iterdir() if path.suffix in (".json", ".jinja")}
    store = ms.open(folder)
    store.save("bench", tensors, files=others)
    found = {"perplexity": _perplexity(store, "bench", text)}
    shutil.rmtree(folder)
    return found


def _perplexity(store: Any, ref: str, text: str) -> float:
    found = store.eval(ref, text=Path(text), limit=LIMIT, context=CONTEXT, baseline=False, keep=False)
    return float(found.measured.perplexity)


def rows(setting: Setting) -> list[Row]:
    """The increase of perplexity of our best in groups of 128 against each tool's; and in groups of 32 against Q4_0."""
    work = "4 bits, smollm2-rg: increase of perplexity"
    model = setting.real / "smollm2-rg" if setting.real else None
    if model is None or not model.exists() or setting.text is None:
        return [skipped(work, "other quantizers", GOAL, "--real with smollm2-rg and --text are needed")]
    rest = {
        "model": str(model.resolve()),
        "text": str(setting.text.resolve()),
        "folder": str(setting.folder / "scratch"),
    }
    run = partial(fresh, "benchmarks.quality4:mine", **rest)
    base = run(recipe=None)["perplexity"]
    ours = {name: run(recipe=recipe) for name, recipe in {**OURS, **NARROW}.items()}
    more = {name: found["perplexity"] - base for name, found in ours.items()}
    best = min(OURS, key=lambda name: more[name])
    note = f"original {base:.2f}; " + ", ".join(
        f"{name} {found['perplexity']:.2f} at {found['bits']:.2f} bits" for name, found in ours.items()
    )
    made = []
    for tool, words in {**PEERS, **Q4_0}.items():
        for name in (best, *NARROW) if tool in Q4_0 else (best,):
            title = f"{work}, {name}"
            try:
                other = fresh("benchmarks.quality4:theirs", **rest, tool=tool)["perplexity"] - base
            except RuntimeError as error:
                made.append(skipped(title, words, GOAL, str(error).strip().splitlines()[-1]))
                continue
            ratio = more[name] / other
            cells = f"+{more[name]:.2f}", f"+{other:.2f}"
            made.append(Row(title, words, *cells, ratio, GOAL, ratio <= 1, note, {"ours": ours, "original": base}))
    return made
