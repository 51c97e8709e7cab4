"""Packed exports of small models of several kinds: transformers computes from them what it does from the dense export, or
they are refused before anything is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import UnsupportedError

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 32}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = torch.arange(3, 35)[None]


def llama(**more: Any) -> Any:
    """Dense."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **more))


def mixtral() -> Any:
    """Experts by number in the checkpoint, w1 to w3, and one parameter in the module."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4))


def qwen3_moe() -> Any:
    """The same with other names; its down projection is of 192 columns."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**GROUPED, **experts))


def llava() -> Any:
    """A nested text_config; names in the checkpoint are others than in the module."""
    text, vision = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=300)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    """A nested text_config; transformers initializes linear layers of its vision tower before it unpacks them."""
    text = transformers.Gemma3TextConfig(**GROUPED, sliding_window=32)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=300
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def bert() -> Any:
    """An encoder whose decoder of words is tied."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def gpt_oss() -> Any:
    """Experts in stacks, which no engine has a packed layout for: they are dense beside the packed attention."""
    config = transformers.GptOssConfig(
        **GROUPED | {"intermediate_size": 64}, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
    "llava": llava,
    "gemma3": gemma3,
    "bert": bert,
}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"name": "int", "params": {"bits": 8, "granularity": "channel"}},
    "int8-group": {"name": "int", "params": {"bits": 8, "group_size": 64}},
    "int4": {"name": "int", "params": {"bits": 4, "group_size": 32}},
    "int3": {"name": "int", "params": {"bits": 3, "group_size": 32}},
    "int4-affine": {"name": "int", "params": {"bits": 4, "group_size": 64, "symmetric": False}},
    "fp8": {"name": "fp8", "params": {}},
    "fp8-tensor": {"name": "fp8", "params": {"granularity": "tensor"}},
    "fp8-block": {"name": "fp8", "params": {"granularity": "block"}},
    "mxfp4": {"name": "mxfp4", "params": {}},
    "nvfp4": {"name": "nvfp4", "params": {}},
    "W8A8": {"name": "int", "params": {"bits": 8, "granularity": "channel"}},
}
MIXTURES = ("mixtral", "qwen3-moe")
NOT_OF_EXPERTS = ("int4-affine", "fp8-block", "nvfp4", "W8A8")


def saved(store: ms.Store, name: str, path: Path) -> None:
    """One of the models, of random weights."""
    torch.manual_seed(0)
    MODELS[name]().to(torch.bfloat16).save_pretrained(path / name)
    store.save(name, path / name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    """All models, saved."""
    path = tmp_path_factory.mktemp("architectures")
    store = ms.open(path / "store", memory="64MiB", threads=1)
    for name in MODELS:
        saved(store, name, path)
    return store


def recipe(codec: dict[str, Any], targets: tuple[str, ...] = ("linear",)) -> dict[str, Any]:
    """One rule."""
    return {"name": "v", "rules": [{"targets": list(targets), "codec": codec}]}


def logits(folder: Path, model: str, **options: Any) -> torch.Tensor:
    """What transformers computes."""
    made = type(MODELS[model]())
    with torch.no_grad():
        found: torch.Tensor = (
            made.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()(TOKENS).logits.float()
        )
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_packed_is_dense_or_refused(store: ms.Store, tmp_path: Path, model: str, format: str) -> None:
    ref = f"{model}:{format}"
    if format not in store.versions(model)[-1].variants:
        store.compress(model, recipe(FORMATS[format]), variant=format)
    options: dict[str, Any] = {"activations": "int8"} if format == "W8A8" else {}
    if model in MIXTURES and format in NOT_OF_EXPERTS:
        with pytest.raises(
            UnsupportedError, match=r"does not take those of .*mxfp4, or export it with dequantize=True"
        ):
            store.export(ref, tmp_path / "packed", **options)
        assert not (tmp_path / "packed").exists()
        return
    store.export(ref, tmp_path / "packed", **options)
    store.export(ref, tmp_path / "dense", dequantize=True)
    how = (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        if format == "int4-affine"
        else {}
    )
    packed, dense = logits(tmp_path / "packed", model, **how), logits(tmp_path / "dense", model)
    assert (packed - dense).norm() < 0.03 * dense.norm()
    assert sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors")) < 0.95 * sum(
        file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors")
    )
    assert format == "W8A8" or torch.equal(packed, dense)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_floats_of_four_bits_are_unpacked_to_bfloat16(store: ms.Store, tmp_path: Path, format: str) -> None:
    wide = {name: tensor.float() for name, tensor in store.load("llama").items()}
    name = f"wide-{format}"
    store.save(name, wide, files={"config.json": b"".join(store.cat("llama", "config.json"))})
    store.compress(name, recipe(FORMATS[format]), variant="v")
    if format == "int4":
        store.export(f"{name}:v", tmp_path / "out")
        return
    with pytest.raises(UnsupportedError, match=r"is float32, and compressed-tensors unpacks .* to bfloat16 only"):
        store.export(f"{name}:v", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- experts


def test_experts_beside_other_schemes(store: ms.Store, tmp_path: Path) -> None:
    """transformers takes the experts' scheme for the first that config.json has."""
    rules = [
        *recipe(FORMATS["nvfp4"], ("*self_attn*",))["rules"],
        *recipe(FORMATS["int4"])["rules"],
    ]
    store.compress("mixtral", {"name": "v", "rules": rules}, variant="two")
    store.export("mixtral:two", tmp_path / "packed")
    store.export("mixtral:two", tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(tmp_path / "packed", "mixtral"), logits(tmp_path / "dense", "mixtral"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("*self_attn*",), "packed only, as the others are"),
        (("*self_attn*", "*w1*", "*w3*"), "packed only, as the others are"),
        (("*experts.[01].*",), "packed only, as the others are"),
    ],
)
def test_dense_experts_beside_packed_weights(
    store: ms.Store, tmp_path: Path, targets: tuple[str, ...], said: str
) -> None:
    variant = f"some{len(targets)}{targets[0].count('e')}"
    store.compress("mixtral", recipe(FORMATS["int4"], targets), variant=variant)
    with pytest.raises(UnsupportedError, match=said):
        store.export(f"mixtral:{variant}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_two_schemes(store: ms.Store, tmp_path: Path) -> None:
    rules = [*recipe(FORMATS["int8"], ("*experts.0*",))["rules"], *recipe(FORMATS["int4"])["rules"]]
    store.compress("mixtral", {"name": "v", "rules": rules}, variant="mixed")
    with pytest.raises(UnsupportedError, match="compressed in 2 ways"):
        store.export("mixtral:mixed", tmp_path / "out")


def test_dense_experts_beside_float8(store: ms.Store, tmp_path: Path) -> None:
    store.compress("mixtral", recipe(FORMATS["fp8"], ("*self_attn*",)), variant="attention8")
    store.export("mixtral:attention8", tmp_path / "packed")
    store.export("mixtral:attention8", tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(tmp_path / "packed", "mixtral"), logits(tmp_path / "dense", "mixtral"))


def test_stacks_are_named_as_not_quantized(store: ms.Store, tmp_path: Path) -> None:
    store.compress("gpt-oss", recipe(FORMATS["int4"]), variant="stack")
    store.export("gpt-oss:stack", tmp_path / "out")
    assert "model.layers.0.mlp.experts" in quantization(tmp_path / "out")["ignore"]


# ---------------------------------------------------------------------- what transformers does to dtypes


def test_scales_that_transformers_keeps_in_float32(
    store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern such as "scale" means them too, and the weights would be unpacked to float32."""
    store.compress("llama", recipe(FORMATS["int4"]), variant="kept")
    store.export("llama:kept", tmp_path / "dense", dequantize=True)
    for at, (pattern, module, is_dense) in enumerate(
        [("q_proj.weight_scale", "q_proj", True), ("k_proj", "k_proj", False)]
    ):
        monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", [pattern])
        store.export("llama:kept", tmp_path / str(at))
        assert (f"model.layers.0.self_attn.{module}" in quantization(tmp_path / str(at))["ignore"]) == is_dense
        if is_dense:  # the other is multiplied in float32 as its dense weight would be, which this class does not do
            assert torch.equal(logits(tmp_path / str(at), "llama"), logits(tmp_path / "dense", "llama"))


def test_a_model_that_casts_its_buffers(store: ms.Store, tmp_path: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=320, n_embd=128, dff=256, n_layer=1, n_head=4, n_positions=64)
    transformers.CTRLLMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "ctrl")
    store.save("ctrl", tmp_path / "ctrl")
    store.compress("ctrl", recipe(FORMATS["int4"]), variant="v")
    with pytest.raises(UnsupportedError, match=r"casts 'transformer\.pos_encoding' while it runs"):
        store.export("ctrl:v", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- int8 activations


def quantization(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_int8_activations_are_described(store: ms.Store, tmp_path: Path) -> None:
    if "int8" not in store.versions("llama")[-1].variants:
        store.compress("llama", recipe(FORMATS["int8"]), variant="int8")
    store.export("llama:int8", tmp_path / "out", activations="int8")
    said = quantization(tmp_path / "out")
    (group,) = said["config_groups"].values()
    assert said["format"] == group["format"] == "int-quantized"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    store.export("llama:int8", tmp_path / "weights")
    (group,) = quantization(tmp_path / "weights")["config_groups"].values()
    assert (group["format"], group["input_activations"]) == ("pack-quantized", None)


@pytest.mark.parametrize("preset", ["int4-rtn", "fp8", "ladder", "nf4"])
def test_int8_activations_want_int8_weights(store: ms.Store, tmp_path: Path, preset: str) -> None:
    store.save(
        f"llama-{preset}", store.load("llama"), files={"config.json": b"".join(store.cat("llama", "config.json"))}
    )
    store.compress(f"llama-{preset}", preset)
    ref = f"llama-{preset}:{'int8' if preset == 'ladder' else preset}"
    with pytest.raises(UnsupportedError, match="weights of 8 bits, symmetric, with a scale a channel"):
        store.export(ref, tmp_path / "out", activations="int8")
    assert not (tmp_path / "out").exists()


def test_int8_activations_of_an_original(store: ms.Store, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing is compressed"):
        store.export("bert", tmp_path / "out", activations="int8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activations": "int8", "dequantize": True}, "leave one of the two out"),
        ({"activations": "int8", "format": "safetensors"}, "leave one of the two out"),
        ({"activations": "int4"}, "one of 'int8'"),
    ],
)
def test_what_activations_do_not_go_with(store: ms.Store, tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        store.export("llama:int8", tmp_path / "out.safetensors", **options)


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "nobody-knows"}, "does not know"),
        ({"architectures": ["NobodyForCausalLM"]}, "cannot build"),
        ({"architectures": ["pipeline"]}, "cannot build"),
        ({"num_hidden_layers": 10**12}, "mend config.json"),
        ({"num_hidden_layers": 120_000}, "more than 8[0-9]{3} modules"),
        ({"hidden_size": "wide"}, "cannot build"),
        ({"hidden_size": 64}, "mend config.json"),
    ],
)
def test_configs_of_no_model(store: ms.Store, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads(b"".join(store.cat("llama", "config.json"))) | change
    other = ms.open(tmp_path / "store")
    other.save("m", store.load("llama"), files={"config.json": json.dumps(config).encode()})
    other.compress("m", recipe(FORMATS["int4"]), variant="v")
    with pytest.raises(UnsupportedError, match=said) as caught:
        other.export("m:v", tmp_path / "out")
    assert "dequantize=True" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_transformers_splits(store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    halves = WeightConverter(["mlp.both.weight"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [halves])
    store.compress("llama", recipe(FORMATS["int4"]), variant="split")
    with pytest.raises(UnsupportedError, match=r"makes several weights of tensors such as 'mlp\.both\.weight'"):
        store.export("llama:split", tmp_path / "out")


def test_without_transformers(store: ms.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("tied", "mixtral"):
        store.compress(model, recipe(FORMATS["int4"]), variant="alone")
    store.export("tied:alone", tmp_path / "with")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    store.export("tied:alone", tmp_path / "without")
    assert quantization(tmp_path / "without") == quantization(tmp_path / "with")
    with pytest.raises(UnsupportedError, match=r"known to transformers 5, which is not installed"):
        store.export("mixtral:alone", tmp_path / "out")


def test_what_is_dense_is_said(store: ms.Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.compress("gemma3", recipe(FORMATS["int4"]), variant="said")
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.export("gemma3:said", tmp_path / "out")
    assert "is exported dense: it" in caplog.text
