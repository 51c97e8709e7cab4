from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch

from modelstore.errors import UnsupportedError
from modelstore.format.dtypes import DTYPES
from modelstore.sources.open import open_source
from tests.sources.contract import Opened, SourceContract, bits, raw, read


def views() -> dict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor need not be dense and row-major."""
    base = bits("bfloat16", 6, 8, 4)
    complex_ = bits("complex64", 5, 4)
    return {f"of.{name}": bits(name, 4, 6, 3) for name in DTYPES} | {
        "transposed": base.permute(2, 0, 1),
        "strided": base[1:5:2, ::3],
        "expanded": base[:1].expand(9, 8, 4),
        "scalar": base[0, 0, 0],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(bits("float32", 3, 4)),
        "conjugated": complex_.conj(),
        "negated": complex_.conj().imag,
        "imaginary": complex_.imag,
        "pairs, transposed": bits("float4_e2m1fn_x2", 4, 6).t(),
        "doubles, transposed": bits("complex128", 4, 6).t(),
        "channels last": bits("float32", 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


class TestStateDict(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> Opened:
        return Opened(open_source(views()), views())

    def test_nothing_says_that_memory_is_the_same(self, opened: Opened) -> None:
        assert opened.source.fingerprint is None


class TestTied(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> Opened:
        weight = bits("float32", 6, 4)
        state = {"embed": weight, "half": weight[:3], "head": weight, "again": weight[:], "turned": weight.t()}
        return Opened(open_source(state), state)

    def test_only_the_same_view_is_tied(self, opened: Opened) -> None:
        assert opened.source.aliases == {"head": "embed", "again": "embed"}


class TestArrays(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> Opened:
        half = bits("bfloat16", 4, 6)
        double = bits("float64", 3, 5)
        state = {
            "bf16": raw(half).reshape(4, 12).view(ml_dtypes.bfloat16),
            "fp8": np.array([1, 2], ml_dtypes.float8_e4m3fn),
            "big": raw(double).reshape(3, 40).view("<f8").astype(">f8"),
            "turned": raw(double).reshape(3, 40).view("<f8").T,
            "complex": np.array([[1 + 2j]], ">c8"),
            "number": np.float32(3),
        }
        expected = {
            "bf16": half,
            "fp8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
            "big": double,
            "turned": double.t(),
            "complex": torch.tensor([[1 + 2j]], dtype=torch.complex64),
            "number": torch.tensor(3.0),
        }
        return Opened(open_source(state), expected)


class TestModule(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> Opened:
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        module[2].weight = module[0].weight
        module.register_buffer("passing", torch.ones(1), persistent=False)
        return Opened(open_source(module), module.state_dict())

    def test_tied_weights_stay_tied(self, opened: Opened) -> None:
        assert opened.source.aliases == {"2.weight": "0.weight"}

    def test_wrappers_are_looked_through(self) -> None:
        module = torch.nn.DataParallel(torch.nn.Linear(2, 2))
        assert [spec.name for spec in open_source(module).tensors] == ["weight", "bias"]
        assert [spec.name for spec in open_source(torch.compile(torch.nn.Linear(2, 2))).tensors] == ["weight", "bias"]


def test_a_transformers_model_brings_its_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    source = open_source(model)
    assert source.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(source.files) == {"config.json", "generation_config.json"}
    written = source.files["config.json"]
    assert isinstance(written, bytes)
    assert json.loads(written)["architectures"] == ["LlamaForCausalLM"]
    assert json.loads(written)["model_type"] == "llama"


class Meta(torch.Tensor):
    """A subclass whose values are not its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("its values were asked for")


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "initialised"),
    "wrapper": (lambda: torch.Tensor._make_subclass(Meta, torch.ones(2)), "Meta"),
    "array of text": (lambda: np.array(["a"]), "dtype"),
    "array of objects": (lambda: np.array([{}], object), "dtype"),
    "array of four bits": (lambda: np.array([1], ml_dtypes.int4), "dtype"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "says"), REFUSED.values(), ids=REFUSED)
def test_tensors_without_dense_values_are_named(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match=f"'layer.x'.*{says}"):
        open_source({"layer.x": make()})


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model": {"w": torch.ones(1)}}, r"'model' is a mapping.*its first key is 'w'.*key="),
        ({"step": 3}, "'step' is the number 3, not a tensor"),
        ({"w": [1.0, 2.0]}, "'w' is a list"),
        ({1: torch.ones(1)}, "names are text"),
    ],
)
def test_what_is_no_tensor_is_named(state: dict[str, object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        open_source(state)


def test_a_sharded_tensor_is_refused_with_advice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(UnsupportedError, match=r"'w'.*distributed\.checkpoint"):
            open_source({"w": sharded})
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu() -> None:
    state = {name: tensor.cuda() for name, tensor in views().items()}
    source = open_source(state)
    for name, tensor in state.items():
        assert np.array_equal(read(source, name), raw(tensor)), name
