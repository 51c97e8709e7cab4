"""Models as maps of what a node's host decoded: opening one costs as much as its manifest, and no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelstore.cluster.network.calls import HostGoneError
from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.read.images import open_image
from modelstore.errors import UnsupportedError
from modelstore.execute.memory import fault_ahead
from modelstore.execute.read.loading import Variant
from modelstore.format.buffers import Bytes
from modelstore.format.region import slices
from modelstore.plan.layout import Share

if TYPE_CHECKING:
    import torch

    from modelstore.cluster.control.session import Session


def mapped(
    session: Session, source: StoreAddress, model: Variant, digest: str, shares: Mapping[str, Share]
) -> dict[str, torch.Tensor]:
    """Tensors, or ranks' shares of them, as views of the node's image; a write to one stays in this process.

    `UnsupportedError` for a share of several runs, if this node does not have a host, or no room; `HostGoneError` if its host
    is being replaced.
    """
    from modelstore.execute.read import tensors as ten

    path = session.image(source, model.name, digest, model.manifest)
    try:
        images = {tensor.name: (tensor, data) for tensor, data in open_image(path, model.manifest)}
    except FileNotFoundError:
        raise HostGoneError(
            f"the store host of this node is gone, and its image {path} with it: load the model again"
        ) from None
    whole = {name: ten.to_torch(data, tensor.dtype, tensor.shape) for name, (tensor, data) in images.items()}
    found = {}
    entire: dict[str, Bytes] = {}
    for name, share in shares.items():
        own = model.tensor(name).name
        tensor = whole[own]
        if share.shape == tuple(tensor.shape):
            found[name] = tensor
            entire[own] = images[own][1]
            continue
        pieces = list(share.pieces())
        if len(pieces) != 1:
            raise UnsupportedError(
                f"this share of tensor {name!r} is not one box, so it cannot be mapped: load it without mmap",
                tensor=name,
            )
        found[name] = tensor[slices(pieces[0][0])]
    fault_ahead(list(entire.values()))
    return found
