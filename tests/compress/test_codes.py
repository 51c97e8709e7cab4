"""A ladder under int4 codes from elsewhere: exact, int4 that is theirs bit for bit, and whatever does not fit refused."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import modelstore as ms
from modelstore.cli.main import app
from modelstore.compress.codes import group_size
from modelstore.errors import ConflictError, FormatError, NotFoundError
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.codecs import quantizers
from tests.compress.llama import CONFIG, FILES, LAYER, llama
from tests.helpers.stores import all_bits, journal, open_on, pack_sizes, shrink

UP, DOWN, KEY = (f"{LAYER}{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.k_proj"))
HOW = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16), torch.float32: np.dtype("f4")}
Tensors = dict[str, torch.Tensor]


def packed(weight: torch.Tensor, group: int, how: str = "nearest", seed: int = 0) -> Tensors:
    """A weight as llm-compressor writes it."""
    numbers, dtype = weight.float().numpy(), HOW[weight.dtype]
    scales = np.maximum(quantizers.largest(numbers, group) / 7.5, 1e-30).astype(dtype)
    if "clipped" in how:
        scales = quantizers.clipped(numbers, group, dtype)
    codes = (quantizers.feedback if "feedback" in how else quantizers.nearest)(numbers, scales, group)
    rows, columns = codes.shape
    raised = np.zeros((rows, -(-columns // 8) * 8), np.uint32)
    raised[:, :columns] = (codes.astype(np.int32) + 8).astype(np.uint32)
    words = np.zeros((rows, raised.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= raised[:, i::8] << np.uint32(4 * i)
    return {
        "packed": torch.from_numpy(words.view(np.int32)),
        "scale": torch.from_numpy(scales.view(np.dtype(f"i{dtype.itemsize}"))).view(weight.dtype),
        "shape": torch.tensor([rows, columns]),
    }


def quantized(tensors: Tensors, names: list[str], group: int = 128, how: str = "nearest") -> Tensors:
    """A model's tensors, those of these names as codes; the tied head is left out, as `save_pretrained` does."""
    made = {name: tensor for name, tensor in tensors.items() if name not in (*names, "lm_head.weight")}
    for name in names:
        made |= {f"{name}_{part}": tensor for part, tensor in packed(tensors[name], group, how).items()}
    return made


