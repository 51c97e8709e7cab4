"""Calibrated variants: solved on what comes to each layer, recorded, gone on with, and refused where they would be wrong."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import modelstore as ms
from modelstore.errors import ConflictError, FormatError
from modelstore.format.recipe import Method
from modelstore.storage.memory import MemoryStorage
from tests.calibrate.killed import DATA, RECIPE
from tests.helpers.language import TEXT
from tests.helpers.stores import open_on

transformers = pytest.importorskip("transformers")


def pruning(params: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """A recipe that prunes linear layers."""
    return {
        "name": "pruned",
        "rules": [{"targets": ["linear"], "codec": {"name": "sparse", "params": params}, "method": method}],
    }


def codes(params: dict[str, Any]) -> dict[str, Any]:
    """A recipe that prunes and rounds linear layers at once."""
    rule = RECIPE["rules"][0]
    return {"name": "both", "rules": [{**rule, "method": {"name": "sparsegpt", "params": params}}]}


def content(store: ms.Store, ref: str) -> str:
    found: str = store[ref].opened().manifest.content
    return found


def test_each_layer_loses_less_of_what_comes_to_it(store: ms.Store) -> None:
    """The second block's inputs are those that the first one gives as it is stored."""
    done = store.compress("m", RECIPE, calibration=DATA)
    assert done.compressed == 14
    assert "data_free" not in done.metrics["solved"]
    plain = {**RECIPE, "name": "plain", "rules": [{**RECIPE["rules"][0], "method": None}]}
    store.compress("m", plain)
    found = store.eval(["m:solved", "m:plain"], text=TEXT, context=32)
    assert found[0].measured.kl < 0.7 * found[1].measured.kl
    recorded = store.describe("m:solved").recipe
    assert recorded["rules"][0]["method"] == {"name": "gptq"}
    said = recorded["calibration"]
    assert (said["samples"], said["length"], said["seed"], said["torch"]) == (
        10,
        32,
        0,
        torch.__version__.split("+")[0],
    ) or (said["torch"] == torch.__version__)
    assert len(said["digest"]) == 64


@pytest.mark.parametrize(
    ("plain", "solved"), [("sparse50", "wanda50"), ("sparse24", "wanda24"), ("sparse24", "sparsegpt24")]
)
def test_pruning_that_looks_at_data_loses_less(store: ms.Store, plain: str, solved: str) -> None:
    store.compress("m", plain)
    store.compress("m", solved, calibration=DATA)
    again = ms.presets()[solved]
    again = msgspec.structs.replace(
        again,
        name="again",
        rules=(
            msgspec.structs.replace(again.rules[0], method=Method(again.rules[0].method.name, {"reconstruct": True})),
        ),
    )
    store.compress("m", again, calibration=DATA)
    found = store.eval([f"m:{plain}", f"m:{solved}", "m:again"], text=TEXT, context=32)
    losses = [one.measured.kl for one in found]
    assert losses[0] > losses[1] > losses[2]
    for variant in (solved, "again"):
        for name, tensor in store.load(f"m:{variant}").items():
            if "proj" in name and "24" in solved:
                assert ((tensor.reshape(len(tensor), -1, 4) != 0).sum(2) <= 2).all()
            if "proj" in name:
                assert 0.49 < float((tensor == 0).float().mean()) < 0.51
    assert store.describe("m:again").recipe["rules"][0]["method"]["params"] == {"reconstruct": True}


def test_codes_are_pruned_in_the_same_pass(store: ms.Store) -> None:
    store.compress("m", codes({"n": 2, "m": 4}), calibration=DATA)
    for name, tensor in store.load("m:both").items():
        if "proj" in name:
            assert ((tensor.reshape(len(tensor), -1, 4) != 0).sum(2) <= 2).all()
            groups = tensor.float().reshape(len(tensor), -1, 16)
            assert all(len(group.unique()) <= 8 for row in groups for group in row)


def test_the_same_again_does_nothing_and_other_data_are_a_conflict(store: ms.Store) -> None:
    store.compress("m", RECIPE, calibration=DATA)
    before = content(store, "m:solved")
    assert store.compress("m", RECIPE, calibration=DATA).stored == 0
    assert content(store, "m:solved") == before
    with pytest.raises(ConflictError):
        store.compress("m", RECIPE, calibration=ms.Calibration(TEXT, samples=10, length=32, seed=1))


