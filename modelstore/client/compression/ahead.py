"""Checks before minutes of work: names, stores that cannot be written to, and texts that are too short."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from modelstore.client.access import Access
from modelstore.client.compression.evaluating import text_of
from modelstore.errors import ConflictError
from modelstore.format.names import ORIGINAL, check_word
from modelstore.format.structure import CHECKPOINT

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration
    from modelstore.execute.read.loading import Variant
    from modelstore.format.objects.record import VersionRecord


def check_made(name: str) -> str:
    """Check the name of a variant to be made; `ValueError` if it is not valid, or is reserved for saves."""
    if name in (ORIGINAL, CHECKPOINT):
        raise ValueError(f"a variant that is made cannot be called {name!r}, as saves make it: choose another name")
    return check_word(name, "variant")


def check_writes(access: Access) -> None:
    """`UnsupportedError` if the store is open for reading only."""
    access.repo.storage.check_writable("keep what is found")


def recipe_there(access: Access, record: VersionRecord, name: str, said: str) -> dict[str, Any] | None:
    """The recipe of a variant that is there, None if there is none. `ConflictError` if its description is not `said`."""
    entry = record.variants.get(name)
    if entry is None:
        return None
    recipe = access.repo.manifests.entry(record.model, entry).recipe
    if recipe.get("name") != name or str(recipe.get("description", "")) != said:
        raise ConflictError(
            f"version {record.version} of model {record.model!r} has a variant {name!r} already, of another recipe: delete it "
            f"first, or give another name",
            model=record.model,
        )
    return {key: recipe[key] for key in ("name", "rules", "description")}


def check_judge(
    opened: Variant,
    text: str | os.PathLike[str],
    context: int,
    calibration: str | os.PathLike[str] | Calibration | None,
) -> None:
    """`ValueError` if a text is that of the calibration, or has less than one whole context of tokens."""
    from modelstore.calibrate.text import Calibration
    from modelstore.compress.evaluate.model import tokens

    content = text_of(text)[1]
    given = calibration.text if isinstance(calibration, Calibration) else calibration
    if given is not None and text_of(given)[1] == content:
        raise ValueError("text= is the calibration's own, on which formats were chosen: judge on another text")
    there = len(tokens(opened, content))
    if there < context:
        raise ValueError(
            f"text= has {there} tokens, and one whole context is {context}: a few predictions give no bound, give a "
            f"longer text"
        )
