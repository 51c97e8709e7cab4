"""`tag` and `untag`: names for versions."""

from __future__ import annotations

from typing import Annotated

import typer

from modelstore.cli import complete, output
from modelstore.cli.options import AsJson, Debug, ModelName, Reference, StoreUrl, open_store


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
    open_store(store).tag(ref, tag)
    output.result({"ref": ref, "tag": tag}, [f"{tag} names {ref}"], as_json=json)


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
    open_store(store).untag(name, tag)
    output.result({"name": name, "untagged": tag}, [f"removed the tag {tag} of {name}"], as_json=json)
