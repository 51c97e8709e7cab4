"""Small files of a stored model that say what it is."""

from __future__ import annotations

from modelstore.architecture.config import MAX_CONFIG, Config, examined, parse
from modelstore.execute.read.reader import Reader
from modelstore.format.files.checkpoint import CONFIG


def json_object(reader: Reader, name: str) -> Config | None:
    """A file of the model that holds a JSON object; None if it has none of that name that can be read."""
    for file in reader.manifest.files:
        if file.name == name and file.nbytes <= MAX_CONFIG:
            return parse(reader.region(file, ((0, file.shape[0]),)).tobytes())
    return None


def model_config(reader: Reader) -> Config | None:
    """The model's config.json, None if it has none that can be read."""
    return json_object(reader, CONFIG)


def without_config(reader: Reader) -> str:
    """Why a model does not have a config, for a message: "has no config.json", or the problem with the one that it has."""
    for file in reader.manifest.files:
        if file.name == CONFIG:
            if file.nbytes > MAX_CONFIG:
                return f"has a config.json of {file.nbytes:,} bytes, more than the {MAX_CONFIG:,} that are looked into"
            found = examined(reader.region(file, ((0, file.shape[0]),)).tobytes())
            return f"has a config.json that {found}" if isinstance(found, str) else "has a config.json"
    return "has no config.json"
