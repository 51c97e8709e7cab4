"""Cuts a model: what stays is counted, measured where it is not named, checked against the model's class, and made a source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelstore.architecture.blocks import blocks
from modelstore.architecture.described import described
from modelstore.architecture.ranks.parallel import Cuts
from modelstore.architecture.rewritten import ShapeCounts, rewritten
from modelstore.architecture.sizes import Sizes
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format.digest import name_of
from modelstore.format.files.checkpoint import CONFIG
from modelstore.format.region import nbytes
from modelstore.plan.work import Limits, Work
from modelstore.restructure.check import check
from modelstore.restructure.choose import Amount, check_amount, count_of, named, neurons_of
from modelstore.restructure.cut import KeptParts, Structure
from modelstore.restructure.layers import MOST_LAYERS, Dropped, LayerLosses
from modelstore.restructure.solved import SolvedWeights
from modelstore.restructure.source import CutModel
from modelstore.restructure.widths import Widths, room

if TYPE_CHECKING:
    from modelstore.calibrate.text import Samples

ComparedBy = Literal["kl", "influence"]
BY: tuple[ComparedBy, ...] = ("kl", "influence")
_LAYER_TOKENS = 2048  # of the samples on which layers are compared
_SHARE = 4  # the part of the memory budget that blocks' outputs may take


@dataclass(frozen=True)
class Cutback:
    """The parts of a model that a caller keeps: amounts of layers, neurons and key/value heads; None keeps all.

    `by`: how layers are compared; None: by divergence up to 48 layers, else by influence. `correct`: whether weights
    behind what is left out are solved again. `ValueError` or `TypeError` if that cannot be meant.
    """

    layers: Amount | None = None
    mlp: float | int | None = None
    heads: float | int | None = None
    by: ComparedBy | None = None
    correct: bool = True

    def __post_init__(self) -> None:
        amounts = {"layers": self.layers, "mlp": self.mlp, "heads": self.heads}
        if all(amount is None for amount in amounts.values()):
            raise ValueError("nothing is left out: give layers=, mlp= or heads=, such as layers=0.75")
        for what, amount in amounts.items():
            if amount is not None:
                check_amount(what, amount, numbers=what == "layers")
        if self.by is not None and self.by not in BY:
            raise ValueError(f"by={self.by!r} is not one of {', '.join(BY)}")
        if self.by is not None and (self.layers is None or named(self.layers) is not None):
            raise ValueError(f"by={self.by!r} says how layers are compared: give layers= as a share or a count")

    @property
    def measured(self) -> bool:
        """Whether a text is needed, on which it is measured what the model misses least."""
        return (
            self.mlp is not None or self.heads is not None or (self.layers is not None and named(self.layers) is None)
        )


class Cutting:
    """A stored model that is cut back. Nothing is read but its config and manifest, until it is measured."""

    def __init__(self, model: Variant, class_name: str, wanted: Cutback, limits: Limits) -> None:
        self.model, self.wanted, self.limits = model, wanted, limits
        config = model.config()
        assert config is not None, "its class was found by it"
        self.config, self._class_name = config, class_name
        known = described(model.manifest, config)
        names = tuple(model.manifest.by_name)
        self.structure = Structure(model.manifest, blocks(names, known), Cuts(config, None, known, strict=False))
        self.stages = Stages(model, class_name, limits)
        if self.structure.layers != self.stages.skeleton.count:
            raise UnsupportedError(
                f"model {model.name!r} has {self.structure.layers} layers, and its config.json speaks of "
                f"{self.stages.skeleton.count}: save it with its own config.json",
                model=model.name,
            )
        self.before, self.after, self._groups = self._counts()

    def _counts(self) -> tuple[ShapeCounts, ShapeCounts, int | None]:
        """The model's counts before and after, and the key/value heads after; None for parts that are not cut."""
        wanted, structure = self.wanted, self.structure
        layers = structure.layers
        left = layers if wanted.layers is None else count_of("layers", wanted.layers, layers)
        neurons = neurons_left = query = query_left = key = key_left = head = None
        if wanted.mlp is not None:
            neurons = structure.neurons()
            neurons_left = neurons_of(wanted.mlp, neurons)
        if wanted.heads is not None:
            key, each = structure.groups()
            key_left = count_of("heads", wanted.heads, key)
            query, query_left = key * each, key_left * each
            head = Sizes(self.stages.skeleton.config).head
        return (
            ShapeCounts(layers, neurons, query, key, head),
            ShapeCounts(left, neurons_left, query_left, key_left, head),
            key_left,
        )

    def sample(self) -> KeptParts:
        """As much as will be kept, of the first parts: for sizes that are known before anything is measured."""
        layers = named(self.wanted.layers) or tuple(range(self.after.layers))
        neurons = dict.fromkeys(layers, tuple(range(self.after.neurons))) if self.after.neurons else {}
        groups = dict.fromkeys(layers, tuple(range(self._groups))) if self._groups else {}
        return KeptParts(tuple(sorted(layers)), neurons, groups)

    @property
    def by(self) -> ComparedBy | None:
        """How layers are compared; None if none are, or they are named."""
        if (
            self.wanted.layers is None
            or named(self.wanted.layers) is not None
            or self.after.layers == self.before.layers
        ):
            return None
        return self.wanted.by or ("kl" if self.structure.layers <= MOST_LAYERS else "influence")

    @property
    def passes(self) -> int:
        """How many times the weights of the blocks are read to measure."""
        rounds = {"kl": self.before.layers - self.after.layers, "influence": 1, None: 0}[self.by]
        return rounds + (self.wanted.mlp is not None or self.wanted.heads is not None)

    def check(self) -> None:
        """`UnsupportedError` if no config can describe the smaller model, as far as that is known before measuring."""
        columns = max(self.before.neurons or 0, (self.before.query or 0) * (self.before.head or 0))
        needed, there = room(columns), self.limits.memory // 2
        if needed > there:
            raise UnsupportedError(
                f"measuring neurons and heads of {self.model.name!r} takes {needed >> 20:,} MiB for a weight of {columns:,} "
                f"columns, and memory= leaves {there >> 20:,} MiB for it: give more memory",
                model=self.model.name,
            )
        if self.by is None:
            self._checked(self.sample())

    def _checked(self, kept: KeptParts) -> dict[str, Any]:
        """The rewritten config, of which transformers makes just what is kept."""
        kinds = Sizes(self.stages.skeleton.config).attention
        config = dict(rewritten(self.config, self.before, self.after, kept.layers, kinds))
        check(self.stages.skeleton, config, self._class_name, self.structure.cut(kept), kept.layers, self._changed())
        return config

    def _changed(self) -> set[tuple[int, int]]:
        """Numbers that modules may have otherwise than before."""
        found = set()
        for was, now in (
            (self.before.neurons, self.after.neurons),
            (self.before.query, self.after.query),
            (self.before.key, self.after.key),
        ):
            if was is not None and now is not None:
                found.add((was, now))
                if self.before.head is not None:
                    found.add((was * self.before.head, now * self.before.head))
        return found

    def measured(self, samples: Samples | None, solved: SolvedWeights, work: Work) -> tuple[KeptParts, list[Dropped]]:
        """The kept parts, and the worth of each layer that goes; weights that are solved again go into `solved`."""
        from modelstore.calibrate.shards import runs_of

        explicit = named(self.wanted.layers) if self.wanted.layers is not None else None
        layers = tuple(sorted(explicit)) if explicit else tuple(range(self.before.layers))
        dropped: list[Dropped] = []
        if samples is None:
            return KeptParts(layers), dropped
        memory = self.limits.memory // _SHARE
        block = nbytes((sum(t.nbytes for t in self.structure.tensors(0)),), 1)
        told = work.begin(block * self.before.layers * self.passes, f"measuring {self.model.name}")

        def advance(count: int) -> None:
            told.done(count * block)

        skeleton = self.stages.skeleton
        if self.by is not None:
            few = samples.ids[: max(1, _LAYER_TOKENS // samples.ids.shape[1])]
            measuring = LayerLosses(self.stages, runs_of(few, skeleton, memory), memory, advance)
            by_kl = self.by == "kl"
            dropped = measuring.by_divergence(self.after.layers) if by_kl else measuring.by_influence(self.after.layers)
            gone = {one.layer for one in dropped}
            layers = tuple(layer for layer in layers if layer not in gone)
        if self.after.neurons is None and self._groups is None:
            return KeptParts(layers), dropped
        runs = runs_of(samples.ids, skeleton, memory)
        widths = Widths(
            self.stages,
            self.structure,
            runs,
            memory,
            self.after.neurons,
            self._groups,
            self.wanted.correct,
            solved,
            advance,
        )
        return widths.run(layers), dropped

    def recorded(
        self, parent: str, kept: KeptParts, dropped: Sequence[Dropped], samples: Samples | None
    ) -> dict[str, Any]:
        """The manifest's entry on how the model was made; neurons and heads as hexadecimal digits of one bit each."""
        said: dict[str, Any] = {"of": parent, "content": self.model.manifest.content, "layers": list(kept.layers)}
        if self.before.neurons is not None:
            said["neurons"] = {str(at): _bits(chosen, self.before.neurons) for at, chosen in kept.neurons.items()}
        if self.before.key is not None:
            said["key_heads"] = {str(at): _bits(chosen, self.before.key) for at, chosen in kept.groups.items()}
        if dropped:
            said |= {"by": self.by, "left_out": [[one.layer, one.loss] for one in dropped]}
        if kept.neurons or kept.groups:
            said["correct"] = self.wanted.correct
        return said | ({"calibration": samples.recorded} if samples else {})

    def source(
        self, kept: KeptParts, solved: SolvedWeights, files: Mapping[str, Path | bytes], metrics: Mapping[str, Any]
    ) -> CutModel:
        """The smaller model, to be saved. `files`: those of the original; `UnsupportedError` if it cannot be described."""
        config = self._checked(kept)
        said = json.dumps([self.model.manifest.content, metrics, solved.digests()], sort_keys=True)
        return CutModel(
            self.model.reader,
            self.structure.cut(kept),
            solved.arrays,
            aliases=self.structure.aliases(kept),
            files={**files, CONFIG: json.dumps(config, indent=2).encode() + b"\n"},
            metrics={"restructured": metrics},
            fingerprint=name_of(said.encode()),
        )


def _bits(chosen: Sequence[int], there: int) -> str:
    bits = np.zeros(there, np.uint8)
    bits[list(chosen)] = 1
    return np.packbits(bits).tobytes().hex()


def weights(cutting: Cutting, kept: KeptParts) -> tuple[int, int]:
    """Bytes of all tensors before and after."""
    before = sum(tensor.nbytes for tensor in cutting.model.manifest.tensors)
    after = sum(nbytes(one.shape, one.source.kind.itemsize) for one in cutting.structure.cut(kept))
    return before, after
