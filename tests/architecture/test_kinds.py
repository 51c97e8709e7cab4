"""Kinds against the classes of transformers: what is taken for a matrix of a layer is one."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest

from modelstore.architecture.kinds import Its, kinds

pytestmark = pytest.mark.slow

# Two of each are enough: the names repeat.
SMALL = frozenset(
    {
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
        *("num_decoder_layers", "depth", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    }
)
MAPPINGS = ("MODEL", "MODEL_FOR_CAUSAL_LM")


def shrink(config: Any) -> None:
    transformers = pytest.importorskip("transformers")
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif name in SMALL and isinstance(value, int):
            setattr(config, name, 2)


def built(kind: str, cls: str) -> Any:
    """A model of a class, without bytes, with two layers where that works; None where it needs what is not here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for small in (True, False):
        with contextlib.suppress(Exception), torch.device("meta"):
            config = transformers.CONFIG_MAPPING[kind]()
            if small:
                shrink(config)
            return getattr(transformers, cls)(config)
    return None


def is_matrix(name: str, owner: Any) -> bool:
    """Whether the module multiplies by that parameter."""
    torch = pytest.importorskip("torch")
    kind = type(owner).__name__
    if isinstance(owner, torch.nn.Linear) or kind in ("Conv1D", "QuantLinear"):
        return name.endswith("weight")
    if "Experts" in kind:
        return "bias" not in name
    return name.rpartition(".")[2] in ("in_proj_weight", "mm_input_projection_weight")


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_class_of_transformers(mapping: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = getattr(transformers.models.auto.modeling_auto, f"{mapping}_MAPPING_NAMES")
    models = matrices = found = 0
    wrong = set()
    for kind, classes in names.items():
        cls = classes if isinstance(classes, str) else classes[0]
        if kind not in transformers.CONFIG_MAPPING or not hasattr(transformers, cls):
            continue
        model = built(kind, cls)
        if model is None:
            continue
        models += 1
        owners = dict(model.named_modules())
        tensors = {name: Its("bfloat16", tuple(tensor.shape)) for name, tensor in model.named_parameters()}
        for name, its in kinds(tensors).items():
            owner = owners[name.rpartition(".")[0]]
            convolves = isinstance(owner, torch.nn.modules.conv._ConvNd)
            if (its == "linear" and not is_matrix(name, owner)) or (
                its in ("convolution", "depthwise") and not convolves
            ):
                wrong.add(f"{cls}: {re.sub('[0-9]+', '*', name)} is taken for {its}, and is {type(owner).__name__}'s")
            if len(tensors[name].shape) > 1 and is_matrix(name, owner):
                matrices += 1
                found += its == "linear"
    assert not wrong, "\n".join(sorted(wrong))
    assert models > 20
    assert found >= 0.85 * matrices, (
        f"{found} of {matrices} matrices are known: the others are heads, routers and embeddings"
    )
