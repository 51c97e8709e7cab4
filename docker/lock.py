"""Writes the images' lock files: every package they install, by exact version and hash. Run it from the repository's root.

    uv run --no-project docker/lock.py [CONSTRAINTS]

CONSTRAINTS is a file such as `pip freeze` writes: what is in it keeps its version, so that the images hold what the tests ran
with. Torch lies in a file of its own, since the CPU image takes another build of it, from PyTorch's own index. Needs `uv`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXTRAS = ("s3", "gs", "az", "cluster", "gguf", "zarr", "hub")
RAY = "ray[default]"  # with the dashboard and its agent: KubeRay's probes and RayJobs ask them
BUILD = "hatchling"
TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # what only the CUDA build of torch brings, and torch itself
FOLDER = Path("docker")
HEADER = "# Written by docker/lock.py: do not edit.\n"


def compiled(wanted: Sequence[str], constraints: Sequence[Path], sources: Sequence[str] = ()) -> str:
    """What uv resolves these requirements to, with hashes. Only wheels: nothing is built while an image is made."""
    command = [
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--generate-hashes",
        "--no-annotate",
        "--no-header",
        "--only-binary=:all:",
    ]
    command += ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_28", *sources, "-"]
    for path in constraints:
        command.append(f"--constraints={path}")
    return subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True, check=True).stdout


def packages(lock: str) -> dict[str, str]:
    """A lock's entries, name → text."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.M)[1:]
    return {entry.split("==")[0].split("[")[0]: entry for entry in entries}


def main(constraints: Sequence[Path]) -> None:
    """Write requirements.txt (all but torch), torch-cuda.txt and build.txt."""
    extras = [f"--extra={extra}" for extra in EXTRAS]
    everything = packages(compiled([RAY], constraints, ["pyproject.toml", *extras]))
    files = {
        "requirements.txt": {name: text for name, text in everything.items() if not TORCH.fullmatch(name)},
        "torch-cuda.txt": {name: text for name, text in everything.items() if TORCH.fullmatch(name)},
        "build.txt": packages(compiled([BUILD], constraints)),
    }
    for name, entries in files.items():
        (FOLDER / name).write_text(HEADER + "".join(entries.values()), encoding="utf-8")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
