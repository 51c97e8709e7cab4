"""A saving process that is killed by the operating system, at a moment that it tells through a pipe."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import modelstore as ms
from modelstore.storage.local import LocalStorage
from tests.helpers.stores import all_bits, contents, half_written, journal, pack_sizes, shrink, weights

ROOT = Path(__file__).parents[2]

# Saves; at the `at`-th call of a method of the storage it says so, and waits for its end.
SAVER = """
import sys
import pytest
import modelstore as ms
from modelstore.storage.local import LocalStorage
from tests.helpers.stores import shrink

url, source, method, at = sys.argv[1:]
shrink(pytest.MonkeyPatch())
calls = 0

def wait():
    print("here", flush=True)
    sys.stdin.read()

def half(pieces):
    first, *rest = pieces
    yield first
    wait()

original = getattr(LocalStorage, method)

def hooked(self, key, data, *size):
    global calls
    calls += 1
    if calls == int(at):
        if method == "put":
            return original(self, key, half(data), *size)  # a part of the object is written
        wait()
    return original(self, key, data, *size)

setattr(LocalStorage, method, hooked)
ms.open(url, memory="64MiB", threads=2).save("m", source)
print("done", flush=True)
"""


# Two creates open the store; then each pack is followed by its page of the journal; the last create is the record.
@pytest.mark.parametrize(("method", "at"), [("put", 1), ("put", 3), ("create", 5)])
def test_kill_9(method: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    source = tmp_path / "model.safetensors"
    save_file(weights(1), source, {"format": "pt"})
    undisturbed = LocalStorage(tmp_path / "undisturbed")
    ms.open(undisturbed.url).save("m", source)

    url = str(tmp_path / "store")
    command = [sys.executable, "-c", SAVER, url, str(source), method, str(at)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    store = ms.open(url)
    storage = LocalStorage(url)
    assert contents(store) == {}
    saved = store.save("m", source)
    assert saved.version == 1
    assert all_bits(store.load("m")) == all_bits(weights(1))
    assert pack_sizes(storage) == pack_sizes(undisturbed)
    assert not journal(storage)
    store.gc(dry_run=False, grace=0)
    assert not half_written(Path(url))
    assert all_bits(store.load("m")) == all_bits(weights(1))
