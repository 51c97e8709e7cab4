"""A codec's parameters are refused where they are made, whatever the codec; what is stored of other versions is read."""

from __future__ import annotations

import dataclasses
import math
import pickle
from importlib import import_module
from typing import Any

import msgspec
import pytest
import torch

import modelstore as ms
from modelstore.codecs import registry
from modelstore.codecs.floating.rounded import Round
from modelstore.format.objects import manifest

WRONG: list[Any] = [
    "x",
    "",
    True,
    False,
    None,
    99,
    -1,
    10**30,
    1.5,
    -0.5,
    10.0**300,
    math.nan,
    math.inf,
    [],
    {},
    b"x",
    object(),
]


def parameters() -> list[Any]:
    """Each parameter of each codec."""
    found = []
    for name, place in registry._ROWS.items():
        module, attribute = place.split(":")
        made = getattr(import_module(module), attribute)
        found += [pytest.param(name, field, id=f"{name}-{field.name}") for field in dataclasses.fields(made)]
    return found


@pytest.mark.parametrize(("name", "field"), parameters())
def test_a_wrong_value_is_refused_by_name(name: str, field: dataclasses.Field[Any]) -> None:
    said = {}
    for at, value in enumerate(WRONG):
        try:
            spec = ms.CodecSpec(name, {field.name: value})
        except ValueError as error:
            said[at] = str(error)
        else:  # it can be meant so, and is written and read as it is
            assert msgspec.json.decode(msgspec.json.encode(spec), type=manifest.CodecSpec) == spec
            assert type(value) in (type(field.default), int)
    assert len(said) >= len(WRONG) - 4
    for text in said.values():
        assert text.startswith(f"codec {name!r}: ")
        assert field.name in text


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("int", {"bits": 99}, "bits is 99; allowed are 2, 3, 4 and 8"),
        ("int", {"bits": "4"}, "bits must be a whole number, not the text '4'"),
        ("int", {"bitz": 4}, "it takes bits, symmetric, granularity, group_size, method"),
        ("int", {"granularity": "rows"}, "known are tensor, channel, group, block"),
        ("itn", {}, "did you mean 'int'"),
        ("int", 4, "a mapping by name"),
        ("raw", {"level": 3}, "it takes none"),
        (4, {}, "named by a text"),
    ],
)
def test_the_mistake_is_named(name: Any, params: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ms.CodecSpec(name, params)


def test_what_is_read_is_equal_and_not_checked() -> None:
    spec, stored = ms.CodecSpec("int", {"bits": 4}), manifest.CodecSpec("int", {"bits": 4})
    assert spec == stored == spec
    assert spec != manifest.CodecSpec("int", {"bits": 8}) != spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert msgspec.json.decode(b'{"name":"newer","params":{"x":1}}', type=manifest.CodecSpec).name == "newer"


def test_rules_and_recipes_are_of_their_kinds() -> None:
    store = ms.open("memory://recipes")
    store.save("m", {"a.weight": torch.ones(64, 64)})
    good = ms.CodecSpec("int", {"bits": 4})
    with pytest.raises(TypeError, match=r"write \('linear',\)"):
        ms.Rule("linear", good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="codec is a CodecSpec"):
        ms.Rule(("linear",), "int4")  # type: ignore[arg-type]
    rule = ms.Rule(("a*",), good)
    for recipe, says in (
        (ms.Recipe("x", rule), "rules"),  # type: ignore[arg-type]
        (ms.Recipe("x", (good,)), "rules"),  # type: ignore[arg-type]
        (ms.Recipe("x", (ms.Rule(("a*", 3), good),)), "targets"),  # type: ignore[arg-type]
        (ms.Recipe(3, (rule,)), "name"),  # type: ignore[arg-type]
        (ms.Recipe("x", (rule,), prune="half"), "prune"),  # type: ignore[arg-type]
        (ms.Recipe("x", (rule, ms.Rule(("no such",), manifest.CodecSpec("int", {"bits": 99})))), "bits is 99"),
        (ms.Recipe("x y", (rule,)), "recipe 'x y' is not valid"),
        (ms.Recipe("../x", (rule,)), "recipe '../x' is not valid"),
        (ms.Recipe("checkpoint", (rule,)), "cannot be called 'checkpoint'"),
    ):
        with pytest.raises(ValueError, match=says):
            store.compress("m", recipe)
    assert list(store.versions("m")[0].variants) == ["original"]


def test_a_recipe_is_named_as_a_variant_only_where_its_variant_is() -> None:
    store = ms.open("memory://named")
    store.save("m", {"a.weight": torch.ones(64, 64)})
    store.compress("m", ms.Recipe("4 bits (mine)", (ms.Rule(("a*",), ms.CodecSpec("int", {"bits": 4})),)), variant="v4")
    assert list(store.versions("m")[0].variants) == ["original", "v4"]
    assert store.verify().ok


@pytest.mark.parametrize("step", [2.0**-100, 2.0**63, 2.0**100])
def test_a_step_is_as_large_as_its_codec_says(step: float) -> None:
    assert registry.codec("round", {"step": step}) == Round(step)


@pytest.mark.parametrize("step", [math.nan, math.inf, -math.inf, 10**400])
def test_a_step_is_finite(step: float) -> None:
    with pytest.raises(ValueError, match=r"not a finite number|beyond all bounds"):
        registry.codec("round", {"step": step})
