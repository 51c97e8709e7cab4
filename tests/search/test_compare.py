"""One table over variants, which of them no other beats, and the picture of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import modelstore as ms
from modelstore.cli.main import app
from modelstore.search.picture import front
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


def filled(store: ms.Store, folder: Path) -> ms.Store:
    store.save("m", folder)
    store.save("other", folder)
    store.compress("m", "int8")
    store.compress("m", "int4-rtn")
    store.compress("m", "int3")
    store.compress("other", "int4")
    return store


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(3, 0.1), (2, 0.2), (4, 0.1), (2, 0.3), (9, 0.0)], [True, True, False, False, True]),
        ([(1, 0.1), (1, 0.1)], [True, True]),
        ([(1, None), (2, 0.1)], [False, True]),
        ([], []),
    ],
)
def test_the_front_is_what_no_other_beats(points: list[tuple[int, float | None]], kept: list[bool]) -> None:
    assert front(points) == kept


def test_all_variants_of_a_version_are_one_table(folder: Path, tmp_path: Path) -> None:
    store = filled(open_on(MemoryStorage(uuid.uuid4().hex)), folder)
    rows = store.compare("m", text=TEXT, context=32, plot=tmp_path / "a.svg")
    assert [row.variant for row in rows] == ["original", "int3", "int4-rtn", "int8"]
    sizes = {info.variant: info.stored for info in store.variants("m")}
    assert {row.variant: row.stored for row in rows} == sizes
    assert rows[0].measured.kl == 0
    assert rows[0].front
    assert rows[1].front  # the smallest
    measured = store.eval(["m:int8"], text=TEXT, context=32)[0]
    assert measured.known
    assert measured.measured == rows[3].measured
    picture = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    circles = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert [circle[0].text for circle in circles] == [row.ref for row in rows]


def test_variants_of_several_models_are_each_compared_to_their_own_original(folder: Path, tmp_path: Path) -> None:
    store = filled(open_on(MemoryStorage(uuid.uuid4().hex)), folder)
    rows = store.compare(
        ["m:int8", "other@1:int4", "m"], text=TEXT, context=32, keep=False, plot=str(tmp_path / "a.html")
    )
    assert [row.ref for row in rows] == ["m@1:int8", "m@1:original", "other@1:int4"]
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert "evaluation" not in store.describe("m:int8").metrics


def test_wrong_input_is_refused_before_anything_is_run(folder: Path, tmp_path: Path) -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", folder)
    with pytest.raises(ValueError, match="is not the name of a picture"):
        store.compare("m", text=TEXT, plot=tmp_path / "a.gif")
    with pytest.raises(ms.errors.NotFoundError, match=r"no folder .*nowhere: make it first"):
        store.compare("m", text=TEXT, plot=tmp_path / "nowhere" / "a.svg")
    with pytest.raises(ValueError, match="nothing to compare"):
        store.compare([], text=TEXT)
    with pytest.raises(ms.errors.NotFoundError):
        store.compare(["m", "m:int4"], text=TEXT)


def test_a_picture_takes_the_place_of_a_link_and_of_nothing_else(folder: Path, tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", folder)
    (tmp_path / "mine.svg").write_text("mine")
    (tmp_path / "link.svg").symlink_to("mine.svg")
    store.compare("m", text=TEXT, context=32, plot=tmp_path / "link.svg")
    assert (tmp_path / "mine.svg").read_text() == "mine"
    assert not (tmp_path / "link.svg").is_symlink()
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "folder.svg").mkdir()
    for place, why in (
        ("pipe.svg", "is a pipe or a device"),
        ("folder.svg", "is a folder"),
        ("store/packs/a.svg", "belongs to the store"),
    ):
        with pytest.raises(ms.errors.ConflictError, match=why):
            store.compare("m", text=TEXT, context=32, plot=tmp_path / place)
    assert not list(tmp_path.glob(".*"))  # nothing half-written


def test_the_command_says_the_same(folder: Path, tmp_path: Path) -> None:
    url, text = str(tmp_path / "store"), tmp_path / "t.txt"
    text.write_text(TEXT)
    ms.open(url).save("m", folder)
    ms.open(url).compress("m", "int8")
    call = ["compare", "m", "--text", str(text), "--context", "32", "--store", url]
    done = CliRunner().invoke(app, [*call, "--plot", str(tmp_path / "a.svg")])
    assert done.exit_code == 0, done.output
    assert "m@1:int8" in done.stdout
    assert (tmp_path / "a.svg").exists()
    told = CliRunner().invoke(app, [*call, "--json"]).stdout
    assert '"front":true' in told.replace(" ", "")
    fit = ["plan", "compress", "m", "--fit", "21KiB", "--store", url]
    first = CliRunner().invoke(app, [*fit, "--calibration", str(text), "--samples", "4", "--length", "32"])
    assert "was not measured yet" in first.stdout
    after = CliRunner().invoke(app, [*fit, "--calibration", str(text), "--samples", "4", "--length", "32", "--measure"])
    assert "expected to diverge" in after.stdout
    made = ["compress", "m", "--fit", "21KiB", "--store", url]
    assert "fit-21KiB" in CliRunner().invoke(app, made).stdout
