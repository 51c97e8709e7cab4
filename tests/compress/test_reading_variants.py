"""Stored variants read back: dequantized as their codec decodes by hand; or as engines take them, whole and in ranks' slices."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelstore as ms
from modelstore.client import Store
from modelstore.codecs import registry
from modelstore.codecs.look import Look
from modelstore.codecs.weight import WeightCodec, part_name
from modelstore.compress.engine.assembly import Assembly, units
from modelstore.compress.made import view_spec
from modelstore.errors import CorruptionError, UnsupportedError
from modelstore.format import grid
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import CodecSpec, Tensor
from modelstore.format.region import Region, extent, full, slices
from modelstore.plan.layout import Share
from modelstore.plan.read import Want, chunk_reads
from tests.compress.llama import FILES, LAYER, decompressed, llama
from tests.helpers.stores import all_bits, bits

ENGINES = ("fp8", "fp8-block", "mxfp4", "nvfp4", "int8", "int4", "int4-affine")
KEPT = ("model.embed_tokens.weight", "lm_head.weight", f"{LAYER}input_layernorm.weight", "model.norm.weight")
DOWN = f"{LAYER}mlp.down_proj.weight"


def saved(where: str, recipe: str, *, codec: str = "lossless") -> tuple[Store, dict[str, CodecSpec]]:
    """A store with the model and a variant of it, and the codec of each tensor that is compressed."""
    store = ms.open(where, memory="64MiB", threads=2)
    store.save("m", llama(), files=FILES, codec=codec)  # type: ignore[arg-type]
    plan = store.plan_compression("m", recipe)
    store.compress("m", recipe)
    return store, {choice.name: choice.codec for choice in plan.compressed if choice.codec}


def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("recipe", ["fp8", "nf4", "nvfp4", "int4", "half", "binary", "kmeans4"])
def test_what_is_loaded_is_what_the_codec_decodes(recipe: str) -> None:
    store, specs = saved(memory(), recipe)
    loaded, original = store.load(f"m:{recipe}"), llama()
    chunks = {t.name: t.chunk for t in store[f"m:{recipe}"].opened().manifest.tensors}
    dtype = DTYPES["bfloat16"]
    for name, spec in specs.items():
        raw = original[name].view(torch.uint8).numpy()
        shape = tuple(original[name].shape)
        codec = registry.codec(spec.name, spec.params)
        assert isinstance(codec, WeightCodec)
        box = raw.reshape(*shape, 2)
        cut = lambda region, box=box: np.ascontiguousarray(box[slices(region)]).reshape(-1)  # noqa: E731
        encode = codec.fit(Look(cut, shape, dtype))
        by_hand = np.empty_like(box)
        for chunk in range(grid.count(shape, chunks[name])):
            region = grid.chunk_region(shape, chunks[name], chunk)
            out = np.empty((1, cut(region).size), np.uint8)
            codec.decode(encode(cut(region), region), extent(region), dtype, out)
            by_hand[slices(region)] = out.reshape(*extent(region), 2)
        assert by_hand.tobytes() == bits(loaded[name])[2]


@pytest.mark.parametrize(("recipe", "place"), [*((name, "memory") for name in ENGINES), ("int4", "files")])
def test_an_engine_arrives_at_what_load_gives(recipe: str, place: str, tmp_path: Path) -> None:
    store, specs = saved(memory() if place == "memory" else str(tmp_path), recipe)
    dense = store.load(f"m:{recipe}")
    parts = store.load(f"m:{recipe}", dequantize=False)
    assert all_bits({name: parts[name] for name in KEPT}) == all_bits({name: dense[name] for name in KEPT})
    assert parts["lm_head.weight"].data_ptr() == parts["model.embed_tokens.weight"].data_ptr()
    for name, spec in specs.items():
        assert bits(decompressed(parts, name, spec)) == bits(dense[name]), name
        assert any(key.startswith(name) and key != name for key in parts)
    assert all_bits(dict(store.stream(f"m:{recipe}", dequantize=False))) == all_bits(parts)
    order = [key.split(".weight")[0] for key in parts]
    assert order == sorted(order, key=[name.split(".weight")[0] for name in dense].index)


@pytest.mark.parametrize("recipe", ENGINES)
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_its_slice(recipe: str, size: int) -> None:
    if recipe == "fp8-block" and size == 4:
        pytest.skip("its blocks are of more rows than a rank has of k_proj: refused, as the next test says")
    store, specs = saved(memory(), recipe)
    for rank in range(size):
        layout = ms.TensorParallel(rank, size)
        dense = store.load(f"m:{recipe}", shard=layout)
        parts = store.load(f"m:{recipe}", shard=layout, dequantize=False)
        for name, spec in specs.items():
            assert bits(decompressed(parts, name, spec)) == bits(dense[name]), (rank, name)
        assert bits(parts["model.norm.weight"]) == bits(dense["model.norm.weight"])


def test_a_slice_that_cuts_a_group_is_refused_and_says_what_fits() -> None:
    store, _ = saved(memory(), "fp8-block")
    with pytest.raises(ValueError, match=r"q_proj.*0:64 of dimension 0 .*multiples of 128.*2, 4 ranks"):
        store.load("m:fp8-block", shard=ms.TensorParallel(0, 8), dequantize=False)
    with pytest.raises(ValueError, match=r"down_proj.*100:512 of dimension 0"):
        store.stream("m:fp8-block", shard={DOWN: ((100, 512), (0, 128))}, dequantize=False)
    parts = store.load("m:fp8-block", shard={DOWN: ((128, 512), (256, 512))}, dequantize=False)
    assert {name: tuple(t.shape) for name, t in parts.items()} == {DOWN: (384, 256), f"{DOWN}_scale": (3, 2)}


def test_names() -> None:
    assert part_name("a.weight", "weight_packed") == "a.weight_packed"
    assert part_name("weight", "weight") == "weight"
    assert part_name("experts.up_proj", "weight_scale") == "experts.up_proj_scale"
    assert part_name("experts.up_proj", "weight") == "experts.up_proj"
    assert part_name("in_proj_weight", "weight_packed") == "in_proj_weight_packed"


def test_codecs_that_no_engine_takes_are_refused() -> None:
    store, _ = saved(memory(), "nf4")
    for read in (store.load, store.stream):
        with pytest.raises(UnsupportedError, match=r"'nf4'.*dequantize=True"):
            read("m:nf4", dequantize=False)
    only = store.load("m:nf4", names=["model.norm.weight"], dequantize=False)
    assert bits(only["model.norm.weight"]) == bits(llama()["model.norm.weight"])


def test_a_shape_without_a_layout_comes_dequantized_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    store = ms.open(memory())
    store.save("m", {"a.weight": torch.randn(8, 70), "b.weight": torch.randn(8, 64)})
    store.compress("m", "mxfp4")
    with caplog.at_level(logging.WARNING, "modelstore"):
        parts = store.load("m:mxfp4", dequantize=False)
    assert "1 compressed tensors come dequantized, such as 'a.weight'" in caplog.text
    assert list(parts) == ["a.weight", "b.weight_packed", "b.weight_scale"]
    assert bits(parts["a.weight"]) == bits(store.load("m:mxfp4")["a.weight"])


def test_a_part_does_not_take_another_tensors_name() -> None:
    store = ms.open(memory())
    store.save("m", {"a.weight": torch.randn(8, 64), "a.weight_scale": torch.ones(8, 1)})
    store.compress("m", "fp8")
    with pytest.raises(UnsupportedError, match=r"'a.weight_scale'.*dequantize=True"):
        store.load("m:fp8", dequantize=False)


def test_an_original_comes_as_it_is() -> None:
    store = ms.open(memory())
    store.save("m", llama())
    assert all_bits(store.load("m", dequantize=False)) == all_bits(llama())
    with pytest.raises(ValueError, match="mmap"):
        store.load("m", mmap=True, dequantize=False)


@pytest.mark.parametrize("view", ["int4", "int8"])
def test_a_ladder_is_handed_to_engines_too(view: str) -> None:
    store = ms.open(memory(), memory="64MiB", threads=2)
    store.save("m", llama(), files=FILES)
    store.compress("m", "ladder")
    specs = {c.name: view_spec(c.codec, view) for c in store.plan_compression("m", "ladder").compressed if c.codec}
    for layout in (None, ms.TensorParallel(1, 2)):
        dense = store.load(f"m:{view}", shard=layout)
        parts = store.load(f"m:{view}", shard=layout, dequantize=False)
        for name, spec in specs.items():
            assert bits(decompressed(parts, name, spec)) == bits(dense[name]), name
    assert all_bits(store.load("m", dequantize=False)) == all_bits(llama())


def test_stacks_of_experts_and_convolutions() -> None:
    torch.manual_seed(0)
    store = ms.open(memory(), memory="64MiB", threads=2)
    saved = {
        "experts.up_proj": torch.randn(6, 128, 256).bfloat16(),
        "conv.weight": torch.randn(64, 16, 3, 3).bfloat16(),
    }
    store.save("m", saved)
    store.compress("m", "fp8")
    shard = {"experts.up_proj": ((2, 5), (0, 128), (128, 256)), "conv.weight": ((32, 64), (0, 16), (0, 3), (0, 3))}
    for layout in (None, shard):
        dense = store.load("m:fp8", shard=layout)
        parts = store.load("m:fp8", shard=layout, dequantize=False)
        for name, scale in (("experts.up_proj", "experts.up_proj_scale"), ("conv.weight", "conv.weight_scale")):
            codes = parts[name].float()
            shape = (*codes.shape[: 2 if name.startswith("e") else 1], *[1] * (2 if name.startswith("c") else 1))
            scales = parts[scale].float().reshape(*shape, *[1] * (codes.ndim - len(shape)))
            assert bits((codes * scales).bfloat16()) == bits(dense[name]), name
    with pytest.raises(ValueError, match=r"conv.weight.*0:8 of dimension 1"):
        store.load("m:fp8", shard={"conv.weight": ((0, 64), (0, 8), (0, 3), (0, 3))}, dequantize=False)


def test_damage_is_found_here_too(tmp_path: Path) -> None:
    store, _ = saved(str(tmp_path), "fp8")
    for pack in (tmp_path / "packs").rglob("*.safetensors"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    with pytest.raises(CorruptionError):
        store.load("m:fp8", dequantize=False)


@st.composite
def slices_of(draw: st.DrawFn, n: int, unit: int) -> tuple[tuple[int, int], ...]:
    """One to three ranges of a dimension whose borders are multiples of the unit, of which the last may reach its end."""
    cuts = sorted(draw(st.sets(st.integers(0, n // unit), min_size=2, max_size=6)) | {0, 1})
    ranges = [(a * unit, min(n, b * unit)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    if draw(st.booleans()):
        ranges.append((n // unit * unit, n) if n % unit else (n - unit, n))
    return tuple(sorted({(a, b) for a, b in ranges if a < b})) or ((0, n),)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_holds_the_numbers_of_the_whole(data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["tensor", "channel", "block"]))
    codec = registry.codec("fp8", {"granularity": how, "group_size": 16})
    assert isinstance(codec, WeightCodec)
    view, dtype = codec.view, DTYPES["float32"]
    assert view is not None
    shape = (data.draw(st.integers(16, 90)), data.draw(st.integers(130, 400)))
    step = codec.group(shape)
    chunk = tuple(min(n, k * data.draw(st.integers(1, 4))) for n, k in zip(shape, step, strict=True))
    unit = units(shape, view.cells(shape))
    share = Share(tuple(data.draw(slices_of(n, k)) for n, k in zip(shape, unit, strict=True)))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def read(region: Region) -> np.ndarray:
        return np.ascontiguousarray(values[slices(region)]).reshape(-1).view(np.uint8)

    encode = codec.fit(Look(read, shape, dtype))
    want = Want(Tensor("w", "float32", shape, chunk, 0, "", ()), share)
    assembly = Assembly(want, view)
    for found in chunk_reads([want]):
        assert assembly.parts is None
        assembly.put(found, encode(read(found.region), found.region))
    assert assembly.parts is not None
    out = np.empty((shape[0], shape[1] * 4), np.uint8)
    codec.decode(encode(read(full(shape)), full(shape)), shape, dtype, out)
    whole = out.view(np.float32)
    expected = np.concatenate(
        [np.concatenate([whole[a:b, c:d] for c, d in share.ranges[1]], axis=1) for a, b in share.ranges[0]]
    )
    codes = (
        torch.from_numpy(assembly.parts["weight"].data).view(torch.float8_e4m3fn).reshape(share.shape).float().numpy()
    )
    scale = assembly.parts["weight_scale"].data.view(np.float32)
    if how == "block":
        blocks = scale.reshape(assembly.parts["weight_scale"].shape)
        scale = np.repeat(np.repeat(blocks, 16, 0), 16, 1)[: share.shape[0], : share.shape[1]]
    elif how == "channel":
        scale = scale.reshape(-1, 1)
    assert np.array_equal(codes * scale, expected)
