"""The kind of each tensor of a model, by its name, its shape and the tensors beside it.

The names are those of the classes of transformers (each of its architectures is built and compared in the tests), of timm
and of the checkpoints that were published beside them. A matrix is a linear layer's only where it is called `….weight`, or is
one that is known by its name, such as a stack of experts; a parameter of another name is a table, a token, a bias or the
state of a recurrence far more often.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from modelstore.architecture.config import Config, count, language
from modelstore.architecture.quantized import quantized
from modelstore.codecs.weight import FLOATS, is_convolution
from modelstore.errors import FormatError
from modelstore.format.objects.architecture import Architecture, find
from modelstore.format.objects.manifest import Manifest
from modelstore.format.recipe import KINDS, Kind
from modelstore.format.region import Shape

# These are matched with the whole name of the module that owns a `weight`, or of the parameter itself.
_EMBEDDING = re.compile(
    r"(?:.*[._])?(?:wte|wpe|shared|\w*emb(?:ed|eds|edding|eddings|edder|s)?(?:_\w+|\d+)?|Hash\w*Embedder_\d+|codebook|\w*_tokens?"
    r"|relative_attention_bias|bias_values|reference_points|quer(?:y_feat|ies_features)|pe_k|rel_pos_[hw])(?:\.[\d*]+)?"
)
_TABLE_OWNER = re.compile(r"(?:transformer\.)?w|query")  # CTRL's words, VideoMT's queries
_STEM = re.compile(r"(?:.*\.)?(?:patch_embed\w*|conv_proj)(?:\..*)?")
_HEAD = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|score|classifier|qa_outputs|decoder|head|(?<!mlp\.)fc_out|(?![qkv]_)\w+_head)|(?:model\.)?output"
)
_ROUTER = re.compile(r".*\.(?:gate|router|router\.\w+|gate\.wg|shared_expert_gate|feed_forward\.gate)")
_NORM = re.compile(r"(?:.*[._])?(?:\w*norm\w*|ln_?\w*|bn\d*|grn)(?:\.(?:weight|bias|gamma|beta|scale|shift))*", re.I)
_BIAS = re.compile(r"(?:.*[._])?(?:bias(?:es)?(?:_\w+)?|b|b\d)")
# Of a recurrence: how fast its state decays (Mamba, gated delta nets, RG-LRU, RWKV), how long its steps are, what passes it by.
_STATE_SPACE = re.compile(r"(?:.*\.)?(?:A_logs?|Ds?|dt_\w+|time_(?:decay|first)|recurrent_param)")
_TABLE = re.compile(r"(?:.*[._])?(?:scale|shift|objective)")
# Stacks of matrices, one an expert, and matrices of other names than `weight`.
_STACK = re.compile(
    r"(?:.*\.)?(?:experts|shared_experts)\.(?:\w+\.)?(?:gate_up_proj|down_proj|up_proj|gate_proj|w[123])(?:\.weight)?"
)
_PARALLEL = re.compile(r"(?:.*\.)?(?:input_linear|output_linear)")  # granite's and JetMoE's experts
_MATRIX = re.compile(r"(?:.*\.)?(?:in_proj_weight|mm_input_projection_weight)")


class Its(NamedTuple):
    """The facts that decide a kind, beside the name."""

    dtype: str
    shape: Shape


def kinds(
    tensors: Mapping[str, Its], config: Config | None = None, known: Architecture | None = None
) -> dict[str, Kind]:
    """The kind of each tensor. Presets compress "linear" and "convolution" only; "unknown" is what nothing is known of.

    `known`: what the model's own class says, which counts before names.
    """
    already = quantized({name: its.dtype for name, its in tensors.items()})
    vocabulary = _vocabulary(config)
    said = known.kinds if known else {}

    def kind(name: str, its: Its) -> Kind:
        if name in already:
            return "quantized"
        if its.dtype not in FLOATS:
            return "other"
        found = find(said, name)
        return found if found in KINDS else kind_of(name, its.shape, vocabulary)  # type: ignore[return-value]

    return {name: kind(name, its) for name, its in tensors.items()}


def kinds_in(manifest: Manifest, config: Config | None, known: Architecture | None = None) -> dict[str, Kind]:
    """`kinds` of a manifest's tensors, by what it says of the model where nobody knows more."""
    tensors = {tensor.name: Its(tensor.dtype, tensor.shape) for tensor in manifest.tensors}
    return kinds(tensors, config, known or manifest.architecture)


def kind_of(name: str, shape: Shape, vocabulary: int | None = None) -> Kind:
    """The kind of a tensor of floats, by its name and shape alone; `vocabulary`: rows that only heads have."""
    owner, _, last = name.rpartition(".")
    weight = last == "weight"
    if _STATE_SPACE.fullmatch(name):
        return "state-space"
    if len(shape) < 2:
        return "norm" if _NORM.fullmatch(name) else "bias" if _BIAS.fullmatch(name) else "other"
    what = owner if weight else name
    for kind, pattern in _NAMED:
        if pattern.fullmatch(what):
            return kind
    if _STACK.fullmatch(name) or _MATRIX.fullmatch(name):
        return "linear"
    if weight and _TABLE_OWNER.fullmatch(owner):
        return "embedding"
    if not weight:
        return "bias" if _BIAS.fullmatch(name) else "unknown"
    if len(shape) == 2:
        return "head" if vocabulary and shape[0] == vocabulary else "linear"
    return _kernel(owner, shape)


def is_stack(name: str, shape: Shape, kind: Kind) -> bool:
    """Whether a tensor of that kind is several matrices in one, such as those of experts."""
    if len(shape) != 3 or kind not in ("linear", "unknown"):
        return False
    return "expert" in name or (shape[0] > 1 and shape[1] > 1)


def is_stem(name: str) -> bool:
    """Whether a weight makes patches of an image into vectors, as an embedding does."""
    return _STEM.fullmatch(name.removesuffix(".weight")) is not None


_NAMED: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("embedding", _EMBEDDING),
    ("embedding", _STEM),
    ("head", _HEAD),
    ("router", _ROUTER),
    ("norm", _NORM),
    ("unknown", _TABLE),
)


def _kernel(owner: str, shape: Shape) -> Kind:
    """The kernel of [out, in, *kernel], or of a stack of matrices."""
    if not is_convolution(shape):
        return "linear" if _PARALLEL.fullmatch(owner) else "unknown"
    return "depthwise" if shape[1] == 1 and shape[0] > 1 else "convolution"


def _vocabulary(config: Config | None) -> int | None:
    """How many words the config says there are, where they are so many that a matrix of as many rows is no other one."""
    try:
        found = count(language(config), "vocab_size") if config is not None else None
    except FormatError:
        return None
    return found if found and found > 1024 else None
