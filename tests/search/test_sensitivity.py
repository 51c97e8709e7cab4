"""What is lost by storing a tensor: the whole model's Fisher information, found block by block, and the KL it stands for."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.calibrate.layers import as_stored
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.errors import FormatError
from modelstore.format.objects.manifest import CodecSpec
from modelstore.plan.work import Limits
from modelstore.search.sensitivity import Measuring
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")

FORMATS = [weight_codec(CodecSpec("int", {"bits": bits, "group_size": 16, "method": "mse"})) for bits in (2, 4, 8)]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 3},
}


def stored(kind: str, folder: Path) -> tuple[ms.Store, Any]:
    """A small model in a store, and as transformers has it, in float32."""
    own = {"vocab_size": 97} if kind == "gpt2" else SMALL
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(own | MODELS[kind]))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", folder)
    return store, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measuring(store: ms.Store, ids: torch.Tensor, wanted: list[str], formats: list[WeightCodec]) -> Measuring:
    opened = store["m"].opened()
    kind = opened.config()["architectures"][0]  # type: ignore[index]
    stages = Stages(opened, kind, Limits(1 << 28, 1))
    return Measuring(stages, opened.manifest, ids, formats, wanted, 0, 1 << 16)


def squares(whole: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each parameter, the sum over sequences of the squared gradient, of tokens that the model draws."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for one in ids.split(1):
        whole.zero_grad()
        logits = whole(one, use_cache=False).logits
        tokens = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits[0], tokens, reduction="sum").backward()
        for name, parameter in whole.named_parameters():
            found[name] = found.get(name, 0) + parameter.grad.square()
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_fisher_information_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Also where transformers transposes what is stored, or stacks it: experts are told apart."""
    store, whole = stored(kind, tmp_path)
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    tensors = store.load("m")
    kinds = {choice.name: choice.kind for choice in store.plan_compression("m", "int4").choices}
    wanted = [name for name, kind in kinds.items() if kind == "linear"]
    measured = measuring(store, ids, wanted, FORMATS)
    costs = measured.run()
    information = squares(whole, ids)
    about = store["m"].opened().manifest.by_name
    assert sorted(costs) == sorted(wanted)
    for name in wanted:
        expected = []
        if name in information:
            square, true = information[name], tensors[name]
        else:  # an expert of a stack
            parts = name.split(".")
            number = int(parts[parts.index("experts") + 1])
            prefix = name.split(".block_sparse_moe")[0] + ".mlp.experts."
            inner = SMALL["intermediate_size"]
            if parts[-2] == "w2":
                square = information[prefix + "down_proj"][number]
            else:
                both = information[prefix + "gate_up_proj"][number]
                square = both[:inner] if parts[-2] == "w1" else both[inner:]
            true = tensors[name]
        for codec in FORMATS:
            moved = as_stored(codec, true, about[name]).float() - true.float()
            expected.append(float((square * moved**2).sum()) / (2 * ids.numel()))
        assert costs[name] == pytest.approx(expected, rel=1e-3), name
        assert costs[name][0] > costs[name][1] > costs[name][2]


def test_it_is_what_the_predictions_diverge_by(tmp_path: Path) -> None:
    """To second order: 8 bits move so little that it holds. Half the step is a quarter of the loss."""
    store, whole = stored("llama", tmp_path)
    ids = torch.randint(0, 97, (150, 24), generator=torch.Generator().manual_seed(1))
    name = "model.layers.1.mlp.down_proj.weight"
    eight = Int(8, group_size=16)
    (cost,) = measuring(store, ids, [name], [eight]).run()[name]
    assert cost is not None
    tensors, about = store.load("m"), store["m"].opened().manifest.by_name[name]
    true = tensors[name].float()
    moved = as_stored(eight, tensors[name], about).float() - true
    weight = whole.get_parameter(name)
    found = []
    with torch.no_grad():
        before = whole(ids).logits.double().log_softmax(-1)
        for share in (1.0, 0.5):
            weight.copy_(true + share * moved)
            after = whole(ids).logits.double().log_softmax(-1)
            found.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert found[0] == pytest.approx(4 * found[1], rel=0.05)
    assert cost == pytest.approx(found[0], rel=0.25)


def test_a_head_that_is_the_embedding_counts_as_both(tmp_path: Path) -> None:
    store, _ = stored("llama", tmp_path)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    name = "model.embed_tokens.weight"
    costs = measuring(store, ids, [name], FORMATS).run()[name]
    assert all(cost is not None and cost > 0 for cost in costs)


def test_what_a_format_refuses_has_no_cost(tmp_path: Path) -> None:
    store, _ = stored("llama", tmp_path)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.mlp.down_proj.weight"

    class Never(Int):
        def refuses(self, shape: Any, dtype: Any) -> str | None:
            return "is not liked"

    costs = measuring(store, ids, [name], [Int(4, group_size=16), Never(8, group_size=16)]).run()[name]
    assert costs[0] is not None
    assert costs[1] is None


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    store, _ = stored("llama", tmp_path)
    tensors = store.load("m")
    tensors["model.layers.0.post_attention_layernorm.weight"][3] = torch.nan
    store.save("m", tensors, files={"config.json": store["m"].file("config.json")})
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with pytest.raises(FormatError, match=r"block model\.layers\.0 .* is not finite"):
        measuring(store, ids, ["model.layers.0.mlp.down_proj.weight"], FORMATS).run()
