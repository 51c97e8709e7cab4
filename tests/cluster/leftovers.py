"""What a cluster that was stopped must not have left: processes, folders in shared memory, temporary files."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modelstore.cluster.control import runtime
from modelstore.cluster.control.directory import ClusterSettings

_MARK = "MODELSTORE_TESTS_CLUSTER"


class Leftovers:
    """Knows a cluster's processes by a mark in the environment that they were started with, and every deployment's folder."""

    def __init__(self, mark: str, temporary: Path) -> None:
        self._mark = f"{_MARK}={mark}".encode()
        self._temporary = temporary
        self._roots: list[Path] = []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Mark what is started from now on, give it a temporary folder of its own, and note what is deployed."""
        deploy = runtime.deploy

        def noted(settings: ClusterSettings, **options: Any) -> None:
            self._roots.append(Path(settings.root))
            deploy(settings, **options)

        patch.setattr(runtime, "deploy", noted)
        patch.setenv(_MARK, self._mark.decode().partition("=")[2])
        patch.setenv("TMPDIR", str(self._temporary))
        patch.setenv("RAY_TMPDIR", "/tmp")  # Ray's own files, whose sockets want short paths

    def memory(self) -> list[Path]:
        """Folders in shared memory."""
        return [root for root in self._roots if root.exists()]

    def processes(self) -> list[str]:
        """Marked processes, each as its id and its command; those that have ended but were not waited for are none."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if self._mark in environment and int(path.name) != os.getpid():
                found.append(f"{path.name} {command[:100]}")
        return found

    def files(self) -> list[Path]:
        """What lies in the temporary folder."""
        return sorted(self._temporary.rglob("*"))

    def check(self, seconds: float = 60.0) -> None:
        """Wait for processes that are just ending, then fail where anything is left."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            threading.Event().wait(0.1)
        assert not self.processes(), "processes are left"
        assert not self.memory(), "something is left in shared memory"
        assert not self.files(), "temporary files are left"
