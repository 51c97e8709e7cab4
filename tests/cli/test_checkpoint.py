"""A training checkpoint out of the store, as a file of torch again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Command
from tests.client.test_checkpoints import Color, imagenet, same


@pytest.fixture
def trained(run: Command, tmp_path: Path) -> Path:
    torch.save(imagenet(), tmp_path / "run.pt")
    run("save", tmp_path / "run.pt", "run", "--include", "all")
    return tmp_path


def test_it_is_written_as_it_was(run: Command, trained: Path, answer: Any) -> None:
    out = trained / "again.pt"
    done = answer("checkpoint", "run", "-o", out)
    assert (done["path"], done["bytes"]) == (str(out), out.stat().st_size)
    # scheduler: a Counter
    assert same(torch.load(out, weights_only=False), torch.load(trained / "run.pt", weights_only=False))
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()
    run("save", out, "again", "--include", "all")
    assert not answer("diff", "run:checkpoint", "again:checkpoint")["changed"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_replaced_unasked(run: Command, trained: Path) -> None:
    out = trained / "again.pt"
    out.write_text("mine")
    said = run("checkpoint", "run", "-o", out, code=1).stderr
    assert said == f"modelstore: {out} exists: give another place, or replace it by --overwrite\n"
    assert out.read_text() == "mine"
    run("checkpoint", "run", "-o", out, "--overwrite")
    assert torch.load(out, weights_only=False)["epoch"] == 1
    assert not [path for path in trained.iterdir() if path.name.startswith(".again")]


def test_wrong_places_and_wrong_versions_are_said(run: Command, trained: Path) -> None:
    assert "is a folder" in run("checkpoint", "run", "-o", trained, code=2).stderr
    assert "no folder" in run("checkpoint", "run", "-o", trained / "a/b.pt", code=2).stderr
    assert "is a URL" in run("checkpoint", "run", "-o", "s3://b/x.pt", code=2).stderr
    torch.save({"w": torch.ones(3)}, trained / "w.pt")
    run("save", trained / "w.pt", "plain")
    assert "holds the weights alone" in run("checkpoint", "plain", "-o", trained / "x.pt", code=1).stderr
    assert not (trained / "x.pt").exists()


@pytest.mark.parametrize("name", ["modelstore.json", "packs/new.safetensors"])
def test_nothing_is_written_into_a_store(run: Command, trained: Path, name: str) -> None:
    inside = Path(os.environ["MODELSTORE_URL"]) / name
    before = inside.read_bytes() if inside.exists() else None
    for command in ("checkpoint", "load") if inside.suffix == ".safetensors" else ("checkpoint",):
        assert "belongs to the store" in run(command, "run", "-o", inside, "--overwrite", code=1).stderr
    assert (inside.read_bytes() if inside.exists() else None) == before


@pytest.mark.parametrize(("command", "code"), [("checkpoint", 2), ("load", 1)])
def test_a_pipe_or_a_device_makes_no_room_for_a_file(run: Command, trained: Path, command: str, code: int) -> None:
    os.mkfifo(trained / "pipe.safetensors")
    (trained / "link.safetensors").symlink_to("/dev/null")
    for name in ("pipe.safetensors", "link.safetensors"):
        before = (trained / name).lstat()
        assert "a pipe or a device" in run(command, "run", "-o", trained / name, "--overwrite", code=code).stderr
        assert (trained / name).lstat().st_ino == before.st_ino


def test_what_is_no_plain_data_is_named(run: Command, tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "color": Color.RED}, tmp_path / "odd.pt")
    run("save", tmp_path / "odd.pt", "odd", "--include", "all")
    said = run("checkpoint", "odd", "-o", tmp_path / "out.pt").stderr
    assert "test_checkpoints.Color only what they were made of is kept" in said
    assert torch.load(tmp_path / "out.pt", weights_only=False)["color"].kind.endswith("Color")
