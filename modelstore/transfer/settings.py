"""How a student is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, cos, pi
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
MASK = "mask"
EVALUATIONS = 20  # of held-out windows in a whole training, beside the one before it
BETAS = (0.9, 0.95)
DECAY = 0.01  # of matrices; norms and biases do not decay
WARM_UP = 0.03  # of all steps
FLOOR = 0.1  # of the rate, where the cosine ends
CLIP = 1.0  # the norm that gradients are cut back to


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training; see `Model.distill`. `ValueError` if a number cannot be meant so.

    `loss_scale`: what the loss is multiplied by at first with float16.
    """

    steps: int = 500
    tokens: int = 1024
    length: int = 256
    rate: float = 3e-4
    ce: float = 0.0
    keep: str | None = None
    dtype: str = "float32"
    seed: int = 0
    checkpoint: int = 50
    device: str = "cpu"
    loss_scale: float = 65536.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("length", 2), ("checkpoint", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is less than {least}")
        if self.tokens < self.length:
            raise ValueError(
                f"tokens={self.tokens} of a step are less than one window: give length={self.tokens} or less"
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate} is not a learning rate: give one above 0 and at most 1, such as 3e-4")
        if self.ce < 0:
            raise ValueError(f"ce={self.ce} is below 0: it is the weight of the cross entropy beside the divergence")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def windows(self) -> int:
        """Windows of a step."""
        return self.tokens // self.length

    @property
    def every(self) -> int:
        """Steps between two evaluations of held-out windows."""
        return max(1, self.steps // EVALUATIONS)

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as plain data: what the result depends on, so not how often its state is kept."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint"}

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear rise, then a cosine down to a tenth."""
        rise = max(1, ceil(WARM_UP * self.steps))
        if step < rise:
            return self.rate * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.rate * (FLOOR + (1 - FLOOR) * (1 + cos(pi * done)) / 2)
