"""Results of a plan for a recipe that looks at data."""

from __future__ import annotations

from modelstore.format.answers.brief import Result


class Looks(Result, frozen=True):
    """The work of a recipe that looks at data: so many `passes` of `samples` of `length` tokens through each of `blocks`
    blocks.

    `solved` tensors are found on the data; up to `spool` bytes of activations wait between blocks, in memory or in a file.
    `data_free`: the tensors that are made of their weights alone, and why.
    """

    samples: int
    length: int
    blocks: int
    solved: int
    passes: int
    spool: int
    data_free: dict[str, str]
