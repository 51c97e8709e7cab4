"""Packed exports: directories that transformers loads by way of compressed-tensors, to the logits of the dense export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import modelstore as ms
from modelstore.compress.engine.export import PackedTensor, engine_layout
from modelstore.errors import UnsupportedError
from modelstore.execute.export import write as export_write
from tests.compress.llama import CONFIG, LAYER, llama

pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")

TOKENS = torch.arange(40).reshape(2, 20)
# Heads of 20: attention has rows that fill no whole words, and an output whose columns are no whole groups of 32.
ODD: dict[str, Any] = CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 20,
}


def recipe(codec: str, targets: tuple[str, ...] = ("linear",), **params: Any) -> dict[str, Any]:
    """One rule."""
    return {"name": "v", "rules": [{"targets": list(targets), "codec": {"name": codec, "params": params}}]}


def saved(
    path: Path, tensors: Mapping[str, torch.Tensor] | None = None, config: Any = CONFIG, **files: bytes
) -> ms.Store:
    """A store with a model "m"."""
    store = ms.open(path / "store", memory="64MiB", threads=2)
    store.save("m", dict(tensors or llama()), files={"config.json": json.dumps(config).encode(), **files})
    return store


def exported(store: ms.Store, path: Path, ref: str = "m:v", **options: Any) -> Path:
    """The exported directory."""
    store.export(ref, path, **options)
    return path


def scheme(folder: Path) -> dict[str, Any] | None:
    """What its config says of quantization."""
    found: dict[str, Any] | None = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return found


def named(names: list[str]) -> set[str]:
    """Modules of the whole model; each that lies below its base model must be named without that too (AutoModel)."""
    assert all(name.removeprefix("model.") in names for name in names)
    return {f"model.{name}" if name.startswith("layers.") else name for name in names}


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """What transformers computes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


# ---------------------------------------------------------------------- what transformers makes of them

FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "int8": (recipe("int", bits=8, granularity="channel"), "pack-quantized"),
    "int8-group": (recipe("int", bits=8), "pack-quantized"),
    "int4": (recipe("int", bits=4, method="mse"), "pack-quantized"),
    "int3": (recipe("int", bits=3, group_size=32), "pack-quantized"),
    "int2-channel": (recipe("int", bits=2, granularity="channel"), "pack-quantized"),
    "fp8-channel": (recipe("fp8"), "float-quantized"),
    "fp8-tensor": (recipe("fp8", granularity="tensor"), "float-quantized"),
    "fp8-block": (recipe("fp8", granularity="block"), "float-quantized"),
    "mxfp4": (recipe("mxfp4"), "mxfp4-pack-quantized"),
    "nvfp4": (recipe("nvfp4"), "nvfp4-pack-quantized"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_computes_the_same_from_packed_weights(tmp_path: Path, name: str) -> None:
    store = saved(tmp_path)
    store.compress("m", FORMATS[name][0], variant="v")
    packed = exported(store, tmp_path / "packed")
    dense = exported(store, tmp_path / "dense", dequantize=True)
    said = scheme(packed)
    assert said is not None
    assert scheme(dense) is None
    assert said["format"] == FORMATS[name][1]
    assert said["ignore"] == ["lm_head"]
    assert f"{LAYER}mlp.up_proj.weight_scale" in tensors(packed)
    assert torch.equal(logits(packed), logits(dense))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points(tmp_path: Path, bits: int) -> None:
    # Packed zero points are loaded where transformers dequantizes while it loads: what compressed-tensors 0.20 makes
    # of a module on the meta device has them unpacked, and its own checkpoints of that kind do not fit either.
    store = saved(tmp_path)
    store.compress("m", recipe("int", bits=bits, symmetric=False, group_size=64), variant="v")
    packed = exported(store, tmp_path / "packed")
    dense = exported(store, tmp_path / "dense", dequantize=True)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["dequantize"] is True
    assert torch.equal(logits(packed), logits(dense))


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_the_ladders_variants(tmp_path: Path, variant: str) -> None:
    store = saved(tmp_path)
    store.compress("m", "ladder")
    packed = exported(store, tmp_path / "packed", f"m:{variant}")
    dense = exported(store, tmp_path / "dense", f"m:{variant}", dequantize=True)
    assert torch.equal(logits(packed), logits(dense))
    assert scheme(exported(store, tmp_path / "original", "m")) is None


def test_several_schemes(tmp_path: Path) -> None:
    rules = [
        *recipe("nvfp4", ("*.mlp.*",))["rules"],
        {"targets": ["*.o_proj.*"]},
        *recipe("int", bits=4, group_size=32)["rules"],
    ]
    store = saved(tmp_path)
    store.compress("m", {"name": "v", "rules": rules})
    packed = exported(store, tmp_path / "packed")
    dense = exported(store, tmp_path / "dense", dequantize=True)
    said = scheme(packed)
    assert said is not None
    assert said["format"] == "mixed-precision"
    groups = {group["format"]: group["targets"] for group in said["config_groups"].values()}
    groups = {kind: named(names) for kind, names in groups.items()}
    assert groups["pack-quantized"] == {f"{LAYER}self_attn.{name}_proj" for name in "kqv"}
    assert groups["nvfp4-pack-quantized"] == {f"{LAYER}mlp.{name}_proj" for name in ("down", "gate", "up")}
    assert named(said["ignore"]) == {"lm_head", f"{LAYER}self_attn.o_proj"}
    assert torch.equal(logits(packed), logits(dense))


def odd() -> dict[str, torch.Tensor]:
    """A model whose attention has 20 and 80 rows, and columns of which only some are whole groups."""
    random = torch.Generator().manual_seed(1)
    shapes = {
        "self_attn.q_proj": (80, 128),
        "self_attn.k_proj": (20, 128),
        "self_attn.v_proj": (20, 128),
        "self_attn.o_proj": (128, 80),
        "mlp.gate_proj": (384, 128),
        "mlp.up_proj": (384, 128),
        "mlp.down_proj": (128, 384),
    }
    made = {f"{LAYER}{name}.weight": torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}
    made |= {f"{LAYER}{name}.weight": torch.ones(128) for name in ("input_layernorm", "post_attention_layernorm")}
    made |= {"model.norm.weight": torch.ones(128), "lm_head.weight": torch.randn(320, 128, generator=random)}
    made["model.embed_tokens.weight"] = torch.randn(320, 128, generator=random)
    return {name: tensor.bfloat16() for name, tensor in made.items()}


@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_rows_are_packed_and_columns_that_do_not_fit_are_dense(tmp_path: Path, symmetric: bool) -> None:
    store = saved(tmp_path, odd(), ODD | {"tie_word_embeddings": False})
    store.compress("m", recipe("int", ("linear", "head"), bits=4, group_size=32, symmetric=symmetric), variant="v")
    packed = exported(store, tmp_path / "packed")
    said = scheme(packed)
    assert said is not None
    assert named(said["ignore"]) == {f"{LAYER}self_attn.o_proj"}
    found = tensors(packed)
    assert found[f"{LAYER}self_attn.k_proj.weight_shape"].tolist() == [20, 128]
    assert "lm_head.weight_packed" in found
    assert f"{LAYER}self_attn.o_proj.weight" in found
    if not symmetric:
        assert found[f"{LAYER}self_attn.k_proj.weight_zero_point"].shape == (3, 4)
    dense = exported(store, tmp_path / "dense", dequantize=True)
    assert torch.equal(logits(packed), logits(dense))


# ---------------------------------------------------------------------- how they are written


@pytest.mark.parametrize("name", ["int4", "fp8-tensor", "fp8-block", "nvfp4"])
def test_parts_are_those_that_load_gives(tmp_path: Path, name: str) -> None:
    store = saved(tmp_path)
    store.compress("m", FORMATS[name][0], variant="v")
    found = tensors(exported(store, tmp_path / "packed"))
    expected = store.load("m:v", dequantize=False)
    expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key


@pytest.mark.parametrize("affine", [False, True])
def test_bands_make_the_same_bytes(tmp_path: Path, affine: bool) -> None:
    store = saved(tmp_path)
    store.compress("m", recipe("int", bits=3, group_size=64, symmetric=not affine), variant="v")
    model = store["m:v"].opened()
    layout = engine_layout(model.reader, model.config())
    assert layout is not None
    packed = layout.packed[f"{LAYER}mlp.gate_proj.weight"]
    assert isinstance(packed, PackedTensor)
    sizes = [torch.empty(shape, dtype=getattr(torch, kind)).nbytes for _, kind, shape in packed.parts("x.weight")]
    offsets = [sum(sizes[:at]) for at in range(len(sizes))]
    made = []
    for limit in (1, 100_000, 1 << 30):
        form = packed.form(offsets)
        file = bytearray(b"\xaa" * sum(sizes))
        regions = list(form.regions(limit))
        for region in regions:
            for (at, length), data in zip(form.places(region), form.read(model.reader, region), strict=True):
                assert len(data) == length
                file[at : at + len(data)] = data.tobytes()
        made.append((len(regions), bytes(file)))
    assert made[0][0] > made[1][0] > made[2][0] == 2, "the shape, and all rows"
    assert made[0][1] == made[1][1] == made[2][1]


def test_shards_and_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, **{"tokenizer.json": b"{}"})
    store.compress("m", recipe("int", bits=4), variant="v")
    whole = exported(store, tmp_path / "whole", max_shard_bytes=300_000)
    assert len(list(whole.glob("*.safetensors"))) > 3
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(whole).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(whole).values())
    assert (whole / "tokenizer.json").read_bytes() == b"{}"
    put, count = export_write._Writer.put, [0]

    class Killed(BaseException):
        pass

    def die(self: Any, *rest: Any) -> None:
        count[0] += 1
        if count[0] == 6:
            raise Killed
        put(self, *rest)

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(export_write._Writer, "put", die)
        with pytest.raises(Killed):
            store.export("m:v", again, max_shard_bytes=300_000)
    assert not (again / "config.json").exists()
    store.export("m:v", again, max_shard_bytes=300_000)
    for file in whole.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("preset", ["half", "nf4", "binary", "round"])
