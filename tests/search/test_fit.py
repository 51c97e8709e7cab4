"""Mixes of formats that fit: within the size as stored, engines' layers alike, measured once, and said before they are made."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import modelstore as ms
from modelstore.architecture.fused import fused
from modelstore.errors import ConflictError, UnsupportedError
from modelstore.format.answers.fitted import FitPlan
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import CodecSpec
from modelstore.search.mix import Mixture, mixture
from modelstore.search.sensitivity import Measuring
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

pytest.importorskip("transformers")

OTHER = TEXT[5:]  # than that of the calibration
DATA = ms.Calibration(TEXT, samples=6, length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def store(folder: Path) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    return opened


def sizes(store: ms.Store) -> FitPlan:
    return store.plan_fit("m", 1 << 20, calibration=DATA)


def codecs(store: ms.Store, ref: str) -> Mapping[str, CodecSpec]:
    manifest = store[ref].opened().manifest
    return {tensor.name: manifest.codecs[tensor.codec] for tensor in manifest.tensors}


def test_every_size_is_kept_and_measured_for_once(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sizes(store)
    real, runs = Measuring.run, []
    monkeypatch.setattr(Measuring, "run", lambda self: runs.append(1) or real(self))
    before = [float("inf")]
    for step in range(5):
        budget = plan.smallest + (plan.original - 1 - plan.smallest) * step // 4
        made = store.compress("m", fit=budget, calibration=DATA, variant=f"mix{step}")
        (info,) = made.variants
        assert info.stored <= budget
        known = store.plan_fit("m", budget)
        assert known.measured
        assert known.bytes is not None
        assert known.cost is not None
        assert info.stored <= known.bytes <= budget  # equal chunks lie once
        assert known.cost <= before[-1]
        before.append(known.cost)
        found = codecs(store, f"m:mix{step}")
        for group in fused(found):
            assert all(found[name] == found[group[0]] for name in group)
    assert runs == [1]
    assert store.verify("m", deep=True).ok


def test_the_mix_is_better_than_any_one_format_of_its_size(store: ms.Store) -> None:
    plan = store.plan_fit("m", 1 << 20, calibration=DATA, measure=True)
    uniform = {"name": "u", "rules": [{"targets": ["linear"], "codec": {"name": "int", "params": {}}}]}
    uniform["rules"][0]["codec"]["params"] = {"bits": 3, "group_size": 16, "method": "mse"}  # type: ignore[index]
    size = store.compress("m", uniform).variants[0].stored
    assert plan.smallest < size
    store.compress("m", fit=size, calibration=DATA, variant="mixed")
    found = store.eval(["m:u", "m:mixed"], text=TEXT, context=32)
    assert found[1].measured.kl < found[0].measured.kl


def test_the_recipe_that_is_told_gives_the_same_variant(store: ms.Store) -> None:
    store.compress("m", fit="21KiB", calibration=DATA)
    told = store.plan_fit("m", "21KiB").recipe
    assert told is not None
    assert told["name"] == "fit-21KiB"
    store.compress("m", told, variant="again")
    assert store["m:again"].opened().manifest.content == store["m:fit-21KiB"].opened().manifest.content
    assert store.compress("m", fit="21KiB", calibration=DATA).stored == 0


def test_values_may_be_solved_on_top(store: ms.Store) -> None:
    store.compress("m", fit="21KiB", method="gptq", calibration=DATA)
    store.compress("m", fit="21KiB", calibration=DATA)
    recipe = store.describe("m:gptq-21KiB").recipe
    assert all(rule["method"] == {"name": "gptq"} for rule in recipe["rules"])
    assert recipe["calibration"]["samples"] == 6
    found = store.eval(["m:fit-21KiB", "m:gptq-21KiB"], text=TEXT, context=32)
    assert found[1].measured.kl < found[0].measured.kl


def test_what_solving_gains_is_found_with_the_costs_and_kept(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that does not say it is made again; one that does serves both."""
    store.plan_fit("m", "21KiB", calibration=DATA, measure=True)
    real, runs = Measuring.run, []
    monkeypatch.setattr(Measuring, "run", lambda self: runs.append(1) or real(self))
    solved = store.plan_fit("m", "21KiB", method="gptq", calibration=DATA, measure=True)
    plain = store.plan_fit("m", "21KiB", calibration=DATA, measure=True)
    store.plan_fit("m", "22KiB", method="gptq", calibration=DATA, measure=True)
    assert runs == [1]
    assert solved.cost is not None
    assert plain.cost is not None
    assert 0.05 * plain.cost < solved.cost < plain.cost
    found = store.describe("m").metrics["sensitivity"]
    assert [one["gains"] is None for one in found] == [False, True]
    assert len(found[0]["gains"]) == 14
    assert all(0 < gain <= 1 for gain in found[0]["gains"].values())


