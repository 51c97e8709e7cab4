"""Models of a store that read text, made ready to be evaluated: the architecture, the tokenizer and the weights, all from it.

Nothing is fetched from a hub and no code of the model's is run. The attention kernels that a model's `config.json` names are
ignored, since transformers might fetch them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modelstore.architecture.config import architectures, model_type, type_told
from modelstore.architecture.quantized import method
from modelstore.compress.built import built_of
from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.execute.model_files import without_config
from modelstore.execute.read.loading import Variant
from modelstore.format.answers.results import TextTask
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


@dataclass(frozen=True)
class Evaluated:
    """The task of a model that reads text, transformers' config of it, and the name of the class that does it.

    `tokens`: it predicts the next one; `vectors`: it gives each passage one; `classes`: it tells which one a passage has.
    """

    task: TextTask
    config: Any
    class_name: str


def language_config(model: Variant) -> Any:
    """transformers' config of a model that predicts next tokens.

    `UnsupportedError` if it does not, where transformers does not know it, or where its weights are quantized by another
    tool; `NotFoundError` if there is no `config.json`.
    """
    found = evaluated(model)
    if found.task != "tokens":
        raise UnsupportedError(
            f"model {model.name!r} is a {found.class_name}, which does not predict the next token, so it "
            f"has no perplexity and cannot be calibrated: compress it without data, as by int8, and measure what that costs "
            f"with 'modelstore eval'",
            model=model.name,
        )
    return found.config


def evaluated(model: Variant) -> Evaluated:
    """The task of a model that reads text; errors as `language_config`, and `UnsupportedError` if it does nothing with one."""
    config, named = _config(model)
    transformers = _transformers()
    kind, name = type(config), (named or ("",))[0]
    if name.endswith("ForSequenceClassification") and kind in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        many = getattr(config, "problem_type", None) == "multi_label_classification"
        if config.num_labels < 2 or many:
            raise UnsupportedError(
                f"model {model.name!r} is a {name} "
                f"{'whose passages have several classes' if many else 'with one number for a passage and no classes'}: "
                f"there is no agreement of classes to measure",
                model=model.name,
            )
        made = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
        return Evaluated("classes", config, made.__name__)
    causal = name.endswith(("CausalLM", "LMHeadModel"))
    encoder = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and not causal
    headless = name.endswith("Model") and not causal
    if not (encoder or headless or config.is_encoder_decoder) and kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return Evaluated("tokens", config, class_of(config))
    made = transformers.MODEL_MAPPING.get(kind, None)
    if config.is_encoder_decoder or getattr(made, "main_input_name", "") != "input_ids":
        raise UnsupportedError(
            f"model {model.name!r} is a {name or kind.__name__}, which neither predicts the next token of a text nor gives "
            f"its passages vectors or classes, so it cannot be evaluated or calibrated: compress it without data, as by int8; "
            f"what that costs each of its tensors is in the metrics of 'modelstore show'",
            model=model.name,
        )
    return Evaluated("vectors", config, made.__name__)


def _config(model: Variant) -> tuple[Any, tuple[str, ...]]:
    """transformers' config, and the architectures that `config.json` names."""
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
    return config, tuple(architectures(content))


def tokens(model: Variant, text: str) -> list[int]:
    """A text as the model's own tokenizer cuts it, with what it puts before a text; `NotFoundError` if it has none."""
    return tokens_in(model, [text])[0]


def tokens_in(model: Variant, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as `tokens`."""
    with _tokenizer(model) as made:
        return [[int(token) for token in made(text, verbose=False)["input_ids"]] for text in texts]


def tokens_of_each(model: Variant, texts: Sequence[tuple[str, str | None]], most: int) -> list[dict[str, list[int]]]:
    """The inputs of the model for each passage, or pair of passages, cut to `most` tokens; errors as `tokens`."""
    with _tokenizer(model) as made:
        return [
            {
                key: [int(one) for one in values]
                for key, values in made(text, pair, truncation=True, max_length=most, verbose=False).items()
                if key in ("input_ids", "token_type_ids", "attention_mask")
            }
            for text, pair in texts
        ]


@contextmanager
def _tokenizer(model: Variant) -> Iterator[Any]:
    """The model's own tokenizer, made of its files; what goes wrong in it comes out as `UnsupportedError`."""
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
            yield transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes of it: the tokenizers library raises bare Exceptions
            raise UnsupportedError(
                f"the tokenizer of model {model.name!r} cannot be used ({_short(error)}): look at its files",
                model=model.name,
            ) from None


def class_of(config: Any) -> str:
    """The name of the class that predicts next tokens with such a config."""
    name: str = _transformers().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return name


def check_runs(model: Variant, class_name: str) -> None:
    """`UnsupportedError` if the model cannot be built, `FormatError` if its config asks for far more than is stored."""
    try:
        built_of(model, class_name)
    except UnsupportedError as error:
        raise UnsupportedError(f"model {model.name!r} cannot be run: {error}", model=model.name) from error


def ready_model(model: Variant, what: Evaluated, limits: Limits, *, dtype: str, device: str) -> torch.nn.Module:
    """The model with its stored weights, ready to run. The whole of it is in memory, as `dtype`.

    `FormatError` if tensors that the architecture needs are missing or have another shape.
    """
    import torch

    transformers = _transformers()
    weights = model.load(model.shares(None, None), Work(limits))
    with _quiet(transformers):
        made, report = getattr(transformers, what.class_name).from_pretrained(
            None,
            config=what.config,
            state_dict=weights,
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # they are in the report, and refused below with a sentence
            output_loading_info=True,
        )
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if what.task == "vectors":  # of the states of tokens, which come before the pooler
        lacking = [name for name in lacking if "pooler" not in name.split(".")]
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
