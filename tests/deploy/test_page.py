"""docs/deploy.md: its commands and paths exist."""

from __future__ import annotations

import re

import pytest

from tests.deploy.checking import ROOT, parse_command

PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S))
COMMANDS = re.findall(r"(?:^|exec \S+ )(modelstore .*)$", BLOCKS, re.M)
COMMANDS += [f"modelstore {words}" for words in re.findall(r" cli (.*)$", BLOCKS, re.M)]
COMMANDS += re.findall(r"`(modelstore [a-z]+ [^`]*)`", PAGE)
PATHS = set(re.findall(r"\b((?:docker|deploy)/[\w./-]+\w)", PAGE)) - {
    "docker/secrets/aws_credentials",
    "docker/secrets",
}


def test_page_has_what_is_checked() -> None:
    assert len(COMMANDS) >= 5
    assert len(PATHS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    parse_command(command.replace(" /model ", f" {ROOT / 'docker'} "))  # a folder that is there


@pytest.mark.parametrize("path", sorted(PATHS))
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()
