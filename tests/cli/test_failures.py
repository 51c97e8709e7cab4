"""How commands end when something outside is not as it should be, or when they are stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelstore
from modelstore.client import Store
from modelstore.errors import StorageError
from tests.cli.conftest import Command

START = """
import os, signal, sys
class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Presses())
from modelstore.__main__ import main
main()
"""


SLOW = """
import sys, time
from modelstore.cli.terminal import failures, output
from modelstore.storage.local import LocalStorage
failures.PATIENCE = 0.5
before = LocalStorage.read
def read(self, key, start, out):
    if key.startswith("packs/"):
        print("reads", flush=True)
        while {swallows}:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                pass
        time.sleep(600)
    return before(self, key, start, out)
LocalStorage.read = read
if {swallows}:
    def refuse(*_, **__):
        raise BrokenPipeError
    output.failure = refuse
from modelstore.__main__ import main
main()
"""


def answering(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, *, press: bool = False) -> None:
    def answer(*_: object, **__: object) -> Any:
        if press:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise error from None
        raise error

    monkeypatch.setattr(Store, method, answer)


def test_ctrl_c_while_the_command_is_imported_ends_it_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("swallows", [False, True], ids=["a thread waits", "nobody reads what it says"])
def test_ctrl_c_ends_the_process_whatever_waits(tmp_path: Path, swallows: bool) -> None:
    model, store = {"w": torch.randn(300, 300)}, tmp_path / "store"
    modelstore.open(str(store)).save("m", model)
    save_file({**model, "x": torch.ones(3)}, tmp_path / "m.safetensors")
    words = ["load", "m", "-o", tmp_path / "out.safetensors"] if swallows else ["save", tmp_path / "m.safetensors", "m"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(swallows=swallows), *map(str, words), "--store", str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130


def test_ctrl_c_that_a_package_made_an_error_of_its_own_of_is_no_failure(
    saved: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "models", ImportError("half imported"), press=True)
    assert saved("ls", code=130).stderr == "modelstore: stopped\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_what_goes_on_says_so(saved: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("verify", "repair"):
        answering(monkeypatch, method, KeyboardInterrupt())
    assert saved("verify", code=130).stderr == "modelstore: stopped\n"
    assert "the same command goes on from what is finished" in saved("repair", "acme/toy", code=130).stderr


def test_what_the_operating_system_refuses_is_a_sentence(saved: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "models", PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/some/folder"))
    said = saved("ls", code=1).stderr
    assert said == "modelstore: /some/folder: permission denied: check who may read and write there\n"


def test_a_verification_that_can_read_nothing_is_no_damage(saved: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "verify", StorageError("cannot list 'models/'"))
    assert saved("verify", code=3).stderr == "modelstore: cannot list 'models/'\n"


def test_options_of_a_collection_belong_together(saved: Command) -> None:
    assert "--live-share is for --compact" in saved("gc", "--live-share", "50%", code=2).stderr
    assert "above 0" in saved("gc", "--compact", "--live-share", "0", code=2).stderr


def test_what_is_too_young_to_go_is_said(saved: Command) -> None:
    saved("rm", "acme/toy@2", "--yes")
    assert "younger than the grace period: see --grace" in saved("gc", "--delete").stdout
    saved("gc", "--delete", "--grace", "0")
    assert "younger" not in saved("gc", "--delete").stdout


def test_many_problems_of_one_pack_are_counted(
    saved: Command, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelstore.cli.checking._FEW", 2)
    pack = max((tmp_path / "store/packs").glob("*/*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(pack, 2_000)
    named = len(answer("verify", code=1)["problems"])
    said = [line for line in saved("verify", code=1).stdout.splitlines() if not line.startswith(" ")]
    assert named > 2
    assert len(said) == 2 + 2
    assert said[2].startswith(f"and {named - 2} more problem")


@pytest.mark.parametrize("words", [("verify",), ("repair",), ("repair", "--from", "EMPTY")], ids=" ".join)
def test_problems_fit_eighty_columns_and_advice_is_said_once(
    saved: Command, answer: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    modelstore.open(tmp_path / "other").save("other", {"w": torch.ones(3)})
    for pack in (tmp_path / "store/packs").glob("*/*.safetensors"):
        os.truncate(pack, 200)
    typed = [str(tmp_path / "other") if word == "EMPTY" else word for word in words]
    problems = answer(*typed, code=1)["problems"]
    done = saved(*typed, code=1)
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))  # no path is cut
    assert done.output.count("another copy of the store") <= (len(problems) if "--from" in words else 1)
    digest = problems[0]["object"].rpartition("/")[2].partition(".")[0]
    assert digest[:12] in done.stdout
    assert digest not in done.stdout  # --json has it
    told = " ".join(done.stdout.split())
    assert all(f"{one['model']}" in told and f"{one['kind']}: " in told for one in problems)


def test_a_name_alone_is_asked_for_where_a_reference_is_given(saved: Command) -> None:
    for args in (("ls", "acme/toy:int8"), ("du", "acme/toy@1"), ("untag", "acme/toy@1", "prod")):
        assert "a model's name alone, such as 'acme/toy'" in saved(*args, code=2).stderr


def test_tensors_are_listed_by_what_the_message_says(saved: Command, tmp_path: Path) -> None:
    said = saved("load", "acme/toy", "-o", tmp_path / "x.safetensors", "--names", "layer.0.bia", code=1).stderr
    assert "did you mean 'layer.0.bias'" in said
    assert "'modelstore show acme/toy --tensors'" in said
    assert "layer.0.bias" in saved("show", "acme/toy", "--tensors").stdout
    said = saved("load", "acme/toy", "-o", tmp_path / "x.safetensors", "--names", "nothing.*", code=1).stderr
    assert "no tensor that fits 'nothing.*'" in said


def test_a_recipe_that_is_not_valid_is_named(saved: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": []}')
    assert (
        "config.json: the recipe is not valid" in saved("compress", "acme/toy", tmp_path / "config.json", code=2).stderr
    )


def test_what_was_removed_is_not_suggested(saved: Command) -> None:
    saved("rename", "acme/toy", "acme/toys")
    said = saved("ls", "acme/toyz", code=1).stderr
    assert "did you mean 'acme/toys'?" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("x", "--gguf-type", "Q4_0"), "--gguf-type Q4_0 is for --format gguf"),
        (("x.zarr", "--format", "zarr", "--dequantize"), "--dequantize is for --format hf"),
        (("x.safetensors", "--format", "safetensors", "--max-shard", "1GB"), "--max-shard is for --format hf"),
        (("x.safetensors",), "add --format safetensors"),
        (("x.gguf",), "add --format gguf"),
    ],
)
def test_nothing_of_an_export_is_passed_over(saved: Command, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    assert says in saved("export", "acme/toy", tmp_path / args[0], *args[1:], code=2).stderr
    assert not (tmp_path / args[0]).exists()


def test_a_copy_to_repair_from_must_be_a_store(saved: Command, tmp_path: Path) -> None:
    assert "there is no store at" in saved("repair", "--from", tmp_path / "nowhere", code=1).stderr


def test_a_model_that_may_not_be_read_hides_no_other(
    saved: Command, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved("save", model, "acme/other")
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "toy":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert "acme/other" in saved("ls").stdout
    assert "permission denied" in caplog.text
    saved("verify", code=3)


def test_a_source_and_a_name_that_are_swapped_are_told_apart(saved: Command, model: Path) -> None:
    assert (
        f"SOURCE and NAME are swapped: write modelstore save {model} acme/toy"
        in saved("save", "acme/toy", model, code=2).stderr
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("tag", "prod", "acme/toy@1"), "REF and TAG are swapped: write modelstore tag acme/toy@1 prod"),
        (("tag", "prod", "plain"), "write modelstore tag plain prod"),
        (("tag", "prod", "acme/missing@1"), "write modelstore tag acme/missing@1 prod"),
        (("untag", "prod", "acme/toy"), "NAME and TAG are swapped: write modelstore untag acme/toy prod"),
        (("compress", "int4", "acme/toy"), "REF and RECIPE are swapped: write modelstore compress acme/toy int4"),
        (("compress", "int4", "plain"), "write modelstore compress plain int4"),
        (("plan", "compress", "int4", "acme/toy@1"), "write modelstore plan compress acme/toy@1 int4"),
        (("copy", "./backup", "acme/toy"), "REF and DEST are swapped: write modelstore copy acme/toy ./backup"),
        (("copy", "memory://b", "acme/toy@1"), "write modelstore copy acme/toy@1 memory://b"),
        (("copy", "backup", "plain"), "write modelstore copy plain backup"),
        (("cat", "config.json", "acme/toy"), "REF and FILE are swapped: write modelstore cat acme/toy config.json"),
        (("export", "./out", "acme/toy@1"), "REF and PATH are swapped: write modelstore export acme/toy@1 ./out"),
    ],
)
def test_arguments_that_are_swapped_are_told_apart(
    saved: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], said: str
) -> None:
    saved("save", model, "plain")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    error = saved(*given, code=2).stderr
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (("tag", "acme/missing", "prod"), 1),
        (("tag", "acme/toy@9", "prod"), 1),
        (("tag", "acme/toy", "a b"), 2),
        (("compress", "acme/toy", "acme/toy"), 2),
        (("compress", "acme/toy", "int44"), 2),
        (("copy", "missing", "./backup"), 1),
        (("cat", "acme/toy", "missing.json"), 1),
        (("untag", "acme/toy", "missing"), 1),
    ],
)
def test_arguments_in_their_places_are_not_said_to_be_swapped(
    saved: Command, given: tuple[str, ...], code: int
) -> None:
    assert "swapped" not in saved(*given, code=code).stderr


def test_only_of_latest_is_said_what_it_means(saved: Command) -> None:
    assert "always means the newest version" in saved("tag", "acme/toy", "latest", code=2).stderr
    assert "latest" not in saved("tag", "acme/toy", "a b", code=2).stderr


def test_nothing_is_saved_where_it_ends_with_the_command(saved: Command, model: Path) -> None:
    for args in (("save", model, "acme/other", "--store", "memory://x"), ("copy", "acme/toy@1", "memory://x")):
        assert "memory:// ends with this command" in saved(*args, code=2).stderr


def test_a_pipe_in_place_of_a_text_or_a_recipe_is_not_waited_for(saved: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for args in (("eval", "acme/toy", "--text"), ("compress", "acme/toy")):
        assert "it is a pipe or a device" in saved(*args, tmp_path / "pipe.json", code=2).stderr


@pytest.mark.parametrize(
    ("ref", "says"), [("acme/toy@", "no version or tag after '@'"), ("acme/toy:", "no variant after ':'")]
)
def test_a_reference_that_is_cut_short_is_told_so(saved: Command, ref: str, says: str) -> None:
    for words in (("show", ref), ("load", ref, "-o", "x.safetensors"), ("rm", "acme/toy@1:", "-y")):
        assert (says if ref in words else "no variant after ':'") in saved(*words, code=2).stderr


def test_a_share_that_is_none_is_told_with_its_option(saved: Command) -> None:
    for share in ("tp=2/2", "tp=x", "foo"):
        said = saved("load", "acme/toy", "-o", "x.safetensors", "--shard", share, code=2).stderr
        assert f"Invalid value for --shard: '{share}'" in " ".join(said.split())
