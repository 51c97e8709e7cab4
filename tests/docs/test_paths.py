"""Files and folders of this repository that pages, comments and docstrings name are there; CONTRIBUTING.md names each room."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.test_house import FILES, ROOT

TOP = ROOT.parent
TEXTS = [
    *FILES,
    *(path for folder in ("docs", "tests", "benchmarks") for path in sorted((TOP / folder).rglob("*.[mp][dy]"))),
    *(TOP / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")),
    *sorted((TOP / "docker").glob("*")),
    *sorted((TOP / "deploy").rglob("*.yaml")),
]
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
# `client/model.py` is spoken of without the package's name, as is `docs/format.md` with its own.
NAMED = re.compile(
    rf"(?<![\w./{{}}~-])(?:modelstore/|(?=tests/|docs/|(?:{'|'.join(sorted(ROOMS))})/))((?:\w+/)*\w+(?:\.py|\.md|/))(?![\w*{{])"
)
# What a store, a run or an example has under a name that is a room's, too.
OTHERS = re.compile(r"(?:store|docs|tests|format)/$|store/(?:packs|exports|jobs|a)/")


def named(text: str) -> Iterator[tuple[int, str]]:
    """Each path that is named, with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in NAMED.finditer(line):
            yield number, found[1]


def test_what_is_named_is_there() -> None:
    wrong = []
    for path in TEXTS:
        for number, name in named(path.read_text(encoding="utf-8", errors="ignore")):
            if not ((ROOT / name).exists() or (TOP / name).exists() or OTHERS.match(name)):
                wrong.append(f"{path.relative_to(TOP)}:{number}: {name}")
    assert not wrong, "\n".join(wrong)
    assert sum(1 for path in TEXTS for _ in named(path.read_text(encoding="utf-8", errors="ignore"))) > 150


def test_contributing_names_every_room() -> None:
    block = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```\nmodelstore/\n")[1].split("```")[0]
    told = {part.split("/")[0].strip(): part for part in re.split(r"\n(?=  \w)", "\n" + block) if part.strip()}
    assert set(told) == ROOMS
    wrong = [
        f"{room}/{inner.name}"
        for room in ROOMS
        for inner in (ROOT / room).iterdir()
        if inner.is_dir() and inner.name != "__pycache__" and not re.search(rf"\b{inner.name}\b", told[room])
    ]
    assert not wrong, wrong
