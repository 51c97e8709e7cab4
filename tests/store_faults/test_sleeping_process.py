"""A process that the operating system stops in the middle of a save or a collection, and lets go on later."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import modelstore as ms
from modelstore.storage.local import LocalStorage
from tests.helpers.stores import all_bits, keys, shrink, weights

ROOT = Path(__file__).parents[2]

# Does `work`; around the `at`-th call of a method of the storage with such a key it says so, and waits for a line.
SLEEPER = """
import sys
import pytest
import modelstore as ms
from modelstore.errors import ModelStoreError
from modelstore.storage.local import LocalStorage
from tests.helpers.stores import shrink, weights

url, work, method, part, at = sys.argv[1:]
shrink(pytest.MonkeyPatch())
calls = 0
original = getattr(LocalStorage, method)

def hooked(self, key, *more):
    global calls
    calls += part in key
    mine = part in key and calls == int(at)
    done = original(self, key, *more) if method == "put" else None
    if mine:
        print("here", flush=True)
        sys.stdin.readline()
    return done if method == "put" else original(self, key, *more)

setattr(LocalStorage, method, hooked)
store = ms.open(url, memory="64MiB", threads=2)
try:
    print(store.save("m", weights(2)).version if work == "save" else store.gc(dry_run=False, grace=0).bytes)
except ModelStoreError as error:
    print("failed:", error)
"""


@contextmanager
def stopped(url: str, *how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped at that moment within the block."""
    command = [sys.executable, "-c", SLEEPER, url, *how]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "here\n"
            process.send_signal(signal.SIGSTOP)
            process.stdin.write("\n")
            process.stdin.flush()
            yield process
        finally:
            process.send_signal(signal.SIGCONT)


def said(process: subprocess.Popen[str]) -> str:
    """What a process says that goes on."""
    process.send_signal(signal.SIGCONT)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert process.wait() == 0
    return line


# After its second pack, and before its record.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "part", "at"), [("put", "packs/", "2"), ("create", "/versions/", "1")])
def test_a_save_that_is_stopped_while_garbage_is_collected(
    method: str, part: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    store = ms.open(str(tmp_path))
    store.save("m", weights(1))
    storage = LocalStorage(tmp_path)
    with stopped(str(tmp_path), "save", method, part, at) as process:
        before = keys(storage, "packs/")
        for _ in range(2):
            store.gc(dry_run=False, grace=0)
        assert method == "create" or len(keys(storage, "packs/")) < len(before), "what it had stored is gone"
        answer = said(process)
    store = ms.open(str(tmp_path))
    if answer.startswith("failed:"):
        assert [one.version for one in store.versions("m")] == [1]
    else:
        assert all_bits(store.load(f"m@{int(answer)}")) == all_bits(weights(2))
    store.gc(dry_run=False, grace=0)
    assert store.verify(deep=True).ok
    assert all_bits(store.load("m@1")) == all_bits(weights(1))


# Before its verdict, and before its first removal of a pack.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "part"), [("create", "verdict.json"), ("delete", "packs/")])
def test_a_collection_that_is_stopped_while_the_content_is_saved_again(
    method: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    store = ms.open(str(tmp_path))
    store.save("m", weights(1))
    store.delete("m@1")
    with stopped(str(tmp_path), "gc", method, part, "1") as process:
        assert ms.open(str(tmp_path)).save("m", weights(1)).version == 2
        assert not said(process).startswith("failed:")
    store = ms.open(str(tmp_path))
    assert all_bits(store.load("m@2")) == all_bits(weights(1))
    store.gc(dry_run=False, grace=0)
    assert store.verify(deep=True).ok
