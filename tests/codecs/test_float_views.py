"""What engines are handed: compressed-tensors itself, given our tensors, must arrive at the values that we decode to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelstore.codecs import registry
from modelstore.codecs.floating.view import Fp8View, Mxfp4View, Nvfp4View
from modelstore.codecs.look import Look
from modelstore.codecs.weight import EngineTensor, EngineView, WeightCodec
from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import Region, full
from modelstore.testing.weight_codec import cuts, make

CODECS: list[tuple[str, dict[str, object]]] = [
    ("fp8", {"granularity": "tensor"}),
    ("fp8", {"granularity": "channel"}),
    ("fp8", {"granularity": "block"}),
    ("mxfp4", {}),
    ("nvfp4", {}),
]
SHAPE = (260, 320)
both = pytest.mark.parametrize(
    ("name", "params"), CODECS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)


def made(name: str, params: dict[str, object]) -> tuple[Any, EngineView]:
    codec = registry.codec(name, params)
    assert isinstance(codec, WeightCodec)
    assert codec.view is not None
    return codec, codec.view


def torch_tensor(part: EngineTensor) -> Any:
    import torch

    return torch.frombuffer(bytearray(part.data.tobytes()), dtype=getattr(torch, part.dtype)).reshape(part.shape)


def decompressed(view: EngineView, parts: dict[str, EngineTensor]) -> Bytes:
    """What the library makes of the parts, as raw bytes of the dtype that it arrives at."""
    import torch

    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**view.scheme()), format=view.format)
    compressor = BaseCompressor.get_value_from_registry(view.format)
    assert set(parts) <= set(compressor.compression_param_names(scheme))
    found = compressor.decompress({name: torch_tensor(part) for name, part in parts.items()}, scheme)["weight"]
    return as_bytes(found.contiguous().view(torch.uint8).numpy().reshape(-1))


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_library_decompresses_to_what_we_decode(name: str, params: dict[str, object], dtype: str) -> None:
    if name != "fp8" and dtype != "bfloat16":
        pytest.skip("the library knows 4-bit floats in bfloat16 only")
    codec, view = made(name, params)
    d = DTYPES[dtype]
    for kind in ("normal", "outlier", "zero", "constant"):
        values = make(kind, SHAPE, d)
        planes = codec.encode(values, SHAPE, d)
        out = np.empty((SHAPE[0], SHAPE[1] * d.itemsize), np.uint8)
        codec.decode(planes, SHAPE, d, out)
        parts = view.parts(view.arrays(planes, SHAPE, d), SHAPE, d)
        assert np.array_equal(decompressed(view, parts), out.reshape(-1)), kind


@both
def test_the_parts_are_what_the_library_makes_of_such_a_layer(name: str, params: dict[str, object]) -> None:
    """The library compresses our values again: the same names, shapes and dtypes, and the same codes."""
    import torch

    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codec, view = made(name, params)
    d = DTYPES["bfloat16"]
    values = make("normal", SHAPE, d)
    parts = view.parts(view.arrays(codec.encode(values, SHAPE, d), SHAPE, d), SHAPE, d)
    ours = {key: torch_tensor(part) for key, part in parts.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**view.scheme()), format=view.format)
    weight = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.bfloat16).reshape(SHAPE).float()
    scale = ours["weight_scale"].float()
    if name == "mxfp4":
        scale = torch.exp2(ours["weight_scale"].float() - 127)
    given = {"weight": weight, "weight_scale": scale} | {k: v for k, v in ours.items() if "global" in k}
    theirs = BaseCompressor.get_value_from_registry(view.format).compress(given, scheme)
    assert set(theirs) == set(ours)
    for key, tensor in theirs.items():
        assert tensor.shape == ours[key].shape, key
        if key != "weight_scale" or name != "fp8":
            assert tensor.dtype == ours[key].dtype, key
        same = tensor.view(torch.uint8) == ours[key].view(torch.uint8) if tensor.dtype == ours[key].dtype else None
        if same is not None:
            assert bool(same.all()), key


@both
def test_chunks_placed_side_by_side_are_the_whole(name: str, params: dict[str, object]) -> None:
    codec, view = made(name, params)
    d = DTYPES["bfloat16"]
    shape = (512, 512)
    values = make("outlier", shape, d)
    box = values.view(np.uint16).reshape(shape)

    def read(region: Region) -> Bytes:
        return np.ascontiguousarray(box[tuple(slice(a, b) for a, b in region)]).reshape(-1).view(np.uint8)

    encode = codec.fit(Look(read, shape, d))
    whole = view.arrays(encode(values, full(shape)), shape, d)
    placed = {key: np.zeros_like(array) for key, array in whole.items()}
    for region in cuts(shape, codec.group(shape)):
        (top, bottom), (left, right) = region
        mine = view.arrays(encode(read(region), region), (bottom - top, right - left), d)
        for key, (high, wide) in view.cells(shape).items():
            rows = slice(top // high, -(-bottom // high)) if high else slice(None)
            columns = slice(left // wide, -(-right // wide)) if wide else slice(None)
            placed[key][rows, columns] = mine[key]
    assert all(np.array_equal(placed[key].view(np.uint8), whole[key].view(np.uint8)) for key in whole)
    slice_of = {
        key: array[: 256 // high if high else None]
        for (key, array), (high, _) in zip(whole.items(), view.cells(shape).values(), strict=True)
    }
    parts = view.parts(slice_of, (256, 512), d)
    out = np.empty((512, 1024), np.uint8)
    codec.decode(encode(values, full(shape)), shape, d, out)
    assert np.array_equal(decompressed(view, parts), out[:256].reshape(-1))


def test_who_has_a_view() -> None:
    for name, params in (("nf4", {}), ("half", {}), ("round", {}), ("fp8", {"format": "e5m2"})):
        codec = registry.codec(name, params)
        assert isinstance(codec, WeightCodec)
        assert codec.view is None


def test_what_engines_cannot_take_is_said() -> None:
    for view in (Mxfp4View(), Nvfp4View()):
        with pytest.raises(UnsupportedError, match="whole blocks"):
            view.cells((4, 72 + 1))
    with pytest.raises(UnsupportedError, match="stack"):
        Fp8View("block", 128).cells((3, 200, 256))


@both
def test_planes_that_do_not_fit_are_refused(name: str, params: dict[str, object]) -> None:
    codec, view = made(name, params)
    d = DTYPES["bfloat16"]
    planes = codec.encode(make("normal", SHAPE, d), SHAPE, d)
    for i in range(len(planes)):
        with pytest.raises(FormatError):
            view.arrays([*planes[:i], b"\0", *planes[i + 1 :]], SHAPE, d)
    with pytest.raises(FormatError):
        view.arrays(planes[:1], SHAPE, d)
