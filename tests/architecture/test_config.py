"""`config.json` as everybody reads it: within bounds, nested or not, with numbers that can be."""

from __future__ import annotations

import json
import tracemalloc
import uuid

import pytest
import torch

import modelstore as ms
from modelstore.architecture.config import MAX_CONFIG, MAX_MEMBERS, MAX_NESTED, count, language, parse
from modelstore.architecture.ties import tied
from modelstore.errors import FormatError


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1} x',
        b"\xff{}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[" * 700 + b"]" * 700 + b"}",
        b'{"a":' * 700 + b"1" + b"}" * 700,
        b'{"a": [' + b"1," * MAX_MEMBERS + b"1]}",
        b'{"a": "' + b"x" * MAX_CONFIG + b'"}',
    ],
)
def test_what_is_no_config(content: bytes) -> None:
    assert parse(content) is None


@pytest.mark.parametrize("content", [b"[" * 900 + b"1" + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_config_of_many_levels_is_saved_as_a_file(content: bytes) -> None:
    content = b'{"model_type": "llama", "x": ' + content + b"}"
    store = ms.open(f"memory://{uuid.uuid4().hex}")
    store.save("m", {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64)}, files={"config.json": content})
    store.plan_compression("m", "int4-g32")
    assert store.file("m", "config.json") == content


def test_as_many_levels_as_are_looked_into() -> None:
    """The object itself is one of them."""
    assert parse(b'{"a":' * MAX_NESTED + b"1" + b"}" * MAX_NESTED) is not None
    assert parse(b'{"a":' * (MAX_NESTED + 1) + b"1" + b"}" * (MAX_NESTED + 1)) is None


def test_labels_of_imagenet_21k_are_taken() -> None:
    labels = {str(number): f"a label of some words, number {number}" for number in range(21_843)}
    content = json.dumps({"id2label": labels, "label2id": {text: int(at) for at, text in labels.items()}}).encode()
    assert parse(content) == json.loads(content)


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_language_model_within_another(key: str) -> None:
    inner = {"model_type": "llama"}
    assert language({key: inner}) == language({"thinker_config": {key: inner}}) == inner
    assert language({key: "llama", "model_type": "x"}) == {key: "llama", "model_type": "x"}


def test_a_config_within_itself_ends() -> None:
    endless: dict[str, object] = {}
    endless["text_config"] = endless
    assert language(endless) is endless


def test_numbers() -> None:
    assert count({"b": 7}, "a", "b") == 7
    assert count({"a": None}, "a", "b") is None
    for absurd in (0, -1, 1.5, True, "8", [8], 1 << 40):
        with pytest.raises(FormatError, match="positive whole number"):
            count({"a": absurd}, "a")


def test_ties() -> None:
    assert tied(None) is tied({}) is None
    assert tied({"tie_word_embeddings": True}) is tied({"text_config": {"tie_word_embeddings": True}}) is True
    assert tied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}) is False


@pytest.mark.parametrize("content", [b'{"a": "' + b"x" * (64 << 20) + b'"}', b'{"a": [' + b"[]," * (5 << 20) + b"1]}"])
def test_a_plan_does_not_take_the_memory_of_a_large_config(content: bytes) -> None:
    store = ms.open(f"memory://{uuid.uuid4().hex}", memory="64MiB")
    store.save("m", {"a.weight": torch.randn(64, 64)}, files={"config.json": content})
    store.plan_compression("m", "int8")
    tracemalloc.start()
    store.plan_compression("m", "int8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