def saved(folder: Path, out: Path, model: Any) -> ms.Store:
    """A store with a model of another kind, and the tokenizer of the folder."""
    torch.manual_seed(0)
    made = getattr(transformers, model[0])(getattr(transformers, model[1])(**SMALL, **model[2]))
    made.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", out)
    return store


def vocabulary(folder: Path) -> int:
    found: int = transformers.AutoConfig.from_pretrained(folder).vocab_size
    return found


SMALL: dict[str, Any] = {"initializer_range": 0.3}
EXPERTS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTRAL = ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 3})
QWEN = (
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
)


@pytest.mark.parametrize("model", [MIXTRAL, QWEN], ids=["mixtral", "qwen3-moe"])
def test_experts_are_solved_on_what_the_router_sends_them(folder: Path, tmp_path: Path, model: Any) -> None:
    store = saved(folder, tmp_path, (*model[:2], model[2] | {"vocab_size": vocabulary(folder)}))
    made = store.compress("m", RECIPE, calibration=DATA)
    assert not any("not a linear layer" in why for why in made.metrics["solved"].get("data_free", {}).values())
    plain = {**RECIPE, "name": "plain", "rules": [{**RECIPE["rules"][0], "targets": ["*.experts.*"], "method": None}]}
    solved = {**plain, "name": "experts", "rules": [{**RECIPE["rules"][0], "targets": ["*.experts.*"]}]}
    store.compress("m", plain)
    store.compress("m", solved, calibration=DATA)
    found = store.eval(["m:experts", "m:plain"], text=TEXT, context=32)
    assert found[0].measured.kl < 0.9 * found[1].measured.kl


def test_experts_that_take_turns_get_the_same_codes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(folder, tmp_path, (*MIXTRAL[:2], MIXTRAL[2] | {"vocab_size": vocabulary(folder)}))
    store.compress("m", RECIPE, calibration=DATA)
    monkeypatch.setattr("modelstore.calibrate.block._SUM", 1 << 30)  # of each expert alone
    store.compress("m", RECIPE, variant="turns", calibration=DATA)
    one, two = store.load("m:solved"), store.load("m:turns")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_expert_that_too_few_tokens_reach_is_rounded_without_data_and_named(folder: Path, tmp_path: Path) -> None:
    store = saved(folder, tmp_path, (*QWEN[:2], QWEN[2] | {"vocab_size": vocabulary(folder), "num_experts": 32}))
    notes = store.compress("m", RECIPE, calibration=ms.Calibration(TEXT, samples=4, length=32)).metrics["solved"][
        "data_free"
    ]
    assert notes
    assert all("expert" in name and "tokens came to its" in why for name, why in notes.items())
    few = store.compress("m", RECIPE, variant="few", calibration=ms.Calibration(TEXT, samples=1, length=32))
    assert (
        "32 tokens came to its 32 columns" in few.metrics["few"]["data_free"]["model.layers.1.self_attn.q_proj.weight"]
    )


def test_weights_with_inputs_as_rows_are_solved(folder: Path, tmp_path: Path) -> None:
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": vocabulary(folder)}
    store = saved(folder, tmp_path, ("GPT2LMHeadModel", "GPT2Config", config))
    made = store.compress("m", RECIPE, calibration=DATA)
    assert "data_free" not in made.metrics["solved"]
    assert made.compressed == 8
    plain = {**RECIPE, "name": "plain", "rules": [{**RECIPE["rules"][0], "method": None}]}
    store.compress("m", plain)
    tuned = {**RECIPE, "name": "tuned", "rules": [{**RECIPE["rules"][0], "method": {"name": "tuned"}}]}
    store.compress("m", tuned, calibration=DATA)
    found = store.eval(["m:solved", "m:tuned", "m:plain"], text=TEXT, context=32)
    assert found[0].measured.kl < 0.8 * found[2].measured.kl
    assert found[1].measured.kl < 0.8 * found[2].measured.kl
    wanda = pruning({"sparsity": 0.5, "scope": "row"}, {"name": "wanda"})
    notes = store.compress("m", wanda, calibration=DATA).metrics["pruned"]["data_free"]
    assert len(notes) == 8
    assert all("inputs as rows, which wanda is not for" in why for why in notes.values())


