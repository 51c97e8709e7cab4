"""`plan compress --fit`: what a fit would do, as lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from modelstore.cli.terminal import output, units

if TYPE_CHECKING:
    from modelstore.format.answers.fitted import FitPlan, Memory, Mixed

_SHOWN = 12  # points of the front


def lines(found: FitPlan) -> Iterator[str]:
    """A fit's groups and its front; or what has to be measured first."""
    if found.memory is not None:
        yield from _memory(found.memory)
    possible = f"{units.size(found.smallest)} (the smallest) to {units.size(found.original)} (all kept)"
    if not found.measured:
        yield f"sizes from {possible} are possible; {units.size(found.budget)} are given"
        yield (
            f"it was not measured yet what formats cost: {found.passes} passes over the data come first, "
            f"{units.count(found.blocks, 'block')} there and back, with up to {units.size(found.spool)} of activations; "
            f"--measure does it now"
        )
        return
    assert found.bytes is not None
    assert found.cost is not None
    rows = [
        (
            one.tensors[0] + (f" and {len(one.tensors) - 1} more" if len(one.tensors) > 1 else ""),
            _codec(one),
            units.size(one.bytes),
            f"{one.cost:.2e}",
        )
        for one in found.groups
    ]
    yield from output.table(rows, ("TENSORS", "FORMAT", "SIZE", "COST"), right=(2, 3))
    front = found.front[:: max(1, -(-len(found.front) // _SHOWN))]
    yield from output.table(
        [(units.size(one.bytes), f"{one.cost:.3g}") for one in front], ("ANOTHER SIZE", "COST"), right=(0, 1)
    )
    if found.unseen:
        yield f"{units.count(len(found.unseen), 'tensor')} the data say nothing of: they count as the dearest of their kind"
    if found.seconds is not None:
        yield f"{found.seconds:.3g} s a token on the device, by what was measured there"
    yield (
        f"{units.size(found.bytes)} of {units.size(found.budget)}, expected to diverge by {found.cost:.3g} nats a token; "
        f"possible are {possible}"
    )


def _memory(found: Memory) -> Iterator[str]:
    cache, activations, logits = (units.size(one) for one in (found.cache, found.activations, found.logits))
    yield (
        f"in memory, beside the weights: {cache} of KV cache, {activations} of activations and {logits} of logits, for "
        f"{units.count(found.batch, 'sequence')} of {found.context} tokens"
    )


def _codec(one: Mixed) -> str:
    return " ".join([one.codec, *(f"{key}={value}" for key, value in one.params.items())]) if one.codec else "kept"
