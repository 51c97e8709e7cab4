"""A model run block by block: its own forward, with what is not there replaced by what was computed before.

The model is on torch's meta device. Stage k of n blocks gives the output of block k: the blocks before it are replaced by stubs
that return what block k-1 gave, whatever they are given, and the forward is stopped behind it. So masks, rotary tables and the
kind of attention of each layer are those that the model's own code makes. Stage n gives the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from modelstore.errors import UnsupportedError

_KEPT = ("attention_type", "layer_type", "is_sliding", "layer_idx", "sliding_window", "is_attention_layer")
_SHARED = {  # entries of configs by which blocks read more than what the block before gives
    "num_kv_shared_layers": "later layers share keys and values of earlier ones",
    "hidden_size_per_layer_input": "each layer reads an embedding of its own",
}

Run = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class _StopError(Exception):
    """The block that was asked for has run."""


class _Stub(torch.nn.Module):
    """Stands for a block that ran already: returns what was spooled."""

    def __init__(self, owner: Skeleton, like: torch.nn.Module) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple: no module's child
        for key in _KEPT:
            if hasattr(like, key):
                setattr(self, key, getattr(like, key))

    def forward(self, *_: Any, **__: Any) -> Any:
        """The output of the last block before the one that runs."""
        return self._owner[0].carried()


class _NoEmbedding(torch.nn.Module):
    """Stands for the embedding where the blocks before do not look at it."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape that the embedding gives."""
        return torch.zeros((*ids.shape, self._width), dtype=self._dtype, device=ids.device)