def directory(path: Path, tensors: Tensors) -> Path:
    """A directory with them."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config}))
    return path


def linear(tensors: Tensors) -> list[str]:
    return [name for name in tensors if "proj" in name]


def dequantized(parts: Tensors, name: str, group: int) -> torch.Tensor:
    """Codes times scales, by the rule of the format."""
    words = parts[f"{name}_packed"].numpy().view(np.uint32)
    codes = ((words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).reshape(len(words), -1).astype(
        np.float32
    ) - 8
    columns = parts[f"{name}_shape"].tolist()[1]
    scale = parts[f"{name}_scale"]
    wide = quantizers.spread(scale.float().numpy(), group, columns)
    return torch.from_numpy(codes[:, :columns] * wide).to(scale.dtype)


def sqnr(one: torch.Tensor, other: torch.Tensor) -> float:
    noise = (one.double() - other.double()).square().sum()
    return float(10 * torch.log10(one.double().square().sum() / noise))


def saved(tensors: Tensors, storage: Any = None) -> ms.Store:
    store = open_on(storage or MemoryStorage(uuid.uuid4().hex))
    store.save("m", tensors, files=FILES)
    return store


@pytest.mark.parametrize(
    ("dtype", "group", "how"),
    [
        (torch.bfloat16, 128, "feedback"),
        (torch.bfloat16, 32, "clipped"),
        (torch.float16, 64, "nearest"),
        (torch.float32, 128, "clipped"),
    ],
)
def test_all_three(tmp_path: Path, dtype: torch.dtype, group: int, how: str) -> None:
    tensors = llama(dtype=dtype)
    names = [UP, DOWN] if how == "feedback" else linear(tensors)
    given = quantized(tensors, names, group, how)
    store, own = saved(tensors), saved(tensors)
    own.compress("m", "ladder")
    made = store.compress("m", "ladder", codes=directory(tmp_path / "codes", given))
    assert [v.variant for v in made.variants] == ["original", "int4", "int8"]
    assert all_bits(store.load("m")) == all_bits(tensors)
    assert all_bits(store.load("m:int8")) == all_bits(own.load("m:int8"))
    four, parts = store.load("m:int4"), store.load("m:int4", dequantize=False)
    for name in names:
        assert torch.equal(four[name], dequantized(given, name, group))
        assert sqnr(tensors[name], four[name]) > 12
        for part in ("packed", "scale", "shape"):
            assert torch.equal(parts[f"{name}_{part}"], given[f"{name}_{part}"])
    if how == "feedback":  # those without codes have the ladder's own
        assert torch.equal(four[KEY], own.load("m:int4")[KEY])
    codecs = {t.name: t.codec for t in store.describe("m").tensors}
    assert [name for name in codecs if codecs[name] == "ladder"] == linear(tensors)
    assert store.verify(deep=True).ok
    store.gc(dry_run=False, grace=0)
    assert all_bits(store.load("m")) == all_bits(tensors)
    assert store.compress("m", "ladder", codes=tmp_path / "codes").stored == 0


def test_slices_and_an_export_give_the_codes_back(tmp_path: Path) -> None:
    tensors = llama()
    given = quantized(tensors, linear(tensors), 64)
    store = saved(tensors)
    store.compress("m", "ladder", codes=directory(tmp_path / "codes", given))
    store.export("m:int4", tmp_path / "out")
    from safetensors.torch import load_file

    exported = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    for name, tensor in given.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor)
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["group_size"] for group in groups.values()] == [64]
    whole = store.load("m:int4")[DOWN]
    layout = ms.TensorParallel(rank=1, size=2)
    assert torch.equal(store.load("m:int4", shard=layout)[DOWN], whole.chunk(2, 1)[1])
    assert torch.equal(store.load("m:int8", shard=layout)[DOWN], store.load("m:int8")[DOWN].chunk(2, 1)[1])
    store.compress("m", "int8", variant="other")  # of an original that lies under codes
    again = store.save(
        "m", tensors
    )  # and a version after it is on a ladder without them, of which all but `high` is there
    found = store.describe("m@2").tensors
    assert {t.codec for t in found if t.name in linear(tensors)} == {"ladder"}
    assert again.stored < 0.4 * sum(t.stored for t in found)
    assert all_bits(store.load("m@2")) == all_bits(tensors)


def test_as_the_library_reads_them(tmp_path: Path) -> None:
    """compressed-tensors' own packing goes in, and its own dequantization is what comes out."""
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    tensors = llama()
    weight = tensors[UP]
    scale = (weight.float().reshape(len(weight), -1, 128).abs().amax(2) / 7.5).to(weight.dtype)
    state = library.PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    given = {name: tensor for name, tensor in tensors.items() if name not in (UP, "lm_head.weight")}
    given |= {UP.removesuffix("weight") + name: tensor.contiguous() for name, tensor in state.items()}
    store = saved(tensors)
    store.compress("m", "ladder", codes=directory(tmp_path / "codes", given))
    wanted = library.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(store.load("m:int4")[UP], wanted)


def test_codes_of_a_variant_and_of_a_saved_model() -> None:
    tensors = llama()
    store = saved(tensors)
    store.compress("m", "int4")
    variant = store.load("m:int4", dequantize=False)
    wanted = store.load("m:int4")
    store.save("other", tensors, files=FILES)
    store.compress("other", "ladder", codes="m:int4")
    assert all_bits(store.load("other:int4")) == all_bits(wanted)
    assert all_bits(store.load("other")) == all_bits(tensors)
    store.save("packed", {name: t for name, t in variant.items() if name != "lm_head.weight"})
    store.save("third", tensors, files=FILES)
    store.compress("third", "ladder", codes="packed")
    assert all_bits(store.load("third:int4")) == all_bits(wanted)
    assert all_bits(store.load("third:int4", dequantize=False)) == all_bits(variant)


