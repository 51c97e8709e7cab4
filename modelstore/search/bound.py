"""The smallest mix that holds a bound on what is measured: few are made and judged, the front says which."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRIALS = 4
_TRIAL = re.compile(r"kl-trial-[0-9a-f]{16}-[0-9]+")


def trial(wish: str, size: int) -> str:
    """The name of a variant while it is judged, by the digest of what is asked for."""
    return f"kl-trial-{wish}-{size}"


def is_trial(name: str, wish: str = "") -> bool:
    """Whether a variant is there to be judged only; of what is asked for, where its digest is given."""
    return bool(_TRIAL.fullmatch(name)) and name.startswith(f"kl-trial-{wish}")


@dataclass(frozen=True)
class Trial:
    """A mix that was made and judged, by its number on the front, and what came out."""

    at: int
    found: float


def bisect(expected: Sequence[float], limit: float, judge: Callable[[int], float]) -> tuple[int | None, list[Trial]]:
    """The number of the smallest mix that was found to hold `limit`, None if none did; and all trials, at most four.

    `expected`: of mixes by size, what each is expected to come to, falling. The measured value is taken to be a multiple of
    it, the same at neighbours; a mix that was found to hold, or not, ends the search on its side.
    """
    low, high = -1, len(expected)  # the largest known not to hold, the smallest known to
    trials: list[Trial] = []
    ratio = 1.0
    while len(trials) < TRIALS and high - low > 1:
        spare = 1.0 if len(trials) < TRIALS - 1 or high < len(expected) else 1.25  # the last one is to hold
        fits = [at for at in range(low + 1, high) if expected[at] * ratio * spare <= limit]
        at = fits[0] if fits else high - 1
        found = judge(at)
        trials.append(Trial(at, found))
        if found <= limit:
            high = at
        else:
            low = at
        if expected[at] > 0 and found > 0:
            ratio = found / expected[at]
    return (high if high < len(expected) else None), trials
