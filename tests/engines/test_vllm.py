"""Every packed export in vLLM: it answers as it does from the same variant written dense.

Needs the environment of `make engines`. vLLM loads all folders in one process of its own, which knows nothing of modelstore.
A CPU has kernels for some formats only: what vLLM says then must be that it has no kernel, and not that the folder is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelstore as ms
from tests.compress.llama import FILES, llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make engines"),
]

INTEGERS = ("int4", "int4-rtn", "int4-affine", "int4-g32", "hqq4")  # vLLM runs these on CPUs with AVX-512
W8A8 = "int8-W8A8"  # the variant int8 beside int8 activations; vLLM runs it on CPUs with AVX-512 too
OTHERS = ("int8", "int3", "int2", "fp8", "fp8-block", "mxfp4", "nvfp4")
NO_KERNEL = re.compile(
    r"Failed to find a kernel|Marlin FP4 not available|'_C' object has no attribute 'cpu_\w+'|not supported on CPU"
)
AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
PROMPT, TOKENS = [1, 5, 9, 33, 70, 200, 7, 8, 12, 99], 6


def answers(folders: Mapping[str, Path], prompt: list[int], tokens: int) -> dict[str, Any]:
    """What vLLM answers from each folder."""
    asked = json.dumps({"prompt": prompt, "tokens": tokens, "folders": {k: str(v) for k, v in folders.items()}})
    script = Path(__file__).with_name("vllm_answers.py")
    done = subprocess.run([sys.executable, str(script), asked], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(lines) == len(folders), done.stderr[-3000:]
    return {line.pop("name"): line for line in lines}


def exported(store: ms.Store, presets: tuple[str, ...], out: Path) -> dict[str, Path]:
    """Each preset packed and dense, and the original."""
    folders = {"original": out / "original"}
    store.export("m", folders["original"])
    for preset in presets:
        variant = preset.removesuffix("-W8A8")
        if variant not in store.versions("m")[-1].variants:
            store.compress("m", variant)
        for kind in ("packed", "dense"):
            folders[f"{preset} {kind}"] = out / f"{preset}-{kind}"
            beside = "int8" if preset == W8A8 and kind == "packed" else None
            store.export(f"m:{variant}", folders[f"{preset} {kind}"], dequantize=kind == "dense", activations=beside)
    return folders


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of a small Llama."""
    folder = tmp_path_factory.mktemp("vllm")
    store = ms.open(folder / "store")
    store.save("m", llama(), files=FILES)
    return answers(exported(store, (*INTEGERS, W8A8, *OTHERS), folder), PROMPT, TOKENS)


def test_the_original_is_computed(found: dict[str, Any]) -> None:
    assert len(found["original"]["tokens"]) == TOKENS


@pytest.mark.parametrize("preset", [*INTEGERS, W8A8, *OTHERS])
def test_a_packed_export_is_computed_as_the_dense_one(found: dict[str, Any], preset: str) -> None:
    packed, dense = found[f"{preset} packed"], found[f"{preset} dense"]
    if "error" in packed:
        assert NO_KERNEL.search(packed["error"]), packed["error"]
        if preset in (*INTEGERS, W8A8):
            assert not AVX512, packed["error"]
        pytest.skip(f"vLLM has no kernel for {preset} on this CPU")
    # The tokens of the prompt are scored alike; kernels round activations and sums in their own ways.
    n = len(PROMPT) - 1
    np.testing.assert_allclose(packed["logprobs"][:n], dense["logprobs"][:n], atol=0.15)
    if preset != W8A8:  # of a model of random weights, rounded activations may choose another token that is as likely
        assert packed["tokens"][0] == dense["tokens"][0]


def real() -> Path | None:
    """SmolLM2, where it is on this machine."""
    root = os.environ.get("MODELSTORE_TEST_MODELS")
    folder = Path(root) / "smollm2" if root else None
    return folder if folder is not None and folder.is_dir() else None


@pytest.mark.skipif(real() is None, reason="SmolLM2 is not on this machine")
def test_a_real_model_says_what_its_dense_export_says(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = real()
    assert folder is not None
    store = ms.open(tmp_path / "store")
    store.save("m", folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("The capital of France is").ids
    presets = ("int4-g32", "hqq4") if AVX512 else ()
    found = answers(exported(store, presets, tmp_path), prompt, 4)
    assert "Paris" in tokenizer.decode(found["original"]["tokens"])
    for preset in presets:
        packed, dense = found[f"{preset} packed"], found[f"{preset} dense"]
        assert packed["tokens"] == dense["tokens"]
        np.testing.assert_allclose(packed["logprobs"], dense["logprobs"], atol=0.15)
