"""Each command, on a real store in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelstore as ms
from modelstore.cli.terminal import complete, output
from tests.cli.conftest import Command
from tests.cli.models import weights, write_model

Answer = Callable[..., Any]


def flip(store: Path) -> Path:
    """Flip a bit in the middle of the largest pack."""
    pack = max((store / "packs").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    return pack


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bits are the same."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert tensor.reshape(-1).view(torch.uint8).equal(other[name].reshape(-1).view(torch.uint8)), name


def test_save_and_load(run: Command, model: Path, tmp_path: Path) -> None:
    done = run("save", model, "toy")
    assert "saved toy@1: 5 tensors" in done.stdout
    out = tmp_path / "out.safetensors"
    assert str(out) in run("load", "toy", "-o", out).stdout
    same(load_file(out), weights())


def test_save_says_what_it_stored(answer: Answer, model: Path, tuned: Path) -> None:
    first = answer("save", model, "toy", "--tag", "prod")
    assert (first["model"], first["version"], first["tensors"]) == ("toy", 1, 5)
    assert first["bytes"] == sum(t.nbytes for t in weights().values())
    assert first["reused"] == 0
    second = answer("save", tuned, "toy", "--parent", "toy@1")
    assert second["version"] == 2
    assert 0 < second["stored"] < first["stored"] / 10
    assert answer("show", "toy")["parent"] is None
    answer("save", tuned, "toy", "--codec", "delta", "--parent", "toy@1")
    assert "toy" in answer("show", "toy@3")["parent"]
    assert answer("show", "toy@prod")["version"] == 1


def test_load_writes_over_a_file_only_when_told(saved: Command, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    done = saved("load", "acme/toy", "-o", out, code=1)
    assert str(out) in done.stderr
    assert out.read_text() == "mine"
    saved("load", "acme/toy@1", "-o", out, "--overwrite")
    same(load_file(out), weights())


def test_export(saved: Command, answer: Answer, tmp_path: Path) -> None:
    done = answer("export", "acme/toy@prod", tmp_path / "hf")
    assert Path(done["path"]) == tmp_path / "hf"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "toy"
    same(load_file(tmp_path / "hf" / "model.safetensors"), weights())
    saved("export", "acme/toy@1", tmp_path / "one.safetensors", "--format", "safetensors")
    same(load_file(tmp_path / "one.safetensors"), weights())


def test_export_cuts_into_shards(saved: Command, tmp_path: Path) -> None:
    saved("export", "acme/toy@1", tmp_path / "hf", "--max-shard", "40KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 1
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= load_file(shard)
    same(tensors, weights())


def test_ls(saved: Command, answer: Answer) -> None:
    assert [m["name"] for m in answer("ls")] == ["acme/toy"]
    assert "acme/toy" in saved("ls").stdout
    assert "prod → @1" in saved("ls").stdout
    assert sorted(v["version"] for v in answer("ls", "acme/toy")) == [1, 2]
    assert "prod" in saved("ls", "acme/toy").stdout
    assert [v["variant"] for v in answer("ls", "acme/toy@1")] == ["original"]
    assert "original" in saved("ls", "acme/toy@prod").stdout


def test_ls_of_nothing_says_what_to_do_next(run: Command, answer: Answer, model: Path, tmp_path: Path) -> None:
    assert "no store" in run("ls", code=1).stderr
    assert not (tmp_path / "store").exists()
    run("save", model, "toy")
    run("rm", "toy@1")
    done = run("ls")
    assert done.stdout == ""
    assert "modelstore save" in done.stderr
    assert answer("ls") == []


def test_show(saved: Command, answer: Answer) -> None:
    about = answer("show", "acme/toy@prod")
    assert {t["name"] for t in about["tensors"]} == weights().keys()
    text = saved("show", "acme/toy@prod").stdout
    assert "acme/toy@1:original" in text
    assert "config.json" in text
    assert "embed.weight" not in text
    assert "512×64" in saved("show", "acme/toy@prod", "--tensors").stdout


def test_diff(saved: Command, answer: Answer) -> None:
    found = answer("diff", "acme/toy@1", "acme/toy@2")
    assert (found["added"], found["removed"], found["changed"]) == ([], [], ["layer.0.bias"])
    assert "~ layer.0.bias" in saved("diff", "acme/toy@1", "acme/toy@2").stdout
    assert saved("diff", "acme/toy@1", "acme/toy@1").stdout == "no tensor differs\n"


def test_tag_and_untag(saved: Command, answer: Answer) -> None:
    assert saved("tag", "acme/toy", "prod").stdout == "prod names acme/toy@2\n"
    assert answer("show", "acme/toy@prod")["version"] == 2
    assert answer("tag", "acme/toy@prod", "best")["version"] == 2
    saved("untag", "acme/toy", "best")
    saved("untag", "acme/toy", "prod")
    assert "has no tag 'prod': it has none" in saved("show", "acme/toy@prod", code=1).stderr


def test_what_is_not_there_is_told_with_what_is(saved: Command, tmp_path: Path) -> None:
    saved("compress", "acme/toy", "int8", "--include", "*")
    for words in (["rm", "acme/toy@2:int9", "-y"], ["show", "acme/toy:int9"], ["verify", "acme/toy:int9"]):
        assert "no variant 'int9' (did you mean 'int8'?): it has int8, original" in saved(*words, code=1).stderr, words


def test_files_are_kept_beside_weights(run: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("mine")
    weights_alone = next(model.glob("*.safetensors"))
    given = ["--files", f"README.md={tmp_path}/card.md", "--files", f"config.json={model}/config.json"]
    run("save", weights_alone, "m", *given)
    assert run("cat", "m", "README.md").stdout == "mine"
    assert run("cat", "m", "config.json").stdout == (model / "config.json").read_text()
    for wrong, says in [("README.md", "is not NAME=FILE"), ("a=/no/where", "/no/where"), ("../a=x", "'../a'")]:
        done = run("save", weights_alone, "m", "--files", wrong, code=1 if "where" in wrong else 2)
        assert says in " ".join(done.stderr.split()), wrong


def test_an_entry_that_is_given_twice_is_refused(saved: Command, model: Path) -> None:
    said = saved("save", model, "acme/toy", "--meta", "a=1", "--meta", "a=2", code=2).stderr
    assert "--meta: 'a' is given twice" in " ".join(said.split())


def test_rm_then_gc(saved: Command, answer: Answer, tmp_path: Path) -> None:
    saved("rm", "acme/toy@2", "--yes")
    assert [v["version"] for v in answer("ls", "acme/toy")] == [1]
    before = sorted((tmp_path / "store" / "packs").rglob("*.safetensors"))

    assert "nothing was deleted: add --delete" in saved("gc", "--grace", "0s").stdout
    listed = answer("gc", "--grace", "0s")
    assert listed["dry_run"] is True
    assert listed["objects"]
    assert sorted((tmp_path / "store" / "packs").rglob("*.safetensors")) == before

    assert answer("gc", "--delete")["objects"] == [], "what is young is spared"
    assert answer("gc", "--delete", "--grace", "0s")["bytes"] == listed["bytes"]
    assert len(list((tmp_path / "store" / "packs").rglob("*.safetensors"))) < len(before)
    saved("verify", "--deep")


def test_rm_of_a_whole_model_wants_all(saved: Command, answer: Answer) -> None:
    assert "--all" in saved("rm", "acme/toy", code=2).stderr
    saved("rm", "acme/toy", "--all")
    assert answer("ls") == []


@pytest.mark.parametrize(("said", "code", "left"), [("n\n", 1, 2), ("", 1, 2), ("y\n", 0, 1)])
def test_rm_asks_on_a_terminal(
    saved: Command, answer: Answer, monkeypatch: pytest.MonkeyPatch, said: str, code: int, left: int
) -> None:
    monkeypatch.setattr("modelstore.cli.removing.asks", lambda: True)
    done = saved("rm", "acme/toy@2", input=said, code=code)
    assert "Remove acme/toy@2?" in done.stderr
    assert len(answer("ls", "acme/toy")) == left


def test_verify_finds_and_repair_mends(
    saved: Command, answer: Answer, model: Path, tuned: Path, tmp_path: Path
) -> None:
    assert "ok: checked" in saved("verify").stdout
    assert answer("verify", "acme/toy@1", "--deep")["ok"] is True
    mirror = tmp_path / "mirror"
    saved("save", model, "acme/toy", "--store", mirror)
    saved("save", tuned, "acme/toy", "--store", mirror)

    flip(tmp_path / "store")
    done = saved("verify", code=1)
    assert "acme/toy" in done.stdout
    assert "repair" in done.stderr
    assert answer("verify", code=1)["problems"]
    assert "acme/toy" in saved("load", "acme/toy@1", "-o", tmp_path / "x.safetensors", code=1).stderr
    assert not (tmp_path / "x.safetensors").exists()
    saved("repair", code=1)

    saved("load", "acme/toy@1", "-o", tmp_path / "m.safetensors", "--mirror", mirror)
    same(load_file(tmp_path / "m.safetensors"), weights())

    assert "ok: checked" in saved("verify").stdout, "a mirror mends what it is asked for"

    flip(tmp_path / "store")
    saved("verify", code=1)
    assert "repaired" in saved("repair", "--from", mirror).stdout
    assert "ok: checked" in saved("verify", "--deep").stdout
    saved("load", "acme/toy@1", "-o", tmp_path / "y.safetensors")
    same(load_file(tmp_path / "y.safetensors"), weights())


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (["show", "acme/none"], 1, "not_found"),
        (["show", "acme/toy@9"], 1, "not_found"),
        (["show", "acme/toy@beta"], 1, "not_found"),
        (["show", "acme/toy:int4"], 1, "not_found"),
        (["show", "../etc/passwd"], 2, "usage"),
        (["show", "acme/toy@0"], 2, "usage"),
        (["tag", "acme/toy@1", "7"], 2, "usage"),
        (["export", "acme/toy@9", "out"], 1, "not_found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_sentence(saved: Command, args: list[str], code: int, kind: str) -> None:
    done = saved(*args, code=code)
    assert done.stdout == ""
    assert done.stderr.startswith("modelstore: ")
    assert done.stderr.count("\n") == 1
    done = saved(*args, "--json", code=code)
    error = json.loads(done.stderr)["error"]
    assert error["kind"] == kind
    assert error["message"]


def test_debug_shows_where(saved: Command, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelstore", "show", "acme/none"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert plain.returncode == 1
    assert plain.stderr.count("\n") == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120, check=False)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "NotFoundError" in debug.stderr


def test_a_reader_that_leaves_is_no_error(saved: Command) -> None:
    command = [sys.executable, "-m", "modelstore", "show", "acme/toy", "--tensors"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.slow
def test_stopped_by_ctrl_c_goes_on_by_the_same_command(run: Command, answer: Answer, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    big = {f"layer.{i}": torch.randn(1024, 4096, generator=generator).bfloat16() for i in range(40)}
    folder = write_model(tmp_path / "big", big)
    packs = tmp_path / "store" / "packs"
    command = [sys.executable, "-m", "modelstore", "save", str(folder), "big"]
    saving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(packs.rglob("*.safetensors")) and saving.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if saving.poll() is None:
        saving.send_signal(signal.SIGINT)
        _, stderr = saving.communicate(timeout=60)
        if saving.returncode:  # else it had ended before it heard
            assert saving.returncode == 130, stderr
            assert stderr.count("\n") == 1
            assert "same command" in stderr
            assert answer("ls") == []
    done = answer("save", folder, "big")
    assert done["bytes"] == sum(t.nbytes for t in big.values())
    run("load", "big", "-o", tmp_path / "big.safetensors")
    same(load_file(tmp_path / "big.safetensors"), big)


def test_completion_offers_what_the_store_holds(saved: Command, tmp_path: Path) -> None:
    class Context:
        params = {"store": str(tmp_path / "store"), "name": "acme/toy"}  # noqa: RUF012

    context: Any = Context()
    assert complete.names(context, "ac") == ["acme/toy"]
    assert complete.names(context, "b") == []
    assert set(complete.references(context, "acme/toy@")) == {"acme/toy@1", "acme/toy@2", "acme/toy@prod"}
    assert complete.references(context, "acme/toy@1:") == ["acme/toy@1:original"]
    assert complete.references(context, "none@") == []
    assert complete.tags(context, "p") == ["prod"]


def test_completion_gives_up_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Context:
        params = {"store": str(tmp_path)}  # noqa: RUF012

    def slow(*_: Any, **__: Any) -> None:
        time.sleep(30)

    monkeypatch.setattr(ms, "open", slow)
    monkeypatch.setattr(complete, "PATIENCE", 0.2)
    context: Any = Context()
    begun = time.monotonic()
    assert complete.names(context, "") == []
    assert time.monotonic() - begun < 5


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with output.progress() as report:
        assert report is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress(quiet=True) as report:
        assert report is None
    with output.progress() as report:
        assert report is not None
        report(0, 10, "saving")
        report(10, 10, "saving")
        report(1, 2, "checking")
