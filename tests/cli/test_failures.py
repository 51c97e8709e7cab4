"""How commands end when something outside is not as it should be, or when they are stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

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
