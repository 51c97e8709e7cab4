"""Presets: recipes with names. Each speaks of the linear layers, and of convolutions where it suits them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from modelstore.format.objects.manifest import CodecSpec
from modelstore.format.recipe import Method, Recipe, Rule, Value
from modelstore.format.suggest import suggestion

_WEIGHTS = ("linear", "convolution")
LADDER = "ladder"


def _preset(name: str, description: str, codec: str, targets: tuple[str, ...] = _WEIGHTS, **params: Value) -> Recipe:
    return Recipe(name, (Rule(targets, CodecSpec(codec, params)),), description=description)


_ALL = (
    _preset("int8", "8 bits, symmetric, one scale a channel", "int", bits=8, granularity="channel"),
    _preset("int4", "4 bits, symmetric, groups of 128, clipped for the least error", "int", bits=4, method="mse"),
    _preset("int3", "3 bits, symmetric, groups of 128, clipped", "int", bits=3, method="mse"),
    _preset("int2", "2 bits, affine, groups of 64, HQQ", "int", bits=2, symmetric=False, group_size=64, method="hqq"),
    _preset("int4-rtn", "4 bits, symmetric, groups of 128, plain rounding", "int", bits=4),
    _preset("int4-g32", "4 bits, symmetric, groups of 32, clipped", "int", bits=4, group_size=32, method="mse"),
    _preset(
        "int4-affine", "4 bits with zero points, groups of 128, clipped", "int", bits=4, symmetric=False, method="mse"
    ),
    _preset(
        "hqq4",
        "4 bits with zero points, groups of 64, HQQ",
        "int",
        bits=4,
        symmetric=False,
        group_size=64,
        method="hqq",
    ),
    _preset("fp8", "float8 e4m3, one scale a channel", "fp8", granularity="channel"),
    _preset("fp8-block", "float8 e4m3, one scale a block of 128 × 128", "fp8", granularity="block"),
    _preset("nf4", "4-bit normal floats, groups of 64 (QLoRA)", "nf4"),
    _preset("mxfp4", "4-bit floats, blocks of 32 with a power of two (OCP MX)", "mxfp4"),
    _preset("nvfp4", "4-bit floats, blocks of 16 with a float8 scale", "nvfp4"),
    _preset("half", "float16", "half", ("linear", "convolution", "embedding", "head")),
    _preset("round", "rounded to multiples of 0.001", "round", step=0.001),
    _preset("binary", "one bit: sign × mean of a channel (XNOR-Net)", "binary"),
    _preset("ternary", "-1, 0, 1 × a scale of a channel", "ternary"),
    _preset("kmeans4", "values that a tensor shares, their indices entropy-coded to 4.1 bits", "kmeans", rate=4.1),
    _preset("sparse50", "the smaller half of each row pruned", "sparse", sparsity=0.5, scope="row"),
    _preset("sparse24", "two of every four pruned", "sparse", n=2, m=4),
    Recipe(
        "sparse50-global",
        (Rule(_WEIGHTS, CodecSpec("sparse")),),
        prune=0.5,
        description="the smaller half of all weights pruned",
    ),
    _preset("deep", "half pruned, the rest shared values, entropy-coded (Deep Compression)", "deep"),
    _preset("lowrank", "factors of half the parameters (SVD)", "lowrank", ratio=0.5),
    _preset(LADDER, "original, int8 and int4 in one set of bytes", "ladder"),
    _preset(
        "packed", "every bit, a twentieth larger than lossless, decoded in less than half the time", "packed", ("*",)
    ),
)
PRESETS: Mapping[str, Recipe] = MappingProxyType({preset.name: preset for preset in _ALL})


def _data(name: str, description: str, codec: CodecSpec, method: Method) -> Recipe:
    return Recipe(
        name, (Rule(("linear",), codec, method),), description=f"{description}: looks at a text, calibration="
    )


def _codes(method: str, bits: int, group_size: int, how: str) -> Recipe:
    codec = CodecSpec("int", {"bits": bits, "group_size": group_size, "method": "mse"})
    said = f"{bits} bits, symmetric, groups of {group_size}, {how}"
    return _data(f"{method}{bits}", said, codec, Method(method))


_SIGNED = "GPTQ, then tuned block by block (SignRound)"
_HALF, _TWO_OF_FOUR = CodecSpec("sparse", {"sparsity": 0.5}), CodecSpec("sparse", {"n": 2, "m": 4})
_EACH_ROW = CodecSpec("sparse", {"sparsity": 0.5, "scope": "row"})
# These look at data, so that no variant of theirs is made while it is read.
CALIBRATED: Mapping[str, Recipe] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            _codes("gptq", 4, 128, "GPTQ"),
            _codes("gptq", 3, 128, "GPTQ"),
            _codes("gptq", 2, 64, "GPTQ"),
            _codes("awq", 4, 128, "AWQ"),
            _codes("tuned", 4, 128, _SIGNED),
            _codes("tuned", 3, 128, _SIGNED),
            _codes("tuned", 2, 64, _SIGNED),
            _data("wanda50", "half of each row pruned, what least comes through (Wanda)", _EACH_ROW, Method("wanda")),
            _data("wanda24", "two of every four pruned, by Wanda", _TWO_OF_FOUR, Method("wanda")),
            _data("sparsegpt50", "half pruned, the rest makes up for it (SparseGPT)", _HALF, Method("sparsegpt")),
            _data("sparsegpt24", "two of every four pruned, by SparseGPT", _TWO_OF_FOUR, Method("sparsegpt")),
            _data(
                "sparsegpt24-int4",
                "two of every four pruned and the rest 4 bits, groups of 128, in one pass (SparseGPT)",
                CodecSpec("int", {"bits": 4, "method": "mse"}),
                Method("sparsegpt", {"n": 2, "m": 4}),
            ),
            _data(
                "svd-llm",
                "factors of half the parameters, of what comes through (SVD-LLM)",
                CodecSpec("lowrank", {"ratio": 0.5}),
                Method("svd-llm"),
            ),
        )
    }
)


def presets() -> dict[str, Recipe]:
    """All presets by name."""
    return {**PRESETS, **CALIBRATED}


def preset(name: str) -> Recipe:
    """The preset of that name; `ValueError` if there is none."""
    every = presets()
    try:
        return every[name]
    except KeyError:
        like, known = suggestion(name, every), ", ".join(every)
        raise ValueError(
            f"there is no preset {name!r}{like}: choose one of {known}, or give a Recipe (a .json file)"
        ) from None
