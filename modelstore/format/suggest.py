"""What was meant, where a name is not known: the one place that says "did you mean"."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with up to three known names that are like it; "" where none is."""
    names = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    short = name.lower().rpartition("/")[2]  # 'llama' for 'org/llama', too
    close += [one for one in names if one not in close and one.rpartition("/")[2] == short][: 3 - len(close)]
    found = [repr(names[one]) for one in close]
    if not found:
        return ""
    return f" (did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?)"
