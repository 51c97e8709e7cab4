"""CONTRIBUTING.md: the codec and the storage that it shows are such, as they stand, with their tests and entry points."""

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

CODEC = """
import sys, torch, modelstore as ms
store, model = ms.open(sys.argv[1]), {"w": torch.arange(5000.0).reshape(50, 100)}
store.save("m", model, codec="swapped")
assert torch.equal(store.load("m")["w"], model["w"])
assert {t.codec for t in store.describe("m").tensors} == {"swapped"}
"""
STORAGE = """
import os, pickle, sys, torch, modelstore as ms
url = f"sqlite://{os.getcwd()}/models.db"
store, model = ms.open(url, storage_options={"timeout": 50}), {"w": torch.arange(5000.0).reshape(50, 100)}
assert store.save("m", model).version == 1
assert torch.equal(pickle.loads(pickle.dumps(store)).load("m")["w"], model["w"])
assert store.verify().ok and os.listdir() == ["models.db"]
try:
    ms.open(url, storage_options={"patience": 5})
except ValueError as error:
    assert "patience" in str(error) and "modelstore-sqlite" in str(error), error
else:
    raise AssertionError("an option that nobody knows was taken")
"""


def install(section: str, folder: Path) -> dict[str, str]:
    """The package of one section of the page, as installed in that folder: the environment in which it is found."""
    text = next(part for part in PAGE.split("\n## ") if part.startswith(section))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code, tests = [block for kind, block in blocks if kind == "python"]
    said = tomllib.loads(next(block for kind, block in blocks if kind == "toml"))["project"]
    points = [(group, name, place) for group, each in said["entry-points"].items() for name, place in each.items()]
    module = points[0][2].partition(":")[0]
    (folder / f"{module}.py").write_text(code)
    (folder / f"test_{module}.py").write_text(tests)
    about = folder / f"{said['name'].replace('-', '_')}-{said['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {said['name']}\nVersion: {said['version']}\n")
    (about / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {place}\n" for group, name, place in points))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def passes(module: str, folder: Path, environment: dict[str, str]) -> None:
    """The tests of the section's package do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"test_{module}.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def python(code: str, *arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that runs this code there."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_codec_passes_its_tests_and_is_found(tmp_path: Path) -> None:
    package = install("Adding a codec", tmp_path)
    passes("swapped", tmp_path, package)
    done = python(CODEC, "store", folder=tmp_path, environment=package)
    assert done.returncode == 0, done.stderr
    # Where the package is not installed, the error names what is missing.
    bare = {**package, "PYTHONPATH": str(ROOT)}
    load = "import sys, modelstore as ms; ms.open(sys.argv[1]).load('m')"
    done = python(load, str(tmp_path / "store"), folder=tmp_path / "store", environment=bare)
    assert "UnsupportedError" in done.stderr
    assert "'swapped'" in done.stderr


@pytest.mark.slow
def test_the_storage_passes_its_tests_and_is_found(tmp_path: Path) -> None:
    package = install("Adding a storage", tmp_path)
    passes("sqlitestore", tmp_path, package)
    work = tmp_path / "work"
    work.mkdir()
    done = python(STORAGE, folder=work, environment=package)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "modelstore", "ls", "--json"],
        cwd=work,
        env={**package, "MODELSTORE_URL": f"sqlite://{work}/models.db"},
        capture_output=True,
        text=True,
    )
    assert '"m"' in listed.stdout, listed.stderr


def test_every_file_that_is_named_is_there() -> None:
    for path in re.findall(r"`((?:modelstore|tests|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
