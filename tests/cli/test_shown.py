"""Whatever names hold, a terminal gets only what is seen, JSON stays JSON, and tables fit."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.core

import modelstore as ms
from modelstore.cli.cluster import states
from modelstore.cli.compression import evaluating
from modelstore.cli.main import app
from modelstore.cli.terminal import complete, output
from modelstore.cluster.logs import JsonLines
from modelstore.errors import ModelStoreError, NotFoundError
from modelstore.format.answers import cluster_results, results
from modelstore.search.picture import FORMATS, draw
from modelstore.text import cells, json_line, shortened, shown
from tests.cli.screen import Answers, Screen, filled, on_screen

HOSTILE = (
    "w\x1b]0;title\x07\x1b[38;5;199m\x9b31m\x85\x00\b\x7f\u202eevil\u2066\u200b\u200d\ufeff\u2028\u2029\u00ad\u3164\ufe0f"
    "\U000e0041\ud800\udcff\r\rPWN\n\tx[bold red]y[/bold red][/z]$\\frac{"
)
LONG = "model.layers.0.attention.projection." * 12
NEEDS_MORE = {  # commands that speak with more than a store, or with none
    "demo",
    "bench",
    "version",
    "presets",
    "jobs",
    "cat",
    "serve",
    *(f"token {name}" for name in ("create", "list", "revoke")),
    *(f"cluster {name}" for name in ("start", "status", "top", "stop", "drain", "undrain", "join")),
}


def commands() -> dict[str, Any]:
    """Every command of the program that works on a store, by its name."""
    found: dict[str, Any] = {}

    def walk(group: Any, before: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{before}{name} ")
            elif before + name not in NEEDS_MORE:
                found[before + name] = command

    walk(typer.main.get_command(app), "")
    return found


ARGUMENT = typer.core.TyperArgument
COMMANDS = commands()


def wanted(command: Any, folder: Path) -> list[str]:
    """Arguments that a command cannot do without."""
    given: list[str] = []
    (folder / "text").write_text("a text")
    for parameter in command.params:
        if not parameter.required and not isinstance(parameter, ARGUMENT):
            continue
        if parameter.name in ("source", "text", "calibration"):
            value = str(folder / "text")
        elif parameter.name in ("out", "path"):
            value = str(folder / "out.safetensors")
        elif parameter.name == "what":
            given += ["acme/m@1", str(folder / "other")]
            continue
        elif parameter.name in ("dest", "target", "to"):
            value = str(folder / "other")
        elif parameter.name in ("recipe",):
            value = "int8"
        elif parameter.name in ("tag", "new"):
            value = "prod"
        else:
            value = "acme/m@1"
        given += [value] if isinstance(parameter, ARGUMENT) else [parameter.opts[0], value]
    return given


def arguments(name: str, folder: Path) -> list[str]:
    """A command line that does what the command is for."""
    more = {"show": ["--tensors"], "rm": ["--yes"]}.get(name, [])
    return [*name.split(), *wanted(COMMANDS[name], folder), *more, "--store", str(folder / "store")]


def of(monkeypatch: pytest.MonkeyPatch, text: str, args: list[str], error: Exception | None = None) -> Screen:
    """Run a command on a store whose every answer is full of a text."""
    monkeypatch.setattr(ms, "open", lambda *_, **__: Answers(text, error))
    return on_screen(args, monkeypatch)


def forbidden(text: str, *, drawn: bool = False) -> list[str]:
    """What is not to arrive; a progress bar's own sequences, which are of other kinds, are left out of it."""
    if drawn:
        assert "\x1b[38;5;199m" not in text
        assert "\rPWN" not in text
        text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text).replace("\r", "")
    return [hex(ord(c)) for c in text if c != "\n" and (shown(c) != c or unicodedata.category(c) == "Cf")]


