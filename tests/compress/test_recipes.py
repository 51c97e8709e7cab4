"""Which tensors a recipe speaks of, and what is planned for them, decided from a manifest alone."""

from __future__ import annotations

import pytest
import torch

import modelstore as ms
from modelstore.architecture.fused import fused
from modelstore.architecture.kinds import Its, kinds
from modelstore.compress.plan import resolve
from modelstore.format.recipe import matches, recipe

SHAPE = (64, 32)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.embed_tokens.weight", SHAPE, "embedding"),
        ("transformer.wpe.weight", SHAPE, "embedding"),
        ("embeddings.word_embeddings.weight", SHAPE, "embedding"),
        ("lm_head.weight", SHAPE, "head"),
        ("classifier.weight", SHAPE, "head"),
        ("model.layers.0.self_attn.q_proj.weight", SHAPE, "linear"),
        ("model.layers.0.mlp.gate_proj.weight", SHAPE, "linear"),
        ("model.layers.0.mlp.gate.weight", SHAPE, "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", SHAPE, "router"),
        ("model.layers.3.mlp.experts.gate_up_proj", (8, 64, 32), "linear"),
        ("model.layers.0.input_layernorm.weight", (64,), "norm"),
        ("encoder.layer.0.output.LayerNorm.bias", (64,), "norm"),
        ("encoder.layer.0.output.dense.bias", (64,), "bias"),
        ("blocks.0.0.conv_dw.weight", (32, 1, 3, 3), "depthwise"),
        ("model.layers.0.mamba.conv1d.weight", (64, 1, 4), "depthwise"),
        ("model.layers.0.mamba.A_log", SHAPE, "state-space"),
        ("backbone.layers.0.mixer.A_log", (64,), "state-space"),
        ("model.layers.0.mamba.D", (64,), "state-space"),
        ("model.layers.0.linear_attn.dt_bias", (64,), "state-space"),
        ("rwkv.blocks.0.attention.time_decay", (64,), "state-space"),
        ("model.layers.0.mamba.dt_proj.weight", SHAPE, "linear"),
        ("model.layers.0.mamba.dt_proj.bias", (64,), "bias"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", SHAPE, "bias"),
        ("model.language_model.embed_tokens_per_layer.weight", SHAPE, "embedding"),
        ("decoder.embed_tokens.3.weight", SHAPE, "embedding"),
        ("attn.in_proj_weight", SHAPE, "linear"),
        ("w", SHAPE, "unknown"),
        ("conv.weight", (32, 16, 3), "convolution"),
        ("rotary.inv_freq", (32,), "other"),
        ("model.layers.0.q_proj.weight_scale", SHAPE, "unknown"),
    ],
)
def test_kinds(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kinds({name: Its("bfloat16", shape)}) == {name: kind}


def test_a_matrix_as_wide_as_the_vocabulary_is_a_head() -> None:
    its = {"something.weight": Its("float32", (30522, 64))}
    assert kinds(its, {"vocab_size": 30522}) == {"something.weight": "head"}
    assert kinds(its, {"text_config": {"vocab_size": 30522}}) == {"something.weight": "head"}
    assert kinds(its) == kinds(its, {"vocab_size": -1}) == {"something.weight": "linear"}
    assert kinds({"ids": Its("int64", SHAPE)}) == {"ids": "other"}


def test_fused_layers() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"]
    assert fused(names) == [tuple(names[0:3]), tuple(names[4:7])]
    assert fused(["a.w1.weight", "b.w3.weight"]) == []


def test_targets() -> None:
    assert matches("linear", "a", "linear")
    assert not matches("linear", "linear", "norm")
    assert matches("model.layers.0.*", "model.layers.0.mlp.up_proj.weight", "linear")
    assert matches("re:.*(up|down)_proj.*", "x.up_proj.weight", "linear")
    assert not matches("re:up", "x.up_proj.weight", "linear")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "x"}, "missing required field `rules`"),
        ({"name": "x", "rules": [], "other": 1}, "unknown field"),
        ({"name": "x", "rules": [{"targets": []}]}, "has no targets"),
        ({"name": "x", "rules": [{"targets": ["re:("]}]}, "is not a regular expression"),
        ({"name": "x", "prune": 2, "rules": [{"targets": ["linear"]}]}, "not a share between 0 and 1"),
    ],
)
def test_recipes_that_are_refused(value: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(value)


def test_what_is_no_recipe() -> None:
    with pytest.raises(ValueError, match=r"no preset 'int5' .*: choose one of .*, or give a Recipe \(a \.json file\)"):
        resolve("int5")
    with pytest.raises(ValueError, match="no rule with a codec"):
        resolve({"name": "x", "rules": [{"targets": ["linear"]}]})
    with pytest.raises(TypeError, match="a preset's name, a Recipe or plain data"):
        resolve(3)  # type: ignore[arg-type]


def test_every_preset_is_valid() -> None:
    for name, preset in ms.presets().items():
        assert name == preset.name
        assert preset.description
        assert resolve(name) == preset


def layer(at: int) -> dict[str, torch.Tensor]:
    names = [f"model.layers.{at}.self_attn.{p}_proj.weight" for p in "qkvo"]
    return {name: torch.randn(128, 256).bfloat16() for name in names}


@pytest.fixture
def store() -> ms.Store:
    store = ms.open("memory://recipes", memory="64MiB")
    others = {
        "model.embed_tokens.weight": torch.randn(512, 256).bfloat16(),
        "model.norm.weight": torch.ones(256).bfloat16(),
        "step": torch.tensor(3),
    }
    store.save("m", others | layer(0) | layer(1))
    return store


def test_a_plan_names_every_tensor(store: ms.Store) -> None:
    plan = store.plan_compression("m", "int4-rtn")
    assert [c.name for c in plan.choices] == [t.name for t in store.describe("m").tensors]
    assert {c.name for c in plan.compressed} == set(layer(0)) | set(layer(1))
    kept = {c.name: c.reason for c in plan.choices if c.codec is None}
    assert "recipes leave norm tensors as they are" in kept["model.norm.weight"]
    made = store.compress("m", "int4-rtn")
    (variant,) = made.variants
    assert plan.expected == variant.stored  # sizes without entropy coding are known beforehand
    assert plan.bytes == made.bytes
    assert (made.compressed, made.kept) == (8, 3)


def test_include_and_skip(store: ms.Store) -> None:
    plan = store.plan_compression("m", "int8", include=["embedding"], skip=["model.layers.1.*"])
    assert {c.name for c in plan.compressed} == {"model.embed_tokens.weight", *layer(0)}
    both = store.plan_compression("m", "int8", include=["model.layers.1.*"], skip=["model.layers.1.*"])
    assert {c.name for c in both.compressed} == set(layer(0))  # what is to be kept is kept


def test_fused_layers_share_one_scheme(store: ms.Store) -> None:
    plan = store.plan_compression("m", "int8", skip=["*.0.self_attn.k_proj.weight"])
    by_name = {c.name: c for c in plan.choices}
    assert by_name["model.layers.0.self_attn.q_proj.weight"].codec is None
    assert "engines fuse it with model.layers.0.self_attn.k_proj.weight" in (
        by_name["model.layers.0.self_attn.q_proj.weight"].reason
    )
    assert by_name["model.layers.0.self_attn.o_proj.weight"].codec is not None
    mixed = {
        "name": "mixed",
        "rules": [
            {"targets": ["*q_proj*"], "codec": {"name": "int", "params": {"bits": 8}}},
            {"targets": ["linear"], "codec": {"name": "int", "params": {"bits": 4}}},
        ],
    }
    plan = store.plan_compression("m", mixed)
    bits = {
        c.name.split(".")[-2]: (c.codec.params["bits"] if c.codec else None) for c in plan.choices if "layers" in c.name
    }
    assert bits == {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 4}


def test_what_a_codec_refuses_is_kept_and_said(store: ms.Store) -> None:
    plan = store.plan_compression("m", "int8", include=["step"])
    (choice,) = (c for c in plan.choices if c.name == "step")
    assert choice.codec is None
    assert choice.reason == "it is int64"


def test_a_recipe_that_fits_nothing(store: ms.Store) -> None:
    nothing = {"name": "x", "rules": [{"targets": ["router"], "codec": {"name": "int"}}]}
    with pytest.raises(ValueError, match="compresses none of the 11 tensors"):
        store.plan_compression("m", nothing)
    with pytest.raises(ms.errors.UnsupportedError, match="codec 'raw' stores a model"):
        store.plan_compression("m", {"name": "x", "rules": [{"targets": ["linear"], "codec": {"name": "raw"}}]})
    with pytest.raises(ms.errors.UnsupportedError, match="codec 'gptq' is not known"):
        store.plan_compression("m", {"name": "x", "rules": [{"targets": ["linear"], "codec": {"name": "gptq"}}]})
    rule = {"targets": ["linear"], "codec": {"name": "int", "params": {"bit": 4}}}
    with pytest.raises(ValueError, match="no parameter 'bit'"):
        store.plan_compression("m", {"name": "x", "rules": [rule]})