def test_what_has_codes_is_compressed_unless_it_is_skipped(tmp_path: Path) -> None:
    tensors = llama()
    names = [UP, DOWN, "model.embed_tokens.weight"]
    folder = directory(tmp_path / "codes", quantized(tensors, names))
    plan = saved(tensors).plan_compression("m", "ladder", codes=folder, skip=[DOWN])
    chosen = {choice.name: choice.codec.params.get("codes_group_size") for choice in plan.compressed if choice.codec}
    assert chosen["model.embed_tokens.weight"] == chosen[UP] == 128
    assert chosen[KEY] is None
    assert DOWN not in chosen
    assert plan.expected == sum(choice.expected for choice in plan.choices)


def test_a_work_goes_on_with_the_same_codes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    tensors = llama()
    one = directory(tmp_path / "one", quantized(tensors, linear(tensors)))
    same = directory(tmp_path / "same", quantized(tensors, linear(tensors)))
    other = directory(tmp_path / "other", quantized(tensors, linear(tensors), how="clipped"))
    storage = MemoryStorage(uuid.uuid4().hex)
    saved(tensors, storage)
    before, at = set(pack_sizes(storage)), 0
    while len(set(pack_sizes(storage)) - before) < 2:  # until some of its packs are stored
        at += 1
        with pytest.raises(Killed):
            open_on(FaultyStorage(storage, kill_at=at)).compress("m", "ladder", codes=one)
    kept = journal(storage)
    assert kept
    fresh = MemoryStorage(uuid.uuid4().hex)
    saved(tensors, fresh)
    whole = open_on(fresh).compress("m", "ladder", codes=one)
    made = open_on(storage).compress("m", "ladder", codes=same)  # the same codes, in another place
    assert made.stored < whole.stored
    assert not journal(storage)
    assert open_on(storage).compress("m", "ladder", codes=one).stored == 0
    with pytest.raises(ConflictError, match="has a variant"):
        open_on(storage).compress("m", "ladder", codes=other)
    for variant in ("int8", "int4"):
        open_on(storage).delete(f"m@1:{variant}")
    open_on(storage).compress("m", "ladder", codes=other)
    given = quantized(tensors, linear(tensors), how="clipped")
    assert torch.equal(open_on(storage).load("m:int4")[UP], dequantized(given, UP, 128))


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name != f"{UP}_{part}"}


def but(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{UP}_{part}": make(tensors[f"{UP}_{part}"])}


def infinite(scales: torch.Tensor) -> torch.Tensor:
    made = scales.clone()
    made[5, 1] = float("inf")
    return made


LAYOUTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no codes": (lambda tensors: {n: t for n, t in tensors.items() if "proj" not in n}, "has no codes"),
    "GPTQ's": (
        lambda _: {f"{LAYER}mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)},
        "lacks its scales or qzeros",
    ),
    "no scale": (without("scale"), "lacks its scale"),
    "no shape": (without("shape"), "lacks its shape"),
    "asymmetric": (lambda t: t | {f"{UP}_zero_point": torch.zeros(8, 4, dtype=torch.int32)}, "asymmetric"),
    "by activation": (lambda t: t | {f"{UP}_g_idx": torch.zeros(512, dtype=torch.int32)}, "by activation"),
    "8 bits": (but("packed", lambda t: torch.cat([t, t], 1)), "codes of 8 bits"),
    "too few codes": (but("packed", lambda t: t[:, :-1].contiguous()), "where 4 bits of"),
    "too few rows": (but("packed", lambda t: t[:-1].contiguous()), "where 4 bits of"),
    "codes of bytes": (but("packed", lambda t: t.to(torch.int16)), "where 4 bits of"),
    "a huge shape": (but("shape", lambda _: torch.tensor([1 << 62, 1 << 62])), "where 4 bits of"),
    "a negative shape": (but("shape", lambda t: -t), "where 4 bits of"),
    "a long shape": (but("shape", lambda _: torch.tensor([1536, 512, 1])), "where two int64 are due"),
    "a shape of floats": (but("shape", lambda t: t.double()), "where two int64 are due"),
    "no groups": (but("scale", lambda t: t[:, :0].contiguous()), "not groups"),
    "odd groups": (but("scale", lambda t: torch.ones(1536, 512, dtype=t.dtype)), "not groups"),
    "scales of other rows": (but("scale", lambda t: t[:-1].contiguous()), "none of 1536 rows"),
    "scales of integers": (but("scale", lambda t: t.to(torch.int32)), "scales of int32"),
    "an infinite scale": (but("scale", infinite), "not finite"),
}


def also(name: str, rows: int, columns: int) -> Callable[[Tensors], Tensors]:
    codes = packed(torch.ones(rows, columns).bfloat16(), 32)
    return lambda tensors: tensors | {f"{name}_{part}": tensor for part, tensor in codes.items()}


NORM, BIAS = f"{LAYER}input_layernorm.weight", f"{LAYER}mlp.up_proj.bias"
MODELS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another name": (
        lambda t: {n.replace("up_proj", "top_proj"): v for n, v in t.items()},
        "top_proj.*is not in the model",
    ),
    "another shape": (also(UP, 64, 64), "in the model, and"),
    "another dtype": (but("scale", lambda t: t.half()), "with scales of float16"),
    "a tied name": (also("lm_head.weight", 320, 512), "is tied to"),
    "another norm": (lambda t: t | {NORM: 2 * t[NORM]}, "AWQ and SmoothQuant"),
    "a bias more": (lambda t: t | {BIAS: torch.zeros(1536)}, "is not in the model"),
}


