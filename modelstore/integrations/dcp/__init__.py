"""Checkpoints of `torch.distributed.checkpoint` in a store: `Writer` for `dcp.save`, `Reader` for `dcp.load`."""

from modelstore.integrations.dcp.reader import CheckpointReader as Reader
from modelstore.integrations.dcp.writer import CheckpointWriter as Writer

__all__ = ["Reader", "Writer"]
