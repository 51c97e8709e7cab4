"""The images' Dockerfiles and locked packages."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.checking import ROOT, parse_command

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)
ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(path: Path) -> list[str]:
    """A Dockerfile's instructions, one a line."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def instructions(path: Path, name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in lines(path) if line.startswith(f"{name} ")]


def locked(name: str) -> dict[str, str]:
    """A lock's packages, name → version; every line of it must be one."""
    text = (DOCKER / name).read_text()
    header, _, rest = text.partition("\n")
    assert header.startswith("#")
    assert ENTRY.sub("", rest) == "", "an entry without a hash"
    return {canonicalize_name(match[1]): match[2] for match in ENTRY.finditer(rest)}


# ---------------------------------------------------------------------- Dockerfiles


def lint(path: Path) -> str:
    assert HADOLINT
    command = [HADOLINT, "--no-color", "--failure-threshold=info", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == bool(done.stdout), done.stderr
    return done.stdout


needs_hadolint = pytest.mark.skipif(HADOLINT is None, reason="hadolint has no package for this platform")


@needs_hadolint
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_linter_is_content(path: Path) -> None:
    assert lint(path) == ""


@needs_hadolint
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.16-slim-bookworm\nLABEL", "python:latest\nLABEL", "DL3007"),
        ("tini=0.19.0-1+b3", "tini", "DL3008"),
        ('ENTRYPOINT ["tini", "--", "modelstore"]', "ENTRYPOINT modelstore", "DL3025"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("WORKDIR /src", "WORDKIR /src", "unexpected"),
    ],
)
def test_linter_finds_what_is_broken(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = DOCKERFILES[0].read_text()
    assert old in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(old, new))
    assert rule in lint(broken)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_image_is_pinned_and_unprivileged(path: Path) -> None:
    bases = {line.split()[0] for line in instructions(path, "FROM")}
    assert len(bases) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", bases.pop())
    assert instructions(path, "USER") == ["10001:10001"]
    labels = {
        word.split("=")[0]: word.split("=", 1)[1] for line in instructions(path, "LABEL") for word in shlex.split(line)
    }
    assert labels["org.opencontainers.image.version"] == PROJECT["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    for run in instructions(path, "RUN"):
        for command in run.split("&&"):
            if "pip install" in command or "pip wheel" in command:
                assert "--no-deps" in command
                assert "--require-hashes" in command or "--no-index" in command or "wheel" in command or "==" in command


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_commands_of_the_image_exist(path: Path) -> None:
    health = re.search(r"CMD (\[.*\])", instructions(path, "HEALTHCHECK")[0])
    assert health
    parse_command(re.findall(r'"([^"]*)"', health[1]))
    (entry,) = instructions(path, "ENTRYPOINT")
    assert re.findall(r'"([^"]*)"', entry) == ["tini", "--", next(iter(PROJECT["scripts"]))]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_is_copied_exists_and_reaches_the_builder(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [line.split()[:-1] for line in instructions(path, "COPY") if "--from" not in line]
    sources = [source for words in copied for source in words]
    assert {"modelstore", "pyproject.toml", "LICENSE", "docker/requirements.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, pattern) for pattern in allowed), f".dockerignore keeps {source} back"
    used = set(re.findall(r"docker/[a-z-]+\.txt", "\n".join(instructions(path, "RUN"))))
    assert used <= set(sources)


def test_images_differ_only_in_torch() -> None:
    cpu, cuda = (set(lines(DOCKER / f"{name}.Dockerfile")) for name in ("cpu", "cuda"))
    apart = sorted(line.split()[0] for line in cpu ^ cuda)
    assert apart == ["COPY", "COPY", "ENV", "ENV", "LABEL", "LABEL", "RUN", "RUN"]


# ---------------------------------------------------------------------- locks


def test_torch_is_the_one_that_is_tested() -> None:
    (constraint,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert locked("torch-cuda.txt")["torch"] == constraint
    assert f" torch=={constraint}+cpu" in (DOCKER / "cpu.Dockerfile").read_text()
    assert "torch" not in locked("requirements.txt")


def test_locks_hold_all_that_the_package_wants() -> None:
    script = runpy.run_path(str(DOCKER / "lock.py"))  # by its path: a package on PyPI has the folder's name
    extras = script["EXTRAS"]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    have = {**locked("requirements.txt"), **locked("torch-cuda.txt")}
    wanted = [
        *PROJECT["dependencies"],
        *(r for extra in extras for r in PROJECT["optional-dependencies"][extra]),
        script["RAY"],
    ]
    for line in wanted:
        requirement = Requirement(line)
        assert requirement.specifier.contains(have[canonicalize_name(requirement.name)]), line
    # KubeRay's probes, dashboard and jobs want these of ray[default].
    assert {"aiohttp", "aiohttp-cors", "prometheus-client"} <= have.keys()


def test_what_builds_the_package_is_locked() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    have = locked("build.txt")
    for line in system["requires"]:
        assert Requirement(line).specifier.contains(have[canonicalize_name(Requirement(line).name)])
