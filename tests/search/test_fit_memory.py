"""Mixes that fit an engine's memory or a device: what is counted, which formats are used, and what is refused."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import modelstore as ms
from modelstore.architecture.sizes import Sizes
from modelstore.errors import ConflictError, UnsupportedError
from modelstore.format.answers.fitted import Memory
from modelstore.format.objects.manifest import CodecSpec
from modelstore.search.engines import refuses
from modelstore.search.footprint import footprint
from modelstore.search.mix import default_formats
from modelstore.search.sensitivity import Measuring
from modelstore.storage.memory import MemoryStorage
from tests.helpers.language import TEXT, make_language_model
from tests.helpers.stores import open_on

pytest.importorskip("transformers")

DATA = ms.Calibration(TEXT, samples=6, length=32)
OTHER = TEXT[5:]
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    """A model of which it is known what the default formats cost."""
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", make_language_model(tmp_path_factory.mktemp("tiny")))
    store.plan_fit("m", "21KiB", calibration=DATA, measure=True)
    return store


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        ({}, 4 * 2 * 4 * 8 * 30),
        ({"num_key_value_heads": 2, "head_dim": 16}, 4 * 2 * 2 * 16 * 30),
        ({"sliding_window": 8}, 4 * 2 * 4 * 8 * 8),
        ({"sliding_window": None}, 4 * 2 * 4 * 8 * 30),
        ({"attention_chunk_size": 16}, 4 * 2 * 4 * 8 * 16),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            2 * 4 * 8 * (3 * 8 + 30),
        ),
        ({"kv_lora_rank": 12, "qk_rope_head_dim": 4, "num_key_value_heads": 4}, 4 * 16 * 30),
        ({"num_kv_shared_layers": 3}, 2 * 4 * 8 * 30),
    ],
)
def test_the_cache_is_that_of_the_layers(more: dict[str, Any], numbers: int) -> None:
    found = footprint(Sizes(SimpleNamespace(**CONFIG | more)), 30, 3, 2)
    assert found.cache == 3 * 2 * numbers
    assert found.logits == 3 * 100 * 4
    dim = more.get("head_dim", 8)
    assert found.activations == 3 * 30 * 2 * (32 + max(2 * 48, 3 * 4 * dim))


def test_what_is_not_known_is_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match="layers of 'mamba' keep"):
        footprint(Sizes(SimpleNamespace(**CONFIG, layer_types=["full_attention", "mamba"] * 2)), 30, 1, 2)
    with pytest.raises(ValueError, match="more than the model's 16 positions"):
        footprint(Sizes(SimpleNamespace(**CONFIG, max_position_embeddings=16)), 17, 1, 2)


def test_what_is_made_fits_the_memory_of_an_engine(measured: ms.Store) -> None:
    """Weights as an engine takes them, with what it needs beside them."""
    use: dict[str, Any] = {"context": 64, "batch": 2}
    plan = measured.plan_fit("m", "1GiB", **use)
    words = measured["m"].tensor("model.embed_tokens.weight").shape[0]
    assert plan.memory == Memory(64, 2, 2 * 2 * 2 * 2 * 2 * 8 * 64, 2 * 64 * 2 * (32 + 2 * 48), 2 * words * 4)
    raw = measured["m"].opened().manifest.nbytes
    assert plan.original == raw + plan.memory.total
    budget = (plan.smallest + plan.original) // 2
    done = measured.compress("m", fit=budget, **use)
    assert done.variants[0].variant == f"fit-{budget}-2x64"
    held = measured.load(f"m:{done.variants[0].variant}", dequantize=False)
    weights = sum(one.nbytes for name, one in held.items() if not name.endswith("weight_shape"))
    known = measured.plan_fit("m", budget, **use)
    assert known.bytes is not None
    assert weights + plan.memory.total <= known.bytes <= budget
    assert weights + plan.memory.total > known.bytes - 100
    with pytest.raises(
        UnsupportedError, match=rf"smallest mix has {plan.smallest:,} .* {plan.memory.total:,} .* in KV cache.*cont"
    ):
        measured.compress("m", fit=plan.smallest - 1, **use)


def int_(bits: int, group: int, **more: Any) -> CodecSpec:
    return CodecSpec("int", {"bits": bits, "group_size": group, "method": "mse", **more})


def test_an_engine_is_given_what_it_runs() -> None:
    assert [spec.params["bits"] for spec in default_formats([256, 1024])] == [2, 3, 4, 8]
    assert default_formats([256, 1024], "vllm") == (int_(4, 128), int_(8, 128))
    assert default_formats([64, 128], "llama.cpp") == (int_(4, 32), int_(8, 32))
    assert default_formats([96], "transformers") == tuple(int_(bits, 32) for bits in (2, 3, 4, 8))
    affine = CodecSpec("int", {"bits": 4, "group_size": 64, "symmetric": False})
    assert [engine for engine in ("vllm", "transformers", "llama.cpp") if refuses(engine, affine)] == [
        "vllm",
        "transformers",
        "llama.cpp",
    ]
    assert "fuses" in refuses("vllm", CodecSpec("nvfp4", {}))
    assert not refuses("vllm", CodecSpec("fp8", {}))
    assert refuses("llama.cpp", CodecSpec("fp8", {}))


def test_a_device_gives_bytes_formats_and_seconds(measured: ms.Store, tmp_path: Path) -> None:
    plan = measured.plan_fit("m", "1GiB")
    size = (plan.smallest + plan.original) // 2
    file = tmp_path / "board.json"
    file.write_text(
        json.dumps({"bytes": size, "formats": ["int4-g32", "int8"], "seconds": {"int4-g32": 2.0, "kept": 9.0}})
    )
    told = measured.plan_fit("m", "1GiB", device=file, calibration=DATA, measure=True)
    assert told.budget == size
    assert {group.codec for group in told.groups} <= {"int", ""}
    assert {group.params["bits"] for group in told.groups if group.codec} <= {4, 8}
    assert told.seconds is None  # int8 was not measured there
    only = {"bytes": size, "formats": ["int4-g32"], "seconds": {"int4-g32": 2.0, "kept": 9.0}}
    file.write_text(json.dumps(only))
    timed = measured.plan_fit("m", "1GiB", device=file, calibration=DATA, measure=True)
    weights = dict.fromkeys(("int", ""), 0)
    for group in timed.groups:
        weights[group.codec] += sum(math.prod(measured["m"].tensor(name).shape) for name in group.tensors)
    assert timed.seconds == pytest.approx(2e-9 * weights["int"] + 9e-9 * weights[""])
    file.write_text(json.dumps(only | {"formats": ["int4-g32", "int8"]}))
    measured.compress("m", fit="1GiB", device=file, calibration=DATA, variant="board")
    assert measured["m:board"].opened().manifest.stored <= size
    with pytest.raises(ValueError, match="the device runs int4-g32, int8 only"):
        measured.compress("m", fit="1GiB", device=file, formats=["int3"], calibration=DATA)


def test_a_device_that_cannot_be_meant_is_refused(measured: ms.Store, tmp_path: Path) -> None:
    for said, why in (
        ("{}", "describes no device"),
        ('{"bytes": 1, "memory": 2}', "describes no device"),
        ('{"bytes": "much"}', "is not a size"),
        ('{"bytes": 1000, "seconds": {"int4": -1}}', "not times"),
    ):
        (tmp_path / "d.json").write_text(said)
        with pytest.raises(ValueError, match=why):
            measured.plan_fit("m", "1GiB", device=tmp_path / "d.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)  # no byte of it is read
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        measured.plan_fit("m", "1GiB", device=tmp_path / "large.json")
    with pytest.raises(ValueError, match="it has more than 256 MiB: give a part of it"):
        measured.eval("m", text=tmp_path / "large.json", context=32)
    with pytest.raises(ValueError, match="cannot be read"):
        measured.plan_fit("m", "1GiB", device=tmp_path / "none.json")


def test_a_taken_name_is_refused_before_anything_is_measured(
    measured: ms.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.compress("m", fit="21KiB", calibration=DATA, variant="taken")
    monkeypatch.setattr(Measuring, "run", lambda _: pytest.fail("it was measured"))
    for change in (
        {"formats": ["int4-g32", "int8"], "fit": "24KiB"},
        {"include": ["embedding"]},
        {"fit": 40_000, "context": 16},
        {"fit": "22KiB"},
    ):
        with pytest.raises(ConflictError, match="of another recipe"):
            measured.compress("m", **{"fit": "21KiB", **change}, calibration=DATA, variant="taken")
    assert measured.compress("m", fit="21KiB", calibration=DATA, variant="taken").stored == 0


def test_the_smallest_whose_perplexity_grows_by_no_more_than_a_share(measured: ms.Store) -> None:
    done = measured.compress("m", max_perplexity_increase=0.05, text=OTHER, calibration=DATA)
    assert [info.variant for info in done.variants] == ["ppl-0.05"]
    (found,) = measured.eval(["m:ppl-0.05"], text=OTHER, context=64, limit=8192)
    assert found.known
    assert found.measured.perplexity <= 1.05 * found.measured.baseline_perplexity
    with pytest.raises(UnsupportedError, match=r"max_perplexity_increase=1e-09 .* % more perplexity"):
        measured.compress("m", max_perplexity_increase=1e-9, text=OTHER, calibration=DATA, formats=["int3"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fit": "1MiB", "context": 0}, "context=0 is "),
        ({"fit": "1MiB", "batch": 2}, "give context=, too"),
        ({"fit": "1MiB", "context": 65}, "more than the model's 64 positions"),
        ({"fit": "1MiB", "engine": "sglang"}, "engine is one of 'transformers', 'vllm', 'llama.cpp'"),
        ({"fit": "21KiB", "engine": "vllm", "formats": ["int3"]}, "'int3' is not a symmetric int of 4 or 8 bits"),
        ({"recipe": "int4", "context": 8}, "context= has no effect here"),
        ({"recipe": "int4", "engine": "vllm"}, "engine= has no effect here"),
        ({"max_kl": 0.1, "text": OTHER, "context": 8}, "context= has no effect here"),
        ({"max_kl": 0.1, "max_perplexity_increase": 0.1, "text": OTHER}, "each say what is to be made"),
        ({"max_perplexity_increase": 0.1}, "is judged on a text"),
        ({"max_perplexity_increase": 0.0, "text": OTHER}, "is not a bound: give a share"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(measured: ms.Store, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measured.compress("m", **given)


def test_without_a_text_or_a_measurement_nothing_is_begun(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", make_language_model(tmp_path_factory.mktemp("other")))
    for act in (store.compress, store.plan_fit):
        with pytest.raises(ValueError, match=r"was not measured yet .*give a text"):
            act("m", fit="21KiB")
