"""llama.cpp's imatrix file: its sums are those of the inputs that transformers' own layers get, under llama.cpp's names."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.errors import ConflictError, UnsupportedError
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HOW = ms.Calibration(TEXT, samples=5, length=16, seed=3)
LAYERS = {
    **{f"self_attn.{p}_proj": f"attn_{to}" for p, to in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def store(folder: Path) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    return opened


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The inputs of every linear layer, by its name."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def expected(store: ms.Store, ref: str, folder: Path) -> dict[str, Any]:
    """Sums by llama.cpp's names, of the whole model as transformers runs it on the same samples."""
    from modelstore.calibrate.text import cut

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    config = transformers.AutoConfig.from_pretrained(folder)
    ids = cut(tokens, HOW, config.vocab_size, None).ids
    made = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=store.load(ref)).float().eval()
    with watched(made) as seen, torch.inference_mode():
        made(ids)
    rows = {name: torch.cat(inputs).flatten(0, -2) for name, inputs in seen.items()}
    return {
        f"blk.{at}.{to}.weight": rows[f"model.layers.{at}.{name}"]
        for at in range(config.num_hidden_layers)
        for name, to in LAYERS.items()
    }


@pytest.mark.parametrize("ref", ["m", "m:int4-g32"])
def test_sums_are_those_of_the_layers_inputs(store: ms.Store, folder: Path, tmp_path: Path, ref: str) -> None:
    if ":" in ref:
        store.compress("m", "int4-g32")
    path = tmp_path / "m.imatrix.gguf"
    done = store[ref].imatrix(path, calibration=HOW)
    assert done.bytes == path.stat().st_size
    read = gguf.GGUFReader(path)
    found = {tensor.name: np.array(tensor.data).reshape(-1) for tensor in read.tensors}
    inputs = expected(store, ref, folder)
    assert found.keys() == {f"{name}.{what}" for name in inputs for what in ("in_sum2", "counts")}
    for name, rows in inputs.items():
        assert found[f"{name}.counts"].tolist() == [5 * 16]
        np.testing.assert_allclose(
            found[f"{name}.in_sum2"], rows.double().square().sum(0).numpy(), rtol=2e-4, atol=1e-6
        )
    assert read.fields["general.type"].contents() == "imatrix"
    assert read.fields["imatrix.chunk_count"].contents() == 5
    assert read.fields["imatrix.chunk_size"].contents() == 16


def test_a_file_that_is_there_is_kept(store: ms.Store, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(ConflictError):
        store["m"].imatrix(path, calibration=HOW)
    assert path.read_bytes() == b"mine"
    store["m"].imatrix(path, calibration=HOW, overwrite=True)
    assert path.read_bytes() != b"mine"


def test_wrong_input_is_refused_before_anything_runs(store: ms.Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"let it end in \.gguf"):
        store["m"].imatrix(tmp_path / "m.dat", calibration=HOW)
    with pytest.raises(ValueError, match="give a longer text"):
        store["m"].imatrix(tmp_path / "m.gguf", calibration=ms.Calibration("a b c", length=32))
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("w", {"w": torch.ones(4, 4)})
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        opened["w"].imatrix(tmp_path / "w.gguf", calibration=HOW)
    assert not list(tmp_path.iterdir())
