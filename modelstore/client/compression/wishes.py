"""The wishes for a mix of formats, and whether they can be met together."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from modelstore.client.compression.bounds import BOUNDS
from modelstore.format.recipe import MIXABLE, Method, Recipe, Rule, check

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration

_OF = {"context": "tokens", "batch": "sequences"}


@dataclass(frozen=True)
class Wish:
    """Wishes for a mix beside its size, as in `Model.compress`."""

    calibration: str | PathLike[str] | Calibration | None
    method: str | None
    formats: tuple[str, ...]
    include: tuple[str, ...]
    skip: tuple[str, ...]
    context: int | None = None
    batch: int | None = None
    engine: str | None = None
    device: str | PathLike[str] | None = None

    def check(self) -> None:
        """`ValueError` if it cannot be meant so."""
        from modelstore.compress.presets import preset
        from modelstore.search.engines import ENGINES

        for name in ("context", "batch"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} is not a number of {_OF[name]}: give 1 or more")
        if self.batch is not None and self.context is None:
            raise ValueError("batch= counts sequences of context= tokens in an engine's memory: give context=, too")
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not one of {', '.join(ENGINES)}")

        if self.method is not None and self.method not in MIXABLE:
            raise ValueError(f"method={self.method!r} is not one of {', '.join(MIXABLE)}, which find a mix's values")
        if self.method is not None and self.calibration is None:
            raise ValueError(f"method={self.method!r} looks at data: give a text, calibration='book.txt'")
        for name in self.formats if self.method is not None else ():
            rules = tuple(Rule(one.targets, one.codec, Method(self.method or "")) for one in preset(name).rules)
            if not preset(name).calibrated:
                check(Recipe(name, rules))  # says of which format it is


def check_asked(
    *,
    recipe: object,
    fit: object,
    max_kl: float | None,
    max_perplexity_increase: float | None,
    text: object,
    wish: Wish,
    codes: object,
    requantize: object,
) -> None:
    """`ValueError` unless exactly one is given: a recipe, a size or a bound; or if another argument has no effect beside it."""
    bounds = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
    asked = {name: one for name, one in {"recipe": recipe, "fit": fit, **bounds}.items() if one is not None}
    bound = next((name for name in bounds if name in asked), None)
    of_memory = {"context": wish.context, "batch": wish.batch, "device": wish.device}
    if not asked:
        raise ValueError(
            "say what is to be made: a recipe such as 'int4', a size, fit='120MiB', or a bound, max_kl=0.05"
        )
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(f'{name}=' for name in asked)} each say what is to be made: give one of them")
    if recipe is not None:
        idle = {"method": wish.method, "formats": wish.formats, "text": text, "engine": wish.engine, **of_memory}
        why = "a recipe says itself what is stored and how it is found"
    else:
        idle = {"codes": codes, "requantize": requantize} | ({"text": text} if bound is None else of_memory)
        why = f"{next(iter(asked))}= chooses formats itself, for the original's own weights"
    for name, value in idle.items():
        if value:
            raise ValueError(f"{name}= has no effect here: {why}; leave it out")
    for name, limit in bounds.items():
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(f"{name}={limit!r} is not a bound: give {BOUNDS[name].takes}")
    if bound is not None and text is None:
        raise ValueError(f"{bound}= is judged on a text that nothing was chosen on: give one, text='other.txt'")
