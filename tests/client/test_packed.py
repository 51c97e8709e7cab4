"""`packed`: saved so, and made of what is stored losslessly; the same bits either way."""

from __future__ import annotations

from pathlib import Path

import torch

import modelstore as ms


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(512, 128).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": (0.02 * torch.randn(300, 128)).bfloat16(),
        "model.norm.weight": torch.ones(128),
        "steps": torch.arange(5000),
        "odd": torch.tensor([float("nan"), -0.0, float("inf")]).repeat(1000),
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in wanted.items()
    )


def test_save_and_load(tmp_path: Path) -> None:
    store = ms.open(tmp_path)
    saved = store.save("acme/llama", state(), codec="packed")
    assert saved.stored < 0.75 * saved.bytes
    assert same(store.load("acme/llama"), state())
    rows = store.tensor("acme/llama", "model.layers.0.mlp.up_proj.weight")[7:250]
    assert torch.equal(rows, state()["model.layers.0.mlp.up_proj.weight"][7:250])


def test_what_is_stored_losslessly_is_packed_chunk_by_chunk(tmp_path: Path) -> None:
    store = ms.open(tmp_path)
    store.save("acme/llama", state())
    plan = store.plan_compression("acme/llama", "packed")
    assert {choice.name for choice in plan.choices if choice.codec} == {name for name in state() if name != "steps"}
    store.compress("acme/llama", "packed")
    assert same(store.load("acme/llama:packed"), state())
    assert store.verify("acme/llama").ok
