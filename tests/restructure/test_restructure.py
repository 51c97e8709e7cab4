"""Models that are cut: what transformers makes of them is the original without what was left out, exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.errors import ConflictError, UnsupportedError
from tests.helpers.language import TEXT
from tests.restructure.models import KINDS

transformers = pytest.importorskip("transformers")

Saved = Callable[[str], ms.Store]
DATA = ms.Calibration(TEXT, samples=8, length=32)
TOKENS = (torch.arange(32) * 7 % 13)[None]
HEADS = ["llama", "qwen2", "gemma2", "phi3"]


def loaded(store: ms.Store, ref: str, out: Path) -> Any:
    """The model, as transformers loads its export; nothing is missing and nothing is left over."""
    store.export(ref, out)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def stack(model: Any) -> Any:
    """The list of a model's blocks."""
    lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def without(model: Any, left_out: Sequence[int]) -> torch.Tensor:
    """Logits of a model whose left out layers give what comes to them."""

    def pass_on(_: Any, given: Any, named: Any, output: Any) -> Any:
        hidden = given[0] if given else named["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [stack(model)[at].register_forward_hook(pass_on, with_kwargs=True) for at in left_out]
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def chosen(digits: str, there: int) -> list[int]:
    """The numbers whose bits are set."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[:there]
    return np.flatnonzero(bits).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_named(saved: Saved, kind: str, tmp_path: Path) -> None:
    """Of Gemma and the like each layer keeps its kind of attention; of Qwen 3 layer 1 has no experts, and is layer 0 then."""
    store = saved(kind)
    original = loaded(store, "m", tmp_path / "original")
    done = store.restructure("m", "small", layers=[1, 3])
    small = loaded(store, "small", tmp_path / "small")
    assert torch.equal(logits(small), without(original, [0, 2]))
    assert len(stack(small)) == 2
    assert done.kept == (1, 3)
    assert done.bytes[1] == sum(one.nbytes for one in store.load("small").values())
    assert done.saved.stored == 0 or done.saved.stored < 0.02 * done.bytes[0]
    # With the cache, whose layers are numbered anew.
    ids = TOKENS[:, :12]
    told = small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    plain = small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(told, plain)


def test_layers_that_are_missed_least(saved: Saved, tmp_path: Path) -> None:
    """Greedily: of each round the layer without which the predictions stay nearest."""
    store = saved("llama")
    original = loaded(store, "m", tmp_path / "original")
    ids = ms_samples(store, "m")

    def loss(left_out: Sequence[int]) -> float:
        with torch.no_grad():
            known = original(ids).logits.double().log_softmax(-1)
        found = without_on(original, left_out, ids).double().log_softmax(-1)
        return float((known.exp() * (known - found)).sum(-1).mean())

    gone: list[int] = []
    wanted = []
    for _ in range(2):
        losses = {at: loss([*gone, at]) for at in range(4) if at not in gone}
        at = min(losses, key=lambda one: losses[one])
        gone.append(at)
        wanted.append((at, losses[at]))
    done = store.restructure("m", "small", layers=0.5, calibration=DATA)
    assert [one.layer for one in done.left_out] == [at for at, _ in wanted]
    assert [one.loss for one in done.left_out] == pytest.approx([value for _, value in wanted], rel=1e-3)
    assert done.kept == tuple(at for at in range(4) if at not in gone)
    said = store.describe("small").metrics["restructured"]
    assert said["of"] == "m@1"
    assert said["layers"] == list(done.kept)
    assert said["by"] == "kl"
    assert (said["calibration"]["samples"], said["calibration"]["length"]) == (8, 32)


def ms_samples(store: ms.Store, name: str) -> torch.Tensor:
    from modelstore.client.compression.compressing import looked_at

    return looked_at(store[name].opened(), DATA)[1].ids


def without_on(model: Any, left_out: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    hooks = [stack(model)[at].register_forward_hook(lambda _, given, __: given[0]) for at in left_out]
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


def test_layers_by_influence(saved: Saved) -> None:
    store = saved("llama")
    done = store.restructure("m", "small", layers=3, by="influence", calibration=DATA)
    assert len(done.kept) == 3
    assert 0 <= done.left_out[0].loss <= 2


@pytest.mark.parametrize("kind", [*HEADS, "gpt2", "gpt_neox", "opt", "cohere2"])
def test_neurons_are_the_originals(saved: Saved, kind: str, tmp_path: Path) -> None:
    """What is left gives what the original gives whose other neurons say nothing."""
    store = saved(kind)
    done = store.restructure("m", "small", mlp=40, correct=False, calibration=DATA)
    inner = done.neurons[0] if done.neurons else 0
    assert done.neurons == (inner, 40)
    original, small = loaded(store, "m", tmp_path / "original"), loaded(store, "small", tmp_path / "small")
    kept = store.describe("small").metrics["restructured"]["neurons"]
    silence(original, {int(at): chosen(digits, inner) for at, digits in kept.items()}, inner)
    assert torch.allclose(logits(small), logits(original), atol=2e-4, rtol=1e-4)
    assert all(len(chosen(digits, inner)) == 40 for digits in kept.values())


def silence(model: Any, kept: dict[int, list[int]], inner: int) -> None:
    """Zero what reads the other neurons, in the one matrix of each block that reads all of them."""
    for at, block in enumerate(stack(model)):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            across = type(module).__name__ == "Conv1D"
            if weight is None or weight.dim() != 2 or weight.shape[0 if across else 1] != inner:
                continue
            gone = [one for one in range(inner) if one not in kept[at]]
            with torch.no_grad():
                if across:
                    weight[gone] = 0
                else:
                    weight[:, gone] = 0


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_the_originals(saved: Saved, kind: str, tmp_path: Path) -> None:
    """Whole groups of query heads stay with the key and value that they use, and the size of a head is written out."""
    store = saved(kind)
    done = store.restructure("m", "small", heads=1, correct=False, calibration=DATA)
    assert done.heads == (4, 2)
    assert done.key_heads == (2, 1)
    original, small = loaded(store, "m", tmp_path / "original"), loaded(store, "small", tmp_path / "small")
    assert small.config.head_dim == 16
    kept = store.describe("small").metrics["restructured"]["key_heads"]
    for at, block in enumerate(stack(original)):
        (group,) = chosen(kept[str(at)], 2)
        with torch.no_grad():
            block.self_attn.o_proj.weight[:, [one for one in range(64) if one // 32 != group]] = 0
    assert torch.allclose(logits(small), logits(original), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["mlp", "heads"])
def test_what_stays_makes_up_for_what_went(saved: Saved, what: str) -> None:
    """Solved again, the weights lose less."""
    store = saved("llama")
    amount: dict[str, Any] = {what: 0.5}
    for name, correct in (("plain", False), ("solved", True)):
        store.restructure("m", name, correct=correct, calibration=DATA, **amount)
    tokens = ms_samples(store, "m")
    known = predicted(store, "m", tokens)
    losses = {
        name: float((known.exp() * (known - predicted(store, name, tokens))).sum(-1).mean())
        for name in ("plain", "solved")
    }
    assert losses["solved"] < 0.9 * losses["plain"]


def predicted(store: ms.Store, name: str, tokens: torch.Tensor) -> torch.Tensor:
    model = store[name]
    config = transformers.AutoConfig.for_model(**json.loads(model.file("config.json")))
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(model.load(), strict=False)
    made.tie_weights()
    with torch.no_grad():
        found: torch.Tensor = made(tokens).logits.double().log_softmax(-1)
    return found


def test_all_at_once_is_the_same_twice_and_evaluated(saved: Saved, tmp_path: Path) -> None:
    store = saved("llama")
    done = store.restructure("m", "small", layers=3, mlp=0.5, heads=0.5, calibration=DATA, tag="first")
    again = store.restructure("m", "small", layers=3, mlp=0.5, heads=0.5, calibration=DATA)
    assert (done.layers, done.neurons, done.heads) == ((4, 3), (96, 64), (4, 2))
    assert again.saved.version == 2
    assert again.saved.stored == 0
    model = loaded(store, "small@first", tmp_path / "small")
    assert sum(one.numel() for one in model.parameters()) * 4 == done.bytes[1]
    found = store.eval("small", text=TEXT, context=32)
    assert found.measured.perplexity > 0
    assert store.log("small")[0].source == "m@1"
    plan = store.plan_restructure("m", layers=3, mlp=0.5, heads=0.5)
    assert plan.bytes == done.bytes
    assert (plan.passes, plan.by) == (2, "kl")


@pytest.mark.parametrize(
    ("kind", "wanted", "error", "said"),
    [
        ("llama", {}, ValueError, "nothing is left out"),
        ("llama", {"layers": 0.5}, ValueError, "give calibration="),
        ("llama", {"layers": [0, 7]}, ValueError, "names 7"),
        ("llama", {"layers": [0, 0]}, ValueError, "each number once"),
        ("llama", {"layers": 9, "calibration": DATA}, ValueError, "more than the model's 4"),
        ("llama", {"layers": True}, TypeError, "a share such as 0.75"),
        ("llama", {"layers": 1.5, "calibration": DATA}, ValueError, "at most 1.0"),
        ("llama", {"mlp": 0, "calibration": DATA}, ValueError, "keeps nothing"),
        ("llama", {"layers": [0], "calibration": DATA}, ValueError, "has no effect"),
        ("llama", {"layers": [0], "by": "kl"}, ValueError, "how layers are compared"),
        ("mixtral", {"mlp": 0.5, "calibration": DATA}, UnsupportedError, "experts"),
        ("gpt2", {"heads": 2, "calibration": DATA}, UnsupportedError, "config.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    saved: Saved, kind: str, wanted: dict[str, Any], error: type[Exception], said: str
) -> None:
    store = saved(kind)
    with pytest.raises(error, match=said):
        store.restructure("m", "small", **wanted)
    assert [one.name for one in store.models()] == ["m"]


def test_a_model_is_not_cut_into_itself(saved: Saved) -> None:
    store = saved("llama")
    with pytest.raises(ConflictError, match="a name of its own"):
        store.restructure("m", "m", layers=[0])
    store.compress("m", "int8")
    with pytest.raises(ValueError, match="cut out of originals"):
        store.restructure("m:int8", "small", layers=[0])


def test_sums_that_do_not_fit_into_the_memory_are_refused_before_measuring(saved: Saved) -> None:
    """96 columns take 16 bytes for each pair; layers alone take none."""
    from modelstore.plan.work import Limits
    from modelstore.restructure.run import Cutback, Cutting

    model, wanted = saved("llama")["m"].opened(), Cutback(mlp=0.5)
    Cutting(model, "LlamaForCausalLM", wanted, Limits(2 * 16 * 96**2)).check()
    with pytest.raises(UnsupportedError, match="give more memory"):
        Cutting(model, "LlamaForCausalLM", wanted, Limits(2 * 16 * 96**2 - 2)).check()