@pytest.mark.parametrize("case", [*LAYOUTS, *MODELS])
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    change, message = {**LAYOUTS, **MODELS}[case]
    tensors = llama()
    storage = MemoryStorage(uuid.uuid4().hex)
    store = saved(tensors, storage)
    folder = directory(tmp_path / "codes", change(quantized(tensors, [UP])))
    before = pack_sizes(storage)
    with pytest.raises(FormatError if case in LAYOUTS else ValueError, match=message):
        store.compress("m", "ladder", codes=folder)
    assert pack_sizes(storage) == before
    assert not journal(storage)
    assert [v.variant for v in store.variants("m")] == ["original"]


def test_wrong_arguments(tmp_path: Path) -> None:
    tensors = llama()
    store = saved(tensors)
    folder = directory(tmp_path / "codes", quantized(tensors, [UP]))
    with pytest.raises(ValueError, match="codes are what a ladder is put on"):
        store.compress("m", "int8", codes=folder)
    with pytest.raises(NotFoundError, match=r"codes='.*' is neither a directory nor a stored variant"):
        store.compress("m", "ladder", codes=tmp_path / "none")
    with pytest.raises(NotFoundError):
        store.compress("m", "ladder", codes="other:int4")
    with pytest.raises(FormatError, match="has no codes"):
        store.compress("m", "ladder", codes="m")
    store.compress("m", "int8")
    with pytest.raises(FormatError, match="with other codes than symmetric int4"):
        store.compress("m", "ladder", codes="m:int8")
    (folder / "model.safetensors").write_bytes(os.urandom(1000))
    with pytest.raises(FormatError):
        store.compress("m", "ladder", codes=folder)


def test_on_the_command_line(tmp_path: Path) -> None:
    tensors = llama()
    given = quantized(tensors, linear(tensors), 64)
    store = ms.open(tmp_path / "store")
    store.save("m", tensors, files=FILES)
    words = ["m", "ladder", "--codes", str(directory(tmp_path / "codes", given)), "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(app, ["plan", "compress", *words])
    assert "its int4 codes are given" in shown.output
    done = CliRunner().invoke(app, ["compress", *words])
    assert done.exit_code == 0, done.output
    assert torch.equal(store.load("m:int4")[UP], dequantized(given, UP, 64))


def test_groups() -> None:
    assert [group_size(512, n) for n in (1, 4, 8, 16, 0, 512, 3)] == [512, 128, 64, 32, 0, 0, 0]
    assert group_size(300, 3) == 100
    assert group_size(290, 3) == 128
    assert group_size(290, 5) == 58
    assert group_size(1 << 20, 1) == 0
