"""Folders whose weights lie elsewhere than in `model.safetensors`: pipelines of diffusers, adapters of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelstore as ms
from modelstore.errors import FormatError, UnsupportedError
from tests.helpers.stores import all_bits

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.39.0",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
UNET = {"conv_in.weight": torch.randn(4, 3, 3, 3), "mid.weight": torch.randn(8, 8)}
TEXT = {"conv_in.weight": torch.randn(5).half(), "embed.weight": torch.randn(6, 2).bfloat16()}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder: one component in shards, one in a file, one without weights."""
    root = tmp_path / "pipeline"
    for name in ("scheduler", "text_encoder", "unet"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"of": name}))
    (root / "model_index.json").write_text(json.dumps(INDEX))
    save_file(TEXT, root / "text_encoder" / "model.safetensors", {"format": "pt"})
    save_file({k: v.half() for k, v in TEXT.items()}, root / "text_encoder" / "model.fp16.safetensors")
    names = [f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for file, (name, tensor) in zip(names, UNET.items(), strict=True):
        save_file({name: tensor}, root / "unet" / file, {"format": "pt"})
    index = {"weight_map": dict(zip(UNET, names, strict=True))}
    (root / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def store(tmp_path: Path) -> ms.Store:
    return ms.open(tmp_path / "store")


def test_a_pipeline_keeps_its_components(pipeline: Path, store: ms.Store, tmp_path: Path) -> None:
    store.save("pipe", pipeline)
    wanted = {f"unet/{k}": v for k, v in UNET.items()} | {f"text_encoder/{k}": v for k, v in TEXT.items()}
    assert all_bits(store.load("pipe")) == all_bits(wanted)
    out = tmp_path / "out"
    store.export("pipe", out)
    assert all_bits(load_file(out / "unet" / "diffusion_pytorch_model.safetensors")) == all_bits(UNET)
    assert all_bits(load_file(out / "text_encoder" / "model.safetensors")) == all_bits(TEXT)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        *(f"{name}/config.json" for name in ("scheduler", "text_encoder", "unet")),
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_shards_of_a_component_lie_in_its_folder_and_replace_older_ones(
    pipeline: Path, store: ms.Store, tmp_path: Path
) -> None:
    store.save("pipe", pipeline)
    out = tmp_path / "out"
    store.export("pipe", out)
    store.export("pipe", out, max_shard_bytes=300, overwrite=True)
    unet = sorted(path.name for path in (out / "unet").iterdir())
    assert unet == [
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    store.save("again", out)
    assert store.diff("pipe", "again").changed == ()
    store.export("pipe", out, overwrite=True)
    assert sorted(path.name for path in (out / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_component_of_pickles_alone_is_refused(pipeline: Path, store: ms.Store) -> None:
    (pipeline / "text_encoder" / "model.safetensors").unlink()
    (pipeline / "text_encoder" / "model.fp16.safetensors").unlink()
    torch.save(TEXT, pipeline / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"'text_encoder' has its weights in pytorch_model\.bin alone"):
        store.save("pipe", pipeline)


def test_an_index_that_names_nothing_here_is_refused(pipeline: Path, store: ms.Store) -> None:
    (pipeline / "model_index.json").write_text(json.dumps({"../unet": ["diffusers", "X"], "vae": ["diffusers", "Y"]}))
    with pytest.raises(FormatError, match="no component"):
        store.save("pipe", pipeline)


def test_a_tensor_of_no_component_is_not_lost_in_an_export(store: ms.Store, tmp_path: Path) -> None:
    store.save(
        "pipe",
        {"unet/a": torch.ones(2), "stray": torch.ones(2)},
        files={"model_index.json": json.dumps(INDEX).encode()},
    )
    with pytest.raises(UnsupportedError, match="'stray'"):
        store.export("pipe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_as_one(store: ms.Store, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    weights = {
        "base_model.model.q_proj.lora_A.weight": torch.randn(2, 8),
        "base_model.model.q_proj.lora_B.weight": torch.randn(8, 2),
    }
    save_file(weights, source / "adapter_model.safetensors", {"format": "pt"})
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    store.save("adapter", source)
    out = tmp_path / "out"
    store.export("adapter", out, max_shard_bytes=10)  # PEFT reads one file only
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all_bits(load_file(out / "adapter_model.safetensors")) == all_bits(weights)


def test_an_adapter_with_a_config_beside_it_is_exported_as_one(store: ms.Store, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    weights = {"base_model.model.q_proj.lora_A.weight": torch.randn(2, 8)}
    save_file(weights, source / "adapter_model.safetensors", {"format": "pt"})
    for name in ("adapter_config.json", "config.json"):
        (source / name).write_text(json.dumps({"peft_type": "LORA", "model_type": "llama"}))
    store.save("adapter", source)
    store.export("adapter", tmp_path / "out")
    assert all_bits(load_file(tmp_path / "out" / "adapter_model.safetensors")) == all_bits(weights)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("shards", [False, True])
def test_a_component_of_diffusers_by_itself_keeps_its_name(
    pipeline: Path, store: ms.Store, tmp_path: Path, shards: bool
) -> None:
    unet = pipeline / "unet"
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.39.0"}))
    store.save("unet", unet)
    out = tmp_path / "out"
    store.export("unet", out, max_shard_bytes=300 if shards else 1 << 30)
    files = sorted(path.name for path in out.iterdir())
    if shards:
        assert files == sorted(path.name for path in unet.iterdir())
    else:
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    store.save("again", out)
    assert all_bits(store.load("again")) == all_bits(UNET)
