"""How far a variant may be from the original: the measure, the expectation for a mix, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from modelstore.format.answers import results

_MOST = 700.0  # of which the exponential is a number


class Bound(Protocol):
    """A bound, as an argument of `Model.compress` gives it."""

    argument: ClassVar[str]
    word: ClassVar[str]  # the first part of the names of variants
    takes: ClassVar[str]  # what the argument is, as the end of "give …"

    @property
    def limit(self) -> float:
        """The most that may be found."""

    def expected(self, cost: float) -> float:
        """The expected measure of a mix that is expected to diverge by so many nats a token."""

    def found(self, measured: results.Measured) -> float:
        """The evaluation's result for this measure; infinite if there is none."""

    def said(self, found: float) -> str:
        """The result, with its unit."""


@dataclass(frozen=True)
class MaxKl:
    """At most `limit` nats a token of divergence."""

    limit: float
    argument: ClassVar[str] = "max_kl"
    word: ClassVar[str] = "kl"
    takes: ClassVar[str] = "nats a token, such as 0.05"

    def expected(self, cost: float) -> float:
        """As `Bound.expected`."""
        return cost

    def found(self, measured: results.Measured) -> float:
        """As `Bound.found`."""
        return math.inf if measured.kl is None else measured.kl

    def said(self, found: float) -> str:
        """As `Bound.said`."""
        return f"{found:.3g} nats a token"


@dataclass(frozen=True)
class MaxPerplexityIncrease:
    """At most the original's perplexity times 1 + `limit`."""

    limit: float
    argument: ClassVar[str] = "max_perplexity_increase"
    word: ClassVar[str] = "ppl"
    takes: ClassVar[str] = "a share, such as 0.02"

    def expected(self, cost: float) -> float:
        """As `Bound.expected`."""
        return math.expm1(min(cost, _MOST))

    def found(self, measured: results.Measured) -> float:
        """As `Bound.found`."""
        if measured.perplexity is None or measured.baseline_perplexity is None:
            return math.inf
        return max(0.0, measured.perplexity / measured.baseline_perplexity - 1)

    def said(self, found: float) -> str:
        """As `Bound.said`."""
        return f"{100 * found:.3g} % more perplexity"


BOUNDS: Mapping[str, type[MaxKl] | type[MaxPerplexityIncrease]] = {
    one.argument: one for one in (MaxKl, MaxPerplexityIncrease)
}
