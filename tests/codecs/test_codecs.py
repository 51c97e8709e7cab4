"""The registry, what an import costs, and kernels where nothing can be cached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import modelstore
from modelstore.codecs import registry
from modelstore.codecs.base import Codec
from modelstore.codecs.exact.lossless import Lossless
from modelstore.errors import UnsupportedError
from modelstore.format.dtypes import DTYPES

ROUND_TRIP = """
import numpy as np
from modelstore.codecs.registry import codec
from modelstore.format.dtypes import DTYPES
v = np.arange(4000, dtype=np.uint8); out = np.zeros((1, 4000), np.uint8)
c = codec("lossless"); c.decode(c.encode(v, (2000,), DTYPES["bfloat16"]), (2000,), DTYPES["bfloat16"], out)
assert (out[0] == v).all()
print("exact")
"""


def test_names() -> None:
    assert registry.names()[:4] == ("raw", "lossless", "packed", "delta")
    needed = {"lowrank": {"rank": 8}}  # one of three, none of which is usual
    for name in registry.names():
        made: Codec = registry.codec(name, needed.get(name))
        assert made.name == name
        assert made == registry.codec(name, needed.get(name, {}))


def test_an_unknown_codec_is_answered_with_those_known() -> None:
    with pytest.raises(UnsupportedError, match=r"'zip'.*raw, lossless, packed, delta"):
        registry.codec("zip")


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="'level'"):
        registry.codec("lossless", {"level": 3})


def test_numba_is_loaded_by_the_first_call_only() -> None:
    code = (
        "import sys; from modelstore.codecs.registry import codec; codec('lossless'); assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_without_any_folder_to_cache_in(tmp_path: Path) -> None:
    """A package and a home that are read-only: kernels are compiled in memory."""
    shutil.copytree(
        Path(modelstore.__file__).parent, tmp_path / "modelstore", ignore=shutil.ignore_patterns("__pycache__")
    )
    for kernels in {path.parent for path in (tmp_path / "modelstore/codecs").rglob("*.py")}:
        (kernels / "__pycache__").write_text("a file where the folder would be, which stops even root")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    env |= {"HOME": "/dev/null", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", ROUND_TRIP], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "exact\n", done.stderr


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_gil_is_free_while_a_chunk_is_coded(way: str) -> None:
    """A thread that counts must hardly be held up by one that codes."""
    d, n = DTYPES["bfloat16"], 4 << 20
    values = (np.random.default_rng(0).standard_normal(n) * 0.02).astype(np.float32).view(np.uint16)[1::2].copy()
    raw = values.view(np.uint8)
    codec = Lossless()
    planes = codec.encode(raw, (n,), d)
    out = np.zeros((1, 2 * n), np.uint8)
    stop = threading.Event()
    gaps = [0.0]

    def count() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=count)
    thread.start()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        _ = codec.encode(raw, (n,), d) if way == "encode" else codec.decode(planes, (n,), d, out)
        calls += 1
    stop.set()
    thread.join()
    assert len(gaps) > 1000 * calls  # held for the whole of each call, it would count a few times a call
