"""Language models of a store, made ready to be evaluated: the architecture, the tokenizer and the weights, all from it.

Nothing is fetched from a hub and no code of the model's is run. The attention kernels that a model's `config.json` names are
ignored, since transformers might fetch them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modelstore.architecture.config import architectures, model_type, type_told
from modelstore.architecture.quantized import method
from modelstore.compress.built import built_of
from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.execute.model_files import without_config
from modelstore.execute.read.loading import Variant
from modelstore.plan.work import Limits, Work

if TYPE_CHECKING:
    import torch

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_LARGEST = 256 << 20  # bytes of a file that a tokenizer is made of


def language_config(model: Variant) -> Any:
    """transformers' config of a model that predicts next tokens.

    `UnsupportedError` if it does not, where transformers does not know it, or where its weights are quantized by another
    tool; `NotFoundError` if there is no `config.json`.
    """
    transformers = _transformers()
    content = model.config()
    if content is None:
        raise NotFoundError(
            f"model {model.name!r} {without_config(model.reader)}, so what it is is not known, and it cannot be run: "
            f"save it again with files={{'config.json': …}}",
            model=model.name,
        )
    how = method(content)
    if how is not None:
        raise UnsupportedError(
            f"model {model.name!r} was quantized before it was saved ({how[:80]}, says its config.json): "
            f"evaluate it in the engine that it was made for",
            model=model.name,
        )
    if not model_type(content):
        raise UnsupportedError(
            f"model {model.name!r} has a config.json with {type_told(content)}: what it is is not known, so it cannot be run; "
            f"save it again with its own config.json",
            model=model.name,
        )
    with tempfile.TemporaryDirectory(prefix="modelstore-eval-") as folder, _quiet(transformers):
        (Path(folder) / "config.json").write_text(json.dumps(_without_kernels(content)))
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever its checks make of a value that is not right
            raise UnsupportedError(
                f"transformers {transformers.__version__} cannot make model {model.name!r} of its config.json "
                f"({_short(error)}): use a version that knows it, or save it with its own config.json",
                model=model.name,
            ) from None
    named = architectures(content)
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) for name in named)
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not causal
    if encoder or config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(
            f"model {model.name!r} is a {(named or [type(config).__name__])[0]}, which does not predict the next token, so it "
            f"has no perplexity and cannot be calibrated: compress it without data, as by int8; what that costs each of its "
            f"tensors is in the metrics of 'modelstore show'",
            model=model.name,
        )
    return config


def tokens(model: Variant, text: str) -> list[int]:
    """A text as the model's own tokenizer cuts it, with what it puts before a text; `NotFoundError` if it has none."""
    transformers = _transformers()
    files = [
        f for f in model.manifest.files if f.name.endswith(_SUFFIXES) and "/" not in f.name and f.nbytes <= _LARGEST
    ]
    if not any(file.name in _TOKENIZERS for file in files):
        raise NotFoundError(
            f"model {model.name!r} has no tokenizer among its files: save it from a folder that has tokenizer.json, "
            f"or with files={{'tokenizer.json': …}}",
            model=model.name,
        )
    with tempfile.TemporaryDirectory(prefix="modelstore-eval-") as folder, _quiet(transformers):
        for file in files:
            (Path(folder) / file.name).write_bytes(model.file(file.name))
        try:
            made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            found = made(text, verbose=False)["input_ids"]
        except Exception as error:  # whatever a broken file makes of it: the tokenizers library raises bare Exceptions
            raise UnsupportedError(
                f"the tokenizer of model {model.name!r} cannot be used ({_short(error)}): look at its files",
                model=model.name,
            ) from None
    return [int(token) for token in found]


def class_of(config: Any) -> str:
    """The name of the class that predicts next tokens with such a config."""
    name: str = _transformers().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return name


def check_runs(model: Variant, config: Any) -> None:
    """`UnsupportedError` if the model cannot be built, `FormatError` if its config asks for far more than is stored."""
    try:
        built_of(model, class_of(config))
    except UnsupportedError as error:
        raise UnsupportedError(f"model {model.name!r} cannot be run: {error}", model=model.name) from error


def language_model(model: Variant, config: Any, limits: Limits, *, dtype: str, device: str) -> torch.nn.Module:
    """The model with its stored weights, ready to predict. The whole of it is in memory, as `dtype`.

    `FormatError` if tensors that the architecture needs are missing or have another shape.
    """
    import torch

    transformers = _transformers()
    weights = model.load(model.shares(None, None), Work(limits))
    with _quiet(transformers):
        made, report = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # they are in the report, and refused below with a sentence
            output_loading_info=True,
        )
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise FormatError(
            f"model {model.name!r} cannot be run as a {type(made).__name__}: {', '.join(lacking[:3])}"
            f"{' …' if len(lacking) > 3 else ''} missing or of another shape",
            model=model.name,
        )
    ready: torch.nn.Module = made.to(device).eval()
    return ready


def _without_kernels(content: Any) -> Any:
    """A config without what would choose kernels, wherever it stands in it."""
    if isinstance(content, dict):
        kept = {
            k: v
            for k, v in content.items()
            if not (isinstance(k, str) and k.endswith(("_implementation", "_internal")))
        }
        return {key: _without_kernels(value) for key, value in kept.items() if key not in ("auto_map", "use_kernels")}
    return [_without_kernels(item) for item in content] if isinstance(content, list) else content


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UnsupportedError("evaluating runs the model with transformers: pip install 'modelstore[eval]'") from None
    return transformers


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without transformers' own bars and warnings; they are as before afterwards."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _short(error: Exception) -> str:
    """An error's first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
