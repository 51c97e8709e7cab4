"""Students that are trained: nearer to their teacher, saved as they were trained, and refused where that cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cli.main import app
from modelstore.errors import NotFoundError, UnsupportedError
from modelstore.format.objects.record import JOBS
from modelstore.transfer.data import read
from modelstore.transfer.state import TrainingStates
from modelstore.transfer.train import Training
from tests.transfer.conftest import text_of

transformers = pytest.importorskip("transformers")

FAST: dict[str, Any] = {"steps": 24, "tokens": 128, "length": 32, "rate": 3e-3}


def test_the_divergence_falls(store: ms.Store, novels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over thirds, of what is held out; and the version has the weights of the best step, bit for bit."""
    trained: list[dict[str, torch.Tensor]] = []
    real = Training.run

    def run(self: Training) -> None:
        real(self)
        trained.append(self.best)

    monkeypatch.setattr(Training, "run", run)
    before = store.eval("small", text=str(novels.parent / "other.txt"), context=32, keep=False)
    done = store.distill("small", novels, teacher="m", held_out=novels.parent / "other.txt", **FAST)
    thirds = [[one.kl or 0.0 for one in done.curve if low < one.step <= low + 8] for low in (0, 8, 16)]
    means = [sum(third) / len(third) for third in thirds]
    assert (done.curve[0].kl or 0) > means[0] > means[1] > means[2]
    assert (done.parent, done.teacher, done.saved.version) == ("small@1", "m@1", 2)
    saved = store.load("small")
    assert saved.keys() == store.load("small@1").keys()
    for name, values in trained[0].items():
        assert torch.equal(saved[name], values), name
        assert saved[name].dtype == torch.bfloat16
    after = store.eval("small", text=str(novels.parent / "other.txt"), context=32, keep=False)
    assert before.measured.perplexity != after.measured.perplexity
    assert done.remarks == ()


def test_the_manifest_tells_how(store: ms.Store, novels: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = store.distill("small", novels, teacher="m@1", ce=0.5, seed=3, tag="won", **FAST)
    said = store.describe("small@won").metrics["distilled"]
    assert (said["of"], said["teacher"], said["settings"]["seed"]) == ("small@1", "m@1", 3)
    assert sorted(said["data"]["sources"]) == ["0.txt", "1.txt"]
    assert said["curve"] == [[one.step, one.loss, one.kl, one.ce] for one in done.curve]
    assert "the same texts" in done.remarks[0]
    assert store.log("small")[0].source == "small@1"
    caplog.clear()
    store.eval("small@2", text=str(novels / "0.txt"), context=32)
    assert "small was trained on 0.txt" in caplog.text
    caplog.clear()
    store.eval("small@2", text=str(novels.parent / "other.txt"), context=32)
    assert "trained on" not in caplog.text
    again = store.distill("small@1", novels, teacher="m@1", ce=0.5, seed=3, **FAST)
    assert store.load("small@3").keys() == store.load("small@2").keys()
    assert all(torch.equal(one, store.load("small@2")[name]) for name, one in store.load("small@3").items())
    assert again.curve == done.curve
    assert again.resumed == 0


def test_without_a_teacher_it_is_fine_tuned(store: ms.Store, novels: Path) -> None:
    done = store.distill("m", novels, **FAST)
    assert all(one.kl is None for one in done.curve)
    assert done.curve[-1].ce < done.curve[0].ce
    assert (done.teacher, done.saved.model, done.saved.version) == ("", "m", 2)


def test_lines_of_json_are_read(store: ms.Store, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text_of(seed, 300)}) for seed in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, ""]))
    plan = store.plan_distill("small", [tmp_path / "data.jsonl"], teacher="m", length=32, tokens=64, steps=3)
    assert plan.tokens == 3 * 64
    assert plan.data + plan.held_out > 1000
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(ValueError, match="line 2 of"):
        store.plan_distill("small", tmp_path / "data.jsonl", teacher="m")


def test_parquet_is_read_where_pyarrow_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UnsupportedError, match="pip install pyarrow"):
            read(path)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(ValueError, match="no column 'text'"):
        read(path)
    parquet.write_table(pyarrow.table({"text": ["a b", None, "c"], "other": [1, 2, 3]}), path)
    assert [one.documents for one in read([path])] == [("a b", "c")]


