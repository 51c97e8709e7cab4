"""The smallest variant that holds a bound on its divergence: mixes are made and judged on a text, and one stays."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelstore.client.access import Access
from modelstore.client.compressing import compress
from modelstore.client.evaluating import evaluate, text_of
from modelstore.client.fitting import Fitting, Wish
from modelstore.errors import ConflictError, UnsupportedError
from modelstore.format import results
from modelstore.format.digest import name_of
from modelstore.format.names import Reference, check_word
from modelstore.format.progress import Progress
from modelstore.format.recipe import Recipe

if TYPE_CHECKING:
    from modelstore.client.reading import Readable
    from modelstore.search.bound import Trial
    from modelstore.search.mix import Mix

_TOKENS = 8192  # of the text that mixes are judged on
_CONTEXT = 512


def bounded(
    access: Access,
    model: Readable,
    limit: float,
    text: str | os.PathLike[str],
    wish: Wish,
    *,
    variant: str | None,
    progress: Progress | None,
) -> results.Compressed:
    """Make the smallest mix that was found to diverge by at most `limit` nats a token, as `Model.compress` says.

    What was made and judged before an interruption is found again by the same call.
    """
    from modelstore.search.bound import bisect

    name = check_word(variant or f"kl-{limit:g}", "variant")
    why = f"the smallest mix found to hold max_kl={limit:g} on {name_of(text_of(text)[1].encode())[:16]}"
    ready = Fitting(access, model, wish)
    search = _Search(access, model, ready, text, wish, name, why, progress)
    before = search.there()
    if before is not None:
        return before
    ready.measure(progress)
    front = [mix for mix in ready.mixture().front() if any(group.codec for group in mix.groups)]
    at, trials = bisect([mix.cost for mix in front], limit, lambda at: search.judge(front[at]))
    try:
        if at is None:
            raise UnsupportedError(_none(limit, [front[one.at] for one in trials], trials))
        return search.publish(front[at])
    finally:
        search.clear()


class _Search:
    """Mixes that are variants while they are judged."""

    def __init__(
        self,
        access: Access,
        model: Readable,
        ready: Fitting,
        text: str | os.PathLike[str],
        wish: Wish,
        name: str,
        why: str,
        progress: Progress | None,
    ) -> None:
        self._access, self._model, self._ready, self._text, self._wish = access, model, ready, text, wish
        self._name, self._why, self._progress = name, why, progress
        self._made: dict[int, results.Compressed] = {}

    def there(self) -> results.Compressed | None:
        """What the same call made before; None where it made nothing. `ConflictError` where the name is another's."""
        entry = self._ready.record.variants.get(self._name)
        if entry is None:
            return None
        manifest = self._access.repo.manifests.entry(self._ready.record.model, entry)
        said = str(manifest.recipe.get("description", ""))
        same = self._ready.sensitivity is not None and said == self._ready.said(self._why)
        if not same or manifest.recipe.get("name") != self._name:
            raise ConflictError(
                f"{self._model.asked} has a variant {self._name!r} already, of another recipe: delete it first, or give "
                f"another name",
                model=self._ready.record.model,
            )
        rules = {key: manifest.recipe[key] for key in ("name", "rules", "description")}
        return self._compress(rules, self._name)

    def judge(self, mix: Mix) -> float:
        """How far a mix is from the original."""
        trial = self._trial(mix)
        self._made[mix.bytes] = self._compress(self._ready.recipe(mix, self._name, self._why), trial)
        at = Reference(self._ready.record.model, version=self._ready.record.version, variant=trial)
        longest = self._ready.positions
        (found,) = evaluate(
            self._access,
            [at],
            text=self._text,
            baseline=True,
            keep=True,
            progress=self._progress,
            context=min(_CONTEXT, longest) if longest else _CONTEXT,
            stride=None,
            limit=_TOKENS,
            batch=None,
            device="cpu",
            dtype="float32",
        )
        return float("inf") if found.measured.kl is None else found.measured.kl

    def publish(self, mix: Mix) -> results.Compressed:
        """Give a mix that was judged its name."""
        record, repo = self._ready.record, self._access.repo
        entry = repo.catalog.variant(repo.catalog.version(record.model, record.version), self._trial(mix))
        repo.catalog.publish_variants(record.model, record.version, {self._name: entry}, uuid.uuid4().hex)
        made = self._made[mix.bytes]
        again = self._compress(self._ready.recipe(mix, self._name, self._why), self._name)
        return results.Compressed(
            made.model,
            made.version,
            again.variants,
            made.compressed,
            made.kept,
            made.bytes,
            sum(one.stored for one in self._made.values()),
            sum(one.seconds for one in self._made.values()),
            again.metrics,
        )

    def clear(self) -> None:
        """Delete what was judged; a garbage collection frees its bytes."""
        record, catalog = self._ready.record, self._access.repo.catalog
        there = catalog.version(record.model, record.version).variants
        for size in self._made:
            if self._named(size) in there:
                catalog.delete(record.model, record.version, self._named(size), uuid.uuid4().hex)

    def _trial(self, mix: Mix) -> str:
        return self._named(mix.bytes)

    def _named(self, size: int) -> str:
        return check_word(f"{self._name}.trial-{size}", "variant")

    def _compress(self, recipe: Recipe | dict[str, object], variant: str) -> results.Compressed:
        return compress(
            self._access,
            self._model,
            recipe,
            variant=variant,
            codes=None,
            include=(),
            skip=(),
            requantize=False,
            calibration=self._wish.calibration if self._wish.method else None,
            progress=self._progress,
        )


def _none(limit: float, mixes: Sequence[Mix], trials: Sequence[Trial]) -> str:
    """Why there is no such mix."""
    least = min(range(len(trials)), key=lambda at: trials[at].found)
    return (
        f"no mix was found that holds max_kl={limit:g} on this text: of {len(trials)} that were made, that of "
        f"{mixes[least].bytes} bytes was closest, with {trials[least].found:.3g} nats a token: give a larger bound, or name "
        f"formats of more bits"
    )
