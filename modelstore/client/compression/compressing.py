"""Making variants."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import msgspec

from modelstore.architecture.sizes import Sizes
from modelstore.client.access import Access
from modelstore.errors import NotFoundError
from modelstore.format.answers import results
from modelstore.format.names import ORIGINAL, check_word, parse_reference
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.progress import Progress
from modelstore.format.recipe import Recipe
from modelstore.paths import from_home
from modelstore.plan.work import Work
from modelstore.store.damage import UNREADABLE

if TYPE_CHECKING:
    from modelstore.calibrate.block import Asked
    from modelstore.calibrate.run import Calibrated
    from modelstore.calibrate.text import Calibration, Samples
    from modelstore.client.reading import Readable
    from modelstore.compress.codes import Codes
    from modelstore.compress.job import Spread
    from modelstore.compress.parent import Parent
    from modelstore.compress.reused import Previous
    from modelstore.execute.read.loading import Variant


def compress(
    access: Access,
    model: Readable,
    value: str | Recipe | Mapping[str, Any],
    *,
    variant: str | None,
    codes: str | PathLike[str] | None,
    include: Iterable[str],
    skip: Iterable[str],
    requantize: bool,
    calibration: str | PathLike[str] | Calibration | None,
    progress: Progress | None,
) -> results.Compressed:
    """Make a variant of a version, as `Model.compress` says."""
    from modelstore.compress.job import compress, variants_of

    started = time.monotonic()
    with _codes(access, codes) as given:
        parent, plan, wanted = planned(access, model, value, given, include, skip, requantize)
        name = check_word(variant, "variant") if variant is not None else check_word(plan.recipe, "recipe")
        variants = variants_of(plan, name)
        if variant is not None and variants != (name,):
            raise ValueError(
                f"variant={variant!r} has no effect: recipe {plan.recipe!r} makes {', '.join(variants)}, leave it out"
            )
        if not parent.record.variants.keys() >= set(variants):
            access.repo.storage.check_writable(f"make {', '.join(variants)}")
        calibrated = _calibrated(access, model, parent, plan, wanted, calibration)
        passes = 2 if wanted.prune is not None else 1
        total = passes * sum(choice.bytes for choice in plan.compressed)
        work = access.work(progress).begin(total, f"compressing {model.asked} to {', '.join(variants)}")
        entries = _earlier(access, parent.record, variants)
        outcome = compress(
            access.repo,
            parent,
            variants,
            plan,
            wanted,
            codes=given,
            earlier=[access.repo.manifests.entry(parent.record.model, entry) for entry in entries],
            previous=_previous(access, parent.record, variants),
            work=work,
            spread=_spread(access, parent, entries, work)
            if given is None and parent.stored is None and calibrated is None
            else None,
            calibrated=calibrated,
        )
        return outcome.result(plan, time.monotonic() - started)


def plan_compression(
    access: Access,
    model: Readable,
    value: str | Recipe | Mapping[str, Any],
    *,
    codes: str | PathLike[str] | None,
    include: Iterable[str],
    skip: Iterable[str],
    requantize: bool,
    calibration: str | PathLike[str] | Calibration | None,
) -> results.CompressionPlan:
    """The plan of `compress`."""
    with _codes(access, codes) as given:
        parent, plan, wanted = planned(access, model, value, given, include, skip, requantize)
    opened = _looks(access, model, parent, wanted, calibration)
    if opened is None:
        return plan
    from modelstore.calibrate.foretold import foretold
    from modelstore.calibrate.text import LENGTH, SAMPLES
    from modelstore.compress.evaluate.model import language_config

    if calibration is None:
        config, count, length = language_config(opened), SAMPLES, LENGTH
    else:
        config, samples = looked_at(opened, calibration)
        count, length = samples.ids.shape
    asked = _asked(access, opened, config, parent, plan, wanted)
    return msgspec.structs.replace(plan, looks=foretold(asked, count, length))


def planned(
    access: Access,
    model: Readable,
    value: str | Recipe | Mapping[str, Any],
    codes: Codes | None,
    include: Iterable[str],
    skip: Iterable[str],
    requantize: bool,
) -> tuple[Parent, results.CompressionPlan, Recipe]:
    """The tensors to compress, the plan for each, and the recipe with the given includes and skips."""
    from modelstore.compress.plan import check_requantize, check_targets, give_codes, plan_compression, resolve
    from modelstore.compress.requantized import parent_of

    include, skip = tuple(include), tuple(skip)
    recipe = resolve(value, include, skip)
    if requantize:
        check_requantize(recipe, codes)
    if model.variant != ORIGINAL:
        raise ValueError(
            f"{model.asked!r} names a variant: variants are made of a version's original, give {model.name!r}"
        )
    record = model.record()
    entry = access.repo.catalog.variant(record, ORIGINAL)
    opened = access.opened(model.name, entry)
    parent, dequantized = parent_of(record, entry.manifest, opened.reader, opened.config(), requantize)
    plan = plan_compression(parent.manifest, parent.config, recipe, parent.architecture, dequantized)
    check_targets(plan, {"include": include, "skip": skip})
    if codes is not None:
        plan = give_codes(plan, opened.manifest, recipe, codes.given, codes.origin)
    return parent, plan, recipe


def _calibrated(
    access: Access,
    model: Readable,
    parent: Parent,
    plan: results.CompressionPlan,
    recipe: Recipe,
    given: str | PathLike[str] | Calibration | None,
) -> Calibrated | None:
    """The solver of a recipe's tensors on a text; None if the recipe needs none."""
    opened = _looks(access, model, parent, recipe, given)
    if opened is None:
        return None
    if given is None:
        raise ValueError(
            f"recipe {recipe.name!r} looks at data: give a text that it is calibrated on, calibration='book.txt'"
        )
    from modelstore.calibrate.run import Calibrated

    config, samples = looked_at(opened, given)
    return Calibrated.of(_asked(access, opened, config, parent, plan, recipe), samples, access.limits().memory)


