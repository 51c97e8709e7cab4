"""What the files in docker/ and deploy/ are checked with: strict schemas, and the command line's own parser."""

from __future__ import annotations

import json
import lzma
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import typer
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
CUSTOM = {"RayCluster": "raycluster", "RayJob": "rayjob"}


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


@cache
def schema(name: str) -> dict[str, Any]:
    """A vendored schema by its file's name, strict: an unknown field is an error, not something to drop silently."""
    loaded: dict[str, Any] = strict(json.loads(lzma.decompress((SCHEMAS / f"{name}.json.xz").read_bytes())))
    return loaded


def strict(node: Any) -> Any:
    """A schema whose objects may have no other fields than those it names."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    closed = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@cache
def validator(kind: str) -> jsonschema.protocols.Validator:
    """Checks one kind of Kubernetes object. `KeyError` for a kind without a schema."""
    core = schema("kubernetes")
    if kind not in CUSTOM:
        return jsonschema.Draft202012Validator({**core["kinds"][kind], "$defs": core["$defs"]})
    custom = schema(CUSTOM[kind])
    # A custom resource's own schema says nothing about its metadata: Kubernetes's does.
    metadata = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    fields = {
        **custom["properties"],
        "metadata": metadata,
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": kind},
    }
    return jsonschema.Draft202012Validator({**custom, "properties": fields, "$defs": core["$defs"]})


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a Kubernetes object, each with its place."""
    return _messages(validator(document["kind"]), document)


def compose_problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a Compose file; `x-` fields are its author's own."""
    return _messages(jsonschema.Draft7Validator(schema("compose")), document)


def _messages(checker: Any, document: dict[str, Any]) -> list[str]:
    return [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in checker.iter_errors(document)
    ]


def walk(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a document, with the way to it."""
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from walk(value, (*path, str(key)))


def pod_specs(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the objects make, with its place."""
    for document in documents:
        for path, node in walk(document):
            if isinstance(node, dict) and isinstance(node.get("containers"), list):
                yield f"{document['kind']} {document['metadata']['name']} {'.'.join(path)}", node


def parse_command(line: str | list[str], token_file: Path | None = None) -> dict[str, Any]:
    """The options of a `modelstore` command, parsed by the command line itself but not run.

    A path in /run/secrets is replaced by `token_file`, since the command line wants it to be there. Raises what the command
    line raises for what it does not know.
    """
    from modelstore.cli.main import app

    words = shlex.split(line) if isinstance(line, str) else list(line)
    if words[0] == "modelstore":
        words = words[1:]
    if token_file is not None:
        words = [str(token_file) if word.startswith("/run/secrets/") else word for word in words]
        words = [
            f"--token-file={token_file}" if word.startswith("--token-file=/run/secrets/") else word for word in words
        ]
    command: Any = typer.main.get_command(app)
    context = None
    name = "modelstore"
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return dict(context.params)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


def size(text: str) -> int:
    """Bytes of a Kubernetes quantity or of a size on the command line (Gi, GiB, G, GB)."""
    number = text.rstrip("BKMGTikmgtb")
    scale = {"K": 1, "M": 2, "G": 3, "T": 4}
    unit = text[len(number) :].rstrip("Bb")
    return int(float(number) * ((1024 if unit.endswith("i") else 1000) ** scale[unit[0].upper()] if unit else 1))