def test_what_engines_have_no_layout_for_is_dense(tmp_path: Path, preset: str) -> None:
    store = saved(tmp_path)
    store.compress("m", preset)
    folder = exported(store, tmp_path / "out", f"m:{preset}")
    assert scheme(folder) is None
    expected = store.load(f"m:{preset}")
    expected.pop("lm_head.weight")
    found = tensors(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# ---------------------------------------------------------------------- what cannot be


def refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: Any, said: str, include: Sequence[str] = (), **params: Any
) -> None:
    """The packed export says why not; the dense one is written."""
    store = saved(tmp_path, tensors, config)
    store.compress("m", recipe("int", bits=4, **params), variant="v", include=include)
    with pytest.raises(UnsupportedError, match=said) as caught:
        store.export("m:v", tmp_path / "out")
    assert "dequantize=True" in str(caught.value)
    assert not (tmp_path / "out").exists()
    store.export("m:v", tmp_path / "out", dequantize=True)


def test_nothing_but_stacked_experts(tmp_path: Path) -> None:
    experts = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 64, 128).bfloat16()}
    refused(tmp_path, experts, CONFIG, "3-d, which engines have no packed layout for")


def test_transposed_weights(tmp_path: Path) -> None:
    made = {"h.0.attn.c_attn.weight": torch.randn(128, 384), "wte.weight": torch.randn(64, 128)}
    refused(tmp_path, made, {"model_type": "gpt2"}, "transposed")


def test_a_model_that_came_quantized(tmp_path: Path) -> None:
    refused(
        tmp_path,
        llama(),
        CONFIG | {"quantization_config": {"quant_method": "fp8"}},
        "quantized before",
        ["*_proj.weight"],
    )


def test_no_rows_of_whole_groups(tmp_path: Path) -> None:
    refused(tmp_path, {"a.weight": torch.randn(64, 100)}, CONFIG, "whole groups", group_size=64)


def test_no_config(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", llama())
    store.compress("m", recipe("int", bits=4), variant="v")
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        store.export("m:v", tmp_path / "out")
