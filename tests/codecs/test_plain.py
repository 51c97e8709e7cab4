"""What a process decodes first, without compiled kernels: the same bits, and no kernels loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.codecs.exact import byteplanes, plain
from modelstore.format.dtypes import DTYPES
from modelstore.testing import contents


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", contents.KINDS)
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str) -> None:
    d = DTYPES[dtype]
    for n in (1, 40, 3000):
        values = contents.make(kind, n * d.itemsize, d, n)
        data = byteplanes.encode(values, d)
        for allowed in (0, 1 << 30):
            monkeypatch.setattr(plain, "first", plain.Allowance(allowed))
            out = np.zeros((1, values.size + 3), np.uint8)[:, :-3]
            byteplanes.decode(data, d, out)
            assert out.tobytes() == values.tobytes()


def test_the_allowance_is_used_up() -> None:
    left = plain.Allowance(3 * plain.CALL)
    assert [left.takes(plain.CALL), left.takes(plain.CALL), left.takes(0), left.takes(0)] == [True, False, True, False]


NOT_FOR_A_LOAD = ("numba", "numpy.ma", "ray", "fsspec", "pyarrow", "transformers")


def test_a_small_load_imports_what_it_needs_alone(tmp_path: Path) -> None:
    ms.open(tmp_path).save("a/b", {"w": torch.randn(64, 64).bfloat16()}, files={"notes.txt": b"a" * 500})
    script = f"""
import sys, modelstore as ms
print(ms.open({str(tmp_path)!r}).load("a/b")["w"].shape)
print([m for m in sys.modules if any(m == n or m.startswith(n + ".") for n in {NOT_FOR_A_LOAD!r})])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch.Size([64, 64])", "[]"]


def test_no_garbage_is_collected_while_the_package_is_imported() -> None:
    script = """
import gc, modelstore as ms
seen = []
gc.callbacks.append(lambda phase, about: seen.append(phase))
ms.open
print(len(seen), gc.isenabled())
gc.disable()
ms.Recipe
print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "False"]
