"""What a model's own class says: found once, kept in the manifest, believed by those who have no such class."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

import modelstore as ms
from modelstore.architecture import described
from modelstore.architecture.blocks import blocks, head_tensors
from modelstore.architecture.classes.model_class import build, is_imported
from modelstore.architecture.described import look
from modelstore.architecture.kinds import Its, kinds
from modelstore.errors import UnsupportedError
from modelstore.format.objects.architecture import Architecture, Sliced, find, folded
from modelstore.format.objects.manifest import Manifest, decode, encode
from modelstore.plan.layout import PipelineStage, TensorParallel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(kind: str, **more: Any) -> Any:
    """A small causal model with random weights."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(SMALL | more)))


def folder(path: Path, kind: str, **more: Any) -> Path:
    """The same as its checkpoint."""
    model(kind, **more).save_pretrained(path)
    return path


def manifest_of(store: ms.Store, ref: str) -> Manifest:
    """The manifest of a variant."""
    manifest: Manifest = store[ref].opened().manifest
    return manifest


@pytest.fixture
def store() -> ms.Store:
    return ms.open(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has no transformers, and remembers nothing."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(described, "_found", {})


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not imported the classes of models yet."""
    monkeypatch.setattr(described, "is_imported", lambda _: False)


def test_a_save_keeps_what_the_class_says_that_is_imported(store: ms.Store, tmp_path: Path) -> None:
    store.save("m", folder(tmp_path, "olmoe", num_experts=4))
    found = manifest_of(store, "m").architecture
    assert found is not None
    assert found.model_class == "OlmoeForCausalLM"
    assert found.by == f"transformers {transformers.__version__}"
    assert found.blocks == ("model.layers",)
    assert {name: kind for name, kind in found.kinds.items() if kind != "norm"} == {
        "lm_head.weight": "head",
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.experts.*.down_proj.weight": "linear",
        "model.layers.*.mlp.experts.*.gate_proj.weight": "linear",
        "model.layers.*.mlp.experts.*.up_proj.weight": "linear",
        "model.layers.*.mlp.gate.weight": "router",
        **{f"model.layers.*.self_attn.{name}_proj.weight": "linear" for name in "kqvo"},
    }


def test_without_the_class_a_save_asks_nobody(store: ms.Store, tmp_path: Path, not_imported: None) -> None:
    store.save("m", folder(tmp_path, "olmoe", num_experts=4))
    assert manifest_of(store, "m").architecture is None


def test_compress_keeps_what_it_found_with_the_version(store: ms.Store, tmp_path: Path, not_imported: None) -> None:
    store.save("m", folder(tmp_path, "llama"))
    before = manifest_of(store, "m")
    created = store.versions("m")[0].created
    store.compress("m", "int8")
    after, made = manifest_of(store, "m"), manifest_of(store, "m:int8")
    assert before.architecture is None
    assert after.architecture == made.architecture is not None
    assert after.content == before.content
    assert store.versions("m")[0].created == created
    store.compress("m", "int4-g32")
    assert manifest_of(store, "m") == after


def test_a_ladder_keeps_it_too(store: ms.Store, tmp_path: Path, not_imported: None) -> None:
    store.save("m", folder(tmp_path, "llama"))
    store.compress("m", "ladder")
    assert (
        len({encode(msgspec.structs.replace(manifest_of(store, f"m:{v}"), nonce=""))[0] for v in ("original", "int8")})
        == 2
    )
    assert manifest_of(store, "m").architecture == manifest_of(store, "m:int8").architecture is not None


def test_the_next_version_of_the_same_model_has_it(
    store: ms.Store, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store.save("m", folder(tmp_path / "a", "olmoe", num_experts=4))
    known = manifest_of(store, "m").architecture
    request.getfixturevalue("without")
    tensors = {name: tensor + 1 for name, tensor in store.load("m").items()}
    files = {"config.json": (tmp_path / "a" / "config.json").read_bytes()}
    store.save("m", tensors, files=files)
    assert manifest_of(store, "m@2").architecture == known is not None
    other = json.dumps(json.loads(files["config.json"]) | {"rope_theta": 1.0}).encode()
    store.save("m", tensors, files={"config.json": other})
    assert manifest_of(store, "m@3").architecture is None


def test_layouts_without_transformers(store: ms.Store, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The record serves the ranks that have no transformers; without it, and without a table, the layout is refused."""
    source = folder(tmp_path, "olmoe", num_experts=4)
    store.save("kept", source)
    held = [store.load("kept", shard=TensorParallel(rank, 2)) for rank in range(2)]
    request.getfixturevalue("without")
    again = [store.load("kept", shard=TensorParallel(rank, 2)) for rank in range(2)]
    for rank in range(2):
        assert all(torch.equal(held[rank][name], again[rank][name]) for name in held[rank])
    store.save("bare", source, codec="raw")
    assert manifest_of(store, "bare").architecture is None
    with pytest.raises(UnsupportedError, match=r"'olmoe', of which neither this package knows one nor transformers"):
        store.load("bare", shard=TensorParallel(0, 2))


def test_layouts_where_only_transformers_knows(store: ms.Store, tmp_path: Path, not_imported: None) -> None:
    store.save("m", folder(tmp_path, "glm4"))
    ranks = [store.load("m", shard=TensorParallel(rank, 2)) for rank in range(2)]
    whole = store.load("m")
    up = "model.layers.1.mlp.gate_up_proj.weight"
    gate, after = whole[up].chunk(2)
    assert torch.equal(ranks[1][up], torch.cat([gate[48:], after[48:]]))
    with_heads = [store.load("m", shard=TensorParallel(rank, 4)) for rank in range(4)]
    key = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(with_heads[0][key], with_heads[1][key])  # 2 heads on 4 ranks
    assert torch.equal(with_heads[3][key], whole[key][16:])


def test_parts_beside_a_sliced_weight_are_not_guessed() -> None:
    known = Architecture("test", "T", slices={"a.*.weight": Sliced(0, (("even", 8),)), "a.*.scale": Sliced(0, ())})
    shapes = {"a.0.weight": (8, 4), "a.0.scale": (1,), "b.weight": (4, 4)}
    held = TensorParallel(0, 2).shares({"model_type": "x"}, shapes, known)
    assert {name: share.shape for name, share in held.items()} == {
        "a.0.weight": (4, 4),
        "a.0.scale": (1,),
        "b.weight": (4, 4),
    }
    with pytest.raises(UnsupportedError, match=r"nothing is known of how 'weight_scale_inv' is cut"):
        TensorParallel(0, 2).shares({"model_type": "x"}, shapes | {"a.0.weight_scale_inv": (1, 1)}, known)
    strange = Architecture("test", "T", slices={"a.*.weight": Sliced(0, (("spiral", 8),))})
    with pytest.raises(UnsupportedError, match="use a newer modelstore"):
        TensorParallel(0, 2).shares({"model_type": "x"}, shapes, strange)


def test_the_class_counts_before_names(store: ms.Store, tmp_path: Path) -> None:
    """Gemma 3n: what is called an embedding and is a linear layer; what is called nothing and is a table."""
    tensors = {"proj.embedding.weight": Its("bfloat16", (8, 8)), "odd.table": Its("bfloat16", (8, 8))}
    assert kinds(tensors) == {"proj.embedding.weight": "embedding", "odd.table": "unknown"}
    known = Architecture("test", "T", kinds={"proj.embedding.weight": "linear", "odd.table": "something new"})
    assert kinds(tensors, None, known) == {"proj.embedding.weight": "linear", "odd.table": "unknown"}
    codes = {
        "proj.embedding.weight": Its("float8_e4m3fn", (8, 8)),
        "proj.embedding.weight_scale_inv": Its("float32", (1, 1)),
    }
    assert set(kinds(codes, None, known).values()) == {"quantized"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**12}, "more than"),
        ({"num_hidden_layers": 100_000}, "modules"),
        ({"hidden_size": 10**13}, "more than"),
        ({"num_labels": 10**9}, "num_labels = 1000000000, more than"),
        ({"vision_config": {"depths": [2, 10**9]}}, "depths = 1000000000, more than"),
        ({"attention_types": [[["global"], 10**9]]}, "attention_types = 1000000000, more than"),
        ({"depths": [1 << 17] * 9}, "depths = 1179648, more than"),
        ({"backbones": [{"num_layers": 10**9}]}, "num_layers = 1000000000, more than"),
        ({"model_type": "mystery"}, "does not know"),
        ({"architectures": ["LlamaPreTrainedModel"]}, "not a whole model"),
        ({"architectures": ["AutoModel"]}, "cannot build"),
        ({"architectures": ["os.system"]}, "cannot build"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"model_type": ["llama"]}, "has no model type"),
    ],
)
def test_absurd_configs(change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelstore.architecture.classes.model_class._MOST_MODULES", (256, 16))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, **change}
    with pytest.raises(UnsupportedError, match=says):
        build(config, 10)
    assert look(config, {"model.embed_tokens.weight": (320, 64)}) is None


def test_code_and_kernels_of_a_config_are_not_followed() -> None:
    config = {
        "model_type": "llama",
        **SMALL,
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "_attn_implementation": "kernels-community/evil",
        "attn_implementation": "flash_attention_2",
    }
    assert type(build(config, 10).model).__name__ == "LlamaForCausalLM"
    assert is_imported(config)


def test_a_checkpoint_of_other_shapes_is_not_described() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    assert look(config, {"model.embed_tokens.weight": (3, 3), "other.weight": (4, 4)}) is None
    assert look(config, {}) is None


def test_names_with_numbers() -> None:
    entries = {"a.0.w": 1, "a.1.w": 1, "b.0.w": 1, "b.1.w": 2, "c.0.w": 1, "c.1.w": None, "d": None}
    made = folded(entries)
    assert made == {"a.*.w": 1, "b.0.w": 1, "b.1.w": 2, "c.0.w": 1}
    assert {name: find(made, name) for name in entries} == entries
    assert find(made, "a.17.w") == 1


def test_the_manifest_is_the_same_bytes_each_time(store: ms.Store, tmp_path: Path) -> None:
    store.save("m", folder(tmp_path, "llama"))
    manifest = manifest_of(store, "m")
    digest, data = encode(manifest)
    assert decode(data, digest, "m") == manifest
    assert encode(decode(data, digest, "m")) == (digest, data)
    assert b"architecture" not in msgspec.json.encode(msgspec.structs.replace(manifest, architecture=None))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "mixtral", "gemma2"])
