"""Suggestions for an unknown name: the one place that says "did you mean"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

_LIKE = 6  # names that are asked for whether they are there


def suggestion(name: str, known: Iterable[str], there: Callable[[str], bool] | None = None) -> str:
    """ " (did you mean 'x'?)" with up to three known names that are like it; "" where none is.

    `there` is asked of those that are like it, and of no other: a name that it denies is not suggested.
    """
    names = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), names, n=_LIKE if there else 3, cutoff=0.6)
    short = name.lower().rpartition("/")[2]  # 'llama' for 'org/llama', too
    close += [one for one in names if one not in close and one.rpartition("/")[2] == short][: 3 - len(close)]
    found = [repr(names[one]) for one in close if there is None or there(names[one])][:3]
    if not found:
        return ""
    return f" (did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?)"