def test_activations_that_are_no_numbers_are_refused(store: ms.Store) -> None:
    tensors = store.load("m")
    tensors["model.layers.0.input_layernorm.weight"][3] = torch.nan
    files = {name: store["m"].file(name) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    store.save("bad", tensors, files=files)
    with pytest.raises(FormatError, match=r"comes to 'model\.layers\.0\.self_attn\.q_proj' is not finite"):
        store.compress("bad", RECIPE, calibration=DATA)
    assert [info.variant for info in store.variants("bad")] == ["original"]


@pytest.mark.parametrize(
    ("recipe", "calibration", "says"),
    [
        ("gptq4", None, "looks at data: give a text"),
        ("int4", DATA, "looks at no data"),
        (RECIPE, ms.Calibration(TEXT, length=65), "more than the model's 64 positions"),
        (RECIPE, ms.Calibration("the sea was calm", length=32), "give a longer text"),
        (RECIPE, "nowhere.txt", "no file"),
        ({**RECIPE, "rules": [{**RECIPE["rules"][0], "codec": {"name": "nf4"}}]}, DATA, "method gptq is for codec int"),
        ({**RECIPE, "rules": [{**RECIPE["rules"][0], "method": {"name": "hqq"}}]}, DATA, "not one of gptq"),
        (
            pruning({"sparsity": 0.5}, {"name": "wanda", "params": {"shape": 1}}),
            DATA,
            "no parameter 'shape'; it takes reconstr",
        ),
        (
            pruning({"sparsity": 0.5}, {"name": "wanda", "params": {"reconstruct": 1}}),
            DATA,
            "reconstruct: 1 is no bool",
        ),
        (pruning({"threshold": 0.5}, {"name": "sparsegpt"}), DATA, "give codec sparse a sparsity, or n and m"),
        (pruning({"sparsity": 0.0}, {"name": "wanda"}), DATA, "give codec sparse a sparsity, or n and m"),
        (pruning({"n": 0, "m": 0}, {"name": "sparsegpt"}), DATA, "give codec sparse a sparsity, or n and m"),
        (pruning({"sparsity": 0.0, "threshold": 0.1}, {"name": "wanda"}), DATA, "leave threshold out"),
        (pruning({"n": 2, "m": 4, "threshold": 0.1}, {"name": "sparsegpt"}), DATA, "leave threshold out"),
        (pruning({"sparsity": 0.5}, {"name": "wanda"}), DATA, '"scope": "row"'),
        (pruning({"sparsity": 0.5, "scope": "tensor"}, {"name": "wanda"}), DATA, '"scope": "row"'),
        (
            pruning({"n": 2, "m": 4}, {"name": "sparsegpt", "params": {"n": 1}}),
            DATA,
            "takes its pattern from codec sparse: give n",
        ),
        (codes({}), DATA, "give it a sparsity between 0 and 1, or n and m"),
        (codes({"sparsity": 0.5, "n": 2, "m": 4}), DATA, "give it a sparsity between 0 and 1, or n and m"),
        (codes({"n": 4, "m": 4}), DATA, "n of every m are kept"),
        (codes({"n": 2, "m": 4, "reconstruct": True}), DATA, "leave reconstruct out"),
        (pruning({"n": 5, "m": 4}, {"name": "sparsegpt"}), DATA, "n of every m are kept"),
        ({**pruning({}, {"name": "wanda"}), "prune": 0.5}, DATA, "give codec sparse a sparsity, or n and m"),
        (
            {**RECIPE, "rules": [{**RECIPE["rules"][0], "method": {"name": "wanda"}}]},
            DATA,
            "method wanda is for codec sparse",
        ),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(store: ms.Store, recipe: Any, calibration: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store.compress("m", recipe, calibration=calibration)


@pytest.mark.parametrize("how", [{"samples": 0}, {"length": 1}, {"seed": -1}, {"samples": True}])
def test_a_calibration_that_cannot_be_meant_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        ms.Calibration(TEXT, **how)


def test_no_calibrated_variant_is_made_while_it_is_read(store: ms.Store) -> None:
    assert "gptq4" in ms.presets()
    with pytest.raises(ms.errors.NotFoundError):
        store.load("m:gptq4")
