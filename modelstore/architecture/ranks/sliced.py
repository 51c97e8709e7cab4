"""How ranks slice a model by transformers' own tensor-parallel plan: the plan says along which axis, modules in what units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.architecture.ranks.parallel_table import BESIDE, FAMILIES
from modelstore.format.objects.architecture import Sliced, general
from modelstore.format.region import Shape

# Styles of transformers. If outputs are gathered, or inputs split, no head needs to be whole.
_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
_ANYWHERE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")
_WHOLE = (
    *("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "all_reduce", "sequence_parallel"),
    *("moe_tp_experts", "moe_identity_expert", "local_params"),
)
_STACKED = (
    (),
    ("MergeModulelist",),
    ("MergeModulelist", "Concatenate"),
)  # of experts, each of which is sliced as all are
_KEYS = ("k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj")
_QKV = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn")
_GATE_UP = "gate_up_proj"  # rows of the gate, then as many of up


class _NotKnownError(Exception):
    """A tensor of which the plan says that it is sliced, and nobody how."""


@dataclass(frozen=True)
class Met:
    """A stored tensor, and what it is in the model: the parameter, its module, and the converter's steps that make it, if any."""

    name: str
    shape: Shape
    parameter: str
    owner: Any
    steps: tuple[str, ...] = ()

    @property
    def last(self) -> str:
        """The parameter's name in its module."""
        return self.parameter.rpartition(".")[2]


class Slicer:
    """A model's plan, asked for each tensor."""

    def __init__(self, model: Any, modules: Mapping[str, Any]) -> None:
        self._modules = modules
        self._plan: Mapping[str, str] = {general(name): style for name, style in (model._tp_plan or {}).items()}
        config = model.config.get_text_config(decoder=True)
        self._known = {model.config.model_type, config.model_type} & FAMILIES.keys()
        self._query = _whole(getattr(config, "num_attention_heads", None))
        self._key = _whole(getattr(config, "num_key_value_heads", None)) or self._query

    def slices(self, met: Iterable[Met]) -> dict[str, Sliced | None] | None:
        """How each tensor is sliced, None for those of which ranks hold the whole; None if nothing is known.

        Nothing is known without a plan, or if a tensor that it names is stored in a way that it does not cover; tensors that
        the table knows are left out.
        """
        if self._known or not self._plan:
            return None
        try:
            found = {one.name: self._sliced(one) for one in met}
        except _NotKnownError:
            return None
        return found if any(found.values()) else None

    def _sliced(self, one: Met) -> Sliced | None:
        owner = one.parameter.rpartition(".")[0]
        style, around = self._plan.get(general(one.parameter)), self._plan.get(general(owner))
        if style is None and one.last in ("weight", "bias"):
            style = around
        elif style is None and around is not None:
            return Sliced(0, ())  # beside a weight that is sliced, and whole
        if style is None or style in _WHOLE or any(part in BESIDE for part in one.name.split(".")):
            return None
        bias = one.last.endswith("bias")
        dimensions = len(one.shape)
        if one.steps not in _STACKED or dimensions == 0 or (bias and dimensions > 1):
            raise _NotKnownError(one.name)
        columns = max(0, dimensions - 2)
        if style in _COLUMNS:
            return self._cut(one, columns, style)
        if style in _ROWS:
            return None if bias else self._cut(one, dimensions - 1, style)
        if style == "packed_colwise":
            return _halves(one, columns)
        if style == "packed_rowwise":
            return None if bias else _halves(one, dimensions - 1)
        if style == "embedding_rowwise" and dimensions == 2:
            return Sliced(0, (("vocabulary", one.shape[0]),))
        if style == "embedding_colwise" and dimensions == 2:
            return Sliced(1, (("even", one.shape[1]),))
        raise _NotKnownError(one.name)

    def _cut(self, one: Met, axis: int, style: str) -> Sliced:
        """A tensor cut along an axis, in the units along it."""
        length = one.shape[axis]
        path = one.parameter.split(".")
        module = path[-2] if path[-1] in ("weight", "bias") and len(path) > 1 else path[-1]
        if module == _GATE_UP:
            return _halves(one, axis)
        if style in _ANYWHERE and module not in _QKV:
            return Sliced(axis, (("vocabulary", length),))
        if not any("attn" in part or "attention" in part for part in path):
            return Sliced(axis, (("even", length),))
        parent = self._modules.get(".".join(path[: path.index(module)]))
        if module in _QKV:
            return Sliced(axis, self._qkv(one, length, style, parent))
        if module in _KEYS:
            return Sliced(axis, (("key", self._heads(one, length, self._key, _width(parent, module))),))
        return Sliced(axis, (("query", self._heads(one, length, self._query, _width(parent, module))),))

    def _qkv(self, one: Met, length: int, style: str, parent: Any) -> tuple[tuple[str, int], ...]:
        """The parts of q, k and v in one: behind each other where the output is gathered, else head by head."""
        width = _width(parent, "q_proj")
        if self._query and self._key and style in _ANYWHERE:
            if width and length == (self._query + 2 * self._key) * width:
                return ("query", self._query), ("key", self._key), ("key", self._key)
        elif self._query and length == 3 * self._query * (width or -(-length // (3 * self._query))):
            return (("query", self._query),)
        raise _NotKnownError(one.name)

    def _heads(self, one: Met, length: int, count: int | None, width: int | None) -> int:
        """The number of heads along a length: as the config says, or in this layer as their width tells."""
        if length == 0:
            raise _NotKnownError(one.name)
        if count and width and length in (count * width, 2 * count * width):  # twice: a gate beside each
            return count
        if count and length == count:
            return count
        if width and length % width == 0:
            return length // width
        if count and length % count == 0:
            return count
        raise _NotKnownError(one.name)


def _halves(one: Met, axis: int) -> Sliced:
    """Two parts behind each other, or one of them where the checkpoint has them apart."""
    length = one.shape[axis]
    if one.steps:
        return Sliced(axis, (("even", length),))
    if length % 2 or length == 0:
        raise _NotKnownError(one.name)
    return Sliced(axis, (("even", length // 2), ("even", length // 2)))


def _width(parent: Any, module: str) -> int | None:
    """How many numbers a head has, where the attention module says so; those of values may be others."""
    names = ("v_head_dim", "head_dim") if module.startswith(("v", "o")) else ("head_dim",)
    return next((found for name in names if (found := _whole(getattr(parent, name, None)))), None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else None
