"""Every argument of every public method: what is wrong is refused in one sentence, before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.client import Store
from modelstore.client.arguments import check_of
from modelstore.client.live import Live
from modelstore.storage.local import LocalStorage
from modelstore.text import is_plain

WEIGHTS = {f"model.layers.{i}.weight": torch.randn(20, 20) for i in range(300)}


class Untouched:
    """A storage that nobody may ask for anything."""

    url = "untouched://"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"the storage was asked for {name}")


STORE = Store(Untouched())  # type: ignore[arg-type]
METHODS = {
    name: getattr(STORE, name)
    for name, value in inspect.getmembers(Store, inspect.isfunction)
    if not name.startswith("_")
} | {"open": ms.open}

VALID: dict[str, Any] = {  # by the parameter's name; None does for what is optional
    **dict.fromkeys(("ref", "a", "b"), "acme/m"),
    **dict.fromkeys(("name", "old", "new", "to"), "m"),
    **dict.fromkeys(("dest", "destination", "url", "path", "text", "data", "calibration"), "some/where"),
    "source": WEIGHTS,
    "tag": "prod",
    "module": torch.nn.Linear(2, 2),
    "recipe": "int8",
    "fit": "120MiB",
    "session": "s",
    "rank": 0,
    "ranks": 2,
    "workers": [object()],
    "method": "take",
    "node": "abc",
    "job": "abc",
}
WRONG: dict[str, list[Any]] = {  # by annotation, None aside
    "str": [WEIGHTS, 3, b"m", ["m"], "", Path("m"), True],
    "bool": ["no", 0, 1, "true", [], {}],
    "int": ["1", "x", 1.5, True, [1], torch.ones(3), WEIGHTS, -(10**9)],
    "float": ["1", "x", True, [1], float("nan"), torch.ones(3), WEIGHTS, -1.0, 10**400],
    "float | int": ["0.5", "x", True, [1], 0, -1, 1.5, 0.0, float("nan"), torch.ones(3), WEIGHTS],
    "float | int | Sequence[int]": [
        "0,1",
        True,
        [],
        [0, 0],
        [-1],
        [1.5],
        [True],
        0,
        -1,
        1.5,
        0.0,
        float("nan"),
        WEIGHTS,
    ],
    "int | str": [1.5, True, [1], "lots", "", "-1GiB", 3, 0, -5, "64"],
    "Size": [1.5, True, [1], "lots", "", "-1GiB", 0, -5, -(10**40), 10**40, "9" * 400, "1e5"],
    "bool | float": ["80%", [1], float("nan"), -0.1, 1.1, 80, torch.ones(3)],
    "str | os.PathLike[str]": [WEIGHTS, 3, "", "a\0b", b"x", True],
    "str | PathLike[str]": [WEIGHTS, 3, "", "a\0b", b"x"],
    "str | Path": [WEIGHTS, 3, "", b"x"],
    "Path": [WEIGHTS, 3, "", b"x"],
    "str | os.PathLike[str] | OpenedStore": [WEIGHTS, 3, "", "a\0b", b"x", True, LocalStorage("x")],
    "Sequence[str | os.PathLike[str] | OpenedStore]": [
        "s3://x",
        Path("x"),
        STORE,
        3,
        [3],
        [b"x"],
        {"a": "b"},
        LocalStorage("x"),
    ],
    "Duration": ["soon", "", "-1h", "1y", "9" * 400, True, [1], float("nan"), -1.0, 10**400, torch.ones(3), WEIGHTS],
    "bool | Iterable[str]": ["int8", 3, [3], b"x"],
    "Iterable[str]": ["one.name", 3, [3], [b"x"], b"x", [None]],
    "Sequence[str]": ["s3://x", 3, [3], b"x"],
    "list[str]": ["x", 3, [3]],
    "Openable": [3, True, 1.5, b"x", "a\0b", STORE],
    "torch.nn.Module": [{}, WEIGHTS, "m", 3],
    "Shard": ["0/3", (0, 3), 3, ms.TensorParallel, [1]],
    "Sequence[Shard | None]": ["0/3", 3, ["0/3"], [3]],
    "Sequence[Any]": ["x", 3, [], {}],
    "str | torch.device": ["gpu", "cuda:99", 3, "", "meta", b"cpu", "cpu:x", WEIGHTS],
    "Progress": [True, "yes", 3],
    "Mapping[str, str | Path | bytes]": ["config.json", ["config.json"], 3, {3: b"x"}],
    "Mapping[str, Any]": ["x", 3, ["x"]],
    "Mapping[str, str]": ["x", 3, ["x"]],
    "Mapping[str, str | int | float | bool]": ["x", 3, ["x"]],
    "str | Recipe | Mapping[str, Any]": [3, ["int8"], WEIGHTS.values(), b"int8"],
    "str | os.PathLike[str] | Calibration": [3, ["text"], b"text"],
    "str | list[str] | tuple[str, ...]": [3, [3], WEIGHTS.values(), b"m", "m@@"],
    "Text | list[Text] | tuple[Text, ...]": [3, [3], "", [""], ["a\0b"], WEIGHTS, b"x"],
    "DTypeName": ["float64", 3, torch.float32],
}
MEANT: dict[str, list[Any]] = {  # by name
    **{key: ["@", "m@0", "m:", "a/b/c", "m@x y"] for key in ("ref", "a", "b", "parent", "teacher")},
    **{key: ["a/b/c", "../x", "m@1", "m:int8"] for key in ("name", "old", "new", "to")},
    "tag": ["1", "latest", "a b"],
    "variant": ["4bit", "a/b"],
    "threads": [0],
    "session": ["x" * 2000, "\ud800"],
    "ranks": [10**9],
    "url": [" ./store", "./store\n"],
}


def parameters() -> Iterator[Any]:
    """Each parameter of each method."""
    for method, function in METHODS.items():
        for parameter in inspect.signature(function).parameters.values():
            yield pytest.param(function, parameter, id=f"{method}-{parameter.name}")


def kind_of(parameter: inspect.Parameter) -> str:
    """The annotation, without None."""
    return str(parameter.annotation).removesuffix(" | None")


def arguments(function: Callable[..., Any], but: str) -> dict[str, Any]:
    """Right arguments for all that has to be given, but one."""
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    given = {name: VALID[name] for name in needed if name != but}
    if function.__name__ == "tensor" and "name" in given:
        given["name"] = "w"
    return given


@pytest.mark.parametrize(("function", "parameter"), list(parameters()))
def test_wrong_arguments_are_refused_before_any_work(
    function: Callable[..., Any], parameter: inspect.Parameter
) -> None:
    kind, signature = kind_of(parameter), inspect.signature(function)
    assert check_of(parameter, signature) is not None, (
        f"nothing checks {parameter}: tell modelstore/client/arguments.py"
    )
    wrong = list(WRONG.get(kind, [3, "no such thing"] if kind.startswith("Literal[") else []))
    assert wrong, f"say in WRONG what is no {kind}"
    wrong += [] if str(parameter.annotation).endswith("| None") else [None]
    a_tensors = parameter.name == "name" and "ref" in signature.parameters
    wrong += [] if a_tensors else MEANT.get(parameter.name, [])
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**arguments(function, parameter.name), **{parameter.name: value})
        said = str(caught.value)
        assert len(said) <= 420, said
        assert is_plain(said), said
        assert "tensor(" not in said, said
        assert "has no attribute" not in said, said
        assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: STORE.save(WEIGHTS, "m"), "name and source are swapped: write save(name, source)"),  # type: ignore[arg-type]
        (lambda: STORE.save(torch.nn.Linear(2, 2), "m"), "swapped"),  # type: ignore[arg-type]
        (lambda: STORE.save(source="m", name=WEIGHTS), "a dict of 300"),  # type: ignore[arg-type]
        (lambda: STORE.load_into("m", torch.nn.Linear(2, 2)), "swapped: write load_into(module, ref)"),  # type: ignore[arg-type]
        (lambda: STORE.deliver([object()], "m", "take"), "swapped"),  # type: ignore[arg-type]
        (lambda: STORE.load_into({}, "m"), "torch.nn.Module, not a dict of 0"),  # type: ignore[arg-type]
        (lambda: STORE.load("m", names="one.name"), "write ['one.name']"),
        (lambda: STORE.load("m", shard="0/3"), "TensorParallel(rank, size)"),  # type: ignore[arg-type]
        (lambda: STORE.together("s", rank="0", ranks=2), "int('0')"),  # type: ignore[arg-type]
        (lambda: STORE.save_part("m", WEIGHTS, session="s", rank="1", ranks="2"), "int('1')"),  # type: ignore[arg-type]
        (lambda: ms.TensorParallel("0", 2), "rank must be a whole number"),  # type: ignore[arg-type]
        (lambda: ms.TensorParallel(0, "2"), "int('2')"),  # type: ignore[arg-type]
        (lambda: ms.ExpertParallel(0.0, 2), "whole number"),  # type: ignore[arg-type]
        (lambda: ms.PipelineStage("0", 2), "stage must be a whole number"),  # type: ignore[arg-type]
        (lambda: ms.Layers(0, None), "stop must be a whole number"),  # type: ignore[arg-type]
        (lambda: ms.Regions("w"), "regions maps names"),  # type: ignore[arg-type]
        (lambda: ms.open("x", mirrors="s3://a"), "write ['s3://a']"),
    ],
)
def test_the_mistake_is_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert says in str(caught.value)
    assert "tensor(" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_there_is_named() -> None:
    for call in (STORE.load, STORE.stream, STORE.follow):
        with pytest.raises(ValueError, match="device='cuda' is not there"):
            call("m", device="cuda")


def test_what_is_missing_is_said_as_python_does() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'source'"):
        STORE.save("m")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nmes'"):
        STORE.load("m", nmes=["a"])  # type: ignore[call-arg]


def test_numbers_of_numpy_and_iterators_are_taken(tmp_path: Path) -> None:
    store = ms.open(tmp_path, threads=np.int64(2))  # type: ignore[arg-type]
    store.save("m", {"a": torch.ones(2), "b": torch.ones(3)})
    assert list(store.load("m", names=(name for name in ["b"]))) == ["b"]
    store.load("m", shard={"a": None})


def test_versions_to_swap_to_are_numbers(tmp_path: Path) -> None:
    store = ms.open(tmp_path)
    store.save("m", {"a": torch.ones(2)})
    live: Live = store.follow("m")
    for wrong in ("1", 1.0, "prod"):
        with pytest.raises(TypeError, match="number"):
            live.swap_to(wrong)  # type: ignore[arg-type]


def test_a_module_may_have_what_a_store_has() -> None:
    class Mine(torch.nn.Linear):
        repo = "github.com/x/y"

    assert ms.open("memory://mine").save("m", Mine(2, 2)).version == 1


def test_a_tag_is_not_called_as_the_weights_of_every_version_are(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", {"w": torch.ones(1)})
    for set_tag in (
        lambda: store.tag("m@1", "original"),
        lambda: store.save("m", {"w": torch.ones(2)}, tag="original"),
    ):
        with pytest.raises(ValueError, match="name of a variant"):
            set_tag()
    assert store.models()[0].versions == 1
