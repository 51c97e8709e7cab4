"""Evaluating encoders and classifiers: the numbers are those of transformers on the same passages, and bad input is refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.compress.evaluate.passages import batches, passages
from modelstore.compress.evaluate.vectors import nearness, pooling
from modelstore.errors import UnsupportedError
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"max_position_embeddings": 64, "num_labels": 3},
}
WORDS = [word for word in TEXT.split() if word]
PARAGRAPHS = [" ".join(WORDS[at : at + 7 + at % 5]) for at in range(0, 120, 6)]
BOOK = "\n\n".join(PARAGRAPHS) + "\n\n\n  \n"


def make(kind: str, root: Path, **settings: Any) -> Path:
    """A small model of that class with random weights, beside the tokenizer of the small Llama."""
    make_language_model(root)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root)
    (root / "model.safetensors").unlink()
    made = getattr(transformers, kind)
    torch.manual_seed(7)
    model = made(made.config_class(**SIZES | {"vocab_size": len(tokenizer)} | settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("BertModel", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("BertForSequenceClassification", tmp_path_factory.mktemp("classes"))


def store_of(folder: Path) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", folder)
    opened.compress("m", "int4-g32")
    return opened


def outputs(store: ms.Store, ref: str, folder: Path, kind: str, texts: list[str]) -> list[Any]:
    """What transformers computes of each passage by itself with the weights of a variant."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(None, config=config, state_dict=store.load(ref)).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=16)) for text in texts]


def test_vectors_are_compared_as_transformers_gives_them(encoder: Path) -> None:
    store = store_of(encoder)
    found = store.eval("m:int4-g32", text=BOOK, context=16)
    one, other = (
        torch.stack([out.last_hidden_state[0].mean(0) for out in outputs(store, ref, encoder, "BertModel", PARAGRAPHS)])
        for ref in ("m", "m:int4-g32")
    )
    cosines = torch.nn.functional.cosine_similarity(one.double(), other.double())
    assert found.measured.task == "vectors"
    assert found.measured.predicted == len(PARAGRAPHS)
    assert found.measured.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert found.measured.neighbours is not None
    assert 0 < found.measured.neighbours <= 1
    assert found.measured.perplexity is None
    assert store.eval("m:int4-g32", text=BOOK, context=16).known
    original = store.eval("m", text=BOOK, context=16).measured
    assert original.cosine == pytest.approx(1)
    assert original.neighbours == 1


def test_what_a_front_compares_is_the_cosine(encoder: Path) -> None:
    store = store_of(encoder)
    store.compress("m", "int8")
    rows = {row.variant: row for row in store.compare("m", text=BOOK, context=16)}
    assert rows["int8"].measured.loss is not None
    assert rows["int4-g32"].measured.loss is not None
    assert rows["int8"].measured.loss < rows["int4-g32"].measured.loss


def test_pooling_of_sentence_transformers_is_used(encoder: Path, tmp_path: Path) -> None:
    files = {"1_Pooling/config.json": json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})}
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    folder = {path.name: path.read_bytes() for path in encoder.iterdir() if path.suffix == ".json"}
    source = store_of(encoder)
    store.save("m", source.load("m"), files=folder | {name: text.encode() for name, text in files.items()})
    store.compress("m", "int4-g32")
    found = store.eval("m:int4-g32", text=BOOK, context=16).measured
    one, other = (
        torch.stack([out.last_hidden_state[0, 0] for out in outputs(store, ref, encoder, "BertModel", PARAGRAPHS)])
        for ref in ("m", "m:int4-g32")
    )
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(one, other).mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (None, "mean"),
        (b'{"pooling_mode_mean_tokens": true, "word_embedding_dimension": 4}', "mean"),
        (b'{"pooling_mode": "lasttoken"}', "lasttoken"),
    ],
)
def test_how_vectors_are_pooled(content: bytes | None, how: str) -> None:
    assert pooling(content) == how


@pytest.mark.parametrize(
    "content",
    [
        b"[",
        b"{}",
        b'{"pooling_mode_weightedmean_tokens": true}',
        b'{"pooling_mode_max_tokens": true, "pooling_mode_cls_token": true}',
    ],
)
def test_pooling_that_is_not_known_is_refused(content: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"1_Pooling/config\.json asks for"):
        pooling(content)


