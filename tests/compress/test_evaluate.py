"""Evaluating: the numbers are those of a direct computation, are kept with the variants, and bad input is refused."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import modelstore as ms
from modelstore.compress.evaluate import score as ev
from modelstore.compress.evaluate.metrics import evaluations, with_evaluation
from modelstore.compress.evaluate.model import ready_model
from modelstore.errors import ConflictError, FormatError, NotFoundError, UnsupportedError
from modelstore.execute.write.save import store_manifest
from modelstore.format.answers.results import Measured
from modelstore.format.names import Reference
from modelstore.storage.memory import MemoryStorage
from modelstore.store.shelf import Shelf
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")

CONTEXT = 32
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights of its own and a tokenizer made from the text."""
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, list[int]]:
    """The model as transformers loads it from the folder, and the text's tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


@pytest.fixture
def store(folder: Path) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    return opened


def add_variant(store: ms.Store, variant: str, changed: Mapping[str, torch.Tensor]) -> None:
    """A variant of m whose tensors differ from the original's by these."""
    store.save("source", store.load("m") | dict(changed))
    original = store["m"].opened().manifest
    manifest = msgspec.structs.replace(
        store["source"].opened().manifest, recipe={"name": variant}, parent=original.content
    )
    entry = store_manifest(store.repo.manifests, "m", manifest, variant, Shelf(store.repo.storage))
    store.repo.catalog.publish_variants("m", store.versions("m")[-1].version, {variant: entry}, uuid.uuid4().hex)