class Skeleton:
    """A model without weights that is given those of one block at a time.

    `stack`: the name before the blocks' numbers; `count`: of blocks. `UnsupportedError` if the model does not have such a
    stack, or has blocks that read more than the output of the block before.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.stack, self._blocks = _stack(model)
        self.count = len(self._blocks)
        _check(model, self.stack, self._blocks)
        self._tuple = False
        self._carried: torch.Tensor | None = None
        self._graded = False
        self._embedding = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
        self._head = _name_of(model, model.get_output_embeddings())  # type: ignore[operator]
        self.rows: torch.Tensor | None = (
            None  # the tokens whose rows an embedding that is placed has, ascending; None: all
        )

    def needs(self, stage: int) -> list[str]:
        """The entries of the model's `state_dict` that a stage computes with; those of its block come last."""
        block, skipped = f"{self.stack}.{stage}.", [f"{self.stack}."]
        if stage and self._embedding:
            skipped.append(f"{self._embedding}.")
        if stage < self.count and self._head:
            skipped.append(f"{self._head}.")
        names = list(self.model.state_dict(keep_vars=True))
        around = [name for name in names if not name.startswith(tuple(skipped))]
        return [*around, *(name for name in names if name.startswith(block))]

    def block(self, number: int) -> torch.nn.Module:
        """One of the blocks."""
        return self._blocks[number]

    @property
    def table(self) -> str:
        """The embedding's weight by its name in the `state_dict`; "" where there is none."""
        return f"{self._embedding}.weight" if self._embedding else ""

    @property
    def config(self) -> Any:
        """The part of the model's config that speaks of its blocks."""
        return self.model.config.get_text_config()  # type: ignore[operator,union-attr]

    @property
    def widest(self) -> torch.nn.Module:
        """The block that has most parameters."""
        return max(self._blocks, key=lambda block: sum(one.numel() for one in block.parameters()))

    @contextmanager
    def experts_one_by_one(self) -> Iterator[None]:
        """While it runs, experts that are stacked are multiplied one after the other, so that it can be seen what each reads."""
        before = self.model.get_experts_implementation()  # type: ignore[operator]
        self.model.set_experts_implementation("eager")  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)  # type: ignore[operator]

    def carried(self) -> Any:
        """The values that the stubs return now."""
        return (self._carried,) if self._tuple else self._carried

    @contextmanager
    def at(
        self, stage: int, values: Mapping[str, torch.Tensor], gradients: Collection[str] | None = None
    ) -> Iterator[Run]:
        """A stage with its values placed: how it is run, on tokens and what the stage before gave for them.

        Parameters are on the meta device again afterwards. Gradients are computed only if parameters are named for them; then
        also of the output of the stage before, if that requires them, too.
        """
        held = _place(self.model, values, gradients or ())
        self._graded = gradients is not None
        blocks = list(self._blocks)
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        padding = getattr(embedding, "padding_idx", None)
        hooks = []
        try:
            for at in range(min(stage, self.count)):
                self._blocks[at] = _Stub(self, blocks[at])
            if stage and self._embedding:
                _set(self.model, self._embedding, _NoEmbedding(embedding.weight.shape[1], _dtype(values)))
            if stage == 0 and self.rows is not None and self.table in values:
                hooks.append(embedding.register_forward_pre_hook(_numbered(self.rows)))
                embedding.padding_idx = None  # which is of no use without gradients, and may be beyond these rows
            got: list[Any] = []
            if stage < self.count:

                def stop(_module: Any, _args: Any, output: Any) -> None:
                    got.append(output)
                    raise _StopError

                hooks.append(blocks[stage].register_forward_hook(stop))
            yield lambda ids, before: self._run(stage, got, ids, before)
        finally:
            for hook in hooks:
                hook.remove()
            for at, block in enumerate(blocks):
                self._blocks[at] = block
            if self._embedding:
                embedding.padding_idx = padding
                _set(self.model, self._embedding, embedding)
            _restore(held)
            self._carried = None

    @contextmanager
    def entry(self, values: Mapping[str, torch.Tensor]) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The inputs of the first block for tokens. `values`: those of stage 0."""
        got: list[torch.Tensor] = []

        def stop(_module: Any, given: Any, named: Mapping[str, Any]) -> None:
            got.append(given[0] if given else named["hidden_states"])
            raise _StopError

        def run(ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), suppress(_StopError):
                self.model(ids, use_cache=False)
            return got.pop()

        held = _place(self.model, values, ())
        hook = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield run
        finally:
            hook.remove()
            _restore(held)

    def _run(self, stage: int, got: list[Any], ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        self._carried = before
        got.clear()
        with torch.set_grad_enabled(self._graded and torch.is_grad_enabled()):
            try:
                output = self.model(ids, use_cache=False)
            except _StopError:
                return self._only(got.pop())
        if stage < self.count:
            raise UnsupportedError(f"a {type(self.model).__name__} does not run its block {self.stack}.{stage}")
        found: torch.Tensor = output.logits
        return found

    def _only(self, output: Any) -> torch.Tensor:
        """The one tensor that a block gives."""
        self._tuple = isinstance(output, tuple)
        first, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor) or any(one is not None for one in others):
            raise UnsupportedError(
                f"the blocks of a {type(self.model).__name__} hand each other more than one tensor: it cannot be run block by "
                f"block"
            )
        return first


def _numbered(rows: torch.Tensor) -> Callable[[Any, Any], Any]:
    """A hook that gives an embedding the places of tokens among its rows."""
    return lambda _, given: (torch.searchsorted(rows, given[0]), *given[1:])


def _stack(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The repeated blocks that have most of the parameters, and their name."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and _alike(module):
            found.append((sum(one.numel() for one in module.parameters()), name, module))
    if not found:
        raise UnsupportedError(f"a {type(model).__name__} has no repeated blocks: it cannot be run block by block")
    _, name, stack = max(found, key=lambda one: one[0])
    return name, stack


def _alike(blocks: torch.nn.ModuleList) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return len({type(one) for one in blocks}) == 1 or all(isinstance(one, GradientCheckpointingLayer) for one in blocks)


def _check(model: torch.nn.Module, stack: str, blocks: torch.nn.ModuleList) -> None:
    """`UnsupportedError` if blocks share what one alone would not have."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    why = next((said for key, said in _SHARED.items() if getattr(config, key, None)), None)
    seen: dict[int, int] = {}
    for at, block in enumerate(blocks):
        if why is None and any(seen.setdefault(id(one), at) != at for one in block.parameters()):
            why = "its blocks share parameters"
    inside = sum(one.numel() for one in blocks.parameters())
    others = sum(
        sum(one.numel() for one in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not f"{name}.".startswith(f"{stack}.")
    )
    if why is None and getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder beside its decoder"
    if why is None and others > inside // 2:
        why = "it has more than one stack of blocks"
    if why is not None:
        raise UnsupportedError(f"a {type(model).__name__} cannot be run block by block: {why}")


def _name_of(model: torch.nn.Module, part: torch.nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is part), "") if part is not None else ""


def _set(model: torch.nn.Module, name: str, part: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)


def _dtype(values: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next((one.dtype for one in values.values() if one.is_floating_point()), torch.float32)


_Held = list[tuple[dict[str, Any], str, Any]]


def _place(model: torch.nn.Module, values: Mapping[str, torch.Tensor], graded: Collection[str]) -> _Held:
    """Make these the model's, and let the `graded` have gradients; what they replace."""
    held: _Held = []
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if key in module._parameters:
            places: dict[str, Any] = module._parameters
            fresh: Any = torch.nn.Parameter(value, requires_grad=name in graded)
        else:
            places, fresh = module._buffers, value
        held.append((places, key, places[key]))
        places[key] = fresh
    return held


def _restore(held: _Held) -> None:
    for places, key, value in reversed(held):
        places[key] = value
