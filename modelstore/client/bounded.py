"""The smallest variant that holds a bound on its divergence: mixes are made and judged on a text, and one stays."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from modelstore.client.access import Access
from modelstore.client.ahead import check_judge, check_made, check_writes, recipe_there
from modelstore.client.evaluating import evaluate, text_of
from modelstore.client.fitting import Fitting, made
from modelstore.client.wishes import Wish
from modelstore.errors import UnsupportedError
from modelstore.format import results
from modelstore.format.digest import name_of
from modelstore.format.names import Reference
from modelstore.format.progress import Progress
from modelstore.format.recipe import Recipe

if TYPE_CHECKING:
    from modelstore.client.reading import Readable
    from modelstore.search.bound import Trial
    from modelstore.search.mix import Mix

_MOST = 700.0  # of which the exponential is a number
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

    What was made and judged before a crash is found again by the same call. An error leaves nothing but the measurement.
    """
    from modelstore.search.bound import bisect

    name = check_made(variant or f"{bound.word}-{_shown(bound.limit)}")
    ready = Fitting(access, model, wish)
    digest = _digest(ready, bound, text, wish)
    why = f"the smallest mix found to hold {bound.name}={_shown(bound.limit)} on the text of {digest}"
    search = _Search(access, model, ready, bound, text, wish, name, digest, why, progress)
    try:
        before = recipe_there(access, ready.record, name, ready.said(why) if ready.data else "")
        if before is not None:
            return made(access, model, before, name, wish, progress)
        check_writes(access)
        check_judge(ready.opened, text, search.context, wish.calibration)
        if not any(group.codec for group in ready.mixture().front()[0].groups):
            raise UnsupportedError(
                f"no format is smaller than what is stored of {model.asked}: name others, formats=['int4']"
            )
        ready.measure(progress)
        front = [mix for mix in ready.mixture().front() if any(group.codec for group in mix.groups)]
        if not front:
            raise UnsupportedError(f"the data say nothing of what takes part in {model.asked}: give another text")
        at, trials = bisect(
            [bound.expected(mix.cost) for mix in front], bound.limit, lambda at: search.judge(front[at])
        )
        if at is None:
            raise UnsupportedError(_none(bound, [front[one.at] for one in trials], trials))
        return search.publish(front[at])
    finally:
        search.clear()


@dataclass(frozen=True)
class Bound:
    """How far a variant may be from the original: `limit` nats a token (`max_kl`), or a share of the original's perplexity."""

    name: str  # of the argument
    limit: float

    @property
    def word(self) -> str:
        """With which names of variants begin."""
        return "kl" if self.name == "max_kl" else "ppl"

    def expected(self, cost: float) -> float:
        """What a mix is expected to come to that is expected to diverge by so much."""
        return cost if self.name == "max_kl" else math.expm1(min(cost, _MOST))

    def found(self, measured: results.Measured) -> float:
        """What an evaluation says of it; infinite where it says nothing."""
        if self.name == "max_kl":
            return float("inf") if measured.kl is None else measured.kl
        if measured.perplexity is None or measured.baseline_perplexity is None:
            return float("inf")
        return max(0.0, measured.perplexity / measured.baseline_perplexity - 1)

    def said(self, found: float) -> str:
        """What was found, with its unit."""
        return f"{found:.3g} nats a token" if self.name == "max_kl" else f"{100 * found:.3g} % more perplexity"


def _shown(limit: float) -> str:
    """A limit with all its digits, as a name may have them."""
    return repr(limit).removesuffix(".0").replace("e+", "e")


def _digest(ready: Fitting, bound: Bound, text: str | os.PathLike[str], wish: Wish) -> str:
    """The digest of all that is asked for, by which the same call finds what it made."""
    asked = {
        "limit": [bound.name, repr(bound.limit)],
        "method": wish.method,
        "formats": [[spec.name, sorted(spec.params.items())] for spec in ready.formats],
        "include": sorted(set(wish.include)),
        "skip": sorted(set(wish.skip)),
        "data": ready.data,
        "text": name_of(text_of(text)[1].encode()),
        "judged": [_TOKENS, _CONTEXT],
    }
    return name_of(msgspec.json.encode(asked, order="deterministic"))[:16]


class _Search:
    """Mixes that are variants while they are judged."""

    def __init__(
        self,
        access: Access,
        model: Readable,
        ready: Fitting,
        bound: Bound,
        text: str | os.PathLike[str],
        wish: Wish,
        name: str,
        digest: str,
        why: str,
        progress: Progress | None,
    ) -> None:
        self._access, self._model, self._ready, self._bound, self._text, self._wish = (
            access,
            model,
            ready,
            bound,
            text,
            wish,
        )
        self._name, self._digest, self._why, self._progress = name, digest, why, progress
        self._made: dict[int, results.Compressed] = {}
        longest = ready.positions
        self.context = min(_CONTEXT, longest) if longest else _CONTEXT

    def judge(self, mix: Mix) -> float:
        """How far a mix is from the original."""
        trial = self._trial(mix)
        self._made[mix.bytes] = self._compress(self._ready.recipe(mix, self._name, self._why), trial)
        at = Reference(self._ready.record.model, version=self._ready.record.version, variant=trial)
        (found,) = evaluate(
            self._access,
            [at],
            text=self._text,
            keep=True,
            progress=self._progress,
            context=self.context,
            limit=_TOKENS,
        )
        return self._bound.found(found.measured)

    def publish(self, mix: Mix) -> results.Compressed:
        """Give a mix that was judged its name."""
        record, repo = self._ready.record, self._access.repo
        entry = repo.catalog.variant(repo.catalog.version(record.model, record.version), self._trial(mix))
        repo.catalog.publish_variants(record.model, record.version, {self._name: entry}, uuid.uuid4().hex)
        first = self._made[mix.bytes]
        again = self._compress(self._ready.recipe(mix, self._name, self._why), self._name)
        return results.Compressed(
            first.model,
            first.version,
            again.variants,
            first.compressed,
            first.kept,
            first.bytes,
            sum(one.stored for one in self._made.values()),
            sum(one.seconds for one in self._made.values()),
            again.metrics,
        )

    def clear(self) -> None:
        """Delete what was judged; a garbage collection frees its bytes."""
        from modelstore.search.bound import is_trial

        record, catalog = self._ready.record, self._access.repo.catalog
        for name in catalog.version(record.model, record.version).variants:
            if is_trial(name, self._digest):
                catalog.delete(record.model, record.version, name, uuid.uuid4().hex)

    def _trial(self, mix: Mix) -> str:
        from modelstore.search.bound import trial

        return trial(self._digest, mix.bytes)

    def _compress(self, recipe: Recipe, variant: str) -> results.Compressed:
        return made(self._access, self._model, recipe, variant, self._wish, self._progress)


def _none(bound: Bound, mixes: Sequence[Mix], trials: Sequence[Trial]) -> str:
    """Why there is no such mix."""
    least = min(range(len(trials)), key=lambda at: trials[at].found)
    return (
        f"no mix was found that holds {bound.name}={_shown(bound.limit)} on this text: of {len(trials)} that were made, that of "
        f"{mixes[least].bytes} bytes was closest, with {bound.said(trials[least].found)}: give a larger bound, or name "
        f"formats of more bits"
    )