def test_embeddings_and_heads_take_part_where_they_are_included(store: ms.Store) -> None:
    less = store.plan_fit("m", 1 << 20, calibration=DATA, include=["embedding", "head"]).smallest
    assert less < sizes(store).smallest
    store.compress("m", fit=less, calibration=DATA, include=["embedding", "head"], variant="least")
    assert codecs(store, "m:least")["model.embed_tokens.weight"].params["bits"] == 2
    kept = store.plan_fit("m", 1 << 20, calibration=DATA, skip=["*.q_proj.weight"], measure=True)
    assert not any("q_proj" in name for group in kept.groups for name in group.tensors)


def test_before_it_is_measured_the_plan_says_what_that_takes(store: ms.Store) -> None:
    plan = sizes(store)
    assert (plan.measured, plan.recipe, plan.blocks, plan.passes) == (False, None, 2, 2)
    assert plan.spool == 6 * 32 * 32 * 4 * 2
    with pytest.raises(ValueError, match="give a text"):
        store.plan_fit("m", 1 << 20)
    done = store.plan_fit("m", "21KiB", calibration=DATA, measure=True)
    assert done.measured
    assert done.front[0].bytes == done.smallest
    assert [one.bytes for one in done.front] == sorted(one.bytes for one in done.front)
    assert [one.cost for one in done.front] == sorted((one.cost for one in done.front), reverse=True)
    assert sum(group.cost for group in done.groups) == pytest.approx(done.cost)


