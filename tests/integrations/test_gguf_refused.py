"""What a GGUF cannot say right is refused in one sentence: contradictions, absurd values, tokenizers of other kinds."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.execute.export.layout import OutFile
from modelstore.format.files.gguf import parse_header
from modelstore.format.objects.manifest import ChunkTable, CodecSpec, Manifest, Tensor
from modelstore.integrations.gguf.export import layout
from modelstore.integrations.gguf.model import gguf_model
from modelstore.integrations.gguf.vocab import MAX_MEMBERS, ModelFiles, Vocabulary, read_vocabulary
from tests.integrations.models import CONFIG, SETTINGS, VOCABULARY, byte_level, pieces, weights

pytest.importorskip("gguf")

Json = Any


@cache
def manifest(extra: tuple[str, ...] = (), without: str = "", float8: str = "") -> Manifest:
    """A small model's tensors, as a manifest says them."""
    found = []
    for name, tensor in weights(extra=extra).items():
        if not without or without not in name:
            dtype = "float8_e4m3fn" if name == float8 else "bfloat16"
            shape = tuple(tensor.shape)
            found.append(Tensor(name, dtype, shape, shape, 0, hashlib.sha256(name.encode()).hexdigest(), ()))
    return Manifest(1, (), (CodecSpec("raw"),), tuple(found), (), ChunkTable(b"", b"", b"", b""))


def tokenizer(said: Json, config: Json = CONFIG, **files: str) -> Vocabulary | None:
    """What is read of a tokenizer.json, with other files beside it."""
    texts = {name.replace("__", "."): text.encode() for name, text in files.items()}
    if said is not None:
        texts["tokenizer.json"] = json.dumps(said).encode()
    return read_vocabulary(ModelFiles({n: len(t) for n, t in texts.items()}, texts.__getitem__), config, VOCABULARY)


def written(config: Json, vocabulary: Vocabulary | None, of: Manifest) -> OutFile:
    """A file's layout, whose header is read again."""
    out = layout(gguf_model(of, config), vocabulary, "m.gguf", "m", "Q8_0")
    padded = out.header.ljust(out.size, b"\0") if out.size < 1 << 24 else out.header
    header = parse_header(lambda start, length: padded[start : start + length], out.size)
    assert header.get("general.architecture")
    return out


# ---------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": VOCABULARY + 1}, "vocab_size 321"),
        ({"vocab_size": VOCABULARY - 1}, "vocab_size 319"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* has no place"),
        ({"num_hidden_layers": 3}, r"lacks 'model\.layers\.2\."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 64}, "hidden_size 64"),
        ({"intermediate_size": 191}, "intermediate_size 191"),
        ({"num_attention_heads": 8}, "num_key_value_heads × head_dim"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"num_key_value_heads": 1}, "num_key_value_heads × head_dim 32"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"num_key_value_heads": None}, "num_key_value_heads × head_dim 128"),
        ({"head_dim": 64}, "num_attention_heads × head_dim 256"),
        ({"head_dim": 31}, "heads of 31"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"attention_bias": True}, r"lacks .*q_proj\.bias"),
        ({"mlp_bias": True}, r"lacks .*gate_proj\.bias"),
        ({"model_type": "qwen2"}, "contradict"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}, r"lacks .*q_norm"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, r"lacks .*q_proj\.bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast 16 .* 32"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2}}, "beta_slow 2 .* 1 "),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_config_that_contradicts_the_tensors(change: Json, said: str) -> None:
    with pytest.raises(ModelStoreError, match=said):
        gguf_model(manifest(), CONFIG | change)


def test_a_model_without_a_tensor_that_its_config_promises() -> None:
    for part in ("lm_head", "embed_tokens", "layers.1.mlp.up_proj", "model.norm"):
        with pytest.raises(UnsupportedError, match=f"lacks .*{part}"):
            gguf_model(manifest(without=part), CONFIG)
    tied = gguf_model(manifest(without="lm_head"), CONFIG | {"tie_word_embeddings": True})
    assert "output.weight" not in {named.name for named in tied.tensors}
    both = gguf_model(manifest(), CONFIG | {"tie_word_embeddings": True})  # transformers takes both, too
    assert "output.weight" in {named.name for named in both.tensors}
    swapped = gguf_model(manifest(without="embed_tokens"), CONFIG | {"tie_word_embeddings": True})
    assert "token_embd.weight" in {named.name for named in swapped.tensors}


