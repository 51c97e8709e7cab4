"""A folder of a source that this user may not read stops the save: what lies there is not left out as if it were nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from modelstore.errors import StorageError
from modelstore.sources.open import open_source
from tests.helpers.users import as_a_user


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user reaches."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def hugging_face(root: Path) -> Path:
    save_file({"w": torch.zeros(2)}, root / "model.safetensors")
    (root / "model.safetensors").chmod(0o644)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.txt").write_text("a")
    return root / "tokenizer"


def group(root: Path) -> Path:
    made = zarr.open_group(root, mode="w")
    for name in ("a", "b"):
        made.create_array(name, data=np.ones((4, 4), np.float32))
    return root / "b"


def orbax(root: Path) -> Path:
    """Arrays in folders, with no group above."""
    for name in ("a", "b"):
        zarr.save_array(root / "layers" / name, np.ones((4, 4), np.float32), zarr_format=2)
    return root / "layers" / "b"


@pytest.mark.parametrize("make", [hugging_face, group, orbax])
def test_it_is_not_left_out(make: Callable[[Path], Path], folder: Path) -> None:
    closed = make(folder)
    open_source(folder)  # all that is imported for it is imported as root
    mode = closed.stat().st_mode
    closed.chmod(0)
    try:
        with as_a_user(), pytest.raises(StorageError, match=f"cannot read {closed}: permission denied: check who may"):
            open_source(folder)
    finally:
        closed.chmod(mode)