def _looks(access: Access, model: Readable, parent: Parent, recipe: Recipe, given: object) -> Variant | None:
    """The original, where a recipe looks at data, None if it does not; `ValueError` if it cannot, or a text is idle."""
    if not recipe.calibrated:
        if given is not None:
            raise ValueError(f"calibration= has no effect: recipe {recipe.name!r} looks at no data, leave it out")
        return None
    if parent.stored is not None:
        raise ValueError(
            "requantize=True makes weights that no text is run through: compress without data, or dequantize first"
        )
    return access.opened(model.name, access.repo.catalog.variant(parent.record, ORIGINAL))


def _asked(
    access: Access, opened: Variant, config: Any, parent: Parent, plan: results.CompressionPlan, recipe: Recipe
) -> Asked:
    """The questions of a plan about a model's layers; no weight is read yet."""
    from modelstore.calibrate.block import Asked
    from modelstore.compress.evaluate.model import class_of
    from modelstore.compress.stages import Stages

    specs = {choice.name: choice.codec for choice in plan.compressed if choice.codec}
    rules = {choice.name: recipe.rule(choice.name, choice.kind) for choice in plan.compressed}
    wanted = {name: rule.method for name, rule in rules.items() if rule is not None and rule.method is not None}
    return Asked(Stages(opened, class_of(config), access.limits()), parent.manifest, specs, wanted)


def looked_at(opened: Variant, given: str | PathLike[str] | Calibration) -> tuple[Any, Samples]:
    """A model's config as transformers has it, and the samples of a text that it looks at."""
    from modelstore.calibrate.text import Calibration, cut
    from modelstore.client.compression.evaluating import text_of
    from modelstore.compress.evaluate.model import language_config, tokens

    how = given if isinstance(given, Calibration) else Calibration(given)
    config = language_config(opened)
    sizes = Sizes(config)
    ids = tokens(opened, text_of(how.text)[1])
    return config, cut(ids, how, sizes.vocabulary, sizes.positions)


def _spread(access: Access, parent: Parent, earlier: Iterable[VariantEntry], work: Work) -> Spread | None:
    """How a cluster's workers take a job's tensors; None without a cluster."""
    if access.session is None or access.source is None:
        return None
    from modelstore.cluster.work.compression import Compression, Encoding
    from modelstore.cluster.work.jobs import run

    model = parent.record.model
    before = tuple((model, entry.manifest) for entry in earlier)
    config = dict(parent.config) if parent.config else None
    encoding = Encoding(access.source, model, parent.digest, config, before)
    return lambda whole: run(Compression(encoding, parent.record.version, whole, parent.manifest), work.advance)


def _earlier(access: Access, record: VersionRecord, variants: tuple[str, ...]) -> list[VariantEntry]:
    """The variants with chunks that a compression may find again: all of this version, and these of the version before."""
    entries = list(record.variants.values())
    before = _before(access, record)
    if before is not None:
        entries += [before.variants[name] for name in variants if name in before.variants]
    return entries


def _before(access: Access, record: VersionRecord) -> VersionRecord | None:
    """The version before one, of those that can be read."""
    older = (one for one in access.repo.catalog.readable(record.model) if one.version < record.version)
    return next(older, None)


def _previous(access: Access, record: VersionRecord, variants: tuple[str, ...]) -> Previous | None:
    """The variant of the version before, where it is made alone, and its original can be read."""
    from modelstore.compress.reused import Previous

    before = _before(access, record)
    if before is None or len(variants) != 1 or variants[0] not in before.variants:
        return None
    try:
        original, variant = (
            access.repo.manifests.entry(record.model, before.variants[name]) for name in (ORIGINAL, variants[0])
        )
    except UNREADABLE:
        return None
    return Previous(original, variant)


@contextmanager
def _codes(access: Access, where: str | PathLike[str] | None) -> Iterator[Codes | None]:
    """Codes to go under a ladder, of a local directory if there is one of that name, else of a stored variant."""
    from modelstore.compress.codes_open import of_directory, of_model

    if where is None:
        yield None
        return
    path = from_home(where)
    if path.is_dir():
        codes: Codes = of_directory(path)
    else:
        try:
            ref = parse_reference(str(where))
            stored = access.stored(ref)
        except (ValueError, NotFoundError) as error:
            said = f" ({error})" if isinstance(error, NotFoundError) else ""
            raise NotFoundError(
                f"codes={str(where)!r} is neither a directory nor a stored variant{said}: give either, with codes of int4",
                object=str(path),
            ) from None
        codes = of_model(str(ref), stored)
    with closing(codes):
        yield codes