def test_the_plan_reads_no_weights(store: ms.Store, novels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelstore.execute.read.loading import Variant

    monkeypatch.delattr(Variant, "load")
    plan = store.plan_distill("small", novels, teacher="m", keep="int4", steps=10, tokens=64, length=32)
    assert plan.parameters == sum(one.bytes for one in [store.describe("small")]) // 2
    assert plan.memory > 24 * plan.parameters
    assert plan.kept
    assert all(name.endswith("_proj.weight") for name in plan.kept)


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"teacher": "nobody"}, NotFoundError, "nobody"),
        ({"keep": "fp8"}, ValueError, "which is not trained"),
        ({"keep": "sparse50"}, ValueError, "which is not trained"),
        ({"keep": "mask"}, UnsupportedError, "has zeros"),
        ({"length": 65, "tokens": 65}, ValueError, "64 positions"),
        ({"length": 64, "tokens": 32}, ValueError, "less than one window"),
        ({"rate": 0.0}, ValueError, "learning rate"),
    ],
)
def test_what_cannot_be_is_refused(
    store: ms.Store, novels: Path, wanted: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        store.distill("small", novels, **{"teacher": "m", **FAST, **wanted})
    assert store.models()[1].versions == 1


def test_a_teacher_of_other_tokens_is_refused_by_name(
    store: ms.Store, novels: Path, teacher: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "larger"
    config = transformers.LlamaConfig.from_pretrained(teacher)
    config.vocab_size += 8
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / name, other / name)
    store.save("larger", other)
    with pytest.raises(UnsupportedError, match="'larger' predicts"):
        store.distill("small", novels, teacher="larger", **FAST)
    cutting = tmp_path / "cutting"
    shutil.copytree(teacher, cutting)
    made = json.loads((cutting / "tokenizer.json").read_text())
    made["model"]["merges"] = made["model"]["merges"][:-3]
    (cutting / "tokenizer.json").write_text(json.dumps(made))
    store.save("cutting", cutting)
    with pytest.raises(UnsupportedError, match="'cutting' cuts the data into other tokens"):
        store.distill("small", novels, teacher="cutting", **FAST)


def test_what_diverges_stops(store: ms.Store, novels: Path) -> None:
    """With the best weights so far where there are some, and nothing else."""
    with pytest.raises(UnsupportedError, match="gained nothing"):
        store.distill("small", novels, teacher="m", **{**FAST, "rate": 1.0, "steps": 40})
    assert store.models()[1].versions == 1


def test_memory_is_foretold(store: ms.Store, novels: Path) -> None:
    few = ms.open(store.url, memory="64MiB")
    with pytest.raises(UnsupportedError, match="give memory="):
        few.distill("small", novels, teacher="m", **FAST)


def test_a_call_that_was_killed_after_it_published_is_at_its_end(store: ms.Store, novels: Path) -> None:
    """It is not done twice: not even of the newest version, which is its own by now."""
    how: dict[str, Any] = {**FAST, "checkpoint": 8, "teacher": "m"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStates, "clear", lambda _: None)
        done = store.distill("small", novels, **how)
    assert list(store.repo.storage.list(JOBS))
    again = store.distill("small", novels, **how)
    assert (again.parent, again.saved.version, again.curve) == (done.parent, 2, done.curve)
    assert not list(store.repo.storage.list(JOBS))
    assert store.distill("small", novels, **how).saved.version == 3


def test_the_command_trains_and_tells(
    store: ms.Store, novels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELSTORE_URL", store.url)
    how = ["small", "--data", str(novels), "--teacher", "m", "--steps", "24", "--tokens", "128", "--length", "32"]
    assert not app(["plan", "distill", *how, "--keep", "int4"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "numbers of small@1 would be trained to predict as m does" in said
    assert "weights would stay int4" in said
    assert not app(
        ["distill", *how, "--rate", "3e-3", "--held-out", str(novels.parent / "other.txt")], standalone_mode=False
    )
    said = capsys.readouterr().out
    assert "small@2 was trained from m@1" in said
    assert "held-out divergence: " in said
    assert not app(["distill", *how, "--rate", "3e-3", "--json", "--quiet"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["saved"]["version"], found["parent"]) == (3, "small@2")
    assert len(found["curve"]) == 25
