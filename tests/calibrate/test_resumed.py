"""A calibration that was broken off: finished blocks are not solved again, and the bytes are those of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.calibrate.block import Solving
from modelstore.execute.write.packs import PackWriter
from tests.calibrate.killed import DATA, RECIPE, STEPS

pytest.importorskip("transformers")


def saved(folder: Path, at: Path) -> ms.Store:
    opened = ms.open(str(at))
    opened.save("m", folder)
    return opened


def digests(store: ms.Store) -> dict[str, str]:
    return {tensor.name: tensor.digest for tensor in store["m:solved"].opened().manifest.tensors}


def test_finished_blocks_are_not_solved_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was noted of them: here the first block's down projection, to which too little is said to come."""
    few = {**RECIPE, "rules": [{"targets": ["*.0.mlp.down_proj.weight"]}, *RECIPE["rules"]]}
    few["rules"][0] |= {**RECIPE["rules"][0], "targets": few["rules"][0]["targets"]}
    data = ms.Calibration(DATA.text, samples=2, length=40)  # 80 tokens: enough for 32 columns, too few for 48
    one, other = saved(folder, tmp_path / "one"), saved(folder, tmp_path / "other")
    metrics = one.compress("m", few, calibration=data).metrics
    real, calls, solved = PackWriter.write, [], []

    def dying(self: PackWriter, items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(PackWriter, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            other.compress("m", few, calibration=data)
    solving = Solving.solve
    monkeypatch.setattr(Solving, "solve", lambda self, given: solved.append(self.number) or solving(self, given))
    assert other.compress("m", few, calibration=data).metrics == metrics
    assert "model.layers.0.mlp.down_proj.weight" in metrics["solved"]["data_free"]
    assert solved == [1]
    assert digests(one) == digests(other)


@pytest.mark.slow
def test_what_was_killed_at_any_step_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    one, other = saved(folder, tmp_path / "one"), tmp_path / "other"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that are killed: more of them add up in another order
    try:
        one.compress("m", RECIPE, calibration=DATA)
    finally:
        torch.set_num_threads(threads)
    saved(folder, other)
    done = subprocess.run(
        [sys.executable, "-m", "tests.calibrate.killed", str(other)], capture_output=True, text=True, check=False
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [*({step: 9} for step in STEPS), {"solved": []}, {"end": 0}], done.stderr
    assert digests(one) == digests(ms.open(str(other)))
