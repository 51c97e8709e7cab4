"""Models run block by block: each block gives exactly what it gives in the whole model, and no parameter is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelstore.architecture.classes.model_class import Built, build
from modelstore.architecture.classes.names import parameters, values
from modelstore.architecture.classes.skeleton import Skeleton
from modelstore.errors import FormatError, UnsupportedError
from modelstore.execute.read.unsaved import made_again

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 97},
    "bert": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "phi3": {},
    "gpt_neox": {},
}


def saved(kind: str, folder: Path, **more: Any) -> tuple[Any, dict[str, torch.Tensor], Built]:
    """A small model as `from_pretrained` gives it, its checkpoint's tensors, and the same without weights."""
    own = dict(MODELS.get(kind, {}) | more)
    small = {"vocab_size": 97} if kind == "gpt2" else SMALL
    if kind == "bert":
        small = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
    config = transformers.AutoConfig.for_model(kind, **(small | own))
    maker = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    maker.from_config(config).save_pretrained(folder)
    whole = maker.from_pretrained(folder, dtype=torch.float32).eval()
    content = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    built = build(content, len(tensors))
    built.model.eval()
    return whole, tensors, built


def buffers(built: Built) -> dict[str, torch.Tensor]:
    """What no checkpoint has."""
    return {one.name: value for one, value in made_again(built.model, strict=True).items()}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_and_parameters_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Each block gives, bit for bit, what it gives there; every parameter is made once, and is what transformers loads."""
    whole, tensors, built = saved(kind, tmp_path)
    skeleton = Skeleton(built.model)
    known = parameters(built, tensors)
    made: dict[str, torch.Tensor] = {}
    for one in known.of(known.made):
        fresh = values(built, one, lambda name: tensors[name], torch.float32)
        assert not fresh.keys() & made.keys()
        made |= fresh
    made |= {name: made[of] for name, of in known.tied.items()}
    state = whole.state_dict()
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], state[name]) for name in state)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    expected: list[torch.Tensor] = []
    for block in whole.get_submodule(skeleton.stack):
        block.register_forward_hook(
            lambda _m, _a, out: expected.append(out[0] if isinstance(out, tuple) else out) or None
        )
    with torch.no_grad():
        expected.append(whole(ids, use_cache=False).logits)
    assert skeleton.count == 3
    extra, before = buffers(built), None
    for stage, wanted in enumerate(expected):
        placed = dict(extra)
        needed = skeleton.needs(stage)
        for one in known.of(needed):
            placed |= values(built, one, lambda name: tensors[name], torch.float32)
        placed |= {name: placed[of] for name, of in known.tied.items() if name in needed}
        if stage == 0:  # and with the rows of these tokens alone
            skeleton.rows = torch.unique(ids)
            few = placed | {skeleton.table: placed[skeleton.table][skeleton.rows]}
            with skeleton.at(0, few) as run:
                assert torch.equal(run(ids, None), wanted)
            skeleton.rows = None
        with skeleton.at(stage, placed) as run:
            before = run(ids, before)
        assert torch.equal(before, wanted), (stage, float((before - wanted).abs().max()))
    assert all(one.is_meta for one in built.model.parameters())


def test_what_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    _, tensors, built = saved("llama", tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FormatError, match=r"no tensors for model\.layers\.1\.mlp\.up_proj\.weight"):
        parameters(built, tensors)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    _, tensors, built = saved("llama", tmp_path)
    known = parameters(built, tensors)
    with pytest.raises(FormatError, match="make"):
        values(built, known.made["model.norm.weight"], lambda _: torch.zeros(3))


def test_blocks_that_hand_over_more_than_one_tensor_are_refused() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=97)
    skeleton = Skeleton(transformers.BloomForCausalLM(config).eval())
    with skeleton.at(0, {}) as run, pytest.raises(UnsupportedError, match="more than one tensor"):
        run(torch.ones(1, 4, dtype=torch.long), None)


def test_models_whose_blocks_share_state_are_refused(tmp_path: Path) -> None:
    _, _, built = saved("llama", tmp_path)
    built.model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedError, match="share keys and values"):
        Skeleton(built.model)
    built.model.config.num_kv_shared_layers = 0
    layers = built.model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(UnsupportedError, match="share parameters"):
        Skeleton(built.model)