def test_biases_that_no_flag_promises() -> None:
    with pytest.raises(UnsupportedError, match="bias' has no place"):
        gguf_model(manifest(("bias",)), CONFIG)


def test_a_quantized_checkpoint() -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedError, match=r"quantized before it was saved \(fp8\)"):
        gguf_model(manifest(float8="model.layers.0.mlp.up_proj.weight"), config)


def test_what_a_window_leaves_of_the_context() -> None:
    mistral = CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    length: Callable[[Json], Any] = lambda config: gguf_model(manifest(), config).values[".context_length"]  # noqa: E731
    assert length(CONFIG | {"sliding_window": 64}) == 512  # a Llama has none
    assert length(mistral | {"sliding_window": 64}) == 64
    assert length(mistral | {"max_position_embeddings": 8192}) == 4096
    assert length(mistral | {"max_position_embeddings": 8192, "sliding_window": None}) == 8192


# ---------------------------------------------------------------------- absurd values

DEEP: Json = []
for _ in range(50):
    DEEP = [DEEP]
ABSURD: list[Json] = [
    *(-1, 0, 1, 3, 1 << 31, 10**12, 10**30, 1.5, -0.5, float("nan"), float("inf"), 1e308, 1e-320, 4e38),
    *("", "8", "\ud800", "\0", [], [1], [[]], ["a"], [None], {}, {"a": 1}, {"type": {"type": 1}}, {"a": {"b": []}}),
    *(True, False, None, DEEP, {"type": "Sequence"}, {"type": "Sequence", "normalizers": 1}),
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.2}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
FULL = CONFIG | {
    "head_dim": 32,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "num_experts": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "quantization_config": None,
    "text_config": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": -1,
}


def paths(value: Json, most: int = 3) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value, of long lists and objects the first ones."""
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, (key, item) in enumerate(items):
        if at < most or len(value) <= 32:
            yield from ((key, *rest) for rest in paths(item, most))


def changed(value: Json, path: tuple[Any, ...], into: Json) -> Json:
    """A copy with another value at a place."""
    if not path:
        return into
    made = copy.copy(value)
    made[path[0]] = changed(value[path[0]], path[1:], into)
    return made


def no_raw_exception(do: Callable[[], object], what: object) -> None:
    """Done, or refused in one sentence that can be shown."""
    try:
        do()
    except ModelStoreError as error:
        said = str(error)
        assert 10 < len(said) < 500, said
        assert "\n" not in said, said
        said.encode()
    except Exception as error:
        pytest.fail(f"{what} gave {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("Llama", None),
        ("Llama", YARN),
        ("Mistral", LLAMA3),
        ("Qwen2", {"rope_type": "linear", "factor": 2}),
        ("Qwen3", None),
    ],
)
def test_absurd_values_of_a_config(name: str, scaling: Json) -> None:
    extra = {"Qwen2": ("bias",), "Qwen3": ("norm",)}.get(name, ())
    config = FULL | {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "rope_scaling": scaling}
    written(config, None, manifest(extra))
    for path in paths(config):
        if path:
            for absurd in ABSURD:
                wrong = changed(config, path, absurd)

                def do(wrong: Json = wrong) -> None:
                    for value in gguf_model(manifest(extra), wrong).values.values():
                        struct.pack("<f" if isinstance(value, float) else "<I", 0 if isinstance(value, str) else value)

                no_raw_exception(do, (path, absurd))


@cache
def templated() -> Json:
    """A tokenizer of Llama 3's kind, which puts a token before each text."""
    made = json.loads(byte_level())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    made["normalizer"] = {"type": "NFC"}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    begin = {"id": "<s>", "ids": [0], "tokens": ["<s>"]}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<s>": begin}}
    made["post_processor"] = {"type": "Sequence", "processors": [level, processor]}
    return made