@pytest.mark.parametrize("name", COMMANDS)
def test_names_do_not_steer_the_terminal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = of(monkeypatch, HOSTILE, arguments(name, tmp_path))
    assert not forbidden(screen.out)
    assert not forbidden(screen.err, drawn=True)
    assert "should not happen" not in screen.err
    assert "[bold red]y[/bold red]" in (screen.out + screen.err).replace("\n", "").replace("  ", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_json_stays_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--json" not in [option for p in COMMANDS[name].params for option in p.opts]:
        pytest.skip("has no JSON")
    screen = of(monkeypatch, HOSTILE, [*arguments(name, tmp_path), "--json"])
    assert not forbidden(screen.out)
    assert json.loads(screen.out) is not None
    assert screen.out.count("\n") == 1


@pytest.mark.parametrize("kind", [ModelStoreError, NotFoundError, ValueError, OSError, KeyError, ModuleNotFoundError])
@pytest.mark.parametrize("option", ["", "--debug", "--json"])
def test_errors_do_not_steer_the_terminal(
    kind: type[Exception], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["show", "m", "--store", "x", *([option] if option else [])]
    screen = of(monkeypatch, HOSTILE, args, kind(HOSTILE))
    assert screen.code in (1, 2)
    assert not forbidden(screen.out + screen.err)
    assert ("Traceback" in screen.err) == (option == "--debug")
    if option == "--json":
        assert json.loads(screen.err.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    "args", [["\x1b[31mls"], ["ls", "--x\x1b[31m"], ["save", "/no\x1b[31m", "m"], ["ls", "a", "\x9b"]]
)
def test_wrong_usage_does_not_steer_the_terminal(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = of(monkeypatch, HOSTILE, args)
    assert screen.code == 2
    assert not forbidden(screen.out + screen.err)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_printed_fits_the_terminal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = of(monkeypatch, LONG, arguments(name, tmp_path))
    assert max(map(cells, screen.out.splitlines()), default=0) <= 80, screen.out


def test_a_clusters_status_does_not_steer(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (HOSTILE, LONG):
        lines = list(states.state_lines(_status(text)))
        output.result(None, lines, as_json=False)
        assert not forbidden(capsys.readouterr().out)


def test_a_clusters_status_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_width", lambda: 80)
    for line in output.shown_lines(states.state_lines(_status(LONG))):
        assert all(cells(part) <= 80 for part in line.splitlines()), line


def _status(text: str) -> cluster_results.ClusterStatus:
    stats = {
        "tiers": {"memory": {"bytes": 10**11}, "disk": {"bytes": 10**12}},
        "hits": 1,
        "asked": 2,
        "from_storage": 10**12,
        "from_peers": 10**12,
        "in_flight": 7,
        "pending": {"saves": 2, "bytes": 3, "problem": text},
    }
    silent = filled(cluster_results.HostStatus, text)
    return cluster_results.ClusterStatus(
        3, 2, (cluster_results.HostStatus(text, text, text, stats), type(silent)(text, text, text, None))
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_a_picture_has_names_as_they_are(tmp_path: Path, ending: str) -> None:
    if ending in (".png", ".pdf"):
        pytest.importorskip("matplotlib")
    out = tmp_path / f"x{ending}"
    draw(evaluating.chart([filled(results.Quality, HOSTILE)], HOSTILE), out)
    assert out.stat().st_size
    if ending in (".svg", ".html"):
        assert not forbidden(out.read_text().replace("\n", ""))


def test_names_of_a_real_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "w\x9b31m\u202e\u200b[red]\x7f"
    store = ms.open(tmp_path / "store")
    store.save("m", {name: torch.ones(3, 4), "v.weight": torch.ones(64, 64)})
    store.save("m", {name: torch.zeros(3, 4), "v.weight": torch.ones(64, 64)})
    for args in (["show", "m", "--tensors"], ["diff", "m@1", "m@2"], ["plan", "compress", "m", "int8"]):
        screen = on_screen([*args, "--store", str(tmp_path / "store")], monkeypatch)
        assert not forbidden(screen.out + screen.err), args
        assert "ed]" in screen.out
    with pytest.raises(ms.errors.NotFoundError) as caught:
        store.tensor("m", name + "\x1b[2J")
    assert not forbidden(str(caught.value))


def test_completions_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [filled(results.ModelInfo, HOSTILE), filled(results.ModelInfo, "acme/m")]
    answers = type("Some", (), {"models": lambda _: models})()
    monkeypatch.setattr(ms, "open", lambda *_: answers)
    context = typer.Context(typer.main.get_command(app))
    context.params = {"store": "x"}
    assert complete.names(context, "") == ["acme/m"]


def test_log_records_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "modelstore"):
        logging.getLogger("modelstore").warning("%s and %r of %d", HOSTILE, HOSTILE, 3)
    assert not forbidden(caplog.messages[0])
    record = logging.LogRecord("modelstore", 30, "", 0, HOSTILE, None, None)
    line = JsonLines({"host": HOSTILE}).format(record)
    assert not forbidden(line)
    assert json.loads(line)["host"].startswith("w")


def test_shown_keeps_what_is_seen() -> None:
    for text in ("model.layers.0", "naïve", "模型", "a b", "–×→", "\\x1b"):
        assert shown(text) == text
    assert shown("a\x1b[0m\u202e") == "a\\x1b[0m\\u202e"
    assert json.loads(json_line({"a": "\x7f\u202e\U000e0041é"})) == {"a": "\x7f\u202e\U000e0041é"}
    assert "é" in json_line("é")
    assert json.loads(json_line([float("nan"), "\ud800"])) == [None, "\\ud800"]


def test_texts_lose_their_middle() -> None:
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abc", 3) == "abc"
    assert cells(shortened("模型" * 20, 9)) <= 9


def test_a_stream_that_lacks_letters_still_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", raw)
        with output.shown_streams():
            output.result(None, ["– é"], as_json=False)
    raw.flush()
    assert raw.buffer.getvalue() == b"\\u2013 \\xe9\n"  # type: ignore[attr-defined]
