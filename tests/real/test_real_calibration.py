"""Methods that look at data lose what they promise, in their order, on a trained model and real texts.

`MODELSTORE_TEST_MODELS` names a folder that has the model, and `MODELSTORE_TEST_TEXTS` one of novels: Emma is looked at,
Persuasion predicted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import modelstore as ms

MODEL = Path(os.environ.get("MODELSTORE_TEST_MODELS", "/nowhere")) / "tinylm-judge"
TEXTS = [
    Path(os.environ.get("MODELSTORE_TEST_TEXTS", "/nowhere")) / f"austen_{name}.txt" for name in ("emma", "persuasion")
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "config.json").exists() or not all(text.exists() for text in TEXTS),
        reason="no trained model and texts here",
    ),
]
HALF, EACH_ROW, TWO_OF_FOUR = {"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"n": 2, "m": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    opened = ms.open(tmp_path_factory.mktemp("store"))
    opened.save("m", MODEL)
    return opened


def make(store: ms.Store, name: str, codec: dict[str, Any], method: dict[str, Any] | None = None) -> str:
    """A variant of one rule; its reference."""
    recipe = {"name": name, "rules": [{"targets": ["linear"], "codec": codec, "method": method}]}
    store.compress("m", recipe, calibration=ms.Calibration(TEXTS[0], samples=16, length=512) if method else None)
    return f"m:{name}"


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=["half", "2-of-4"])
def test_magnitude_wanda_sparsegpt_and_reconstruction_lose_less_each(store: ms.Store, pattern: dict[str, Any]) -> None:
    rows = {"name": "sparse", "params": EACH_ROW if pattern is HALF else pattern}
    whole, of = {"name": "sparse", "params": pattern}, len(pattern)
    made = [
        make(store, f"magnitude{of}", rows),
        make(store, f"wanda{of}", rows, {"name": "wanda"}),
        make(store, f"sparsegpt{of}", whole, {"name": "sparsegpt"}),
        make(store, f"again{of}", whole, {"name": "sparsegpt", "params": {"reconstruct": True}}),
    ]
    found = store.eval(made, text=TEXTS[-1], limit=4096, context=512)
    magnitude, wanda, sparsegpt, again = (one.measured.kl for one in found)
    assert magnitude > wanda > sparsegpt > again
    assert again <= 0.8 * sparsegpt
    assert sparsegpt <= 0.72 * wanda
