"""A store with a small model of a kind, whose tokenizer comes from a tiny language model."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import modelstore as ms
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import make_language_model
from tests.helpers.stores import open_on
from tests.restructure.models import make


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, as transformers saves it."""
    pytest.importorskip("transformers")
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Callable[[str], ms.Store]:
    """A store in memory that has a model of a kind as "m"."""

    def save(kind: str) -> ms.Store:
        import transformers

        out = tmp_path / kind
        vocabulary = transformers.AutoConfig.from_pretrained(folder).vocab_size
        make(kind, vocabulary).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (out / name).write_bytes((folder / name).read_bytes())
        store = open_on(MemoryStorage(uuid.uuid4().hex))
        store.save("m", out)
        return store

    return save
