"""How a command ends when it does not succeed: one sentence on stderr, and an exit code.

0 done, 1 the work failed, 2 wrong usage, 3 what was to be checked could not be read, 130 stopped by Ctrl-C,
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from modelstore.cli import output
from modelstore.errors import ModelStoreError
from modelstore.text import json_line

FAILED, USAGE, UNREAD, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141

UsageError: Any = typer.BadParameter.__bases__[0]  # Typer exports this one class of its error tree only


class Commands(TyperGroup):
    """The group of all commands, which turns whatever goes wrong in one into a sentence and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run as the command line does; without `standalone_mode`, return the exit code instead of exiting."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            with output.shown_streams():
                code = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            with output.shown_streams():
                code = self._usage(error, as_json="--json" in given)
        except typer.Abort:  # a question was answered by the end of input
            code = FAILED
        code = code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        given = [*ctx.args, *getattr(ctx, "_protected_args", ())]
        as_json, debug = "--json" in given, "--debug" in given
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("stopped; the same command goes on from what is finished.", kind="cancelled", as_json=as_json)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Python flushes stdout once more at its end: that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except (UsageError, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                output.failure(traceback.format_exc())
            raise typer.Exit(_explain(error, as_json=as_json)) from None

    @staticmethod
    def _usage(error: Any, *, as_json: bool) -> int:
        if as_json:
            _say(error.format_message(), kind="usage", as_json=True)
        else:
            error.show()
        return USAGE


def usage(message: str) -> Exception:
    """The error that ends a command as wrongly used."""
    error: Exception = UsageError(message)
    return error


def _explain(error: Exception, *, as_json: bool) -> int:
    """Say what went wrong, and give the exit code for it."""
    if isinstance(error, ModelStoreError):
        _say(as_json=as_json, **error.as_dict())  # type: ignore[arg-type]
        return FAILED
    if isinstance(error, ValueError):  # a wrong argument, such as a name or reference that cannot be one
        _say(str(error), kind="usage", as_json=as_json)
        return USAGE
    if isinstance(error, OSError):
        _say(str(error), kind="system", as_json=as_json)
        return FAILED
    if isinstance(error, ModuleNotFoundError):
        _say(
            f"the package {error.name!r} is needed for this and is not installed",
            kind="missing_package",
            as_json=as_json,
        )
        return FAILED
    text = f"{type(error).__name__}: {error} (this should not happen; --debug shows where)"
    _say(text, kind="unexpected", as_json=as_json)
    return FAILED


def _say(message: str, *, kind: str, as_json: bool, **places: Any) -> None:
    if as_json:
        output.failure(json_line({"error": places | {"kind": kind, "message": message}}))
    else:
        output.failure(f"modelstore: {' '.join(message.split())}")
