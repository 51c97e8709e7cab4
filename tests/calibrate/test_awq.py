"""AWQ: what is folded leaves the model the same function, and what is rounded then loses less."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.calibrate import awq
from modelstore.calibrate.block import Solving
from modelstore.calibrate.folding import Before
from modelstore.codecs.integer.codec import Int
from modelstore.format.dtypes import DTYPES
from modelstore.storage.memory import MemoryStorage
from tests.calibrate.killed import DATA, RECIPE
from tests.helpers.language import TEXT
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")

SCALED: dict[str, Any] = {"name": "scaled", "rules": [{**RECIPE["rules"][0], "method": {"name": "awq"}}]}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
NORMS = {"input_layernorm", "post_attention_layernorm"}
FOLDED: dict[tuple[str, str], tuple[dict[str, Any], set[str]]] = {
    ("LlamaForCausalLM", "LlamaConfig"): ({}, {*NORMS, "v_proj", "up_proj"}),
    ("Qwen2ForCausalLM", "Qwen2Config"): ({}, {*NORMS, "up_proj"}),  # its values have a bias
    ("Qwen3ForCausalLM", "Qwen3Config"): ({}, {*NORMS, "v_proj", "up_proj"}),
    ("Gemma2ForCausalLM", "Gemma2Config"): (
        {"sliding_window": 16},
        {"input_layernorm", "pre_feedforward_layernorm", "v_proj", "up_proj"},
    ),
    # A router reads what experts do: nothing is folded into the norm before both.
    ("MixtralForCausalLM", "MixtralConfig"): ({"num_local_experts": 3}, {"input_layernorm", "v_proj"}),
    ("Phi3ForCausalLM", "Phi3Config"): ({"pad_token_id": 0}, NORMS),  # fused layers
    ("GPT2LMHeadModel", "GPT2Config"): ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, set()),
}


def opened(folder: Path, out: Path, model: tuple[str, str], more: dict[str, Any], dtype: torch.dtype) -> ms.Store:
    """A store with a random model of a kind, as "m"; gains of its norms differ."""
    torch.manual_seed(0)
    size = transformers.AutoConfig.from_pretrained(folder).vocab_size
    config = getattr(transformers, model[1])(vocab_size=size, **({} if "n_embd" in more else SIZES), **more)
    made = getattr(transformers, model[0])(config)
    for name, value in made.named_parameters():
        if "norm" in name and value.dim() == 1:
            value.data += torch.rand_like(value) - 0.3
    made.to(dtype).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", out)
    return store


@pytest.mark.parametrize("model", FOLDED, ids=lambda one: one[0].removesuffix("ForCausalLM"))
def test_what_is_folded_leaves_a_block_what_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[str, str]
) -> None:
    """Before anything is rounded; with gains of bfloat16, which cannot hold a gain by a scale."""
    more, wanted = FOLDED[model]
    store = opened(folder, tmp_path, model, more, torch.bfloat16)
    real, differences = Solving._fold, []

    def watched(self: Solving, layers: Any, gathered: Any) -> None:
        def given() -> torch.Tensor:
            with self.asked.stages.skeleton.at(self.number, self.values) as run:
                return run(self.shards[0], self.came(0))

        before = given()
        values = {name: value.clone() for name, value in self.values.items()}
        real(self, layers, gathered)
        changed = any(not torch.equal(values[name], value) for name, value in self.values.items())
        assert changed <= bool(self.folded)
        differences.append(float((given() - before).norm() / before.norm()))

    monkeypatch.setattr(Solving, "_fold", watched)
    found = store.compress("m", SCALED, calibration=DATA).metrics["scaled"].get("folded", {})
    assert {name.split(".")[-2] for name in found} <= wanted
    assert bool(found) == bool(wanted)
    assert differences
    assert max(differences) < 1e-5


def test_the_function_is_kept_where_it_is_stored(folder: Path, tmp_path: Path) -> None:
    """Of 8 bits nearly nothing is lost, whatever was folded; what is folded has values of its own, and exact ones."""
    store = opened(folder, tmp_path, ("LlamaForCausalLM", "LlamaConfig"), {}, torch.bfloat16)
    rule = SCALED["rules"][0]
    fine = {**SCALED, "rules": [{**rule, "codec": {"name": "int", "params": {"bits": 8, "group_size": 16}}}]}
    made = store.compress("m", fine, calibration=DATA)
    folded = made.metrics["scaled"]["folded"]
    norms = [name for name in folded if "norm" in name]
    assert norms
    one, other = store.load("m"), store.load("m:scaled")
    assert all(not torch.equal(one[name], other[name]) for name in norms)
    manifest = store["m:scaled"].opened().manifest
    assert {manifest.codecs[manifest.by_name[name].codec].name for name in norms} == {"lossless"}
    kept = [name for name in one if "norm" in name and name not in norms]
    assert kept
    assert all(torch.equal(one[name], other[name]) for name in kept)
    assert store.describe("m:scaled").metrics["sqnr"] > 30  # by what was to be stored, not by the original's weights
    (found,) = store.eval(["m:scaled"], text=TEXT, context=32)
    assert found.measured.kl < 4e-3


def test_rounding_loses_less(store: ms.Store) -> None:
    store.compress("m", SCALED, calibration=DATA)
    store.compress("m", {**SCALED, "name": "plain", "rules": [{**SCALED["rules"][0], "method": None}]})
    found = store.eval(["m:scaled", "m:plain"], text=TEXT, context=32)
    assert found[0].measured.kl < 0.9 * found[1].measured.kl


def test_its_codes_go_under_no_ladder_of_the_original(store: ms.Store) -> None:
    """They are those of other weights."""
    store.compress("m", "awq4", calibration=DATA)
    with pytest.raises(ValueError, match="made of another model"):
        store.compress("m", "ladder", codes="m:awq4")


def test_without_scales_it_is_plain_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40).bfloat16()
    inputs = torch.rand(40)
    first = next(awq.scales(inputs, awq.magnitude(weight.float(), 16)))
    assert torch.equal(first, torch.ones(40))
    codec, raw = Int(bits=4, group_size=16), weight.view(torch.uint8).numpy().reshape(-1)
    _, scale = codec.encode(raw, (24, 40), DTYPES["bfloat16"])
    stored = torch.frombuffer(bytearray(scale), dtype=torch.bfloat16).reshape(24, 3).float()
    assert torch.equal(awq.plain(weight.float(), 4, 16, torch.bfloat16).abs(), stored)


def test_columns_of_nothing_keep_their_scale() -> None:
    inputs = torch.rand(12)
    inputs[3] = 0
    for one in awq.scales(inputs, torch.rand(12)):
        assert one[3] == 1
        assert torch.isfinite(one).all()
    assert all(torch.equal(one, torch.ones(4)) for one in awq.scales(torch.zeros(4), torch.rand(4)))


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_a_gain_that_cannot_hold_its_quotient_is_made_up_for(plus: float) -> None:
    """What is multiplied takes on what the stored gain was divided by; a gain of 0 is left as it is."""
    torch.manual_seed(1)
    value = (torch.rand(64) + 0.5 - plus).bfloat16().float()
    value[5] = -plus
    by = torch.exp2(torch.randn(64))
    fresh, true = Before("norm.weight", plus).divided(value, by, torch.bfloat16)
    assert torch.equal(fresh, fresh.bfloat16().float())
    assert torch.allclose((fresh + plus) * true, value + plus, rtol=1e-6, atol=0)
    assert (float(fresh[5]), float(true[5])) == (-plus, 1)
    assert not torch.equal(true, by)


def test_a_clip_loses_no_more_of_what_a_group_gives() -> None:
    torch.manual_seed(2)
    weight, came = torch.randn(20, 40), torch.randn(300, 40) * torch.rand(40)
    inputs = awq.Squares((came.T @ came).double())
    wide, narrow = awq.plain(weight, 3, 16, torch.float32), awq.clipped(weight, inputs, 3, 16, torch.float32)

    def lost(scales: torch.Tensor, at: int) -> torch.Tensor:
        part = slice(at * 16, (at + 1) * 16)
        made = awq.codes(weight, scales, 3, 16) * scales.repeat_interleave(16, 1)[:, :40]
        return ((made - weight)[:, part] @ came[:, part].T).square().sum(1)

    for at in range(3):
        assert (lost(narrow, at) <= lost(wide, at) * (1 + 1e-5)).all()
    assert sum(float(lost(narrow, at).sum()) for at in range(3)) < 0.9 * sum(
        float(lost(wide, at).sum()) for at in range(3)
    )


def test_too_few_samples_to_look_at_are_refused(store: ms.Store) -> None:
    rule = {**SCALED["rules"][0], "method": {"name": "awq", "params": {"samples": 0}}}
    with pytest.raises(ValueError, match="samples=0, which is not a whole number from 1"):
        store.compress("m", {**SCALED, "rules": [rule]}, calibration=DATA)
