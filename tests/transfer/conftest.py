"""A store with a small teacher, a student that was cut out of it, and texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import modelstore as ms
from tests.helpers.language import WORDS, make_language_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text_of(seed: int, words: int) -> str:
    """A text of the words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    return "".join(WORDS[at] for at in torch.randint(0, len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, as transformers saves it."""
    pytest.importorskip("transformers")
    return make_language_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    """A folder of texts."""
    folder = tmp_path / "novels"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.txt").write_text(text_of(seed, 1200))
    (tmp_path / "other.txt").write_text(text_of(7, 400))
    return folder


@pytest.fixture
def store(teacher: Path, tmp_path: Path) -> ms.Store:
    """A store that has the teacher as "m", and it without a layer as "small"."""
    opened = ms.open(tmp_path / "store")
    opened.save("m", teacher)
    opened.restructure("m", "small", layers=[0])
    return opened
