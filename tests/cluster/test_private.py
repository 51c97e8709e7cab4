"""What lies in folders that everybody can write to: believed only where this user, and nobody else, can have written it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from modelstore.cluster.control import nodes, runtime
from modelstore.cluster.node import private
from modelstore.errors import NotFoundError, StorageError

OTHER = 12345  # another user


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder as /tmp is, without a folder of a login's."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    for name in ("XDG_RUNTIME_DIR", "MODELSTORE_RUN_DIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nodes, "_RAY_ADDRESS", folder / "ray_current_cluster")
    return folder


def state(folder: Path) -> Path:
    """A state file that leads to an attacker's cluster."""
    made = nodes.Running(os.getpid(), "192.0.2.66:6379", str(folder / "token"), str(folder), True)
    path = folder / "node.json"
    path.write_bytes(msgspec.json.encode(made))
    path.chmod(0o600)
    return path


def _given_away(path: Path) -> None:
    os.chown(path, OTHER, OTHER, follow_symlinks=False)


def _folder_of_another(folder: Path) -> None:
    state(folder)
    _given_away(folder)


def _file_of_another(folder: Path) -> None:
    _given_away(state(folder))


def _others_can_write_the_folder(folder: Path) -> None:
    state(folder)
    folder.chmod(0o777)


def _others_can_write_the_file(folder: Path) -> None:
    state(folder).chmod(0o666)


def _link_to_a_file(folder: Path) -> None:
    real = state(folder).rename(folder.parent / "elsewhere.json")
    (folder / "node.json").symlink_to(real)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "node.json", 0o600)


def _link_to_a_folder(folder: Path) -> None:
    state(folder)
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


PLANTS = [_others_can_write_the_folder, _others_can_write_the_file, _link_to_a_file, _link_to_a_folder, _pipe]
NEED_ROOT = [_folder_of_another, _file_of_another]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.mark.parametrize("plant", [*PLANTS, *(pytest.param(each, marks=root_only) for each in NEED_ROOT)])
def test_a_state_file_that_others_could_have_written_is_not_believed(
    temporary: Path, plant: Callable[[Path], None]
) -> None:
    folder = temporary / f"modelstore-{os.getuid()}"
    folder.mkdir(mode=0o700)
    state(folder)
    assert nodes.running() is not None, "one's own is"
    (folder / "node.json").unlink()
    plant(folder)
    assert nodes.running() is None
    assert not nodes.ended()
    assert nodes.stop_node() is None
    with pytest.raises(NotFoundError, match="no Ray cluster runs"):
        runtime._found("auto")


def test_the_address_that_ray_noted_is_believed_of_this_user_and_of_root(temporary: Path) -> None:
    path = temporary / "ray_current_cluster"
    path.write_text("192.0.2.1:6379\n")
    path.chmod(0o644)
    assert runtime._found("auto")[0] == "192.0.2.1:6379"
    path.chmod(0o666)
    with pytest.raises(NotFoundError):
        runtime._found("auto")
    path.chmod(0o644)
    if os.geteuid() == 0:
        _given_away(path)
        with pytest.raises(NotFoundError):
            runtime._found("auto")


@pytest.mark.parametrize("kind", ["link", "open", pytest.param("another's", marks=root_only)])
def test_nothing_is_started_in_a_folder_that_others_wait_in(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = temporary / f"modelstore-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777 if kind == "open" else 0o700)
    if kind == "link":
        folder.rename(temporary / "elsewhere")
        folder.symlink_to(temporary / "elsewhere")
    if kind == "another's":
        _given_away(folder)
    monkeypatch.setattr(private, "_SHORT", 1000)
    for make in (private.run_folder, private.temporary_folder, nodes.start_node):
        with pytest.raises(StorageError, match="MODELSTORE_RUN_DIR"):
            make()


def test_what_is_made_is_this_users_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        run = private.run_folder()
        private.write_private(run / "token", b"secret")
        made = private.temporary_folder()
        monkeypatch.setattr("tempfile.tempdir", str(temporary / ("long" * 8)))
        far = private.temporary_folder()  # sockets have no room below a long path
    finally:
        os.umask(before)
    for folder in (run, made, far):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "token").stat().st_mode) == 0o600
    assert len(str(far)) < 30
    far.rmdir()


def test_a_login_has_a_folder_of_its_own_and_others_of_this_user_find_what_it_noted(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = temporary / "login"
    login.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(login))
    assert private.run_folder() == login / "modelstore"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    path = state(private.run_folder())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(login))
    assert nodes.state_file() == path
    login.chmod(0o777)
    assert private.run_folder() == temporary / f"modelstore-{os.getuid()}", "one that others can write to is not used"


def test_a_process_of_the_same_number_is_not_the_node(temporary: Path) -> None:
    run = private.run_folder()
    made = nodes.Running(os.getpid(), "127.0.0.1:6379", None, str(run / "none"), True, born=1)
    private.write_private(run / "node.json", msgspec.json.encode(made))
    assert nodes.running() is None
    assert nodes.ended()
    assert nodes.stop_node() == made, "what it left is removed, and nobody else's process is ended"
