"""A damaged or senseless `config.json` is kept as it is, told of when it is saved, and named for what it is later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.execute.write.remarks import remarks

WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}
ODD = {
    b"": "is empty",
    b"{": "is not valid JSON",
    b"\xff\xfe": "is not valid JSON",
    b"[1]": "holds no JSON object",
    b'"llama"': "holds no JSON object",
    b"[" * 100_000: "nested too deeply",
    b'{"model_type": null}': "has model_type null, which names no type",
    b'{"model_type": ""}': 'has model_type "", which names no type',
    b'{"model_type": ["llama"]}': "has model_type",
    b'{"a": [' + b"1," * (1 << 18) + b"1]}": "entries that are looked into",
    b'{"a": "' + b"x" * (16 << 20) + b'"}': "more than the 16,777,216",
}


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_what_is_odd_is_kept_and_said(content: bytes) -> None:
    store = ms.open(f"memory://odd-{len(ODD)}-{list(ODD).index(content)}")
    saved = store.save("m", WEIGHTS, files={"config.json": content})
    assert len(saved.remarks) == 1
    assert saved.remarks[0].startswith(f"config.json {ODD[content]}") or ODD[content] in saved.remarks[0]
    assert saved.remarks[0].endswith("it is kept as it is")
    assert store["m"].file("config.json") == content
    assert torch.equal(store.load("m")[next(iter(WEIGHTS))], WEIGHTS[next(iter(WEIGHTS))])
    with pytest.raises(UnsupportedError) as caught:
        store.load("m", shard=ms.TensorParallel(0, 2))
    said = str(caught.value)
    assert "None" not in said
    assert ODD[content] in said or "no model type (model_type is" in said
    for act in (lambda: store["m"].export("/nowhere/x.gguf", format="gguf"), lambda: store.eval("m", text="a text")):
        with pytest.raises(ModelStoreError) as caught:
            act()
        assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{"model_type": "llama"}, {"architecture": "resnet50"}, {"_class_name": "UNet"}, {}]
)
def test_nothing_is_said_of_what_is_usual(content: dict[str, Any]) -> None:
    store = ms.open("memory://usual")
    saved = store.save("m", WEIGHTS, files={"config.json": json.dumps(content).encode(), "tokenizer.json": b"{}"})
    assert saved.remarks == ()


def test_other_files_of_json_are_looked_at() -> None:
    files = {"tokenizer.json": b'{"a": ', "generation_config.json": b"", "x.json": b'{"b": NaN}', "notes.txt": b"{"}
    saved = ms.open("memory://others").save("m", WEIGHTS, files=files)
    assert [said.split()[0] for said in saved.remarks] == ["generation_config.json", "tokenizer.json"]


def test_what_is_odd_in_parts_and_beside_them_is_said() -> None:
    store = ms.open("memory://odd-parts")
    part = store.save_part("m", WEIGHTS, session="s", rank=0, ranks=1, files={"tokenizer.json": b"{"})
    saved = store.publish("m", "s", ranks=1, files={"config.json": b"[1]"})
    assert [said.split()[0] for said in (*part.remarks, *saved.remarks)] == ["tokenizer.json", "config.json"]


def test_a_file_that_vanishes_is_not_remarked_on(tmp_path: Path) -> None:
    assert remarks({"config.json": tmp_path / "gone.json", "tokenizer.json": b""}) == (
        "tokenizer.json is empty: it is kept as it is",
    )
