"""Small files of a stored model that say what it is."""

from __future__ import annotations

from modelstore.architecture.config import MAX_CONFIG, Config, parse
from modelstore.execute.read.reader import Reader
from modelstore.format.checkpoint import CONFIG


def json_object(reader: Reader, name: str) -> Config | None:
    """A file of the model that holds a JSON object; None where it has none of that name that can be read."""
    for file in reader.manifest.files:
        if file.name == name and file.nbytes <= MAX_CONFIG:
            return parse(reader.region(file, ((0, file.shape[0]),)).tobytes())
    return None


def model_config(reader: Reader) -> Config | None:
    """The model's config.json, None where it has none that can be read."""
    return json_object(reader, CONFIG)
