"""The model that calibrations are tried on."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

import modelstore as ms
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import make_language_model
from tests.helpers.stores import open_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, as transformers saves it."""
    pytest.importorskip("transformers")
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def store(folder: Path) -> ms.Store:
    """A store in memory that has it as "m"."""
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    return opened
