"""How the command starts, ends and explains itself: without a store, in processes of its own where that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from modelstore.cli.main import app

HEAVY = ("torch", "numpy", "numba", "fsspec", "safetensors", "zstandard", "blake3", "rich", "zarr", "msgspec")


def walk(group: Any, *before: str) -> Iterator[tuple[str, Any]]:
    """Every command by the words that call it; a group's come after the group itself."""
    for name, command in group.commands.items():
        yield " ".join((*before, name)), command
        if hasattr(command, "commands"):
            yield from walk(command, *before, name)


FOUND = dict(sorted(walk(get_command(app))))
COMMANDS = list(FOUND)
PRINTING = [
    name
    for name in COMMANDS
    if not hasattr(FOUND[name], "commands") and name not in ("demo", "cat", "cluster top", "serve")
]


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "MODELSTORE_URL"} | environment
    return subprocess.run(
        [sys.executable, "-m", "modelstore", *args], capture_output=True, text=True, env=env, timeout=120, check=False
    )


@pytest.mark.parametrize("args", [["--help"], ["save", "--help"], ["--version"], ["version"]], ids=" ".join)
def test_nothing_heavy_is_imported_for_help(args: list[str]) -> None:
    code = (
        "import sys, modelstore.cli.main as m\n"
        f"try: m.app({args!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"heavy = [n for n in {HEAVY!r} if n in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert command in done.stdout
    for line in done.stdout.splitlines():
        assert len(line) <= 80, line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_argument_has_a_help_text(command: str) -> None:
    for parameter in FOUND[command].params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name}"


@pytest.mark.parametrize("command", PRINTING)
def test_every_command_that_prints_a_result_prints_json_too(command: str) -> None:
    assert "--json" in CliRunner().invoke(app, [*command.split(), "--help"]).stdout


def test_without_a_command_it_shows_what_there_is() -> None:
    done = run()
    assert "Commands:" in done.stdout + done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.parametrize(
    "args",
    [
        ["frobnicate"],
        ["ls"],  # no store
        ["save", "--store", "x"],
        ["save", "does-not-exist", "name", "--store", "x"],
        ["gc", "--grace", "soon", "--store", "x"],
        ["ls", "--memory", "1GiB", "--store", "x"],
        ["verify", "--memory", "lots", "--store", "x"],
        ["save", ".", "name", "--codec", "zip", "--store", "x"],
        ["rm", "name", "--store", "x"],
        ["rm", "name@1", "--all", "--store", "x"],
        ["load", "name", "--store", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two(args: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MODELSTORE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is made by a command that was wrong"

    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stderr)["error"]["kind"] == "usage"


def test_no_store_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSTORE_URL", raising=False)
    done = CliRunner().invoke(app, ["ls"])
    assert "--store URL" in done.stderr
    assert "MODELSTORE_URL" in done.stderr


def test_version_names_what_is_installed() -> None:
    from importlib.metadata import version

    done = CliRunner().invoke(app, ["version", "--json"])
    found = json.loads(done.stdout)
    assert found["modelstore"] == version("modelstore")
    assert found["torch"] == version("torch")
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"modelstore {version('modelstore')}"


def test_completion_offers_commands() -> None:
    done = run(_MODELSTORE_COMPLETE="complete_bash", COMP_WORDS="modelstore ver", COMP_CWORD="1")
    assert done.stdout.split() == ["verify", "version"]
    assert done.stderr == ""


@pytest.mark.parametrize("url", ["no-such-protocol://x", "/proc/nothing/here", "http://127.0.0.1:9/x"])
def test_completion_of_names_never_fails(url: str) -> None:
    words = f"modelstore show --store {url} a"
    done = run(_MODELSTORE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="4")
    assert done.stdout.strip() == ""
    assert done.stderr == ""


def test_the_page_on_the_command_line_is_complete() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in FOUND.items():
        assert hasattr(command, "commands") or f"| `{name}" in page, name
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("--") or f"`{option}" in page or f" {option}" in page, f"{name} {option}"