@pytest.mark.parametrize("make", [lambda: json.loads(byte_level()), lambda: json.loads(pieces()), templated])
def test_absurd_values_of_a_tokenizer(make: Callable[[], Json]) -> None:
    said = make()
    assert tokenizer(said, tokenizer_config__json=SETTINGS) is not None
    for at, path in enumerate(paths(said, most=1)):
        for absurd in ABSURD[at % 3 :: 3]:  # a third of them at each place
            wrong = changed(said, path, absurd)

            def do(wrong: Json = wrong) -> None:
                tokenizer(wrong, tokenizer_config__json=SETTINGS)

            no_raw_exception(do, (path, absurd))


def test_absurd_values_of_what_is_beside_a_tokenizer() -> None:
    said = json.loads(byte_level())
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "add_bos_token": False}
    config |= {
        "chat_template": [{"name": "default", "template": "x"}],
        "added_tokens_decoder": {"0": {"content": "<s>"}},
    }
    assert tokenizer(said, tokenizer_config__json=json.dumps(config)) is not None
    for path in paths(config):
        for absurd in ABSURD[::2]:
            text = json.dumps(changed(config, path, absurd))

            def do(text: str = text) -> None:
                tokenizer(said, tokenizer_config__json=text)

            no_raw_exception(do, (path, absurd))
    for text in ("", "[]", "{", "\0", "[" * 100_000, '{"a":' * 100_000, json.dumps({"chat_template": 3})):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
            files = {"tokenizer.json": byte_level().encode(), name: text.encode()}
            read = ModelFiles({n: len(t) for n, t in files.items()}, files.__getitem__)
            no_raw_exception(lambda read=read: read_vocabulary(read, FULL, VOCABULARY), (name, text[:20]))  # type: ignore[misc]


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "names",
    [
        ["tekken.json"],
        ["vocab.json", "merges.txt"],
        ["tokenizer.model"],
        ["vocab.txt"],
        ["qwen.tiktoken"],
        ["tokenizer.model.v3"],
        ["tokenizer_config.json"],
    ],
)
def test_a_tokenizer_in_other_files(names: list[str]) -> None:
    read = ModelFiles(dict.fromkeys(names, 2), lambda _: b"{}")
    with pytest.raises(UnsupportedError, match=r"without a tokenizer\.json"):
        read_vocabulary(read, CONFIG, VOCABULARY)


def test_a_model_without_a_tokenizer() -> None:
    assert tokenizer(None) is None
    written(CONFIG, None, manifest())


