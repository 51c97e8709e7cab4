"""Layouts on true names and shapes: transformers builds each architecture on the meta device."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.architecture.blocks import blocks
from modelstore.architecture.ranks.parallel import axes
from modelstore.architecture.ranks.parallel_table import FAMILIES
from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.format.region import Shape, extent, slices
from modelstore.plan.layout import (
    ExpertParallel,
    Layers,
    Layout,
    PipelineStage,
    Regions,
    Share,
    TensorParallel,
    whole,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8},
    "bloom": {"n_layer": 3, "n_head": 8},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32},
    **{
        kind: {
            **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
            **{"encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_key_value_heads": 8},
        }
        for kind in (
            *(
                "bart",
                "bigbird_pegasus",
                "blenderbot",
                "blenderbot-small",
                "marian",
                "mbart",
                "mvp",
                "pegasus",
                "plbart",
            ),
            *("trocr", "whisper"),
        )
    },
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 8},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 8},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 8},
    "gpt_neo": {"num_heads": 8, "attention_types": [[["global"], 3]]},
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 8},
    "cpmant": {"dim_head": 8, "dim_ff": 96},
    "modernbert": {"global_attn_every_n_layers": 1},
    "deepseek_v2": {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "deepseek_v3": {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
}


@functools.cache
def model(kind: str) -> tuple[dict, dict[str, Shape], dict[str, str]]:
    """(config.json, {name: shape}, transformers' own tensor-parallel plan) of a small model of that type."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if kind == "gemma3":
        config = transformers.AutoConfig.for_model(kind, text_config=SMALL, vision_config={"num_hidden_layers": 2})
        with torch.device("meta"):
            built = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        sizes = SMALL | SPECIAL.get(kind, {})
        config = transformers.AutoConfig.for_model(kind, **sizes)
        auto = transformers.AutoModelForMaskedLM if kind.endswith("bert") else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            built = auto.from_config(config)
    shapes = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    return config.to_dict(), shapes, dict(getattr(built, "_tp_plan", None) or {})


def reassembled(shares: list[Share], shape: Shape) -> np.ndarray:
    """How many shares hold each element."""
    held = np.zeros(shape, dtype=np.int64)
    for share in shares:
        for source, target in share.pieces():
            assert extent(source) == extent(target)
            held[slices(source)] += 1
    return held


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_ranks_tile_every_tensor(kind: str, size: int) -> None:
    config, shapes, _ = model(kind)
    ranks = [TensorParallel(rank, size).shares(config, shapes) for rank in range(size)]
    axis = axes(config)
    cuts = 0
    for name, shape in shapes.items():
        shares = [rank[name] for rank in ranks]
        held = reassembled(shares, shape)
        if axis(name) is None:
            assert all(share == whole(shape) for share in shares), name
            continue
        cuts += 1
        if "qkv_proj" in name:  # 8 heads of q, then 2 of k and 2 of v, which more ranks than that repeat
            assert (held[:64] == 1).all()
            assert (held[64:] == max(1, size // 2)).all()
            continue
        assert held.min() == held.max(), name
        copies = int(held.flat[0])
        assert copies == 1 or (copies < size and ("k_proj" in name or "v_proj" in name)), name
        assert sum(share.shape[axis(name)] for share in shares) == shape[axis(name)] * copies
    assert cuts > len(shapes) // 5


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_axes_agree_with_transformers(kind: str) -> None:
    config, shapes, plan = model(kind)
    axis = axes(config)
    expected = {
        "colwise": -2,
        "colwise_gather_output": -2,
        "rowwise": -1,
        "rowwise_split_input": -1,
        "packed_colwise": -2,
        "embedding_rowwise": -2,
    }
    checked = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        general = ".".join("*" if part.isdigit() else part for part in module.split("."))
        style = plan.get(general)
        if style in expected and len(shape) > 1:
            assert axis(name) == len(shape) + expected[style], (name, style)
            checked += 1
    assert checked or not plan or kind == "gpt_oss"


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_default_heads_are_those_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    config = getattr(config, "text_config", None) or config
    ours = FAMILIES[kind]
    assert ours.heads == config.num_attention_heads
    if kind not in ("deepseek_v2", "deepseek_v3"):
        assert (ours.key_heads or ours.heads) == (getattr(config, "num_key_value_heads", None) or ours.heads)


def taken(tensor: np.ndarray, share: Share) -> np.ndarray:
    out = np.full(share.shape, np.nan)
    for source, target in share.pieces():
        out[slices(target)] = tensor[slices(source)]
    assert not np.isnan(out).any()
    return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, key_heads: int) -> np.ndarray:
    """Attention of (tokens, heads·size) by heads, those of k and v shared by groups of q's."""
    split = [m.reshape(len(m), n, -1) for m, n in ((q, heads), (k, key_heads), (v, key_heads))]
    q, k, v = split[0], *(np.repeat(m, heads // key_heads, axis=1) for m in split[1:])
    scores = np.exp(np.einsum("thd,shd->hts", q, k) / 3)
    return np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(len(q), -1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "bert"])
def test_parallel_layer_equals_whole(kind: str, size: int) -> None:
    """One layer's attention and MLP, computed from the ranks' shares and summed, is that of the whole tensors."""
    config, shapes, _ = model(kind)
    random = np.random.default_rng(3)
    tensors = {name: random.normal(size=shape) * 0.3 for name, shape in shapes.items() if ".1." in name}
    x = random.normal(size=(5, 64))
    key_heads = 2 if kind in ("llama", "phi3") else 8

    def layer(part: dict[str, np.ndarray], heads: int, keys: int, first: bool) -> tuple[np.ndarray, np.ndarray]:
        w = {name.split(".1.")[1]: tensor for name, tensor in part.items()}
        if kind == "llama":
            q, k, v = (x @ w[f"self_attn.{n}_proj.weight"].T for n in "qkv")
            out = attention(q, k, v, heads, keys) @ w["self_attn.o_proj.weight"].T
            gate, up = (x @ w[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            return out, (np.tanh(gate) * up) @ w["mlp.down_proj.weight"].T
        if kind == "phi3":
            q, k, v = np.split(x @ w["self_attn.qkv_proj.weight"].T, [heads * 8, (heads + keys) * 8], axis=1)
            out = attention(q, k, v, heads, keys) @ w["self_attn.o_proj.weight"].T
            gate, up = np.split(x @ w["mlp.gate_up_proj.weight"].T, 2, axis=1)
            return out, (np.tanh(gate) * up) @ w["mlp.down_proj.weight"].T
        if kind == "gpt2":
            q, k, v = np.split(x @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"], 3, axis=1)
            out = attention(q, k, v, heads, keys) @ w["attn.c_proj.weight"] + first * w["attn.c_proj.bias"]
            inner = np.tanh(x @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
            return out, inner @ w["mlp.c_proj.weight"] + first * w["mlp.c_proj.bias"]
        q, k, v = (
            x @ w[f"attention.self.{n}.weight"].T + w[f"attention.self.{n}.bias"] for n in ("query", "key", "value")
        )
        out = attention(q, k, v, heads, keys) @ w["attention.output.dense.weight"].T
        inner = np.tanh(x @ w["intermediate.dense.weight"].T + w["intermediate.dense.bias"])
        return (
            out + first * w["attention.output.dense.bias"],
            inner @ w["output.dense.weight"].T + first * w["output.dense.bias"],
        )

    expected = layer(tensors, 8, key_heads, True)
    parts = []
    for rank in range(size):
        shares = TensorParallel(rank, size).shares(config, {name: t.shape for name, t in tensors.items()})
        part = {name: taken(tensor, shares[name]) for name, tensor in tensors.items()}
        parts.append(layer(part, 8 // size, max(1, key_heads // size), rank == 0))
    for whole_result, results in zip(expected, zip(*parts, strict=True), strict=True):
        np.testing.assert_allclose(sum(results), whole_result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("said", "rows"), [({"num_key_value_heads": None}, 16), ({}, 4)], ids=["null", "absent"])
def test_key_heads_that_the_config_does_not_say_are_those_of_transformers(said: dict[str, None], rows: int) -> None:
    """16 heads of width 1 for two ranks: an absent entry means the model type's 4, a null one as many as queries have."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model("smollm3", num_attention_heads=16, **said)
    assert theirs.num_key_value_heads == rows
    config = {"model_type": "smollm3", "num_attention_heads": 16, **said}
    [share] = TensorParallel(0, 2).shares(config, {"model.layers.0.self_attn.k_proj.weight": (rows, 8)}).values()
    assert share.shape == (rows // 2, 8)
    [whole] = TensorParallel(5, 8).shares(config, {"model.layers.0.self_attn.k_proj.weight": (rows, 8)}).values()
    assert whole.shape == (max(rows // 8, 1), 8)


def test_fused_rows_are_several_ranges() -> None:
    config = {"model_type": "phi3", "num_attention_heads": 8, "num_key_value_heads": 2}
    shares = TensorParallel(5, 8).shares(config, {"model.layers.0.self_attn.qkv_proj.weight": (96, 64)})
    [share] = shares.values()
    assert share == Share((((40, 48), (72, 80), (88, 96)), ((0, 64),)))
    assert share.shape == (24, 64)
    assert share.region is None
    assert [target for _, target in share.pieces()] == [
        ((0, 8), (0, 64)),
        ((8, 16), (0, 64)),
        ((16, 24), (0, 64)),
    ]


def test_vocabulary_is_cut_by_ceil() -> None:
    shapes = {"lm_head.weight": (9, 2)}
    held = [
        TensorParallel(rank, 4).shares({"model_type": "llama"}, shapes)["lm_head.weight"].shape for rank in range(4)
    ]
    assert held == [(3, 2), (3, 2), (3, 2), (0, 2)]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (96, 64), "12 attention heads.*8 ranks.*1, 2, 4, 12"),
        ("model.layers.0.self_attn.k_proj.weight", (32, 64), None),
        ("model.layers.0.mlp.up_proj.weight", (90, 64), "90 features.*1, 2, 3, 5, 6, 9"),
        ("model.layers.0.self_attn.q_proj.weight", (95, 64), "not a multiple of the 12 heads"),
        ("model.layers.0.self_attn.o_proj.weight", (64,), "no axis 1"),
    ],
)
def test_sizes_that_do_not_divide(name: str, shape: Shape, says: str | None) -> None:
    config = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4}
    if says is None:
        assert TensorParallel(7, 8).shares(config, {name: shape})[name].region == ((24, 32), (0, 64))
        return
    with pytest.raises(ValueError, match=says):
        TensorParallel(0, 8).shares(config, {name: shape})


def test_unknown_architecture() -> None:
    shapes = {"body.proj.weight": (6, 4), "other": (3,)}
    with pytest.raises(UnsupportedError, match=r"'mystery'.*plan=.*Regions"):
        TensorParallel(0, 2).shares({"model_type": "mystery"}, shapes)
    with pytest.raises(UnsupportedError):
        TensorParallel(0, 2).shares(None, shapes)
    held = TensorParallel(1, 2, plan={"*.proj.weight": 1}).shares(None, shapes)
    assert held == {"body.proj.weight": Share((((0, 6),), ((2, 4),))), "other": whole((3,))}
    assert axes(None)("body.proj.weight") is None
    assert axes(None, {"*.proj.weight": -1})("body.proj.weight") == -1


def test_plan_comes_before_the_table() -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (4, 6)}
    held = TensorParallel(0, 2, plan={"*up_proj*": None}).shares({"model_type": "llama"}, shapes)
    assert held["model.layers.0.mlp.up_proj.weight"] == whole((4, 6))


def test_unknown_parameter_of_a_cut_module() -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    with pytest.raises(UnsupportedError, match="weight_scale_inv"):
        TensorParallel(0, 2).shares({"model_type": "llama"}, {name: (2, 2)})
    assert axes({"model_type": "llama"})(name) is None
    assert axes({"model_type": "llama"})("model.layers.0.mlp.up_proj.weight") == 0


def test_nested_config_and_vision_tower() -> None:
    config, shapes, _ = model("gemma3")
    axis = axes(config)
    assert axis("model.language_model.layers.0.self_attn.q_proj.weight") == 0
    towers = [name for name in shapes if "vision_tower" in name]
    assert towers
    assert all(axis(name) is None for name in towers)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("idefics2", "model.connector.perceiver_resampler.layers.0"),
        ("video_llava", "model.video_tower.encoder.layers.0"),
        ("video_llava", "model.image_tower.encoder.layers.0"),
    ],
)
def test_attention_beside_the_language_model_is_not_cut_by_its_heads(kind: str, beside: str) -> None:
    """Each class's own plan in transformers leaves these whole."""
    text = {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": 4}
    own = "model.language_model.layers.0.self_attn.k_proj.weight"
    shapes = {f"{beside}.self_attn.{part}_proj.weight": (6, 8) for part in "qkv"} | {own: (8, 8)}
    held = TensorParallel(0, 2).shares({"model_type": kind, "text_config": text}, shapes)
    assert {name for name, share in held.items() if share != whole(shapes[name])} == {own}


@pytest.mark.parametrize("heads", ["8", True, 0, -1, 1.5, [8]])
def test_bad_config(heads: object) -> None:
    with pytest.raises(FormatError, match="num_attention_heads"):
        TensorParallel(0, 2).shares({"model_type": "llama", "num_attention_heads": heads}, {})


@pytest.mark.parametrize("make", [TensorParallel, ExpertParallel, PipelineStage])
@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_bad_rank(make: type, rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        make(rank, size)


EXPERTS = {f"m.layers.0.mlp.experts.{n}.{p}_proj.weight": (4, 4) for n in range(5) for p in ("gate", "up", "down")}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_experts_are_divided(size: int) -> None:
    shapes = EXPERTS | {"m.layers.0.mlp.gate.weight": (5, 4), "m.layers.1.mlp.experts.down_proj": (5, 4, 4)}
    ranks = [ExpertParallel(rank, size).shares(None, shapes) for rank in range(size)]
    for name in EXPERTS:
        assert sum(name in rank for rank in ranks) == 1
    assert all(rank["m.layers.0.mlp.gate.weight"] == whole((5, 4)) for rank in ranks)
    stacked = [rank["m.layers.1.mlp.experts.down_proj"] for rank in ranks]
    assert (reassembled(stacked, (5, 4, 4)) == 1).all()
    for rank, share in zip(ranks, stacked, strict=True):  # both forms put the same experts on a rank
        (start, stop) = share.ranges[0][0]
        assert {name for name in EXPERTS if name in rank} == {
            name for name in EXPERTS if start <= int(name.split(".")[5]) < stop
        }


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tensor_parallel_with_whole_experts(kind: str) -> None:
    config, shapes, _ = model(kind)
    ranks = [TensorParallel(rank, 4, experts="parallel").shares(config, shapes) for rank in range(4)]
    for name, shape in shapes.items():
        held = reassembled([rank[name] for rank in ranks if name in rank], shape)
        assert held.min() == held.max() >= 1
        if ".experts." in name:
            assert ranks[1][name].shape == (2, *shape[1:])


def test_expert_tensors_of_a_rank_compose() -> None:
    config = {"model_type": "mixtral", "num_attention_heads": 8, "num_key_value_heads": 2}
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": (8, 12, 4)}
    both = TensorParallel(1, 2) & ExpertParallel(0, 4)
    [share] = both.shares(config, shapes).values()
    assert share == Share((((0, 2),), ((3, 6), (9, 12)), ((0, 4),)))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("kind", sorted(set(FAMILIES)))
def test_stages_hold_every_tensor_once(kind: str, stages: int) -> None:
    config, shapes, _ = model(kind)
    if kind == "xlm":  # its layers are lists of attentions, norms, …: no stack
        with pytest.raises(ValueError, match="no numbered layers"):
            [PipelineStage(stage, 2).shares(config, shapes) for stage in range(2)]
        return
    [layers] = blocks(shapes).stacks.values()
    stages = min(stages, len(set(layers.values())))
    held = [PipelineStage(stage, stages).shares(config, shapes) for stage in range(stages)]
    for name, shape in shapes.items():
        holders = [stage[name] for stage in held if name in stage]
        assert holders == [whole(shape)], name
    heads = [name for name in shapes if "lm_head" in name or name.startswith(("cls.", "vocab_", "head.", "proj_out."))]
    assert all(name in held[-1] for name in heads)
    embeddings = [name for name in shapes if "embed" in name or "wte" in name]
    assert all(name in held[0] for name in embeddings if "embed_out" not in name)


LLAMA = {
    "lm_head.weight": (8, 4),
    "model.embed_tokens.weight": (8, 4),
    **{f"model.layers.{n}.mlp.up_proj.weight": (4, 4) for n in range(7)},
    "model.norm.weight": (4,),
}


def held_layers(layout: Layout, shapes: dict[str, Shape]) -> list[int]:
    return [int(name.split(".")[2]) for name in layout.shares(None, shapes) if ".layers." in name]


def test_stage_sizes_leave_room_at_the_ends() -> None:
    assert [held_layers(PipelineStage(n, 4), LLAMA) for n in range(4)] == [[0, 1], [2, 3], [4, 5], [6]]
    five = {name: shape for name, shape in LLAMA.items() if ".5." not in name and ".6." not in name}
    assert [held_layers(PipelineStage(n, 4), five) for n in range(4)] == [[0], [1], [2, 3], [4]]


def test_tied_head_is_held_at_both_ends() -> None:
    tied = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
    last = PipelineStage(1, 2)
    assert "model.embed_tokens.weight" in last.shares({"tie_word_embeddings": True}, tied)
    assert "model.embed_tokens.weight" in last.shares(None, tied)
    assert "model.embed_tokens.weight" not in last.shares({"tie_word_embeddings": False}, tied)
    assert "model.embed_tokens.weight" not in last.shares({"architectures": ["LlamaModel"]}, tied)
    assert "model.embed_tokens.weight" not in last.shares({"tie_word_embeddings": True}, LLAMA)


def test_layers_by_range() -> None:
    assert list(Layers(2, 4).shares(None, LLAMA)) == [f"model.layers.{n}.mlp.up_proj.weight" for n in (2, 3)]
    assert "model.embed_tokens.weight" in Layers(0, 1).shares(None, LLAMA)
    assert {"lm_head.weight", "model.norm.weight"} <= Layers(6, 7).shares(None, LLAMA).keys()
    with pytest.raises(ValueError, match="has 7"):
        Layers(6, 8).shares(None, LLAMA)
    with pytest.raises(ValueError, match="8 stages of a model that has 7 layers"):
        PipelineStage(0, 8).shares(None, LLAMA)
    with pytest.raises(UnsupportedError, match="several stacks"):
        Layers(0, 1).shares(None, {"encoder.block.0.w": (1,), "decoder.block.0.w": (1,)})


def test_pipeline_and_tensor_parallel() -> None:
    config, shapes, _ = model("llama")
    grid = [
        (PipelineStage(stage, 3) & TensorParallel(rank, 2)).shares(config, shapes)
        for stage in range(3)
        for rank in range(2)
    ]
    for name, shape in shapes.items():
        held = reassembled([rank[name] for rank in grid if name in rank], shape)
        expected = 1 if axes(config)(name) is not None else 2
        assert (held == expected).all(), name


def test_regions() -> None:
    shapes = {"a": (4, 6), "b": (3,), "c": ()}
    held = Regions({"c": None, "a": np.s_[:, 2:4]}).shares(None, shapes)
    assert held == {"a": Share((((0, 4),), ((2, 4),))), "c": Share(())}
    assert list(held["c"].pieces()) == [((), ())]
    assert Regions({"a": ((1, 2), (0, 6))}).shares(None, shapes)["a"].region == ((1, 2), (0, 6))
    assert Regions({"a": ...}).shares(None, shapes)["a"] == whole((4, 6))
    assert Regions({"a": ()}).shares(None, shapes)["a"] == whole((4, 6))
    with pytest.raises(NotFoundError, match="'z'"):
        Regions({"z": None}).shares(None, shapes)
    for bad in (((0, 9), (0, 6)), ((0, 1),), np.s_[1], np.s_[::2], "x", ((None, 1), (0, 6))):
        with pytest.raises(ValueError, match="a: "):
            Regions({"a": bad}).shares(None, shapes)


@pytest.mark.parametrize("index", [np.s_[900:1000], np.s_[2:5], np.s_[-5:], np.s_[3:1], np.s_[..., :7], np.s_[:, 5:-3]])
def test_a_slice_that_reaches_beyond_its_tensor_is_refused(index: object) -> None:
    with pytest.raises(ValueError, match=r"a: .* does not lie within dimension \d, which is \d long"):
        Regions({"a": index}).shares(None, {"a": (4, 6)})


DENSE = {"model.layers.0.mlp.up_proj.weight": (4, 4), "model.norm.weight": (4,)}


@pytest.mark.parametrize(
    ("layout", "shapes", "says"),
    [
        (ExpertParallel(0, 2), DENSE, "no experts"),
        (TensorParallel(0, 2, experts="parallel"), DENSE, "no experts"),
        (PipelineStage(0, 2), {"a": (4,)}, "no numbered layers"),
        (Layers(0, 0), {"a": (4,)}, "no numbered layers"),
        (TensorParallel(0, 2), {"body.up.weight": (4, 4)}, "no tensor of the model is cut"),
        (
            TensorParallel(1, 2, plan={"*.proj_inn.weight": 0}),
            {"body.proj_in.weight": (4, 4)},
            "no tensor of the model",
        ),
        (PipelineStage(0, 1) & ExpertParallel(0, 2), DENSE, "no experts"),
    ],
)
def test_a_layout_that_divides_nothing_is_refused(layout: Layout, shapes: dict[str, Shape], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layout.shares({"model_type": "llama", "num_attention_heads": 4}, shapes)


@pytest.mark.parametrize("layout", [ExpertParallel(0, 1), TensorParallel(0, 1), PipelineStage(0, 1)])
def test_one_rank_holds_all_of_any_model(layout: Layout) -> None:
    assert layout.shares({"model_type": "llama"}, {"a": (4,)}) == {"a": whole((4,))}


RANGES = st.lists(st.integers(0, 12), max_size=6, unique=True).map(
    lambda points: tuple(zip(*[iter(sorted(points))] * 2, strict=False)) or ((0, 0),)
)


@given(st.lists(st.tuples(RANGES, RANGES), max_size=3))
def test_common_part_is_the_set_intersection(pairs: list[tuple]) -> None:
    one, other = Share(tuple(a for a, _ in pairs)), Share(tuple(b for _, b in pairs))
    shape = (12,) * len(pairs)
    expected = reassembled([one], shape) * reassembled([other], shape)
    assert (reassembled([one.within(other)], shape) == expected).all()
    assert one.within(other).shape == tuple(np.unique(np.nonzero(expected)[i]).size for i in range(len(shape))) or (
        not expected.any()
    )


@given(st.tuples(RANGES, RANGES))
def test_pieces_fill_the_share(ranges: tuple) -> None:
    share = Share(ranges)
    filled = np.zeros(share.shape, dtype=int)
    for _, target in share.pieces():
        filled[slices(target)] += 1
    assert (filled == 1).all()


def test_axes_of_many_names_are_cheap() -> None:
    axis = axes({"model_type": "qwen3_moe"})
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(500) for j in range(100)]
    assert {axis(name) for name in names} == {0}
