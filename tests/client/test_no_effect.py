"""What an argument asks for is done, or refused: nothing that was given is passed over in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import modelstore as ms
from modelstore.cli.main import app
from modelstore.client import Store
from modelstore.errors import ConflictError, FormatError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a small language model."""
    store = ms.open(tmp_path / "store")
    weights = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(256, 256).bfloat16() for i in range(2)}
    weights["model.embed_tokens.weight"] = torch.randn(64, 256).bfloat16()
    store.save("m", weights, files={"config.json": json.dumps(CONFIG).encode()})
    return store


@pytest.mark.parametrize("kind", ["dict", "module", "arrays", "safetensors", "folder", "torch"])
def test_a_source_without_a_tensor_makes_no_version(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    for path in ("one.safetensors", "folder/model.safetensors"):
        save_file({}, tmp_path / path)
    torch.save({}, tmp_path / "one.pt")
    source, error = {
        "dict": ({}, ValueError),
        "module": (torch.nn.ReLU(), ValueError),
        "arrays": (dict[str, np.ndarray](), ValueError),
        "safetensors": (tmp_path / "one.safetensors", FormatError),
        "folder": (tmp_path / "folder", FormatError),
        "torch": (tmp_path / "one.pt", FormatError),
    }[kind]
    made = ms.open(tmp_path / "store")
    with pytest.raises(error, match=r"no tensor|no state dict"):
        made.save("m", source)
    assert not (tmp_path / "store").exists()


def test_files_that_are_given_make_a_version_by_themselves(tmp_path: Path) -> None:
    made = ms.open(tmp_path / "store")
    made.save("tokenizer", {}, files={"tokenizer.json": b"{}"})
    assert made.file("tokenizer", "tokenizer.json") == b"{}"
    assert made.load("tokenizer") == {}


def test_parts_without_a_tensor_make_no_version(tmp_path: Path) -> None:
    made = ms.open(tmp_path / "store")
    for rank in range(2):
        made.save_part("m", {}, session="s", rank=rank, ranks=2)
    with pytest.raises(ConflictError, match="no rank's part"):
        made.publish("m", "s", ranks=2)
    made.save_part("m", {"a": torch.ones(2)}, session="s", rank=1, ranks=2)
    assert made.publish("m", "s", ranks=2).tensors == 1


@pytest.mark.parametrize("option", ["include", "skip"])
@pytest.mark.parametrize("target", ["model.layers.9.*", "q_proj", "re:nothing.*", "router", "embedings"])
def test_targets_that_speak_of_nothing(store: Store, option: str, target: str) -> None:
    for act in (store.compress, store.plan_compression):
        with pytest.raises(ValueError, match="has no effect") as caught:
            act("m", "int8", **{option: ["embedding", target]})
        assert f"{option}={target!r}" in str(caught.value)
    assert [v.variant for v in store.variants("m")] == ["original"]


def test_targets_that_speak_of_something(store: Store) -> None:
    plan = store.plan_compression("m", "int8", include=["embedding"], skip=["model.layers.1.*"])
    assert {choice.name for choice in plan.compressed} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    }


def test_a_ladders_variants_have_their_own_names(store: Store) -> None:
    with pytest.raises(ValueError, match="variant='x' has no effect: recipe 'ladder' makes"):
        store.compress("m", "ladder", variant="x")
    store.compress("m", "int8")
    with pytest.raises(ms.errors.ConflictError, match=r"delete m@1:int8 first: a ladder's variants have these names"):
        store.compress("m", "ladder")


def test_a_tag_names_a_version(store: Store) -> None:
    store.compress("m", "int8")
    for ref in ("m:int8", "m@1:int8", "m:original"):
        with pytest.raises(ValueError, match="a tag names a version with all its variants"):
            store.tag(ref, "prod")
        with pytest.raises(ValueError, match="variants are those of a version"):
            store.variants(ref)
        with pytest.raises(ValueError, match="quality is told of all variants"):
            store.quality(ref)
    assert store.models()[0].tags == {}


def test_the_command_line_makes_a_variant_as_python_does(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int4.safetensors"
    assert not app(["load", "m:int4", "-o", str(out), "--store", str(tmp_path / "store")], standalone_mode=False)
    expected = store.load("m:int4")
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert "wrote" in capsys.readouterr().out
    made = store.export("m:int8", tmp_path / "made")
    store.compress("m", "int8")
    assert made.bytes == store.export("m:int8", tmp_path / "stored").bytes


def test_a_variant_that_is_no_smaller_outside_is_told_of(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.compress("m", "kmeans4")
    store.compress("m", "int8")
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.export("m:int8", tmp_path / "packed")
        store.export("m", tmp_path / "original")
        assert not caplog.messages
        store.export("m:kmeans4", tmp_path / "dense")
    (said,) = caplog.messages
    assert "m:kmeans4 was written dense" in said
