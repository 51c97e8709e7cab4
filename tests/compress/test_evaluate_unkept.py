"""What cannot be kept is refused before minutes of work, and what is known is told all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelstore as ms
from modelstore.compress.evaluate import score
from modelstore.errors import UnsupportedError
from tests.helpers.language import TEXT, make_language_model

pytest.importorskip("transformers")


def test_what_cannot_be_kept_is_said_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ms.open(tmp_path / "s")
    written.save("m", make_language_model(tmp_path / "tiny"))
    store = ms.open(tmp_path / "s", read_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(score, "compare", lambda *_, **__: pytest.fail("it was run"))
        with pytest.raises(UnsupportedError, match=r"cannot keep what is found \(keep=False does without\)"):
            store.eval("m", text=TEXT, context=32)
        with pytest.raises(UnsupportedError, match=r"cannot keep what is found \(keep=False does without\)"):
            store.compare("m", text=TEXT, context=32)
        with pytest.raises(UnsupportedError, match=r"cannot make gptq4: .* is open for reading only"):
            store.compress("m", "gptq4", calibration=TEXT)
    assert not store.eval("m", text=TEXT, context=32, keep=False).known
    written.eval("m", text=TEXT, context=32)
    assert store.eval("m", text=TEXT, context=32).known  # nothing is to be kept
