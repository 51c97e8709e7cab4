"""The smallest variant that holds a bound on its divergence: mixes are made and judged on a text, and one stays."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from modelstore.client.access import Access
from modelstore.client.compression.ahead import check_judge, check_made, check_writes, recipe_there
from modelstore.client.compression.bounds import Bound
from modelstore.client.compression.evaluating import evaluate, text_of
from modelstore.client.compression.fitting import Fitting, made
from modelstore.client.compression.wishes import Wish
from modelstore.errors import UnsupportedError
from modelstore.format.answers import results
from modelstore.format.digest import name_of
from modelstore.format.names import Reference
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
    bound: Bound,
    text: str | os.PathLike[str],
    wish: Wish,
    *,
    variant: str | None,
    progress: Progress | None,
) -> results.Compressed:
    """Make the smallest mix that was found to hold a bound, as `Model.compress` says.

    The same call finds again what it made and judged before a crash. An error leaves nothing but the measurement.
    """
    name = check_made(variant or f"{bound.word}-{_shown(bound.limit)}")
    ready = Fitting(access, model, wish)
    search = _Search(ready, bound, text, name, progress)
    said = ready.said(search.why) if ready.data else ""
    try:
        before = recipe_there(access, ready.record, name, said)
        if before is not None:
            return search.make(before, name)
        check_writes(access)
        check_judge(ready.opened, text, search.context, wish.calibration)
        return _searched(search, ready, bound)
    finally:
        search.clear()


def _searched(search: _Search, ready: Fitting, bound: Bound) -> results.Compressed:
    """Measure what formats cost, then make and judge mixes until the smallest that holds the bound is known."""
    from modelstore.search.bound import bisect

    if not _mixes(ready):
        raise UnsupportedError(
            f"no format is smaller than what is stored of {ready.model.asked}: name others, formats=['int4']"
        )
    ready.measure(search.progress)
    front = _mixes(ready)
    if not front:
        raise UnsupportedError(f"the data say nothing of what takes part in {ready.model.asked}: give another text")
    expected = [bound.expected(mix.cost) for mix in front]
    at, trials = bisect(expected, bound.limit, lambda at: search.judge(front[at]))
    if at is None:
        raise UnsupportedError(_none(bound, [front[one.at] for one in trials], trials))
    return search.publish(front[at])


def _mixes(ready: Fitting) -> list[Mix]:
    """The mixes on the front, as far as what formats cost is known, in which anything is compressed."""
    return [mix for mix in ready.mixture().front() if any(group.codec for group in mix.groups)]


def _shown(limit: float) -> str:
    """A limit with all its digits, as a name may have them."""
    return repr(limit).removesuffix(".0").replace("e+", "e")


@dataclass
class _Search:
    """Mixes that are variants while they are judged; one of them is published as `name`."""

    ready: Fitting
    bound: Bound
    text: str | os.PathLike[str]
    name: str
    progress: Progress | None
    made: dict[int, results.Compressed] = field(default_factory=dict)  # by bytes of a mix

    @cached_property
    def digest(self) -> str:
        """The digest of all that is asked for, by which the same call finds what it made."""
        ready, wish = self.ready, self.ready.wish
        asked = {
            "limit": [self.bound.argument, repr(self.bound.limit)],
            "method": wish.method,
            "formats": [[spec.name, sorted(spec.params.items())] for spec in ready.formats],
            "include": sorted(set(wish.include)),
            "skip": sorted(set(wish.skip)),
            "data": ready.data,
            "text": name_of(text_of(self.text)[1].encode()),
            "judged": [_TOKENS, _CONTEXT],
        }
        return name_of(msgspec.json.encode(asked, order="deterministic"))[:16]

    @property
    def why(self) -> str:
        """Why the mix is what it is, as its recipe says."""
        said = f"{self.bound.argument}={_shown(self.bound.limit)}"
        return f"the smallest mix found to hold {said} on the text of {self.digest}"

    @property
    def context(self) -> int:
        """Tokens that a mix is judged on at a time."""
        return min(_CONTEXT, self.ready.positions or _CONTEXT)

    def judge(self, mix: Mix) -> float:
        """How far a mix is from the original."""
        trial, record = self._trial(mix), self.ready.record
        self.made[mix.bytes] = self.make(self._recipe(mix), trial)
        (found,) = evaluate(
            self.ready.access,
            [Reference(record.model, version=record.version, variant=trial)],
            text=self.text,
            keep=True,
            progress=self.progress,
            context=self.context,
            limit=_TOKENS,
        )
        return self.bound.found(found.measured)

    def publish(self, mix: Mix) -> results.Compressed:
        """Give a mix that was judged its name."""
        record, catalog = self.ready.record, self.ready.access.repo.catalog
        entry = catalog.variant(catalog.version(record.model, record.version), self._trial(mix))
        catalog.publish_variants(record.model, record.version, {self.name: entry}, uuid.uuid4().hex)
        first = self.made[mix.bytes]
        again = self.make(self._recipe(mix), self.name)
        return results.Compressed(
            first.model,
            first.version,
            again.variants,
            first.compressed,
            first.kept,
            first.bytes,
            sum(one.stored for one in self.made.values()),
            sum(one.seconds for one in self.made.values()),
            again.metrics,
        )

    def clear(self) -> None:
        """Delete what was judged; a garbage collection frees its bytes."""
        from modelstore.search.bound import is_trial

        record, catalog = self.ready.record, self.ready.access.repo.catalog
        for name in catalog.version(record.model, record.version).variants:
            if is_trial(name, self.digest):
                catalog.delete(record.model, record.version, name, uuid.uuid4().hex)

    def make(self, recipe: Recipe | Mapping[str, Any], variant: str) -> results.Compressed:
        """Compress by a recipe."""
        return made(self.ready.access, self.ready.model, recipe, variant, self.ready.wish, self.progress)

    def _trial(self, mix: Mix) -> str:
        from modelstore.search.bound import trial

        return trial(self.digest, mix.bytes)

    def _recipe(self, mix: Mix) -> Recipe:
        return self.ready.recipe(mix, self.name, self.why)


def _none(bound: Bound, mixes: Sequence[Mix], trials: Sequence[Trial]) -> str:
    """Why there is no such mix."""
    least = min(range(len(trials)), key=lambda at: trials[at].found)
    return (
        f"no mix was found that holds {bound.argument}={_shown(bound.limit)} on this text: of {len(trials)} that were made, "
        f"that of {mixes[least].bytes} bytes was closest, with {bound.said(trials[least].found)}: give a larger bound, or "
        f"name formats of more bits"
    )
