"""The seconds of an answer are those of the whole call: also what is looked up, measured or made before the main work."""

from __future__ import annotations

import importlib
import pkgutil
import re
from itertools import count
from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore.client import arguments
from modelstore.client.model import Model
from modelstore.client.store import Store
from modelstore.format import answers
from modelstore.format.answers.brief import Result, Timed

OTHER = {"FitPlan", "JobStatus"}  # of an engine, of a job


def returned() -> set[str]:
    """Names of what the public methods answer."""
    said = [
        str(getattr(member, "__annotations__", {}).get("return", ""))
        for kind in (Store, Model)
        for name in dir(kind)
        if not name.startswith("_") and callable(member := getattr(kind, name))
    ]
    return {name for text in said for name in re.findall(r"\w+", text)}


def test_every_answer_of_one_call_that_has_seconds_is_timed() -> None:
    for module in pkgutil.iter_modules(answers.__path__):
        importlib.import_module(f"{answers.__name__}.{module.name}")
    kinds = {kind.__name__: kind for kind in (*Result.__subclasses__(), *Timed.__subclasses__())}
    timed = {name for name in returned() & kinds.keys() if "seconds" in kinds[name].__struct_fields__}
    assert {"Saved", "Exported", "Compressed", "Copied"} <= timed
    # An evaluation is one of a list, of which each has the seconds of all.
    assert {name for name in timed if not issubclass(kinds[name], Timed)} <= OTHER | {"Evaluation"}


def test_seconds_are_those_of_the_whole_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ms.open(tmp_path / "store")
    monkeypatch.setattr(arguments, "monotonic", count(0, 1000).__next__)
    saved = store.save("m", {"w": torch.randn(64, 64)})
    made = store.compress("m", "int8", include=["w"])
    written = store.export("m", tmp_path / "m.safetensors", format="safetensors")
    copied = store.copy("m", tmp_path / "copy")
    for answer in (saved, made, written, copied):
        assert answer.seconds >= 1000, type(answer).__name__
        assert answer.seconds % 1000 == 0