def answers(model: Any, ids: list[int], context: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of all tokens for each prediction, token by token: what the windows must come to. And the tokens."""
    rows, targets, done = [], [], 1
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        with torch.no_grad():
            logs = model(torch.tensor([ids[start:stop]])).logits[0].float().log_softmax(-1)
        for at in range(max(done, start + 1), stop):
            rows.append(logs[at - start - 1])
            targets.append(ids[at])
        done = stop
        if stop == len(ids):
            break
    return torch.stack(rows), torch.tensor(targets)


def perplexity(logs: torch.Tensor, targets: torch.Tensor) -> float:
    return math.exp(-logs.gather(1, targets[:, None]).double().mean())


@pytest.mark.parametrize(
    ("context", "stride", "batch"), [(32, 32, None), (32, 32, 1), (48, 20, 3), (64, 1, 8), (2, 1, 7)]
)
def test_perplexity_is_that_of_a_direct_computation(
    store: ms.Store, reference: tuple[Any, list[int]], context: int, stride: int, batch: int | None
) -> None:
    model, ids = reference
    found = store.eval("m", text=TEXT, context=context, stride=stride, batch=batch).measured
    logs, targets = answers(model, ids, context, stride)
    assert (found.tokens, found.predicted) == (len(ids), len(targets))
    assert found.perplexity == pytest.approx(perplexity(logs, targets), rel=1e-5)
    assert (found.kl, found.top1, found.baseline_perplexity) == (0, 1, found.perplexity)


@pytest.mark.parametrize("tokens", [*range(2, 40)])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (8, 8), (8, 3), (16, 15)])
def test_every_token_is_predicted_once_at_most(tokens: int, context: int, stride: int) -> None:
    found = ev.windows(tokens, context, stride)
    predicted = [at for w in found for at in range(w.first, w.stop)]
    assert predicted == sorted(set(predicted))
    assert all(w.start < w.first < w.stop <= w.start + context for w in found)
    if stride < context:
        assert predicted == list(range(1, tokens))
    else:
        assert predicted == [at for at in range(tokens) if at % context]
    work = ev.batches(found, 3)
    assert [w for batch in work for w in batch] == found
    assert all(len({(w.stop - w.start, w.first - w.start) for w in batch}) == 1 and len(batch) <= 3 for batch in work)


@pytest.mark.parametrize("memory", ["64MiB", "1GiB"])
def test_a_known_shift_has_the_divergence_that_it_must(
    store: ms.Store, reference: tuple[Any, list[int]], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A final norm of half the scale makes each distribution the square root of itself, normalised: the top stays the top."""
    add_variant(store, "half", {NORM: store.load("m")[NORM] / 2})
    add_variant(store, "flat", {NORM: torch.zeros(32, dtype=torch.bfloat16)})
    add_variant(store, "same", {})
    model, ids = reference
    logs, targets = answers(model, ids, CONTEXT, CONTEXT)
    halved = (logs / 2).log_softmax(-1)
    if memory == "64MiB":  # too little to keep what the original predicted: it is run beside the variants
        loaded = []
        monkeypatch.setattr(ev, "_against", _counting(loaded))
        kept = ev.compare
        monkeypatch.setattr(ev, "compare", lambda *args, **rest: kept(*args, **rest | {"memory": 1000}))
    half, flat, same = (e.measured for e in store.eval(["m:half", "m:flat", "m:same"], text=TEXT, context=CONTEXT))
    assert (same.kl, same.top1, same.perplexity) == (0, 1, same.baseline_perplexity)
    assert half.top1 == 1
    assert half.kl == pytest.approx(float((logs.exp() * (logs - halved)).sum(-1).mean()), rel=1e-4)
    assert half.perplexity == pytest.approx(perplexity(halved, targets), rel=1e-5)
    vocabulary = logs.shape[1]
    assert flat.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert flat.kl == pytest.approx(math.log(vocabulary) + float((logs.exp() * logs).sum(-1).mean()), rel=1e-4)
    assert half.baseline_perplexity == flat.baseline_perplexity == pytest.approx(perplexity(logs, targets), rel=1e-5)


def _counting(loaded: list[bool]) -> Any:
    real = ev._against

    def against(reference: Any, *rest: Any) -> ev.Score:
        assert not isinstance(reference, list), "the original's predictions were kept"
        loaded.append(True)
        return real(reference, *rest)

    return against


def test_what_is_known_is_not_computed_again(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_variant(store, "half", {NORM: store.load("m")[NORM] / 2})
    first = store.eval("m:half", text=TEXT, context=CONTEXT)
    digests = {info.variant: store.repo.catalog.entry(Reference("m", variant=info.variant))[1].manifest
               for info in store.variants("m")}  # fmt: skip
    assert not first.known
    run: list[str] = []

    def noted(model: Any, *args: Any, **rest: Any) -> Any:
        run.append(model.manifest.recipe.get("name", "original"))
        return ready_model(model, *args, **rest)

    monkeypatch.setattr("modelstore.compress.evaluate.run.ready_model", noted)
    again = store.eval("m:half", text=TEXT, context=CONTEXT)
    assert again.known
    assert again.measured == first.measured
    original = store.eval("m", text=TEXT, context=CONTEXT)  # found out when the variant was compared to it
    assert original.known
    assert original.measured.perplexity == first.measured.baseline_perplexity
    assert not run
    assert digests == {v: store.repo.catalog.entry(Reference("m", variant=v))[1].manifest for v in digests}
    add_variant(store, "other", {NORM: store.load("m")[NORM] / 4})
    alone = store.eval("m:other", text=TEXT, context=CONTEXT, baseline=False).measured
    assert run == ["other"]
    assert (alone.kl, alone.top1, alone.baseline_perplexity) == (None, None, original.measured.perplexity)
    compared = store.eval("m:other", text=TEXT, context=CONTEXT)
    assert not compared.known
    assert compared.measured.kl is not None
    assert run == ["other", "original", "other"]


def test_other_settings_are_evaluations_of_their_own(store: ms.Store) -> None:
    store.eval("m", text=TEXT, context=16)
    store.eval("m", text=TEXT, context=32)
    store.eval("m", text=TEXT, context=32, limit=50)
    found = evaluations(store.describe("m").metrics)
    assert [(one.context, one.tokens == 50) for one in found] == [(32, True), (32, False), (16, False)]
    assert store.eval("m", text=TEXT, context=16).known


def test_metrics_survive_verification_collection_and_repair(folder: Path) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", folder)
    add_variant(store, "half", {NORM: store.load("m")[NORM] / 2})
    tuned = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in store.load("m").items()}
    store.save("tuned", tuned, codec="delta", parent="m@1")  # its base is the manifest from before the evaluation
    created = [info.created for info in store.variants("m")]
    before = store.repo.catalog.entry(Reference("m"))[1].manifest
    made = store.eval("m:half", text=TEXT, context=CONTEXT).measured
    assert store.repo.catalog.entry(Reference("m"))[1].manifest != before
    for key, (data, modified) in list(storage._shelf.objects.items()):
        storage._shelf.objects[key] = data, modified - 1e6
    assert store.gc(dry_run=False, grace=0).kept
    fresh = open_on(storage)
    assert fresh.verify(deep=True).ok
    assert fresh.load("tuned").keys() == tuned.keys()
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in fresh.load("tuned").items())
    assert [info.created for info in fresh.variants("m")] == created
    for key in [k for k in storage._shelf.objects if "/manifests/" in k and k.startswith("models/m/")]:
        del storage._shelf.objects[key]
    fresh = open_on(storage)
    assert fresh.repair().ok
    assert fresh.verify(deep=True).ok
    assert evaluations(fresh.describe("m:half").metrics) == [made]
    (original,) = evaluations(fresh.describe("m").metrics)
    assert original.perplexity == made.baseline_perplexity
    fresh.delete("m@1:half")
    fresh.gc(dry_run=False, grace=0)
    assert open_on(storage).verify(deep=True).ok


