"""The interface between a compression and the solver that finds values on data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import Written
from modelstore.format.objects.manifest import Manifest

Write = Callable[[list[Input]], dict[str, Written]]


@dataclass(frozen=True)
class Begun:
    """The state that an interrupted run of the same work left.

    `written`: names of tensors that are stored; `reader` gives these, as the variant will. `notes`: what was noted, by name;
    `note` notes more for a later run, plain data.
    """

    written: Collection[str]
    reader: Reader
    notes: Mapping[str, Any]
    note: Callable[[str, Any], None]


class Solver(Protocol):
    """Finds values of tensors on data, and writes them with all others."""

    @property
    def recorded(self) -> Mapping[str, Any]:
        """A manifest's entry on the data."""

    @property
    def notes(self) -> dict[str, str]:
        """Once it has run: why tensors were left to what the weights alone give, by name."""

    @property
    def gains(self) -> Sequence[str]:
        """Tensors that are kept exact, and of which it may yet write other values than the original's."""

    @property
    def folded(self) -> Mapping[str, Sequence[str]]:
        """Once it has run: the tensors that were divided by factors, each with those that were multiplied by them."""

    def run(self, items: list[Input], write: Write, begun: Begun) -> dict[str, Written]:
        """Write all items, in calls as it likes; those that are written already are not among them.

        Only those of the `gains` that differ from the original's.
        """


def noted(manifest: Manifest, calibrated: Solver | None) -> Manifest:
    """A manifest that says which tensors were left to what the weights alone give, and why; and what was folded into what."""
    if calibrated is None:
        return manifest
    said = {"data_free": calibrated.notes, "folded": calibrated.folded}
    return msgspec.structs.replace(manifest, metrics=manifest.metrics | {key: one for key, one in said.items() if one})
