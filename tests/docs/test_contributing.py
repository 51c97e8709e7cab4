"""CONTRIBUTING.md: the codec that it shows is one, as it stands, with its tests and its entry point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import modelstore as ms

ROOT = Path(ms.__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

SAVED = """
import sys, torch, modelstore as ms
store, model = ms.open(sys.argv[1]), {"w": torch.arange(5000.0).reshape(50, 100)}
store.save("m", model, codec="swapped")
assert torch.equal(store.load("m")["w"], model["w"])
assert {t.codec for t in store.describe("m").tensors} == {"swapped"}
"""


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """The page's package, as installed: the environment in which it is found."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code, tests = [text for kind, text in blocks if kind == "python"]
    said = tomllib.loads(next(text for kind, text in blocks if kind == "toml"))["project"]
    (tmp_path / "swapped.py").write_text(code)
    (tmp_path / "test_swapped.py").write_text(tests)
    about = tmp_path / f"modelstore_swapped-{said['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {said['name']}\nVersion: {said['version']}\n")
    points = ((group, each) for group, each in said["entry-points"].items())
    lines = [f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in each.items()) for group, each in points]
    (about / "entry_points.txt").write_text("".join(lines))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.slow
def test_the_codec_passes_its_tests_and_is_found(package: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_swapped.py"]
    done = subprocess.run(command, cwd=tmp_path, env=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", SAVED, "store"], cwd=tmp_path, env=package, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Where the package is not installed, the error names what is missing.
    load = "import sys, modelstore as ms; ms.open(sys.argv[1]).load('m')"
    bare = {**package, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", load, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=tmp_path / "store", env=bare, capture_output=True, text=True)
    assert "UnsupportedError" in done.stderr
    assert "'swapped'" in done.stderr


def test_every_file_that_is_named_is_there() -> None:
    for path in re.findall(r"`((?:modelstore|tests|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
