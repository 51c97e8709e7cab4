"""`tag` and `untag`: names for versions."""

from __future__ import annotations

from typing import Annotated

import typer

from modelstore.cli.terminal import complete, output, swapped
from modelstore.cli.terminal.options import AsJson, Debug, ModelName, Reference, StoreUrl, open_store
from modelstore.format.names import is_model, is_word


def tag(
    ref: Reference,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="The tag, such as prod.", show_default=False)],
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let a tag name a version.

    A tag that names another version of the model moves to this one.
    """
    opened = open_store(store)
    with swapped.told(opened, "tag", (ref, tag), ("REF", "TAG"), second=is_word):
        version = opened.tag(ref, tag)
    at = f"{ref.partition('@')[0]}@{version}"
    output.result({"ref": ref, "tag": tag, "version": version}, [f"{tag} names {at}"], as_json=json)


def untag(
    name: ModelName,
    tag: Annotated[
        str, typer.Argument(metavar="TAG", autocompletion=complete.tags, help="The tag to remove.", show_default=False)
    ],
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove a tag. The version it named stays."""
    opened = open_store(store)
    with swapped.told(opened, "untag", (name, tag), ("NAME", "TAG"), first=is_model, second=is_word):
        opened.untag(name, tag)
    output.result({"name": name, "untagged": tag}, [f"removed the tag {tag} of {name}"], as_json=json)
