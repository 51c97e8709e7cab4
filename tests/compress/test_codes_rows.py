"""A ladder under the codes of checkpoints of GPTQ and AWQ: exact, int4 that is theirs bit for bit, other codes refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import modelstore as ms
from modelstore.errors import FormatError
from modelstore.storage.memory import MemoryStorage
from tests.compress.llama import CONFIG, FILES, llama
from tests.helpers.stores import all_bits, open_on

Tensors = dict[str, torch.Tensor]
GROUP = 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # which output is in the bits from 4 * i on


def words(codes: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes from 0 to 15 packed along an axis."""
    turned = np.moveaxis(codes.astype(np.uint32), axis, -1)
    eight = turned.reshape(*turned.shape[:-1], -1, 8)
    made = sum(eight[..., number] << np.uint32(4 * at) for at, number in enumerate(order))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(made, -1, axis)).view(np.int32))


def rounded(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes from -8 to 7 (outputs, inputs) and scales, float16 (outputs, groups)."""
    numbers = weight.float().numpy()
    groups = numbers.reshape(len(numbers), -1, GROUP)
    scales = (np.abs(groups).max(-1) / 7.5).astype(np.float16)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)[..., None]), -8, 7)
    return codes.reshape(numbers.shape).astype(np.int8), scales


def parts(weight: torch.Tensor, how: str) -> Tensors:
    """A weight as a checkpoint has it: "gptq", "gptq_v2" or "awq"."""
    codes, scales = rounded(weight)
    raised, zeros = codes.T + 8, np.full(scales.T.shape, 7 if how == "gptq" else 8)
    made = {"scales": torch.from_numpy(np.ascontiguousarray(scales.T))}
    if how == "awq":
        return made | {"qweight": words(raised, 1, AWQ), "qzeros": words(zeros, 1, AWQ)}
    index = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP
    return made | {"qweight": words(raised, 0), "qzeros": words(zeros, 1), "g_idx": index}


def checkpoint(path: Path, tensors: Tensors, how: str, **changed: torch.Tensor) -> Path:
    """A folder of a quantized model; `changed`: parts of every weight that are others."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if "proj" in name:
            owner = name.removesuffix(".weight")
            made |= {f"{owner}.{part}": value for part, value in (parts(tensor, how) | changed).items()}
            if how == "gptq":
                made[f"{owner}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        elif name != "lm_head.weight":
            made[name] = tensor
    path.mkdir(parents=True)
    save_file(made, path / "model.safetensors")
    said: dict[str, Any] = {"quant_method": how.removesuffix("_v2"), "bits": 4, "group_size": GROUP}
    said |= {"version": "gemm"} if how == "awq" else {"desc_act": False, "sym": True, "checkpoint_format": how}
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": said}))
    return path


@pytest.fixture
def tensors() -> Tensors:
    found: Tensors = {name: tensor.to(torch.float16) for name, tensor in llama().items()}
    return found


@pytest.fixture
def store(tensors: Tensors) -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", tensors, files=FILES)
    return opened


@pytest.mark.parametrize("how", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_ladder_is_put_on_them(store: ms.Store, tensors: Tensors, tmp_path: Path, how: str, saved: bool) -> None:
    folder = checkpoint(tmp_path / how, tensors, how)
    where = str(folder)
    if saved:
        store.save("q", folder)
        where = "q"
    store.compress("m", "ladder", codes=where)
    assert all_bits(store.load("m")) == all_bits(tensors)
    found = store.load("m:int4")
    for name, tensor in tensors.items():
        if "proj" in name:
            codes, scales = rounded(tensor)
            wide = np.repeat(scales.astype(np.float32), GROUP, 1)
            assert torch.equal(found[name], torch.from_numpy(codes * wide).half()), name


@pytest.mark.parametrize("how", ["gptq", "awq"])
def test_such_a_checkpoint_is_saved_bit_for_bit(store: ms.Store, tensors: Tensors, tmp_path: Path, how: str) -> None:
    folder = checkpoint(tmp_path / how, tensors, how)
    store.save("q", folder)
    assert all_bits(store.load("q")) == all_bits(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("how", "part", "change", "says"),
    [
        ("gptq", "g_idx", lambda one: one.flip(0), "order of activations"),
        ("gptq", "qzeros", lambda one: one + 1, "asymmetric"),
        ("gptq_v2", "qzeros", lambda one: one - 0x11111111, "asymmetric"),
        ("awq", "qzeros", lambda one: one - 1, "asymmetric"),
        ("gptq", "scales", lambda one: one * torch.inf, "not finite"),
        ("gptq", "scales", lambda one: one[:-1], "scales"),
    ],
)
def test_other_codes_are_refused(
    store: ms.Store, tensors: Tensors, tmp_path: Path, how: str, part: str, change: Any, says: str
) -> None:
    folder = checkpoint(tmp_path / how, tensors, how)
    made = load_file(folder / "model.safetensors")
    name = next(name for name in made if name.endswith(part))
    made[name] = change(made[name]).contiguous()
    save_file(made, folder / "model.safetensors")
    with pytest.raises(FormatError, match=says) as caught:
        store.compress("m", "ladder", codes=str(folder))
    assert name.rpartition(".")[0] in str(caught.value)
    assert [one.variant for one in store.variants("m")] == ["original"]


def test_a_bias_that_adds_something_is_another_models(store: ms.Store, tensors: Tensors, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "gptq", tensors, "gptq")
    made = load_file(folder / "model.safetensors")
    name = next(name for name in made if name.endswith("bias"))
    made[name] = made[name] + 1
    save_file(made, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is not in the model"):
        store.compress("m", "ladder", codes=str(folder))
