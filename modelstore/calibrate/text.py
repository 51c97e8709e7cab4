"""The text that a calibration looks at, cut into samples of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from modelstore.format.digest import name_of

if TYPE_CHECKING:
    import torch


SAMPLES, LENGTH = 128, 512  # where nothing is said


@dataclass(frozen=True)
class Calibration:
    """A text, and what of it a calibrated compression looks at: `samples` windows of `length` tokens, at places drawn by `seed`.

    `ValueError` if a number cannot be meant so.
    """

    text: str | os.PathLike[str]
    samples: int = SAMPLES
    length: int = LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("samples", 1, 1 << 20), ("length", 2, 1 << 20), ("seed", 0, (1 << 63) - 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name}={value!r} of a calibration is not a whole number from {least} to {most}")


@dataclass(frozen=True)
class Samples:
    """Tokens, int64 (samples, length), and what a manifest says of them."""

    ids: torch.Tensor
    recorded: dict[str, Any]


def cut(tokens: Sequence[int], how: Calibration, vocabulary: int, positions: int | None) -> Samples:
    """The samples of a text. `ValueError` if it is too short, or the model cannot look at so many tokens together."""
    import torch

    if positions is not None and how.length > positions:
        raise ValueError(f"length={how.length} of the calibration is more than the model's {positions} positions")
    if len(tokens) <= how.length:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, and samples of {how.length} are cut out of it: give a longer text"
        )
    if max(tokens) >= vocabulary:
        raise ValueError(f"the tokenizer knows more tokens than the model's {vocabulary}")
    generator = torch.Generator().manual_seed(how.seed)
    starts = torch.randint(0, len(tokens) - how.length, (how.samples,), generator=generator)
    whole = torch.tensor(tokens)
    ids = torch.stack([whole[at : at + how.length] for at in starts.tolist()])
    made_by = {name: version(name) for name in ("torch", "transformers")}
    said = {"samples": how.samples, "length": how.length, "seed": how.seed}
    return Samples(ids, {"digest": name_of(ids.numpy().tobytes()), **said, **made_by})
