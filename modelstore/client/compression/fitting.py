"""Variants that fit: the best mix of formats of a size, or the smallest that holds a bound on its divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from modelstore.architecture.sizes import Sizes
from modelstore.client.access import Access
from modelstore.client.compression.ahead import check_made, check_writes, recipe_there
from modelstore.client.compression.compressing import compress, looked_at, planned
from modelstore.client.compression.wishes import Wish
from modelstore.format.answers import results
from modelstore.format.answers.fitted import FitPlan, Memory
from modelstore.format.digest import name_of
from modelstore.format.dtypes import DTYPES
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.sensitivity import Sensitivity
from modelstore.format.progress import Progress, meter
from modelstore.format.recipe import Method, Recipe, Rule, check
from modelstore.format.units import Size, bytes_told, parse_size

if TYPE_CHECKING:
    from modelstore.calibrate.text import Samples
    from modelstore.client.reading import Readable
    from modelstore.compress.stages import Stages
    from modelstore.execute.read.loading import Variant
    from modelstore.format.objects.manifest import CodecSpec
    from modelstore.format.objects.record import VersionRecord
    from modelstore.search.mix import Costs, Mix, Mixture


_SOLVED = "gptq"  # the method by which codes are solved for data
_TRIED = 3  # bits in which it is tried what that gains
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("GB", 10**9), ("MB", 10**6), ("KB", 1000))


class Fitting:
    """A model of which it is known what takes part in a mix; what its formats cost is measured when it is asked for."""

    def __init__(self, access: Access, model: Readable, wish: Wish) -> None:
        from modelstore.search.device import read
        from modelstore.search.known import known

        self.access, self.model, self.wish = access, model, wish
        self.device = read(wish.device) if wish.device is not None else None
        self.formats, self.plan, self.record = self._planned()
        self.opened: Variant = access.opened(model.name, access.repo.catalog.variant(self.record, ORIGINAL))
        self._config: Any = None
        self.samples: Samples | None = None
        if wish.calibration is not None:
            self._config, self.samples = looked_at(self.opened, wish.calibration)
        data = self.samples.recorded if self.samples else None
        solved = wish.method == _SOLVED
        self.sensitivity = known(self.opened.manifest.metrics, self.formats, self.wanted, data, solved=solved)
        if self.sensitivity is None and self.samples is None:
            raise ValueError(
                f"it was not measured yet what these formats cost {model.asked}: give a text that it is measured on, "
                f"calibration='book.txt'"
            )

    @property
    def wanted(self) -> list[str]:
        """The tensors that take part."""
        return [choice.name for choice in self.plan.compressed]

    @property
    def data(self) -> Mapping[str, Any] | None:
        """The data that give the cost of formats; None if there are none."""
        from modelstore.search.known import found_by

        if self.samples is not None:
            return found_by(self.samples.recorded)
        return found_by(self.sensitivity.data) if self.sensitivity is not None else None

    def mixture(self) -> Mixture:
        """The groups with what each format costs, as far as that is known."""
        from modelstore.search.mix import mixture, scaled

        costs: Costs | None = None
        if self.sensitivity is not None:
            costs = self.sensitivity.costs
            if self.wish.method == _SOLVED:
                costs = scaled(costs, self.sensitivity.gains or {})
        return mixture(self.plan, self.opened.manifest, self.formats, costs, self.memory())

    def memory(self) -> Memory | None:
        """The memory that an engine holds beside the weights; None if bytes are counted as stored."""
        from modelstore.search.footprint import footprint

        if self.wish.context is None:
            return None
        floats = [choice for choice in self.plan.choices if choice.name in set(self.wanted)]
        number = max(DTYPES[choice.dtype].itemsize for choice in floats)
        return footprint(Sizes(self.config), self.wish.context, self.wish.batch or 1, number)

    def within(self, budget: Size) -> int:
        """The bytes that a mix may have: no more than the device has."""
        found = parse_size(budget)
        return found if self.device is None else min(found, parse_size(self.device.bytes))

    def seconds(self, mix: Mix) -> float | None:
        """Seconds a token on the device, where all formats of the mix were measured there."""
        from modelstore.search.device import seconds_of
        from modelstore.search.mix import named_formats

        if self.device is None or not self.device.seconds:
            return None
        named = {name: named_formats([name])[0] for name in self.device.seconds if name != "kept"}
        return seconds_of(self.device, named, mix.weights({one.name: one.shape for one in self.plan.compressed}))

    def why(self, bytes: int) -> str:
        """Why a mix of a size is what it is; the same for the same formats, layers and use, and no others."""
        asked = {
            "formats": [[spec.name, sorted(spec.params.items())] for spec in self.formats],
            "wanted": sorted(self.wanted),
            "method": self.wish.method,
            "held": [self.wish.context, self.wish.batch],
        }
        digest = name_of(msgspec.json.encode(asked, order="deterministic"))[:16]
        return f"the best mix of {bytes} bytes, asked for as {digest}"

    @property
    def config(self) -> Any:
        """The model's config, as transformers has it."""
        from modelstore.compress.evaluate.model import language_config

        if self._config is None:
            self._config = language_config(self.opened)
        return self._config

    def stages(self) -> Stages:
        """The model, to be run block by block."""
        from modelstore.compress.evaluate.model import class_of
        from modelstore.compress.stages import Stages

        return Stages(self.opened, class_of(self.config), self.access.limits())

    def measure(self, progress: Progress | None) -> None:
        """Measure what formats cost, unless it is known, and keep that with the original."""
        from modelstore.compress.plan import weight_codec
        from modelstore.search.known import keep, rounded
        from modelstore.search.sensitivity import Measuring

        if self.sensitivity is not None:
            return
        stages = self.stages()
        assert self.samples is not None, "or it is known"
        data, limits = self.samples.recorded, self.access.limits()
        count = meter(progress, 2 * self.opened.manifest.nbytes, f"measuring {self.model.asked}")
        codecs = [weight_codec(spec) for spec in self.formats]
        tried = _tried(self.formats) if self.wish.method == _SOLVED else None
        made = Measuring(
            stages,
            self.opened.manifest,
            self.samples.ids,
            codecs,
            self.wanted,
            data["seed"],
            limits.memory // 4,
            count,
            tried,
        )
        costs = rounded(made.run())
        gains = {name: round(gain, 4) for name, gain in made.gains.items()} if tried else None
        self.sensitivity = Sensitivity(data, self.formats, costs, gains)
        at = self.record.version
        keep(self.access.repo, self.record.model, at, self.opened.manifest.content, self.sensitivity)

    def recipe(self, mix: Mix, name: str, why: str) -> Recipe:
        """The recipe of a mix, which says on what data it was chosen."""
        return mix.recipe(name, self.wish.method, self.said(why))

    def said(self, why: str) -> str:
        """A recipe's description: why it is what it is, and by which data."""
        data = self.data
        assert data is not None, "a mix is chosen by what formats cost"
        of = f"{data['samples']} samples of {data['length']} tokens, seed {data['seed']}, {str(data['digest'])[:16]}"
        return f"{why}, by what formats cost on {of}"

    @property
    def positions(self) -> int | None:
        """The most tokens that the model looks at, where its config says it."""
        return Sizes(self.config).positions

    def _planned(self) -> tuple[tuple[CodecSpec, ...], results.CompressionPlan, VersionRecord]:
        """The formats, and the plan in which each tensor that takes part has the smallest of them."""
        from modelstore.compress.plan import weight_codec
        from modelstore.search.mix import default_formats, named_formats

        def made(formats: tuple[CodecSpec, ...]) -> tuple[results.CompressionPlan, VersionRecord]:
            least = min(formats, key=lambda spec: weight_codec(spec).size((1024, 1024), DTYPES["bfloat16"]))
            recipe = Recipe("fit", (Rule(("linear",), least),))
            parent, plan, _ = planned(self.access, self.model, recipe, None, self.wish.include, self.wish.skip, False)
            return plan, parent.record

        engine, run = self.wish.engine, self.device.formats if self.device else ()
        if self.wish.formats:
            formats = named_formats(self.wish.formats, engine)
            if run and any(spec not in named_formats(run) for spec in formats):
                raise ValueError(f"formats: the device runs {', '.join(run)} only: name some of these")
        elif run:
            formats = named_formats(run, engine)
        else:
            columns = [choice.shape[-1] for choice in made(default_formats([]))[0].compressed]
            formats = default_formats(columns, engine)
        method = Method(self.wish.method) if self.wish.method else None
        check(Recipe("fit", tuple(Rule(("linear",), spec, method) for spec in formats)))
        return formats, *made(formats)


