"""`cluster stop` where nothing of one's own runs any more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelstore.cluster.control import nodes


def ended_process() -> int:
    """The id of a process that has ended, and that no other one has yet."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_node_left_that_ended_by_itself_is_removed_and_no_other_cluster_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from modelstore.cli.main import app
    from modelstore.cluster.control import runtime

    left = tmp_path / "ray"
    left.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "token").write_text("secret")
    state = nodes.Running(ended_process(), "192.0.2.1:6379", str(run / "token"), str(left), False)
    import msgspec

    (run / "node.json").write_bytes(msgspec.json.encode(state))
    monkeypatch.setenv("MODELSTORE_RUN_DIR", str(run))

    def connect(address: str) -> None:
        raise AssertionError(f"connects to {address}, which is another cluster")

    monkeypatch.setattr(runtime, "connect", connect)
    done = CliRunner().invoke(app, ["cluster", "stop", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"hosts": 0, "node": "192.0.2.1:6379"}
    assert not left.exists()
    assert list(run.iterdir()) == []