def test_blocks_by_name_are_those_of_the_class(kind: str) -> None:
    with torch.device("meta"):
        built = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, num_hidden_layers=3))
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    config = {**built.config.to_dict(), "architectures": [type(built).__name__]}
    known = look(config, shapes)
    assert known is not None
    assert known.blocks
    by_name, by_class = blocks(shapes), blocks(shapes, known)
    if kind != "bert":  # whose layers are called `layer`, which are in no stack but theirs
        assert by_name == by_class
    (stack,) = by_class.stacks.values()
    assert sorted(set(stack.values())) == [0, 1, 2]
    assert list(stack.values()) == sorted(stack.values())


def test_stages_by_what_the_class_says() -> None:
    known = Architecture("test", "T", ties={"out.weight": "words.weight"}, blocks=("body.steps",))
    shapes = {"words.weight": (4, 4), **{f"body.steps.{n}.w.weight": (4, 4) for n in range(4)}, "norm.weight": (4,)}
    stages = [list(PipelineStage(stage, 2).shares(None, shapes, known)) for stage in range(2)]
    assert stages[0] == ["words.weight", "body.steps.0.w.weight", "body.steps.1.w.weight"]
    assert stages[1] == ["words.weight", "body.steps.2.w.weight", "body.steps.3.w.weight", "norm.weight"]
    assert head_tensors({**shapes, "out.weight": (4, 4)}, None, known) == set()
