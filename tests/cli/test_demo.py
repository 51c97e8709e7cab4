"""The demonstration and the measurement, from end to end."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import modelstore as ms
from modelstore.cli.demo.model import PACKAGE
from modelstore.cli.main import app
from tests.cli.models import weights, write_model

STEPS = 8


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, so that what is left there is seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("MODELSTORE_URL", str(tmp_path / "precious"))
    return folder


def demo(*args: str | Path) -> Result:
    """Run the demonstration; it must succeed, with all its steps."""
    done = CliRunner().invoke(app, ["demo", *map(str, args)])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    for number in range(1, STEPS + 1):
        assert f"\n{number}. " in done.stdout
    assert "All of it held" in done.stdout
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model, in a folder without what transformers needs."""
    folder = write_model(tmp_path / "A Model", weights())
    (folder / "config.json").unlink()
    return folder


def test_a_folder_and_nothing_left_behind(model: Path, temporary: Path, tmp_path: Path) -> None:
    done = demo(model)
    assert "demo/a-model@1" in done.stdout
    assert not list(temporary.glob("modelstore-*"))
    assert not (tmp_path / "precious").exists(), "the store of the environment is not written to"


def test_kept(model: Path, temporary: Path, tmp_path: Path) -> None:
    demo(model, "--keep", tmp_path / "kept")
    assert ms.open(tmp_path / "kept" / "store").verify(deep=True).ok
    assert (tmp_path / "kept" / "export").is_dir()
    again = CliRunner().invoke(app, ["demo", str(model), "--keep", str(tmp_path / "kept")])
    assert again.exit_code == 2


def test_in_a_store(model: Path, temporary: Path, tmp_path: Path) -> None:
    demo(model, "--store", tmp_path / "mine")
    demo(model, "--store", tmp_path / "mine")
    assert [v.version for v in ms.open(tmp_path / "mine").versions("demo/a-model")] == [1, 2, 3, 4]
    assert not list(temporary.glob("modelstore-*"))


@pytest.mark.parametrize("given", ["neither-folder-nor-id", "."])
def test_what_is_no_model_is_said(given: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", given])
    assert done.exit_code == 1
    assert given in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(temporary.glob("modelstore-*"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="needs the extra 'demo'")
def test_the_packaged_model(temporary: Path) -> None:
    done = demo()
    assert "transformers loads it" in done.stdout or find_spec("transformers") is None
    assert not list(temporary.glob("modelstore-*"))


def test_measurement(model: Path, temporary: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(model), "--json"])
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout)
    assert measured["bytes"] == sum(tensor.nbytes for tensor in weights().values())
    assert all(took > 0 for took in measured["seconds"].values())
    assert "load" in CliRunner().invoke(app, ["bench", str(model), "--in", str(temporary)]).stdout
    assert not list(temporary.glob("modelstore-*"))
