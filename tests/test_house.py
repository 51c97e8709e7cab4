"""The rules of the house, as far as a program can see them."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import modelstore

ROOT = Path(modelstore.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 400
BODY = 50  # lines of a function, without its docstring

# Lower may not import higher. `execute` lies between what it runs (plans, stores) and what uses it.
LAYERS = {
    "text": -1,  # errors are shown by it
    "errors": 0,
    "paths": 0,
    "format": 1,
    "codecs": 2,
    "storage": 2,
    "sources": 2,
    "architecture": 3,
    "plan": 4,
    "store": 5,
    "execute": 6,
    "compress": 7,
    "calibrate": 8,
    "search": 9,
    "restructure": 9,
    "transfer": 9,
    "cluster": 9,
    "client": 10,
    "cli": 11,
    "integrations": 11,
    "serve": 11,
    "testing": 12,  # which nothing else imports
}
# Siblings on one level know nothing of each other, with one exception: the edges may use one another.
EDGES = frozenset({"cli", "integrations", "serve"})
# The client hands out views that live at an edge (`store.zarr`): it looks for them when it is asked, not before.
ON_DEMAND = frozenset({("client", "integrations")})
FOREIGN = {  # packages that only these parts may import when they themselves are imported
    "ray": {"cluster"},
    "transformers": {"integrations"},
    "huggingface_hub": {"integrations"},
    "vllm": {"integrations"},
    "xarray": {"integrations"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "obstore": {"storage"},
    "s3fs": {"storage"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
}


@cache
def parse(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(path: Path) -> str:
    """The part of the house a file lies in: a folder's name, or the file's own; '' for the package itself."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py") if first not in ("__init__.py", "__main__.py") else ""


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Every module that is imported anywhere in the tree, with its line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            # `from modelstore import store` names a part too
            found += [
                (f"{module}.{alias.name}" if module == "modelstore" else module, node.lineno) for alias in node.names
            ]
    return found