def fit(
    access: Access, model: Readable, budget: Size, wish: Wish, *, variant: str | None, progress: Progress | None
) -> results.Compressed:
    """Make the best mix of at most `budget` bytes, as `Model.compress` says."""
    name = _named(variant, parse_size(budget), wish)
    ready = Fitting(access, model, wish)
    bytes, before = ready.within(budget), ready.mixture()
    if bytes >= before.largest:
        as_what = "as it is stored, exact" if before.memory is None else "in an engine's memory, exact, with its cache"
        raise ValueError(
            f"fit: {bytes_told(bytes)} leave nothing to compress: {model.asked} has {bytes_told(before.largest)} {as_what}"
        )
    if bytes < before.smallest:
        before.best(bytes)  # says what is possible
    why = ready.why(bytes)
    there = recipe_there(access, ready.record, name, ready.said(why) if ready.data else "")
    if there is not None:
        return made(access, model, there, name, wish, progress)
    check_writes(access)
    ready.measure(progress)
    recipe = ready.recipe(ready.mixture().best(bytes), name, why)
    return made(access, model, recipe, name, wish, progress)


def made(
    access: Access,
    model: Readable,
    recipe: Recipe | Mapping[str, Any],
    variant: str,
    wish: Wish,
    progress: Progress | None,
) -> results.Compressed:
    """Make a variant of a mix's recipe."""
    return compress(
        access,
        model,
        recipe,
        variant=variant,
        codes=None,
        include=(),
        skip=(),
        requantize=False,
        calibration=wish.calibration if wish.method else None,
        progress=progress,
    )


