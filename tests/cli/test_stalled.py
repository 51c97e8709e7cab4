"""Ctrl-C while a server does not answer: the command ends though the request does not, with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelstore
from tests.storage.proxy import Proxy

pytestmark = pytest.mark.s3
BOUND = 100  # seconds that the process may take on a busy machine: less than the patience of retries
START = """
from modelstore.cli.terminal import failures
from modelstore.storage.remote import options
options.STALL_SECONDS, failures.PATIENCE = 10_000.0, 0.5  # the request never ends
from modelstore.__main__ import main
main()
"""

COMMANDS = {
    "ls": ("ls",),
    "load": ("load", "m", "-o", "{out}"),
    "save": ("save", "{model}", "n"),
}


@pytest.mark.parametrize(
    ("command", "at"),
    [*((command, "its first request") for command in COMMANDS), ("load", "its data"), ("save", "its data")],
)
def test_ctrl_c_at_a_server_that_does_not_answer(
    proxy: Proxy, s3_url: str, tmp_path: Path, command: str, at: str
) -> None:
    model = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(300, 400)}, model)
    modelstore.open(s3_url).save("m", {"w": torch.ones(300, 400)})
    arrived = threading.Event()

    def rule(_: int, request: bytes) -> str:
        if at == "its data" and b"/packs/" not in request.split(b"\r\n", 1)[0]:
            return "pass"
        arrived.set()
        return "stall"

    proxy.rule = rule
    words = [word.format(out=tmp_path / "out.safetensors", model=model) for word in COMMANDS[command]]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *words, "--store", s3_url],
        env={**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert arrived.wait(BOUND), "the request arrives"
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=BOUND)
    finally:
        process.kill()
        process.wait()
    goes_on = "" if command in ("ls", "load") else "; the same command goes on from what is finished"
    assert (process.returncode, out, said) == (130, "", f"modelstore: stopped{goes_on}\n")
    proxy.rule = lambda *_: "pass"
    assert [info.name for info in modelstore.open(s3_url).models()] == ["m"]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
