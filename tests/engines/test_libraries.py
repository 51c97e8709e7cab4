"""Adapters in PEFT and pipelines in diffusers: what they saved is loaded again from an export, and computes the same.

Needs the environment of `make engines`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelstore as ms
from tests.helpers.stores import all_bits

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    store = ms.open(tmp_path / "store")
    store.save("org/adapter", tmp_path / "adapter")
    store.export("org/adapter", tmp_path / "out")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    tokens = torch.tensor([[1, 2, 3, 40, 50]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert not torch.equal(again(tokens).logits, base().eval()(tokens).logits)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000], ids=["single files", "shards"])
def test_a_pipeline_of_diffusers(tmp_path: Path, max_shard_bytes: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path / "pipeline")
    store = ms.open(tmp_path / "store")
    store.save("org/pipeline", tmp_path / "pipeline")
    assert all(name.startswith("unet/") for name in store.load("org/pipeline"))
    store.export("org/pipeline", tmp_path / "out", max_shard_bytes=max_shard_bytes)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert all_bits(again.unet.state_dict()) == all_bits(unet.state_dict())
    noise = torch.randn(1, 3, 8, 8)
    with torch.no_grad():  # sums may be taken in another order where weights lie at other addresses
        torch.testing.assert_close(again.unet(noise, 3).sample, unet(noise, 3).sample)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000], ids=["single file", "shards"])
def test_a_component_of_diffusers_by_itself(tmp_path: Path, max_shard_bytes: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=8).eval()
    model.save_pretrained(tmp_path / "vae")
    store = ms.open(tmp_path / "store")
    store.save("org/vae", tmp_path / "vae")
    store.export("org/vae", tmp_path / "out", max_shard_bytes=max_shard_bytes)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert all_bits(again.state_dict()) == all_bits(model.state_dict())
