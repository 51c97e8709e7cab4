"""The plan of a calibration, by shapes alone."""

from __future__ import annotations

from modelstore.calibrate.block import Asked, too_few
from modelstore.calibrate.statistics import TOKENS
from modelstore.format.answers.looks import Looks

_PASSES = 2  # one that sums up what comes to a block's layers, one through the block as it is stored
_FLOAT = 4


def foretold(asked: Asked, samples: int, length: int) -> Looks:
    """The work, memory and tensors without data for so many samples of `length` tokens.

    Experts may turn out to see too few of them, and those of a block may take turns.
    """
    layers, skeleton = asked.layers(), asked.stages.skeleton
    tokens, left = samples * length, asked.no_layers(layers)
    shapes = dict(skeleton.model.named_parameters())
    for layer in (one for mine in layers for one in mine.values()):
        columns = layer.inputs(shapes)
        why = too_few(tokens, columns) if tokens < TOKENS * columns else asked.unfit(layer)
        left |= {layer.tensor: why} if why else {}
    width = skeleton.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    tuned = any(asked.tunes(one) for mine in layers for one in mine.values())
    waiting = 3 if tuned else 2  # what came, what is given, and what was
    solved = len(asked.wanted) - len(left)
    return Looks(samples, length, len(layers), solved, _PASSES, waiting * _FLOAT * tokens * width, left)
