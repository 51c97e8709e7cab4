"""Makes the schemas in this folder from their projects' own files; see schemas/README.md. Run it again for newer versions.

    python tests/deploy/vendor.py KUBERAY_CHECKOUT KUBERNETES_SCHEMAS COMPOSE_SPEC_CHECKOUT

KUBERNETES_SCHEMAS is a folder `v1.N.0-local-strict` of the package kubernetes-validate.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
KINDS = ("ConfigMap", "Namespace", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount", "StatefulSet")


def bare(schema: Any, *, names: bool = False) -> Any:
    """A schema without its descriptions; `names` where the keys are properties' names, not keywords."""
    if isinstance(schema, list):
        return [bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if names or key not in ("description", "x-enum-descriptions")}
    return {key: bare(value, names=not names and key in ("properties", "$defs")) for key, value in kept.items()}


def references(schema: Any) -> set[str]:
    """The names of the definitions that a schema refers to, directly."""
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    found = set().union(*map(references, schema.values()))
    return found | {_definition(schema["$ref"])} if "$ref" in schema else found


def here(schema: Any) -> Any:
    """A schema whose references lead into its own file."""
    if isinstance(schema, list):
        return [here(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: f"#/$defs/{_definition(value)}" if key == "$ref" else here(value) for key, value in schema.items()}


def _definition(reference: str) -> str:
    return reference.rpartition("#/$defs/")[2]


def kubernetes(folder: Path) -> dict[str, Any]:
    """Each kind's schema by name, and under `$defs` what they need of the definitions."""
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    by_kind = {}
    for kind in KINDS:
        (path,) = (p for p in folder.glob(f"{kind.lower()}-*v1.json") if not p.stem.endswith(("alpha1", "beta1")))
        by_kind[kind] = json.loads(path.read_text())
    wanted, seen = references(list(by_kind.values())), set[str]()
    while wanted - seen:
        name = (wanted - seen).pop()
        seen.add(name)
        wanted |= references(definitions[name])
    return here(bare({"kinds": by_kind, "$defs": {name: definitions[name] for name in sorted(seen)}}))


def custom(path: Path) -> Any:
    """The schema of a custom resource's newest version."""
    versions = {version["name"]: version for version in yaml.safe_load(path.read_text())["spec"]["versions"]}
    return bare(versions["v1"]["schema"]["openAPIV3Schema"])


def main(kuberay: Path, kubernetes_schemas: Path, compose: Path) -> None:
    """Write them all."""
    crds = kuberay / "ray-operator/config/crd/bases"
    made = {
        "raycluster": custom(crds / "ray.io_rayclusters.yaml"),
        "rayjob": custom(crds / "ray.io_rayjobs.yaml"),
        "kubernetes": kubernetes(kubernetes_schemas),
        "compose": bare(json.loads((compose / "schema/compose-spec.json").read_text())),
    }
    for name, schema in made.items():
        content = json.dumps(schema, separators=(",", ":"), sort_keys=True).encode()
        (SCHEMAS / f"{name}.json.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