def test_evaluations_at_the_same_time_are_both_kept(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = open_on(store.repo.storage)
    publish = store.repo.catalog.replace_entry
    raced: list[bool] = []

    def late(*args: Any, **rest: Any) -> Any:
        if not raced:
            raced.append(True)
            other.eval("m", text=TEXT, context=16)
        return publish(*args, **rest)

    monkeypatch.setattr(store.repo.catalog, "replace_entry", late)
    store.eval("m", text=TEXT, context=32)
    assert [one.context for one in evaluations(store.describe("m").metrics)] == [32, 16]


def test_a_variant_made_anew_meanwhile_gets_no_metrics_of_the_old(
    store: ms.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_variant(store, "half", {NORM: store.load("m")[NORM] / 2})

    def slow(model: Any, *args: Any, **rest: Any) -> Any:
        if model.manifest.recipe:
            store.delete("m@1:half")
            add_variant(store, "half", {NORM: store.load("m")[NORM] / 3})
        return ready_model(model, *args, **rest)

    monkeypatch.setattr("modelstore.compress.evaluate.run.ready_model", slow)
    with pytest.raises(ConflictError, match="made again"):
        store.eval("m:half", text=TEXT, context=CONTEXT, baseline=False)
    assert not evaluations(store.describe("m:half").metrics)


def test_quality_sets_sizes_beside_what_was_measured(store: ms.Store) -> None:
    add_variant(store, "half", {NORM: store.load("m")[NORM] / 2})
    add_variant(store, "unknown", {})
    store.eval("m:half", text=TEXT, context=CONTEXT)
    store.eval("m", text=TEXT, context=16)
    original, half, unknown = store.quality("m")
    assert original.weights == sum(t.numel() for t in store.load("m").values())
    infos = store.describe("m").tensors
    (norm, *alike) = [info for info in infos if "norm" in info.name]  # all ones: stored once
    stored = sum(info.stored for info in infos) - len(alike) * norm.stored
    assert original.stored == stored
    assert original.bits == pytest.approx(8 * stored / original.weights)
    assert original.measured is not None
    assert half.measured is not None
    assert original.measured.context == half.measured.context == CONTEXT
    assert unknown.measured is None


def test_a_model_whose_predictions_are_no_numbers_has_no_perplexity(store: ms.Store) -> None:
    add_variant(store, "broken", {NORM: torch.full((32,), math.nan, dtype=torch.bfloat16)})
    found = store.eval("m:broken", text=TEXT, context=CONTEXT)
    assert (found.measured.perplexity, found.measured.kl) == (None, None)
    assert store.eval("m:broken", text=TEXT, context=CONTEXT).known
    json.dumps(store.describe("m:broken").metrics, allow_nan=False)


def test_a_file_and_its_content_are_the_same_text(store: ms.Store, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    first = store.eval("m", text=path, context=CONTEXT)
    assert first.measured.text == "text.txt"
    assert store.eval("m", text=TEXT, context=CONTEXT).known
    assert store.eval("m", text=str(path), context=CONTEXT).known


def test_nothing_is_kept_where_that_is_not_wanted(store: ms.Store) -> None:
    before = store.repo.storage
    keys = {info.key for info in before.list("")}
    store.eval("m", text=TEXT, context=CONTEXT, keep=False)
    assert {info.key for info in before.list("")} == keys


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": ""}, "text is an empty text"),
        ({"text": "h"}, "too short"),
        ({"text": " "}, "1 tokens"),
        ({"text": "nowhere/text.txt"}, "no file"),
        ({"text": Path("nowhere/text.txt")}, "cannot be read"),
        ({"context": 65}, "64 positions"),
        ({"context": 1}, "context=1 is too small"),
        ({"stride": 33}, "between 1 and"),
        ({"stride": -1}, "stride=-1 is too small"),
        ({"limit": 1}, "limit=1 is too small"),
        ({"batch": 0}, "batch=0 is too small"),
        ({"dtype": "int8"}, "dtype is one of"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(store: ms.Store, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store.eval("m", **{"text": TEXT, "context": CONTEXT} | options)


def test_unknown_references_are_said_so(store: ms.Store) -> None:
    for ref in ("other", "m:int4", "m@2"):
        with pytest.raises(NotFoundError):
            store.eval(ref, text=TEXT)
    store.save("m", store.load("m"))
    with pytest.raises(ValueError, match="one version"):
        store.eval(["m@1", "m@2"], text=TEXT)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        store.eval([], text=TEXT)


def resaved(store: ms.Store, folder: Path, files: Mapping[str, bytes | None], **tensors: torch.Tensor) -> None:
    """The model again as `n`, with some files replaced, or left out."""
    kept: dict[str, bytes] = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    changed = {name: content for name, content in (kept | dict(files)).items() if content is not None}
    weights = {name: tensor for name, tensor in (store.load("m") | tensors).items() if tensor.numel()}
    store.save("n", weights, files=changed)


def test_models_that_cannot_be_run_are_refused(store: ms.Store, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def refused(error: type[Exception], says: str, files: Mapping[str, bytes | None], **tensors: torch.Tensor) -> None:
        resaved(store, folder, files, **tensors)
        with pytest.raises(error, match=says):
            store.eval("n", text=TEXT, context=CONTEXT)

    def changed(**fields: Any) -> dict[str, bytes | None]:
        return {"config.json": json.dumps(config | fields).encode()}

    refused(NotFoundError, "no config.json", {"config.json": None})
    refused(NotFoundError, "no tokenizer", {"tokenizer.json": None})
    refused(UnsupportedError, "tokenizer", {"tokenizer.json": b"{"})
    refused(UnsupportedError, "cannot make", changed(model_type="nothing-known"))
    refused(UnsupportedError, "cannot make", changed(model_type="x", auto_map={"AutoConfig": "evil.Config"}))
    refused(UnsupportedError, r"quantized before .*gptq", changed(quantization_config={"quant_method": "gptq"}))
    refused(UnsupportedError, "quantized before", changed(compression_config={"format": "x"}))
    refused(FormatError, NORM, {}, **{NORM: torch.ones(16)})
    refused(FormatError, "lm_head", {}, **{"lm_head.weight": torch.empty(0)})
    bert = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32}
    refused(
        UnsupportedError,
        "transformers cannot build BertModel",
        {"config.json": json.dumps(bert).encode()},
    )
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    refused(UnsupportedError, "neither predicts the next token", {"config.json": json.dumps(t5).encode()})


def test_kernels_that_a_config_asks_for_are_not_fetched(store: ms.Store, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    asked = config | {
        "_attn_implementation": "kernels-community/flash-attn",
        "attn_implementation": "kernels-community/x",
    }
    resaved(store, folder, {"config.json": json.dumps(asked).encode()})
    found = store.eval("n", text=TEXT, context=CONTEXT).measured
    assert found.perplexity == store.eval("m", text=TEXT, context=CONTEXT).measured.perplexity


def test_metrics_that_are_none_of_ours_are_left_alone() -> None:
    made = Measured("t", "d", 3, 2, 2, 2, "float32", 5.0)
    strange = {"sqnr": 3.0, "evaluation": {"perplexity": "good"}, "earlier_evaluations": "many"}
    assert evaluations(strange) == []
    kept = with_evaluation(strange, made)
    assert kept["sqnr"] == 3.0
    assert evaluations(kept) == [made]
    assert with_evaluation(kept, made) == kept
