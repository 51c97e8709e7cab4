"""Which stored tensors make each parameter of a model, as transformers renames, stacks, splits and transposes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelstore.architecture.classes.model_class import Built
from modelstore.errors import FormatError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Made:
    """Parameters, or saved buffers, that are made together of stored tensors.

    `sources` in the order in which they are stacked. `pattern`: of each, what of the converter it fits; "" where the tensor is
    the parameter.
    """

    parameters: tuple[str, ...]
    sources: tuple[str, ...]
    patterns: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Parameters:
    """A model's parameters: what makes each, and the tied ones, each with the parameter that it is."""

    made: Mapping[str, Made]
    tied: Mapping[str, str]

    def of(self, wanted: Iterable[str]) -> list[Made]:
        """The recipes of these parameters, each once."""
        found = {id(one): one for name in wanted for one in [self.made[self.tied.get(name, name)]]}
        return list(found.values())


def parameters(built: Built, stored: Collection[str]) -> Parameters:
    """The recipe of each entry of the model's `state_dict`. `FormatError` names those that nothing makes."""
    from transformers.core_model_loading import dot_natural_key

    known: dict[str, Any] = dict(built.model.state_dict(keep_vars=True))
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        there, pattern = built.rename(name, known)
        if there in known:
            groups.setdefault(there, []).append((name, pattern or ""))
    made: dict[str, Made] = {}
    for first, members in groups.items():
        pattern = members[0][1]
        targets: tuple[str, ...] = (first,)
        if pattern:
            leading, *others = built.converters[pattern].target_patterns
            targets = (first, *(first.replace(leading, other) for other in others))
            one = Made(targets, tuple(name for name, _ in members), tuple(p for _, p in members))
        else:
            one = Made(targets, (members[-1][0],))
        made |= dict.fromkeys(targets, one)
    tied = _tied(built, known, made)
    lacking = sorted(name for name in known if name not in made and name not in tied)
    if lacking:
        raise FormatError(
            f"the checkpoint has no tensors for {', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''} of a "
            f"{type(built.model).__name__}"
        )
    return Parameters({name: made[name] for name in known if name in made}, tied)


def values(
    built: Built, one: Made, read: Callable[[str], torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The parameters that are made together, of tensors that `read` gives; floats as `dtype`. `FormatError` for other shapes."""
    given = [_as(read(name), dtype) for name in one.sources]
    if one.patterns == ("",):
        found = {one.parameters[0]: given[0]}
    else:
        converter = deepcopy(built.converters[one.patterns[0]])
        for name, pattern, tensor in zip(one.sources, one.patterns, given, strict=True):
            converter.add_tensor(one.parameters[0], name, pattern, tensor)
        converted = converter.convert(one.parameters[0], model=built.model, config=built.model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
    for name, value in found.items():
        place = _place(built.model, name)
        if place is None or value.shape != place.shape:
            wanted = list(place.shape) if place is not None else "nothing"
            raise FormatError(
                f"parameter {name!r} of a {type(built.model).__name__} is {wanted}, and the tensors stored for it make "
                f"{list(value.shape)}",
                tensor=one.sources[0],
            )
    return found


def _place(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The model's parameter or buffer of that name; None if it has none. All of them are not listed for one."""
    owner, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    return module._parameters.get(key, module._buffers.get(key))


def _tied(built: Built, known: Mapping[str, Any], made: Mapping[str, Made]) -> dict[str, str]:
    """Parameters without tensors of their own, each with the tied one that has them."""
    partners: dict[str, set[str]] = {}
    said: Mapping[str, str] = getattr(built.model, "all_tied_weights_keys", None) or {}
    for name, of in said.items():
        partners.setdefault(name, set()).add(of)
        partners.setdefault(of, set()).add(name)
    by_identity: dict[int, list[str]] = {}
    for name, value in known.items():
        by_identity.setdefault(id(value), []).append(name)
    found = {}
    for name, value in known.items():
        if name in made:
            continue
        for other in (*by_identity[id(value)], *sorted(partners.get(name, ()))):
            if other in made:
                found[name] = other
                break
    return found


def _as(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
