"""The files of a whole directory, read by a library by their paths: watched by walking it again."""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from modelstore.sources.local.reading import Files
from modelstore.sources.local.states import State, changed, settle


class TreeFiles(Files):
    """As `Files`; `check` also looks at every file and folder below `root`, whichever code read them."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self._state = _state(root, wait=True)

    def check(self) -> None:
        """See `Files.check`; a file that came or went counts as a change."""
        super().check()
        if _state(self._root) != self._state:
            raise changed(self._root)


def _state(root: Path, *, wait: bool = False) -> str:
    """One text for the state of everything there, links and their targets both."""
    digest, newest = blake3(), State(0, 0, 0, 0, 0)
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in (Path(folder), *(Path(folder, name) for name in sorted((*folders, *names)))):
            for follow in (False, True):
                try:
                    state = State.of(path.stat(follow_symlinks=follow))
                except OSError:  # a link to nothing, or gone
                    state = State(0, 0, 0, 0, 0)
                digest.update(f"{os.fsencode(path)!r} {state}\n".encode())
                newest = max(newest, state, key=lambda one: max(one.modified, one.changed))
    if wait:
        settle([newest])
    return digest.hexdigest()
