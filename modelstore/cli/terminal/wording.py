"""Messages in the words of the command line: what Python writes as `calibration='book.txt'` is `--calibration book.txt` here.

The library says of its arguments how they are written in Python; a command has the same ones as options, mostly under the same
names. All that a command says of a failure passes through `as_typed`, so that no message is written twice.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_OTHERWISE = {  # arguments of Python whose option has another name
    "max_shard_bytes": "--max-shard",
    "mirrors": "--mirror",
    "url": "--store",
}
_TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_VALUE = rf"{_TEXT}|\[[^\[\]]*\]|\{{[^{{}}]*\}}|-?\d[\w.+-]*\w|\d|True|False|None|"
# A quotation stays as it is, whatever it holds; an apostrophe within a word does not start one.
_ARGUMENT = re.compile(rf"(?<![\w=])(?:{_TEXT})|(?<![\w.'\"-])(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})")
_ITEM = re.compile(r"'([^']*)': ([^,}]+)")  # of a mapping, as messages write it
_FIRST = re.compile(r"\A(?P<name>[a-z][a-z_]*)(?=: | is | are | must )")  # of a message that is about an argument
_ASIDE = re.compile(r" \((?P<name>[a-z][a-z_]*)=\w+\)")  # how Python says what was just said, where no option does

_PARSED = (  # what Typer says of a value that it cannot take
    (re.compile(r"Value error, "), ""),
    (re.compile(r"Input should be greater than or equal to (\S+)"), r"it must be at least \1"),
    (re.compile(r"Input should be less than or equal to (\S+)"), r"it must be at most \1"),
    (re.compile(r"Input should be a valid integer\b.*"), "it must be a whole number"),
    (re.compile(r"Input should be a (?:valid|finite) number\b.*"), "it must be a number"),
)

_RUNNING: ContextVar[tuple[Any, Sequence[str]] | None] = ContextVar("running", default=None)


@contextmanager
def of_command(group: Any, words: Sequence[str]) -> Iterator[None]:
    """Within the block, messages are of the command of `group` that starts with `words`."""
    before = _RUNNING.set((group, words))
    try:
        yield
    finally:
        _RUNNING.reset(before)


def as_typed(message: str) -> str:
    """A message, with its arguments written as the running command takes them."""
    running = _RUNNING.get()
    if running is None:
        return message
    group, words = running
    own = options(_command(group, words))
    return in_options(message, own, everywhere(group) | own)


def in_options(message: str, own: Mapping[str, str], known: Mapping[str, str]) -> str:
    """A message with each argument that is `known` written as its option.

    Args:
        message: one sentence, such as "recipe= and fit= each say what is to be made".
        own: what the command takes, by its name in Python: a sentence may start with one of these.
        known: what any command takes, these too: "save with codec='raw'" may be said by another command.
    """
    message = _FIRST.sub(lambda found: own.get(found["name"], found[0]), message)
    message = _ASIDE.sub(lambda found: found[0] if found["name"] in known else "", message)
    return _ARGUMENT.sub(lambda found: _written(found, known), message)


def _written(found: re.Match[str], known: Mapping[str, str]) -> str:
    option = known.get(found["name"] or "")
    if option is None:
        return found[0]
    text = found["value"]
    if text in ("", "True"):
        return option
    if text in ("False", "None"):
        return known.get(found[0], found[0])
    if text[0] == "{":
        return " ".join(f"{option} {key}={value}" for key, value in _ITEM.findall(text)) or found[0]
    if text[0] not in "'\"[":
        return f"{option} {text}"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # cut short, or no list of texts
        return f"{option} {text}"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{option} {shlex.quote(str(one))}" for one in values)


def of_value(message: str) -> str:
    """Typer's message about a value, in this package's words."""
    for theirs, ours in _PARSED:
        message = theirs.sub(ours, message)
    return message


def options(command: Any) -> dict[str, str]:
    """How a command's arguments are typed, by what Python calls them."""
    found: dict[str, str] = {}
    for one in command.params:
        if one.param_type_name == "option":
            option = next((name for name in one.opts if name.startswith("--")), one.opts[0])
            found |= dict.fromkeys((one.name, option.lstrip("-").replace("-", "_")), option)
            found |= {f"{one.name}=False": other for other in one.secondary_opts}
        elif one.metavar:
            found[one.name] = one.metavar.strip("[].")
    return found | {name: option for name, option in _OTHERWISE.items() if option in found.values()}


def everywhere(command: Any) -> dict[str, str]:
    """The options of a command and of all below it."""
    inner = [everywhere(one) for one in getattr(command, "commands", {}).values()]
    found = {name: option for each in inner for name, option in each.items()}
    return found | {name: option for name, option in options(command).items() if option.startswith("--")}


def _command(group: Any, words: Sequence[str]) -> Any:
    for word in words:
        inner = getattr(group, "commands", {}).get(word)
        if inner is None:
            break
        group = inner
    return group