def test_too_small_is_refused_with_what_is_possible(store: ms.Store) -> None:
    least = sizes(store).smallest
    with pytest.raises(UnsupportedError, match=f"the smallest mix has {least:,} bytes"):
        store.compress("m", fit=least - 1, calibration=DATA)
    store.compress("m", fit=least, calibration=DATA)
    with pytest.raises(UnsupportedError, match=f"the smallest mix has {least:,} .*expected to diverge by"):
        store.plan_fit("m", least - 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "say what is to be made"),
        ({"recipe": "int4", "fit": "1MiB"}, "recipe= and fit= each say"),
        ({"fit": "1MiB", "max_kl": 0.1, "text": TEXT}, "fit= and max_kl= each say"),
        ({"recipe": "int4", "method": "gptq"}, "method= has no effect here: a recipe says itself"),
        ({"recipe": "int4", "formats": ["int8"]}, "formats= has no effect here"),
        ({"fit": "1MiB", "codes": "m:int4"}, "codes= has no effect here: fit= chooses"),
        ({"fit": "1MiB", "text": TEXT}, "text= has no effect here"),
        ({"fit": "1MiB", "calibration": DATA}, "leave nothing to compress"),
        ({"fit": "21KiB"}, "give a text that it is measured on"),
        ({"fit": "21KiB", "method": "gptq"}, "looks at data: give a text"),
        ({"fit": "21KiB", "method": "awk", "calibration": DATA}, "is not one of gptq"),
        ({"fit": "21KiB", "formats": ["gptq4"], "calibration": DATA}, "is more than a format"),
        ({"fit": "21KiB", "formats": ["sparse50"], "calibration": DATA}, "no engine runs 'sparse50'"),
        ({"fit": "21KiB", "formats": ["int5"], "calibration": DATA}, "there is no preset 'int5'"),
        (
            {"fit": "21KiB", "formats": ["fp8"], "method": "gptq", "calibration": DATA},
            "'fp8': method gptq is for codec int",
        ),
        ({"fit": "21KiB", "include": ["nothing*"], "calibration": DATA}, "include='nothing.' has no effect"),
        ({"fit": "21KiB", "method": "wanda", "calibration": DATA}, "is not one of gptq, imatrix"),
        ({"fit": "21KiB", "variant": "original", "calibration": DATA}, "as saves make it"),
        ({"fit": "21KiB", "variant": "checkpoint", "calibration": DATA}, "as saves make it"),
        ({"max_kl": 0.1, "variant": "checkpoint", "text": OTHER, "calibration": DATA}, "as saves make it"),
        ({"max_kl": 0.1, "variant": "v" * 97, "text": OTHER, "calibration": DATA}, "is not valid"),
        ({"max_kl": 0.1, "text": TEXT, "calibration": DATA}, "is the calibration's own"),
        ({"max_kl": 0.1, "text": "the sea", "calibration": DATA}, "tokens, and one whole context is 64"),
        ({"max_kl": 0.1, "calibration": DATA}, "is judged on a text"),
        ({"max_kl": 0.0, "text": TEXT, "calibration": DATA}, "max_kl=0.0 is not a bound"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(store: ms.Store, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store.compress("m", **given)
    assert [info.variant for info in store.variants("m")] == [ORIGINAL]


def test_the_smallest_that_holds_a_bound(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = store.compress("m", max_kl=0.05, text=OTHER, calibration=DATA)
    assert [info.variant for info in done.variants] == ["kl-0.05"]
    assert [info.variant for info in store.variants("m")] == [ORIGINAL, "kl-0.05"]
    (found,) = store.eval(["m:kl-0.05"], text=OTHER, context=64, limit=8192)
    assert found.known  # it was judged
    assert found.measured.kl <= 0.05
    wider = store.compress("m", max_kl=0.2, text=OTHER, calibration=DATA).variants[0]
    assert wider.stored < done.variants[0].stored
    again = store.compress("m", max_kl=0.05, text=OTHER, calibration=DATA)
    assert (again.stored, again.variants) == (0, done.variants)
    with pytest.raises(ConflictError, match="of another recipe"):
        store.compress("m", max_kl=0.05, text=OTHER + " more", calibration=DATA)
    with pytest.raises(UnsupportedError, match="no mix was found that holds"):
        store.compress("m", max_kl=1e-9, text=OTHER, calibration=DATA, formats=["int4"])
    assert [info.variant for info in store.variants("m")] == [ORIGINAL, "kl-0.05", "kl-0.2"]


def test_a_bound_is_another_where_anything_of_the_call_is(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the name is another's, which is said before anything is measured or made; nothing of the call stays."""
    asked: dict[str, Any] = {"max_kl": 0.2, "text": OTHER, "calibration": DATA, "formats": ["int4", "int3"]}
    store.compress("m", **{**asked, "variant": "b" * 90})
    monkeypatch.setattr(Measuring, "run", lambda _: pytest.fail("it was measured"))
    for change in (
        {"max_kl": 0.2000000001},
        {"formats": ["int4"]},
        {"skip": ["*.q_proj.weight"]},
        {"include": ["embedding"]},
        {"method": "gptq"},
        {"calibration": ms.Calibration(TEXT, samples=5, length=32)},
    ):
        with pytest.raises(ConflictError, match="of another recipe"):
            store.compress("m", **{**asked, **change, "variant": "b" * 90})
    assert store.compress("m", **{**asked, "variant": "b" * 90}).stored == 0
    with pytest.raises(ConflictError, match="of another recipe"):
        store.compress("m", fit="21KiB", calibration=DATA, variant="b" * 90)


def test_any_bound_has_a_name(store: ms.Store) -> None:
    assert store.compress("m", max_kl=1e20, text=OTHER, calibration=DATA).variants[0].variant == "kl-1e20"


def test_trials_do_not_outlive_an_error(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelstore.client.compression import bounded

    with monkeypatch.context() as broken:
        broken.setattr(bounded, "evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.compress("m", max_kl=0.2, text=OTHER, calibration=DATA)
    assert [info.variant for info in store.variants("m")] == [ORIGINAL]
    with monkeypatch.context() as broken:  # a crash: nothing is cleared
        broken.setattr(bounded, "evaluate", lambda *_, **__: 1 / 0)
        broken.setattr(bounded._Search, "clear", lambda _: None)
        with pytest.raises(ZeroDivisionError):
            store.compress("m", max_kl=0.2, text=OTHER, calibration=DATA)
    assert len(store.variants("m")) == 2
    assert len(store.compare(["m"], text=OTHER, context=64, keep=False)) == 1  # trials are not compared
    store.compress("m", max_kl=0.2, text=OTHER, calibration=DATA)
    assert [info.variant for info in store.variants("m")] == [ORIGINAL, "kl-0.2"]


def test_where_no_format_is_smaller_a_bound_is_refused(folder: Path, tmp_path: Path) -> None:
    store = on_grid(folder, tmp_path / "grid")
    with pytest.raises(UnsupportedError, match="no format is smaller"):
        store.compress("grid", max_kl=0.2, text=OTHER, calibration=DATA, formats=["fp8"])


def test_a_store_for_reading_only_refuses_before_it_measures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms.open(tmp_path / "s").save("m", folder)
    monkeypatch.setattr(Measuring, "run", lambda _: pytest.fail("it was measured"))
    store = ms.open(tmp_path / "s", read_only=True)
    for act in (
        lambda: store.compress("m", fit="21KiB", calibration=DATA),
        lambda: store.compress("m", max_kl=0.2, text=OTHER, calibration=DATA),
        lambda: store.plan_fit("m", "21KiB", calibration=DATA, measure=True),
    ):
        with pytest.raises(UnsupportedError, match="open for reading only"):
            act()


def mixed(costs: dict[str, list[float | None]] | None, store: ms.Store) -> Mixture:
    formats = [CodecSpec("int", {"bits": bits, "group_size": 16}) for bits in (2, 4)]
    plan = store.plan_compression("moe", {"name": "x", "rules": [{"targets": ["linear"], "codec": {"name": "int"}}]})
    return mixture(plan, store["moe"].opened().manifest, formats, costs)


def test_what_no_token_came_to_counts_as_the_dearest_of_its_kind() -> None:
    """Not as what costs nothing; and where nothing is known of a kind, it is kept."""
    import torch

    store = open_on(MemoryStorage(uuid.uuid4().hex))
    names = [f"model.layers.0.mlp.experts.{at}.down_proj.weight" for at in range(3)]
    other = "model.layers.0.self_attn.o_proj.weight"
    store.save("moe", {name: torch.randn(64, 64) for name in [*names, other]})
    costs: dict[str, list[float | None]] = {
        names[0]: [4.0, 1.0],
        names[1]: [None, None],
        names[2]: [2.0, 0.5],
        other: [None, None],
    }
    made = mixed(costs, store)
    assert set(made.unseen) == {names[1], other}
    options = dict(zip([group[0] for group in made.groups], made.options, strict=True))
    assert [one.cost for one in options[names[1]]] == [4.0, 1.0, 0.0]
    assert len(options[other]) == 1
    assert mixed(None, store).smallest < made.smallest


def on_grid(folder: Path, out: Path) -> ms.Store:
    """A store with the model "grid", whose weights mxfp4 stores exactly."""
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", folder)
    store.compress("m", "mxfp4")
    store["m:mxfp4"].export(out, dequantize=True)
    store.save("grid", out)
    return store


def test_a_model_on_a_formats_grid_fits_that_format(folder: Path, tmp_path: Path) -> None:
    """What costs nothing was seen: it is not taken for what the data say nothing of."""
    store = on_grid(folder, tmp_path / "grid")
    plan = store.plan_fit("grid", 1 << 20, calibration=DATA, formats=["mxfp4"])
    store.compress(
        "grid", fit=(plan.smallest + plan.original) // 2, calibration=DATA, formats=["mxfp4"], variant="half"
    )
    done = store.plan_fit("grid", plan.smallest, formats=["mxfp4"])
    assert (done.unseen, done.cost) == ((), 0.0)
