"""A config.json that asks for more than is stored, or is senseless: refused in a sentence, before anything is made of it."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from modelstore.errors import ModelStoreError
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 10**11}, r"describes a LlamaForCausalLM of [\d,]+ numbers, and [\d,]+ are stored"),
        ({"head_dim": 10**9}, r"describes a LlamaForCausalLM of [\d,]+ numbers"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000, more than"),
        ({"num_hidden_layers": 100_000}, r"more than \d+ modules"),
        ({"intermediate_size": -1}, "cannot build LlamaForCausalLM"),
        ({"hidden_act": "nothing-known"}, "cannot build LlamaForCausalLM"),
        ({"num_attention_heads": 0}, "cannot make model 'm' of its config.json"),
        ({"hidden_size": float("nan")}, "cannot make model 'm' of its config.json"),
    ],
)
def test_it_is_refused(fields: dict[str, Any], says: str, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text()) | fields
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save(
        "m", load_file(folder / "model.safetensors"), files=files | {"config.json": json.dumps(content).encode()}
    )
    with pytest.raises(ModelStoreError, match=says):
        store.eval("m", text=TEXT, context=32)
    with pytest.raises(ModelStoreError, match=says):
        store.plan_compression("m", "gptq4")
