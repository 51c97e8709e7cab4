"""`eval`, and what `show` says and draws of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelstore as ms
from tests.cli.conftest import Command
from tests.helpers.language import TEXT, make_language_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sea.txt"
    path.write_text(TEXT)
    return path


def test_eval_measures_and_show_says_it(run: Command, folder: Path, text: Path, tmp_path: Path) -> None:
    run("save", folder, "m")
    run("compress", "m", "round")
    assert "dB" in run("show", "m:round").stdout
    done = run("eval", "m", "m:round", "--text", text, "--context", "32", "--batch", "2")
    measured = ms.open(tmp_path / "store").eval("m:round", text=text, context=32)
    assert measured.known
    assert f"{measured.measured.perplexity:.3f}" in done.stdout
    assert "sea.txt" in done.stdout
    (line,) = run("eval", "m:round", "--text", text, "--context", "32", "--json").stdout.splitlines()
    (answer,) = json.loads(line)
    assert answer["measured"]["perplexity"] == measured.measured.perplexity
    assert answer["known"]
    shown = run("show", "m").stdout
    assert "PERPLEXITY" in shown
    assert f"{measured.measured.kl:.5f}" in shown
    about = json.loads(run("show", "m:round", "--json").stdout)
    assert about["metrics"]["evaluation"]["perplexity"] == measured.measured.perplexity


def test_several_texts_are_measured_one_after_the_other(run: Command, folder: Path, text: Path, tmp_path: Path) -> None:
    run("save", folder, "m")
    run("compress", "m", "round")
    other = tmp_path / "other.txt"
    other.write_text(TEXT[40:600])
    args = ("eval", "m", "m:round", "--text", text, "--text", other, "--context", "32")
    found = json.loads(run(*args, "--json").stdout)
    assert [(one["variant"], one["measured"]["text"]) for one in found] == [
        ("original", "sea.txt"),
        ("round", "sea.txt"),
        ("original", "other.txt"),
        ("round", "other.txt"),
    ]
    shown = run(*args).stdout
    assert shown.count("PERPLEXITY") == 2 * 2
    assert shown.index("sea.txt") < shown.index("other.txt")
    store = ms.open(tmp_path / "store")
    again = store.eval("m:round", text=[text, other], context=32)
    assert [one.measured.perplexity for one in again] == [
        found[1]["measured"]["perplexity"],
        found[3]["measured"]["perplexity"],
    ]
    assert all(one.known for one in again)
    with pytest.raises(ValueError, match="give a text"):
        store.eval("m", text=[])


def test_the_original_is_left_out_where_it_is_not_wanted(run: Command, folder: Path, text: Path) -> None:
    run("save", folder, "m")
    run("compress", "m", "round")
    args = ("eval", "m:round", "--text", text, "--context", "16", "--stride", "8", "--limit", "60")
    (answer,) = json.loads(run(*args, "--no-baseline", "--no-keep", "--json").stdout)
    assert answer["measured"]["kl"] is None
    assert (answer["measured"]["tokens"], answer["measured"]["stride"]) == (60, 8)
    assert "evaluation" not in json.loads(run("show", "m:round", "--json").stdout)["metrics"]


@pytest.mark.parametrize(
    ("name", "magic"), [("q.png", b"\x89PNG"), ("q.svg", b"<svg"), ("q.html", b"<!doctype html>"), ("q.pdf", b"%PDF")]
)
def test_show_draws_a_picture(run: Command, folder: Path, text: Path, tmp_path: Path, name: str, magic: bytes) -> None:
    if name.endswith(("png", "pdf")):
        pytest.importorskip("matplotlib")
    run("save", folder, "m")
    run("compress", "m", "round")
    out = tmp_path / name
    assert str(out) in run("show", "m", "--plot", out).stderr  # of errors, as long as that is all that is known
    first = out.read_bytes()
    assert first.startswith(magic)
    run("eval", "m:round", "--text", text, "--context", "32")
    run("show", "m", "--plot", out)
    assert out.read_bytes() != first
    beside = tmp_path / f"compared-{name}"
    drawn = run("compare", "m", "--text", text, "--context", "32", "--plot", beside)  # one rule for both
    assert f"drew {beside}" in drawn.stderr
    assert beside.read_bytes().startswith(magic)


def test_what_cannot_be_done_is_said(run: Command, folder: Path, text: Path, tmp_path: Path) -> None:
    run("save", folder, "m")
    for words in (["show", "m"], ["compare", "m", "--text", text]):
        said = run(*words, "--plot", tmp_path / "q.txt", code=2).stderr
        assert "q.txt is not the name of a picture: let it end in .svg, .html, .png or .pdf" in said
        assert "no folder" in run(*words, "--plot", tmp_path / "nowhere" / "q.svg", code=1).stderr
    assert "nothing was measured" in run("show", "m", "--plot", tmp_path / "q.png", code=1).stderr
    assert "64 positions" in run("eval", "m", "--text", text, "--context", "512", code=2).stderr
    run("eval", "m", "--text", tmp_path / "nowhere.txt", code=2)
    run("eval", "m", code=2)
    assert "no variant 'int4'" in run("eval", "m:int4", "--text", text, "--context", "32", code=1).stderr