def made(part: str, value: Json, of: Callable[[], str] = byte_level) -> Json:
    """A tokenizer with one part changed; a dot leads into another."""
    return changed(json.loads(of()), tuple(part.split(".")), value)


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}], "special_tokens": {}}
TWO = [{"SpecialToken": {"id": "a"}}, {"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}]
PREPEND = {"type": "Prepend", "prepend": "▁"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (made("normalizer", {"type": "NFKC"}), "NFKC"),
        (made("normalizer", {"type": "Lowercase"}), "Lowercase"),
        (made("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}), "NFC, Strip"),
        (made("pre_tokenizer", {"type": "Whitespace"}), "rule of its own"),
        (made("pre_tokenizer", LEVEL | {"add_prefix_space": True}), "space before"),
        (made("model.type", "Unigram"), "Unigram"),
        (made("model.dropout", 0.1), "dropout"),
        (made("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (made("model.ignore_merges", True), "rule of its own"),
        (made("model.merges", [["a", "zzz"]]), "merges"),
        (made("model.vocab", {"a": 0, "b": 0}), "no other token"),
        (made("model.vocab", {"a": VOCABULARY}), "321 tokens"),
        (made("post_processor", {"type": "BertProcessing"}), "BertProcessing"),
        (made("post_processor", TEMPLATE | {"single": TWO, "special_tokens": {"a": {"ids": [1]}}}), "several tokens"),
        (made("post_processor", TEMPLATE | {"single": []}), "several tokens"),
        (made("normalizer", {"type": "NFC"}, pieces), "NFC"),
        (made("normalizer", PREPEND, pieces), "Prepend"),
        (made("model.ignore_merges", True, pieces), "ignore_merges"),
        (made("model.merges", [], pieces), "no merge makes"),
    ],
)
def test_a_tokenizer_that_does_what_llama_cpp_does_not(said: Json, why: str) -> None:
    with pytest.raises(ModelStoreError, match=why):
        tokenizer(said, tokenizer_config__json=SETTINGS)


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_what_is_around_it(key: str) -> None:
    said = json.loads(byte_level())
    said["added_tokens"][0] |= {key: True}
    with pytest.raises(UnsupportedError, match=key):
        tokenizer(said, tokenizer_config__json=SETTINGS)


def test_metaspaces_that_say_whether_a_space_is_put_before_the_text() -> None:
    said = made("normalizer", None, pieces)
    space = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "always"}
    for scheme, prefix in (("always", True), ("never", False)):
        found = tokenizer(said | {"pre_tokenizer": space | {"prepend_scheme": scheme}}, tokenizer_config__json=SETTINGS)
        assert found is not None
        assert found.prefix is prefix
    for change in ({"prepend_scheme": "first"}, {"split": True}, {"replacement": "_"}):
        with pytest.raises(UnsupportedError, match="Metaspace"):
            tokenizer(said | {"pre_tokenizer": space | change}, tokenizer_config__json=SETTINGS)


def test_special_tokens() -> None:
    said = templated()
    found = tokenizer(said, tokenizer_config__json=SETTINGS)
    assert found is not None
    assert (found.rule, found.special.begins, found.special.ends) == ("smaug-bpe", True, False)
    assert found.special.tokens == {"bos": 0, "eos": 1}
    whole = changed(said, ("model", "ignore_merges"), True)
    found = tokenizer(whole, tokenizer_config__json=SETTINGS)
    assert found is not None
    assert found.rule == "llama-bpe"
    for settings, why in (
        ({"bos_token": "</s>", "eos_token": "</s>"}, "begins each text with '<s>'"),
        ({"bos_token": "<s>"}, "no token that ends a text"),
        ({"eos_token": "<end>"}, "'<end>' as eos_token"),
        ({"eos_token": "</s>", "add_bos_token": False}, "add_bos_token false"),
        ({"eos_token": "</s>", "add_eos_token": True}, "add_eos_token true"),
        ({"eos_token": "</s>", "added_tokens_decoder": {"9999": {"content": "<x>"}}}, "adds the token '<x>'"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            tokenizer(said, tokenizer_config__json=json.dumps(settings))


def test_the_configs_end_of_text() -> None:
    said = json.loads(byte_level())
    for value, eos in ((5, 5), ([6, 7], 6)):
        found = tokenizer(said, CONFIG | {"eos_token_id": value})
        assert found is not None
        assert found.special.tokens["eos"] == eos
    for value in (VOCABULARY, -2, 1.5, "2", True, {"a": 1}):
        with pytest.raises(ModelStoreError, match="eos_token_id"):
            tokenizer(said, CONFIG | {"eos_token_id": value})


def test_a_tokenizer_beyond_bounds_is_not_parsed() -> None:
    text = b'{"a": [' + b"1," * MAX_MEMBERS + b"1]}"
    with pytest.raises(ModelStoreError, match=r"tokenizer\.json is not a JSON object"):
        read_vocabulary(ModelFiles({"tokenizer.json": len(text)}, lambda _: text), CONFIG, VOCABULARY)
    with pytest.raises(ModelStoreError, match=r"tokenizer\.json is not a JSON object"):
        read_vocabulary(ModelFiles({"tokenizer.json": 1 << 40}, lambda _: b"{}"), CONFIG, VOCABULARY)
