"""Puts manifests together: tensors newly stored, and those taken over from another manifest with their chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.format.objects.manifest import FORMAT, CodecSpec, Manifest, Plane, Tensor, chunk_table
from modelstore.format.region import Shape

Location = tuple[str, int, int]  # pack digest, offset, length


def chunk_places(manifest: Manifest, tensor: Tensor) -> dict[str, list[tuple[bytes, Location]]]:
    """The chunks of a tensor by plane: the digest and the place of each."""
    n = tensor.chunks
    return {
        plane.name: [
            (
                manifest.digest(row),
                (manifest.packs[int(manifest.pack[row])], int(manifest.offset[row]), int(manifest.length[row])),
            )
            for row in range(plane.first, plane.first + n)
        ]
        for plane in tensor.planes
    }


class ManifestBuilder:
    """A manifest on its way: the codecs, packs and rows of the chunk table that its tensors refer to."""

    def __init__(self) -> None:
        self._codecs: list[CodecSpec] = []
        self._packs: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, bytes]] = []

    def tensor(
        self,
        name: str,
        dtype: str,
        shape: Shape,
        chunk: Shape,
        codec: CodecSpec,
        digest: str,
        planes: Mapping[str, Sequence[tuple[bytes, Location]]],
    ) -> Tensor:
        """The entry of a tensor whose chunks are at these places; `digest` is of its values as they will be read."""
        made = []
        for plane, chunks in planes.items():
            made.append(Plane(plane, len(self._rows)))
            self._rows += [(self._pack(pack), start, n, content) for content, (pack, start, n) in chunks]
        return Tensor(name, dtype, shape, chunk, self._codec(codec), digest, tuple(made))

    def carry(self, manifest: Manifest, tensor: Tensor) -> Tensor:
        """The entry of a tensor that is kept as another manifest has it."""
        planes, spec = chunk_places(manifest, tensor), manifest.codecs[tensor.codec]
        return self.tensor(tensor.name, tensor.dtype, tensor.shape, tensor.chunk, spec, tensor.digest, planes)

    def build(self, tensors: Sequence[Tensor], files: Sequence[Tensor], **rest: Any) -> Manifest:
        """The manifest; `rest` are its other fields, such as `aliases`."""
        return Manifest(
            FORMAT,
            tuple(self._packs),
            tuple(self._codecs),
            tuple(tensors),
            tuple(files),
            chunk_table(self._rows),
            **rest,
        )

    def _pack(self, digest: str) -> int:
        return self._packs.setdefault(digest, len(self._packs))

    def _codec(self, spec: CodecSpec) -> int:
        if spec not in self._codecs:
            self._codecs.append(spec)
        return self._codecs.index(spec)