def plan_fit(
    access: Access, model: Readable, budget: Size, wish: Wish, *, measure: bool, progress: Progress | None
) -> FitPlan:
    """Tell what `fit` would do, as `Model.plan_fit` says."""
    ready = Fitting(access, model, wish)
    bytes = ready.within(budget)
    if bytes < ready.mixture().smallest:
        ready.mixture().best(bytes)
    if measure:
        if ready.sensitivity is None:
            check_writes(access)
        ready.measure(progress)
    mixture = ready.mixture()
    blank = FitPlan(
        ready.record.model,
        ready.record.version,
        bytes,
        mixture.smallest,
        mixture.largest,
        ready.sensitivity is not None,
        0,
        0,
        0,
        memory=mixture.memory,
    )
    if ready.sensitivity is None:
        skeleton, ids = ready.stages().skeleton, ready.samples.ids if ready.samples else None
        width = skeleton.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        tokens = 0 if ids is None else ids.numel()
        return msgspec.structs.replace(
            blank, passes=2, blocks=skeleton.count, spool=4 * tokens * width * skeleton.count
        )
    best = mixture.best(bytes)
    compresses = any(group.codec for group in best.groups)
    recipe = ready.recipe(best, _named(None, parse_size(budget), wish), ready.why(bytes)) if compresses else None
    return msgspec.structs.replace(
        blank,
        bytes=best.bytes,
        cost=best.cost,
        recipe=msgspec.to_builtins(recipe) if recipe else None,
        groups=best.groups,
        front=tuple(mix.point for mix in mixture.front()),
        unseen=mixture.unseen,
        seconds=ready.seconds(best),
    )


def _named(variant: str | None, bytes: int, wish: Wish) -> str:
    """The variant's name: that which is given, or one that says the size."""
    if variant is not None:
        return check_made(variant)
    unit, divisor = next((pair for pair in _UNITS if bytes % pair[1] == 0), ("", 1))
    use = f"-{wish.batch or 1}x{wish.context}" if wish.context else ""
    return f"{wish.method or 'fit'}-{bytes // divisor}{unit}{use}"


def _tried(formats: tuple[CodecSpec, ...]) -> tuple[int, int, int]:
    """The format in which it is tried what solving gains, that nearest to 3 bits: its number, bits, and columns of a group."""
    told = [
        (at, int(spec.params.get("bits", 4)), int(spec.params.get("group_size", 128)))
        for at, spec in enumerate(formats)
    ]
    return min(told, key=lambda one: abs(one[1] - _TRIED))
