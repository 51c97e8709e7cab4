"""A small model, a store with it, and the command as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from modelstore.cli.main import app
from tests.cli.models import weights, write_model

Command = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model's first state."""
    return write_model(tmp_path / "model", weights())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The model's second state: one tensor differs."""
    return write_model(tmp_path / "tuned", weights() | {"layer.0.bias": torch.ones(64).half()})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command on a store in a folder; it must end with `code`."""
    monkeypatch.setenv("MODELSTORE_URL", str(tmp_path / "store"))

    def run(*args: str | Path, code: int = 0, input: str | None = None) -> Result:
        done = CliRunner().invoke(app, [str(arg) for arg in args], input=input)
        assert done.exit_code == code, f"{args}: exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
        assert "Traceback" not in done.output
        return done

    return run


@pytest.fixture
def answer(run: Command) -> Callable[..., Any]:
    """Run a command with --json; its answer, parsed. stdout holds that one line and nothing else."""

    def answer(*args: str | Path, code: int = 0) -> Any:
        done = run(*args, "--json", code=code)
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout)

    return answer


@pytest.fixture
def saved(run: Command, model: Path, tuned: Path) -> Command:
    """The command, on a store that holds two versions of acme/toy."""
    run("save", model, "acme/toy", "--tag", "prod")
    run("save", tuned, "acme/toy", "--parent", "acme/toy@1")
    return run
