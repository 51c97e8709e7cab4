"""The parent of a variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelstore.codecs.registry import codec as make_codec
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Input
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VersionRecord
from modelstore.plan.write import FILE_CODEC, plan_tensor
from modelstore.store.packs import FILE


@dataclass(frozen=True)
class Parent:
    """The original that is compressed: its record, its manifest with its digest, and how its tensors are read.

    `architecture`: what is known of the model, by its manifest or found out here. If the original is quantized and read as the
    weights that it stands for, `manifest` is of these, `stored` is the manifest in the store, `requantized` is the method it
    is quantized by, and `files` are written instead of its own.
    """

    record: VersionRecord
    digest: str
    manifest: Manifest
    reader: Reader
    config: Mapping[str, Any] | None = None
    architecture: Architecture | None = None
    stored: Manifest | None = None
    requantized: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The content of the original as it is stored; see `Manifest.content`."""
        return (self.stored or self.manifest).content

    def file_inputs(self) -> list[Input]:
        """The encoder's inputs for the files that are written instead of the original's."""
        return [_file_input(path, content) for path, content in self.files.items()]


def _file_input(path: str, content: bytes) -> Input:
    data = np.frombuffer(content, np.uint8)
    plan = plan_tensor(FILE + path, "uint8", data.shape, FILE_CODEC)

    def read(region: Any, out: Any) -> None:
        ((start, stop),) = region
        out[:] = data[start:stop]

    return Input(plan, make_codec(FILE_CODEC.name, FILE_CODEC.params), read)
