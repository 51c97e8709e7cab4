"""A store with a small language model, and `modelstore serve` over it as a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelstore as ms
from tests.helpers.language import make_language_model
from tests.helpers.serving import Server, serving


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first`, a language model; `second`, a fine-tune of it; `store`, which has both as acme/tiny, and a model of one name."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("served")
    make_language_model(root / "first", 128)
    module = transformers.AutoModelForCausalLM.from_pretrained(root / "first")
    with torch.no_grad():
        module.model.norm.weight.add_(0.5)
    shutil.copytree(root / "first", root / "second")
    module.save_pretrained(root / "second")
    store = ms.open(str(root / "store"))
    store.save("acme/tiny", root / "first", tag="prod", message="first")
    store.compress("acme/tiny", "int8")
    store.save("acme/tiny", root / "second", message="tuned", files={"notes/deep/why.md": b"because\n"})
    store.compress("acme/tiny", "int4")
    store.save("alone", root / "first")
    return root


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests that only read."""
    with serving(models / "store", tmp_path_factory.mktemp("server")) as found:
        yield found
