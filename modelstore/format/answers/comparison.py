"""Results of a comparison of variants: a row of a table each."""

from __future__ import annotations

from modelstore.format.answers.brief import Result
from modelstore.format.answers.results import Measured


class Compared(Result, frozen=True):
    """A variant among others. `stored`: bytes of its tensors and files; `bits`: for each weight, of its tensors alone.

    `recipe` names how it was made, as `ls` does. `measured` is against the original of its own version. `front`: whether no
    other is both no larger and no further from its original, and better in one of them.
    """

    model: str
    version: int
    variant: str
    recipe: str
    stored: int
    weights: int
    bits: float
    measured: Measured
    front: bool

    @property
    def ref(self) -> str:
        """The reference that names it."""
        return f"{self.model}@{self.version}:{self.variant}"
