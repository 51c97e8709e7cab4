"""An object that could not be read is not known to be damaged: it is reported differently, and once."""

from __future__ import annotations

from collections.abc import Iterable

from modelstore.format.answers.results import UNREADABLE, Problem


def told_once(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems, with those of the storage made one: a network that is down is one fault, however many objects it hides."""
    damaged: list[Problem] = []
    unread: list[Problem] = []
    for problem in problems:
        (unread if problem.kind == "storage" else damaged).append(problem)
    if not unread:
        return tuple(damaged)
    first = unread[0]
    objects = len({problem.object or problem.message for problem in unread})
    what = "1 object" if objects == 1 else f"{objects:,} objects"
    message = (
        f"{what} cannot be read now, which does not say that anything is damaged ({first.message}): see that the storage can "
        f"be reached and read by this user, then run it again"
    )
    return (*damaged, Problem(UNREADABLE, message, first.model, first.tensor, first.chunk, first.object))