def when_imported(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: no function bodies, nothing for type checkers only."""
    kept: list[ast.stmt] = []
    queue = list(tree.body)
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif isinstance(node, ast.If | ast.With | ast.ClassDef | ast.For):
            queue += [*node.body, *getattr(node, "orelse", [])]
        elif isinstance(node, ast.Try):
            queue += [*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)]
        else:
            kept.append(node)
    return ast.Module(kept, [])


def where(path: Path) -> str:
    """A file's path as it is spoken of."""
    return path.relative_to(ROOT.parent).as_posix()


def test_every_part_has_its_place() -> None:
    parts = {part(path) for path in FILES} - {""}
    unknown, gone = parts - {*LAYERS}, {*LAYERS} - parts
    assert not unknown, f"no layer is given for {unknown}: add them to LAYERS"
    assert not gone, f"there is no {gone} any more: take them out of LAYERS"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in FILES:
        here = part(path)
        if not here:
            continue
        for module, line in imports(parse(path)):
            names = module.split(".")
            if names[0] != "modelstore" or len(names) < 2 or names[1] not in LAYERS or names[1] == here:
                continue
            there = names[1]
            if (here, there) in ON_DEMAND and (module, line) not in imports(when_imported(parse(path))):
                continue
            if LAYERS[there] > LAYERS[here] or (LAYERS[there] == LAYERS[here] and not {here, there} <= EDGES):
                wrong.append(f"{where(path)}:{line}: {here} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_imported_by_what_it_imports() -> None:
    """Also when a function asks for it later: a circle is one room with two doors."""
    files = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    needs = {name: {module for module in names(parse(path)) if module in files} for name, path in files.items()}
    try:
        list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' ← '.join(error.args[1])}")


def names(tree: ast.AST) -> set[str]:
    """The modules that a tree may import: `from a import b` may be of a or a.b."""
    found = {module for module, _ in imports(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - {"modelstore"}


def test_heavy_packages_stay_at_the_edges() -> None:
    wrong = []
    for path in FILES:
        for module, line in imports(when_imported(parse(path))):
            allowed = FOREIGN.get(module.split(".")[0])
            if allowed is not None and part(path) not in allowed:
                wrong.append(f"{where(path)}:{line}: imports {module} at its top")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=where)
def test_file_is_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{where(path)} has {lines} lines: two rooms in one?"


def test_a_function_is_one_thought() -> None:
    """Kernels are loops that are compiled as one."""
    wrong = []
    for path in FILES:
        if "kernel" in path.as_posix().removeprefix(ROOT.as_posix()):
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0
                if lines > BODY:
                    wrong.append(f"{where(path)}:{node.lineno}: {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_no_function_is_written_twice() -> None:
    """The same body of four lines or more in two files is a helper that has no place yet."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = "\n".join(map(ast.unparse, node.body[1:] if ast.get_docstring(node) else node.body))
                if body.count("\n") >= 3:
                    found.setdefault(body, []).append(f"{where(path)}:{node.lineno}: {node.name}")
    wrong = [", ".join(places) for places in found.values() if len(places) > 1]
    assert not wrong, "\n".join(wrong)


def test_all_names_what_is_public() -> None:
    listed = list(modelstore.__all__)
    assert listed == sorted(listed)
    assert len(listed) == len(set(listed))
    missing = [name for name in listed if not hasattr(modelstore, name)]
    assert not missing, f"__all__ promises {missing}"
    public = {name for name in dir(modelstore) if not name.startswith("_")}
    submodules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    extra = public - set(listed) - submodules - {"annotations", "TYPE_CHECKING"}
    assert not extra, f"{extra} are public by accident: add them to __all__, or begin them with '_'"


def test_what_is_public_is_explained() -> None:
    wrong = []
    for path in FILES:
        tree = parse(path)
        if ast.get_docstring(tree) is None:
            wrong.append(f"{where(path)}:1: the module")
        public = (
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
        )
        wrong += [f"{where(path)}:{node.lineno}: {node.name}" for node in public if ast.get_docstring(node) is None]
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{where(path)}:{node.lineno}"
        for path in FILES
        if part(path) != "cli"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "print outside cli:\n" + "\n".join(wrong)


def test_no_failure_is_swallowed() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"BaseException"}
            silent = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            if node.type is None or (silent and caught & {"Exception", "BaseException"}):
                wrong.append(f"{where(path)}:{node.lineno}")
    assert not wrong, "bare or silent except:\n" + "\n".join(wrong)


def test_structs_are_prepared_before_they_are_decoded() -> None:
    """See `format/objects/decoding.py`: otherwise two threads that decode one for the first time end the process."""
    wrong = []
    for path in FILES:
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("msgspec."):
                continue
            kinds = [key.value for key in node.keywords if key.arg == "type"]
            if node.func.attr in ("convert", "Decoder"):  # type: ignore[attr-defined]
                kinds += node.args[-1:]
            if path.name != "decoding.py":
                named = [ast.unparse(kind) for kind in kinds]
                wrong += [
                    f"{where(path)}:{node.lineno}: {n}" for n in named if not n.startswith(("prepared(", "_MEMBERS"))
                ]
    assert not wrong, "type=prepared(…):\n" + "\n".join(wrong)


# What is done in one place, and the files (by the end of their path) that have a reason to do it themselves.
ONCE: dict[str, set[str]] = {
    # Threads of a piece of work end with it: `storage/pool.py`. A host's live as long as the host.
    r"\bThreadPoolExecutor\(": {"pool.py", "host.py", "write_behind.py"},
    r"(?i)pool\.map\(": set(),
    # Results in the order of their items, so many under way: `ordered` there. Of requests to hosts, each is several.
    r"deque\[.*Future": {"pool.py", "acknowledge.py", "export/write.py"},
    # Bytes are checked against their digest: `format/digest.py`. These pass the bytes on while they digest them.
    r"digest\(\) *[!=]=|[!=]= *\S*digest\(\)": {"digest.py", "heal.py", "whole.py", "hub.py"},
    # Boxes of raw bytes are cut and pasted: `format/boxes.py`.
    r"""view\(f["']V""": {"boxes.py"},
    # `~` of a user that there is not: `from_home` in `paths.py`.
    r"expanduser\(": {"paths.py", "control/runtime.py", "control/joining.py"},
    # A region is wanted as one range a dimension: `Share.of`.
    r"\(pair,\) for pair in": {"layout_share.py"},
    # A storage says itself whether it is local, and sweeps what is left in it: wrappers forward both.
    r"""\.path\(["']|isinstance\(.*[a-z]Storage\b""": {"storage/open.py"},
}


@pytest.mark.parametrize("pattern", ONCE)
def test_what_is_done_in_one_place_is_done_there(pattern: str) -> None:
    wrong = [
        f"{where(path)}:{number}: {line.strip()}"
        for path in FILES
        if part(path) != "testing" and not where(path).endswith(tuple(f"/{name}" for name in ONCE[pattern]))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_reaches_into_a_store() -> None:
    """Tests and benchmarks stand where users stand: `store.repo`, `store[ref]` and `store.cluster` are what they need."""
    wrong = []
    for folder in ("tests", "benchmarks"):
        for path in sorted((ROOT.parent / folder).rglob("*.py")):
            for node in ast.walk(parse(path)):
                if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr):
                    continue
                text = ast.unparse(node.value)
                if node.attr == "_access" or re.search(r"(^|\.)store$|(^|\.)(open_on|open|Store)\(.*\)$", text):
                    wrong.append(f"{where(path)}:{node.lineno}: {text}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_a_codec_is_asked_and_not_looked_at() -> None:
    """What others want to know of a codec is a property of it, which codecs of other packages have, too."""
    wrong = []
    for path in FILES:
        if part(path) == "codecs":
            continue
        tree = parse(path)
        classes = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modelstore.codecs")
            for alias in node.names
        }
        # An assertion tells the type checker.
        told = {call for node in ast.walk(tree) if isinstance(node, ast.Assert) for call in ast.walk(node.test)}
        for node in ast.walk(tree):
            asks = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type")
            if (asks or isinstance(node, ast.MatchClass)) and node not in told:
                named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & classes
                wrong += [f"{where(path)}:{node.lineno}: {name}" for name in named]  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def test_a_name_is_one_thing() -> None:
    """No type is called as another one is, wherever it lies: who reads a name, or looks for it, finds one meaning.

    A type is a class, or an alias at the top of a module; an alias may be written twice where it says the same.
    """
    found: dict[str, dict[str, str]] = {}
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                place = f"{where(path)}:{node.lineno}"
                found.setdefault(node.name, {})[place] = place
        for name, said, line in aliases(parse(path)):
            found.setdefault(name, {})[said] = f"{where(path)}:{line}"
    del found["CodecSpec"]  # users have the subclass that checks what it is given
    wrong = [f"{name}: {', '.join(places.values())}" for name, places in found.items() if len(places) > 1]
    assert not wrong, "\n".join(wrong)


def aliases(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """The types that are given a name: the name, what it stands for, and the line. Options of commands are named as options."""
    for node in tree.body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if not isinstance(target, ast.Name) or not re.match(r"[A-Z]\w*[a-z]", target.id):
            continue
        said = ast.unparse(value) if value is not None else ""
        if not isinstance(value, ast.Call) and "typer." not in said:
            yield target.id, said, node.lineno


SIZES = {  # what configs say of how large a model is, by names that are transformers'
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "layer_types"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "kv_lora_rank"),
    *("moe_intermediate_size", "num_kv_shared_layers", "get_text_config", "text_config"),
}
# GGUF files are made of a config, and a config of GGUF files, key by key.
TRANSLATORS = {"integrations/gguf", "sources/gguf_names.py"}


def test_only_architecture_knows_what_configs_call_things() -> None:
    wrong = []
    for path in FILES:
        here = path.relative_to(ROOT).as_posix()
        if part(path) == "architecture" or any(here.startswith(one) for one in TRANSLATORS):
            continue
        for node in ast.walk(parse(path)):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            )
            if isinstance(name, str) and name in SIZES:
                wrong.append(f"{where(path)}:{getattr(node, 'lineno', 0)}: {name}: ask architecture/sizes.py")
    assert not wrong, "\n".join(wrong)