def test_neighbours_are_counted_as_by_looking_at_every_pair() -> None:
    torch.manual_seed(0)
    one = torch.randn(300, 8)
    other = one + 0.5 * torch.randn(300, 8)

    def nearest(vectors: torch.Tensor, at: int) -> set[int]:
        alike = torch.nn.functional.cosine_similarity(vectors[at : at + 1].double(), vectors.double())
        return set(sorted((n for n in range(300) if n != at), key=lambda n: -float(alike[n]))[:10])

    found = nearness(one, other)
    common = sum(len(nearest(one, at) & nearest(other, at)) for at in range(300))
    assert found.neighbours == pytest.approx(common / 3000)
    assert 0.2 < common / 3000 < 0.9
    assert nearness(one, one).neighbours == 1
    assert nearness(one[:1], other[:1]).neighbours is None


def records(labels: list[Any]) -> str:
    return "\n".join(
        json.dumps({"text": text, "label": label}) for text, label in zip(PARAGRAPHS, labels, strict=False)
    )


def test_classes_are_compared_and_labels_counted(classifier: Path, tmp_path: Path) -> None:
    store = store_of(classifier)
    kind = "BertForSequenceClassification"
    one, other = (
        torch.cat([out.logits for out in outputs(store, ref, classifier, kind, PARAGRAPHS)])
        for ref in ("m", "m:int4-g32")
    )
    path = tmp_path / "reviews.jsonl"
    path.write_text(records([f"LABEL_{int(label)}" for label in one.argmax(-1)]))
    found = store.eval("m:int4-g32", text=path, context=16).measured
    agreed = float((one.argmax(-1) == other.argmax(-1)).double().mean())
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.task == "classes"
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.top1 == found.accuracy == pytest.approx(agreed)
    assert found.baseline_accuracy == 1
    alone = store.eval("m:int4-g32", text=path, context=16, baseline=False, keep=False).measured
    assert alone.accuracy == found.accuracy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b", "label": "LABEL_9"}', "record 1 has the label 'LABEL_9'"),
        ('{"text": "a b", "label": 3}', "record 1 has the label '3'"),
        ('{"text": "a b", "label": 1}\n{"text": "a"}', "record 2 has no label"),
        ('{"text": "a b", "label": true}', "line 1 of t.jsonl is not a record"),
        ('\n{"text": 5}', "line 2 of t.jsonl is not a record"),
        ("[1]", "line 1 of t.jsonl is not a record"),
        ("{", "line 1 of t.jsonl is not a record"),
        ("\n\n", "no passages"),
    ],
)
def test_records_that_cannot_be_read_are_told_by_their_line(
    classifier: Path, tmp_path: Path, content: str, message: str
) -> None:
    store = store_of(classifier)
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        store.eval("m:int4-g32", text=path, context=16)


def test_what_nothing_says_is_right_is_not_measured_alone(encoder: Path, classifier: Path) -> None:
    for folder in (encoder, classifier):
        with pytest.raises(ValueError, match="measured against the original"):
            store_of(folder).eval("m:int4-g32", text=BOOK, context=16, baseline=False)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, "one number for a passage"),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "several classes"),
        ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 1, "num_heads": 2}, "neither predicts"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, kind: str, settings: dict[str, Any], message: str) -> None:
    store = store_of(make(kind, tmp_path / "m", **settings))
    with pytest.raises(UnsupportedError, match=message):
        store.eval("m:int4-g32", text=BOOK, context=16)


def test_a_model_that_does_not_fit_is_refused_with_the_memory_it_needs(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(encoder)
    monkeypatch.setattr("modelstore.compress.evaluate.question.float32_bytes", lambda _: 1 << 50)
    with pytest.raises(UnsupportedError, match=f"a BertModel is evaluated whole, so give memory={1 << 51}"):
        store.eval("m:int4-g32", text=BOOK, context=16)


def test_passages_are_cut_by_empty_lines_and_read_in_batches_of_equal_length() -> None:
    assert [one.text for one in passages("book.txt", "a\nb\n\n \n\n c  d ")] == ["a b", "c d"]
    inputs = [{"input_ids": [0] * length} for length in (3, 1, 3, 2, 3)]
    assert [batch.places for batch in batches(inputs, 2)] == [(1,), (3,), (0, 2), (4,)]
