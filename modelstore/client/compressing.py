"""Making variants."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.client.base import Base
from modelstore.errors import NotFoundError
from modelstore.format import results
from modelstore.format.manifest import Manifest
from modelstore.format.names import ORIGINAL, check_word, parse_reference
from modelstore.format.progress import Advance, Progress, meter
from modelstore.format.recipe import Recipe
from modelstore.format.record import VariantEntry, VersionRecord

if TYPE_CHECKING:
    from modelstore.compress.codes import Codes
    from modelstore.compress.job import Parent, Spread


class Compressing(Base):
    """The part of a store that makes variants of models."""

    def compress(
        self,
        ref: str,
        recipe: str | Recipe | Mapping[str, Any],
        *,
        variant: str | None = None,
        codes: str | PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> results.Compressed:
        """Make a compressed variant of a version; the original stays as it is, exact.

        `recipe`: a preset's name (`modelstore.presets()`), a `Recipe`, or one as plain data. `variant` names what is made
        (default: the recipe's name). `include` and `skip` are further targets to compress by the recipe's first rule, and
        to keep: kinds ("embedding", "head", …) or patterns of names. "ladder" stores the original itself anew, with int8
        and int4 as parts of the same bytes, after proving that every bit comes back. `codes` are its int4 ones, found by
        GPTQ or the like: a directory of compressed-tensors (pack-quantized, symmetric, in groups), or a reference to a
        stored variant with such; weights without any are rounded to nearest. Everything is read and written chunk by chunk
        within the memory budget; what was interrupted goes on where it stopped when it is called again.

        `ValueError` for a recipe or codes that do not fit, `FormatError` for codes of another layout, `ConflictError` where
        there is another variant of that name.
        """
        from modelstore.compress.job import compress, variants_of

        started = time.monotonic()
        with self._codes(codes) as given:
            parent, plan, wanted = self._compression(ref, recipe, given, include, skip)
            name = check_word(variant, "variant") if variant is not None else plan.recipe
            variants = variants_of(plan, name)
            if variant is not None and variants != (name,):
                raise ValueError(
                    f"variant={variant!r} has no effect: recipe {plan.recipe!r} makes {', '.join(variants)}, leave it out"
                )
            passes = 2 if wanted.prune is not None else 1
            total = passes * sum(choice.bytes for choice in plan.compressed)
            metered = meter(progress, total, f"compressing {ref} to {', '.join(variants)}")
            outcome = compress(
                self.repo,
                parent,
                variants,
                plan,
                wanted,
                codes=given,
                earlier=self._earlier(parent.record, variants),
                limits=self._limits(),
                progress=metered,
                spread=self._spread(parent, variants, metered) if given is None else None,
            )
            return outcome.result(plan, time.monotonic() - started)

    def _spread(self, parent: Parent, variants: tuple[str, ...], progress: Advance | None) -> Spread | None:
        """How a cluster's workers take a job's tensors; None without a cluster."""
        if self._session is None or self._source is None:
            return None
        from modelstore.cluster.jobs import Job

        model = parent.record.model
        earlier = tuple((model, entry.manifest) for entry in self._earlier_entries(parent.record, variants))
        job = Job(self._source, model, parent.record.version, parent.digest, parent.config, earlier)
        return lambda portion: job.run(portion, parent.manifest, progress)

    def plan_compression(
        self,
        ref: str,
        recipe: str | Recipe | Mapping[str, Any],
        *,
        codes: str | PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
    ) -> results.CompressionPlan:
        """What `compress` would do, tensor by tensor, with sizes in bytes; nothing but manifests and headers is read."""
        with self._codes(codes) as given:
            return self._compression(ref, recipe, given, include, skip)[1]

    @contextmanager
    def _codes(self, where: str | PathLike[str] | None) -> Iterator[Codes | None]:
        """Codes to go under a ladder, of a local directory if there is one of that name, else of a stored variant."""
        from modelstore.compress.codes_open import DirectoryCodes, of_model

        if where is None:
            yield None
            return
        path = Path(where).expanduser()
        if path.is_dir():
            codes: Codes = DirectoryCodes(path)
        else:
            try:
                ref = parse_reference(str(where))
            except ValueError:
                raise NotFoundError(
                    f"{path} is no directory: give one of packed codes, or a reference to a stored variant",
                    object=str(path),
                ) from None
            codes = of_model(str(ref), self._model(ref))
        with closing(codes):
            yield codes

    def _compression(
        self,
        ref: str,
        value: str | Recipe | Mapping[str, Any],
        codes: Codes | None,
        include: Iterable[str],
        skip: Iterable[str],
    ) -> tuple[Parent, results.CompressionPlan, Recipe]:
        from modelstore.compress.job import Parent
        from modelstore.compress.plan import check_targets, give_codes, plan_compression, resolve

        include, skip = tuple(include), tuple(skip)
        recipe = resolve(value, include, skip)
        parsed = parse_reference(ref)
        if parsed.variant != ORIGINAL:
            raise ValueError(
                f"{ref!r} names a variant: variants are made of a version's original, give {parsed.name!r}"
            )
        self.repo.catalog.open()
        record, entry = self.repo.catalog.entry(parsed)
        model = self._opened(parsed.name, entry)
        plan = plan_compression(model.manifest, model.config(), recipe)
        check_targets(plan, {"include": include, "skip": skip})
        if codes is not None:
            plan = give_codes(plan, model.manifest, recipe, codes.given, codes.origin)
        return Parent(record, entry.manifest, model.manifest, model.reader, model.config()), plan, recipe

    def _earlier(self, record: VersionRecord, variants: tuple[str, ...]) -> list[Manifest]:
        """Manifests whose chunks a compression may find again."""
        return [self.repo.manifests.entry(record.model, entry) for entry in self._earlier_entries(record, variants)]

    def _earlier_entries(self, record: VersionRecord, variants: tuple[str, ...]) -> list[VariantEntry]:
        """All variants of this version, and these of the version before."""
        entries = list(record.variants.values())
        for before in self.repo.catalog.readable(record.model):
            if before.version < record.version:
                entries += [before.variants[name] for name in variants if name in before.variants]
                break
        return entries
