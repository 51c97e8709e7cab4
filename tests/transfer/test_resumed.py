"""A training that was killed at any step, and called again, gives the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore.format.objects.record import JOBS
from modelstore.transfer.state import TrainingState, TrainingStates
from tests.transfer.killed import HOW, STEPS

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["", "int4-g32"])
def test_what_was_killed_gives_the_same_weights(store: ms.Store, novels: Path, tmp_path: Path, keep: str) -> None:
    other = ms.open(tmp_path / "other")
    for name in ("m", "small"):
        store.copy(name, str(tmp_path / "other"))
    done = store.distill("small", novels, keep=keep or None, **HOW)
    assert done.resumed == 0
    ran = subprocess.run(
        [sys.executable, "-m", "tests.transfer.killed", str(tmp_path / "other"), str(novels), keep],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    assert said == [*({step: 9} for step in STEPS), {"resumed": 8}, {"end": 0}], ran.stderr
    for variant in ("original", *([keep] if keep else [])):
        wanted, found = store.load(f"small@2:{variant}"), other.load(f"small@2:{variant}")
        assert all(torch.equal(found[name], one) for name, one in wanted.items())
    one, two = (opened.describe("small@2").metrics["distilled"] for opened in (store, other))
    assert one == two
    assert not list(other.repo.storage.list(JOBS))


def test_the_newest_states_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", {"w": torch.ones(2)})
    states = TrainingStates(store.repo.storage, "0" * 32)
    assert states.newest() is None
    for step in (4, 8, 12):
        states.keep(
            TrainingState(step, {"step": step}, {"a": torch.full((3,), float(step)), "b": torch.ones(2).bfloat16()})
        )
    found = states.newest()
    assert found is not None
    assert (found.step, found.tensors["a"].tolist(), found.tensors["b"].dtype) == (12, [12.0] * 3, torch.bfloat16)
    files = sorted((tmp_path / "store" / "jobs" / ("0" * 32)).iterdir())
    assert [int(file.name[:8]) for file in files] == [8, 12]
    raw = bytearray(files[-1].read_bytes())
    raw[-1] ^= 1
    files[-1].write_bytes(raw)
    before = states.newest()
    assert before is not None
    assert before.step == 8
    assert not store.verify().problems
    states.clear()
    assert states.newest() is None
