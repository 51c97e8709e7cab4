"""A mix of formats: which tensors get one together, what each costs, and the recipe of the best mix of a size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from modelstore.architecture.fused import fused
from modelstore.codecs.weight import EngineView, WeightCodec, matrix
from modelstore.compress.plan import weight_codec
from modelstore.compress.presets import preset
from modelstore.errors import UnsupportedError
from modelstore.format.answers.fitted import FrontPoint, Memory, Mixed
from modelstore.format.answers.results import CodecChoice, CompressionPlan
from modelstore.format.dtypes import DType
from modelstore.format.objects.architecture import general
from modelstore.format.objects.manifest import CodecSpec, Manifest
from modelstore.format.recipe import KINDS, Method, Recipe, Rule
from modelstore.format.region import Shape
from modelstore.format.units import bytes_told
from modelstore.search.allocate import Option, allocate, smallest
from modelstore.search.engines import refuses, runnable

_BITS = (2, 3, 4, 8)
_GROUP_SIZES = (128, 64, 32, 16)
_WORD = 32  # bits that packed rows are whole numbers of
_POINTS = 48  # sizes that a front is told of

Costs = Mapping[str, Sequence[float | None]]


def default_formats(columns: Sequence[int], engine: str | None = None) -> tuple[CodecSpec, ...]:
    """Integers of 2, 3, 4 and 8 bits, clipped, in groups of at most 128 that divide the columns of each weight.

    If an engine is named, only the formats that it runs.
    """

    def of(size: int) -> tuple[CodecSpec, ...]:
        every = [CodecSpec("int", {"bits": bits, "group_size": size, "method": "mse"}) for bits in _BITS]
        return runnable(engine, every)

    sizes = [size for size in _GROUP_SIZES if of(size)]
    return of(next((one for one in sizes if all(n % one == 0 for n in columns)), sizes[0]))


def scaled(costs: Costs, gains: Mapping[str, float]) -> Costs:
    """Costs where codes are solved for data."""
    return {
        name: [None if cost is None else cost * gains.get(name, 1.0) for cost in each] for name, each in costs.items()
    }


@dataclass(frozen=True)
class Mixture:
    """Groups of tensors, and the formats that each can have: None is to keep them.

    `fixed`: bytes of all else; `measured`: whether costs are known; `unseen`: tensors of which the data say nothing. Bytes are as
    stored; with `memory` they are those that an engine holds, and that is part of what is fixed.
    """

    groups: tuple[tuple[str, ...], ...]
    formats: tuple[tuple[CodecSpec | None, ...], ...]
    options: tuple[tuple[Option, ...], ...]
    fixed: int
    measured: bool
    unseen: tuple[str, ...] = ()
    memory: Memory | None = None

    @property
    def kept(self) -> int:
        """Bytes of the tensors that are in no group."""
        return self.fixed - (self.memory.total if self.memory else 0)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest mix."""
        return self.fixed + smallest(self.options)

    @property
    def largest(self) -> int:
        """Bytes where all is kept."""
        return self.fixed + sum(each[-1].bytes for each in self.options)

    def best(self, budget: int) -> Mix:
        """The best mix of a size. `UnsupportedError` if it is below the smallest."""
        least = self.smallest
        if budget < least:
            cost = sum(min(each, key=lambda one: (one.bytes, one.cost)).cost for each in self.options)
            expected = f", and is expected to diverge by {cost:.3g} nats a token" if self.measured else ""
            beside, less = "", ""
            if self.memory is not None:
                beside = f" and {bytes_told(self.memory.total)} in KV cache, activations and logits"
                less = "give a shorter context= or a smaller batch=, "
            raise UnsupportedError(
                f"{bytes_told(budget)} are too few: the smallest mix has {bytes_told(least)}, {bytes_told(self.kept)} of them in "
                f"what is kept{beside}{expected}: give that much, {less}let more be compressed (include=['embedding']), or name "
                f"formats of fewer bits"
            )
        return Mix(self, tuple(allocate(self.options, budget - self.fixed)))

    def front(self) -> list[Mix]:
        """The best mixes of sizes from the smallest to where all is kept, without those that are the same."""
        low, high = self.smallest, self.largest
        found: list[Mix] = []
        for step in range(_POINTS):
            made = self.best(low + (high - low) * step // (_POINTS - 1))
            if not found or made.chosen != found[-1].chosen:
                found.append(made)
        return found


@dataclass(frozen=True)
class Mix:
    """One format for each group, by its number."""

    of: Mixture
    chosen: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all, counted as the mixture counts them."""
        return self.of.fixed + sum(each[at].bytes for each, at in zip(self.of.options, self.chosen, strict=True))

    @property
    def cost(self) -> float:
        """The divergence that is expected, in nats a token."""
        return sum(each[at].cost for each, at in zip(self.of.options, self.chosen, strict=True))

    @property
    def point(self) -> FrontPoint:
        """Its place on the front."""
        return FrontPoint(self.bytes, self.cost)

    @property
    def groups(self) -> tuple[Mixed, ...]:
        """Each group with its format."""
        found = []
        for names, formats, options, at in zip(
            self.of.groups, self.of.formats, self.of.options, self.chosen, strict=True
        ):
            spec = formats[at]
            params = dict(spec.params) if spec else {}
            found.append(Mixed(names, spec.name if spec else "", params, options[at].bytes, options[at].cost))
        return tuple(found)

    def weights(self, shapes: Mapping[str, Shape]) -> list[tuple[CodecSpec | None, int]]:
        """Each group's format, None if it is kept, and how many weights it has."""
        counts = [sum(math.prod(shapes[name]) for name in names) for names in self.of.groups]
        formats = [each[at] for each, at in zip(self.of.formats, self.chosen, strict=True)]
        return list(zip(formats, counts, strict=True))

    def recipe(self, name: str, method: str | None, description: str) -> Recipe:
        """The recipe that makes it: a rule for each format, with the names of its tensors. All else is kept."""
        found: list[tuple[CodecSpec, list[str]]] = []
        for names, formats, at in zip(self.of.groups, self.of.formats, self.chosen, strict=True):
            spec = formats[at]
            if spec is None:
                continue
            mine = next((names for one, names in found if one == spec), None)
            if mine is None:
                found.append((spec, mine := []))
            mine += [_exactly(one) for one in names]
        how = Method(method) if method else None
        found.sort(key=lambda pair: msgspec.json.encode(pair[0], order="sorted"))
        return Recipe(name, tuple(Rule(tuple(names), spec, how) for spec, names in found), description=description)


def mixture(
    plan: CompressionPlan,
    manifest: Manifest,
    formats: Sequence[CodecSpec],
    costs: Costs | None,
    memory: Memory | None = None,
) -> Mixture:
    """The groups of a model. `plan`: in which the tensors that take part are compressed, by one of the formats.

    `costs`: of each of these tensors by format; None if they are not known, and count as nothing. A tensor that the data
    say nothing of (None in all formats), such as an expert that no token came to, counts as the dearest of its kind; where
    all of them are so, it is kept. With `memory` bytes are those that an engine holds, weights as it takes them.
    """
    taking = {choice.name: choice for choice in plan.compressed}
    together = fused(taking)
    alone = taking.keys() - {name for group in together for name in group}
    order = {name: at for at, name in enumerate(taking)}
    groups = sorted([*together, *((name,) for name in alone)], key=lambda group: order[group[0]])
    known, unseen = _seen(taking, costs) if costs is not None else (None, ())
    specs, options = [], []
    for group in groups:
        mine = [
            (spec, _option(group, at, spec, taking, manifest, known, held=memory is not None))
            for at, spec in enumerate(formats)
        ]
        kept = Option(sum(_kept(taking[name], memory) for name in group), 0.0)
        fits = [(spec, option) for spec, option in mine if option is not None and option.bytes < kept.bytes]
        specs.append((*(spec for spec, _ in fits), None))
        options.append((*(option for _, option in fits), kept))
    rest = sum(_kept(choice, memory) for choice in plan.choices if choice.name not in taking)
    files = sum(int(manifest.length[manifest.rows(file)].sum()) for file in manifest.files)
    fixed = rest + (memory.total if memory is not None else files)
    return Mixture(tuple(groups), tuple(specs), tuple(options), fixed, costs is not None, unseen, memory)


def _kept(choice: CodecChoice, memory: Memory | None) -> int:
    """Bytes of a tensor that is kept: as stored, or as an engine holds it."""
    return choice.stored if memory is None else choice.bytes


def _has_layout(view: EngineView, shape: Shape) -> bool:
    try:
        view.cells(shape)
    except UnsupportedError:
        return False
    return True


def _stored(codec: WeightCodec, shape: Shape, kind: DType) -> int:
    return codec.size(shape, kind)


def _held(codec: WeightCodec, shape: Shape, kind: DType) -> int:
    """Bytes of a weight as engines take it: rows of packed codes end with a whole word; a weight without a layout is dense."""
    view, (rows, columns) = codec.view, matrix(shape)
    if view is None or not _has_layout(view, shape):
        return rows * columns * kind.itemsize
    spare = -columns * int(view.scheme()["num_bits"]) % _WORD // 8 if view.format == "pack-quantized" else 0
    return codec.size(shape, kind) + rows * spare


def _option(
    group: Sequence[str],
    at: int,
    spec: CodecSpec,
    taking: Mapping[str, CodecChoice],
    manifest: Manifest,
    known: Costs | None,
    *,
    held: bool,
) -> Option | None:
    """A group's size and cost in a format; None if one of its tensors cannot be stored so."""
    codec = weight_codec(spec)
    size, cost = 0, 0.0
    for name in group:
        kind, one = manifest.by_name[name].kind, 0.0 if known is None else known[name][at]
        if one is None or codec.refuses(taking[name].shape, kind):
            return None
        size += (_held if held else _stored)(codec, taking[name].shape, kind)
        cost += one
    return Option(size, cost)


def _seen(taking: Mapping[str, CodecChoice], costs: Costs) -> tuple[Costs, tuple[str, ...]]:
    """Costs in which what is not seen counts as the dearest of its kind; and what was not seen."""
    unseen = tuple(name for name in taking if all(cost is None for cost in costs[name]))
    dearest: dict[str, list[float | None]] = {}
    for name in taking.keys() - set(unseen):
        worst = dearest.setdefault(general(name), [None] * len(costs[name]))
        for at, cost in enumerate(costs[name]):
            if cost is not None:
                worst[at] = max(cost, worst[at] or 0.0)
    nothing: list[float | None] = [None] * max((len(each) for each in costs.values()), default=0)
    return {name: dearest.get(general(name), nothing) if name in unseen else costs[name] for name in taking}, unseen


def _exactly(name: str) -> str:
    """A target that speaks of one tensor."""
    plain = name not in KINDS and not name.startswith("re:") and not any(c in name for c in "*?[")
    return name if plain else f"re:{re.escape(name)}"


def named_formats(names: Sequence[str], engine: str | None = None) -> tuple[CodecSpec, ...]:
    """The codecs of presets, each once. `ValueError` if one is none that engines, or this one, run, or has several."""
    found: list[CodecSpec] = []
    for name in names:
        made = preset(name)
        if made.calibrated or made.prune is not None or len(made.rules) != 1:
            raise ValueError(f"formats: {name!r} is more than a format: name what is stored, such as int4, and method=")
        spec = made.rules[0].codec
        if spec is None or weight_codec(spec).view is None:
            raise ValueError(
                f"formats: no engine runs {name!r} as it is stored: name others, such as int4, int8 or fp8"
            )
        if why := refuses(engine, spec):
            raise ValueError(f"formats: {name!r} {why}: name others, or another engine=")
        if spec not in found:
            found.append(spec)
    return tuple(found)
