"""Structs that several threads decode for the first time at once."""

from __future__ import annotations

import subprocess
import sys

THREADS = """
import sys
import threading
from typing import Annotated

import msgspec

from modelstore.format.objects.decoding import prepared

sys.setswitchinterval(1e-6)
TEXT = b'{"kind":1,"parts":{"a":{"codec":{"name":"q"},"shape":[1,2]},"b":{"codec":{"name":"q"},"shape":[1]}}}'


def kinds():
    class Codec(msgspec.Struct):
        name: str
        params: dict[str, int | float | str | bool] = {}

    class Part(msgspec.Struct):
        codec: Codec
        shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]

    class Note(msgspec.Struct):
        kind: int
        parts: dict[str, Part] = {}

    return Note


def read(kind):
    begin.wait()
    found.append(len(msgspec.json.decode(TEXT, type=prepared(kind)).parts))


for _ in range(200):
    kind, begin, found = kinds(), threading.Barrier(8), []
    threads = [threading.Thread(target=read, args=(kind,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8
"""


def test_many_threads_decode_a_struct_for_the_first_time() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
