"""How a command ends when it does not succeed: one sentence on stderr, and an exit code.

0 done, 1 the work failed, 2 wrong usage, 3 what was to be checked could not be read, 130 stopped by Ctrl-C,
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup

from modelstore.cli.terminal import output, wording
from modelstore.cli.terminal.interrupts import INTERRUPTED, end_at_once
from modelstore.errors import ModelStoreError
from modelstore.paths import explained
from modelstore.text import json_line

# These do not repeat the finished part of a command that was stopped.
RESUMING = frozenset({"save", "export", "compress", "copy", "rename", "repair", "gc"})
FAILED, USAGE, UNREAD, BROKEN_PIPE = 1, 2, 3, 141
PATIENCE = 5.0  # seconds from Ctrl-C to the end of a command, and from that to the end of the process

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
        given = [*getattr(ctx, "_protected_args", ()), *ctx.args]  # the command first
        with wording.of_command(self, given):
            return self._run(ctx, given)

    def _run(self, ctx: Any, given: list[str]) -> Any:
        as_json, debug = "--json" in given, "--debug" in given
        stopped = Stopped(lambda: _tell_stopped(given, as_json))
        try:
            with stopped.noticed():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _interrupted(given, as_json) from None
        except BrokenPipeError:
            # Python flushes stdout once more at its end: that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except (UsageError, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if stopped:  # what was interrupted made an error of its own of it, as the imports of some packages do
                raise _interrupted(given, as_json) from None
            if debug:
                output.failure(traceback.format_exc())
            raise typer.Exit(explain(error, as_json=as_json)) from None

    @staticmethod
    def _usage(error: Any, *, as_json: bool) -> int:
        error.message = wording.of_value(str(error.message))
        if as_json:
            _say(error.format_message(), kind="usage", as_json=True)
        else:
            error.show()
        return USAGE


class Stopped:
    """Whether Ctrl-C was pressed, also where `KeyboardInterrupt` did not come through."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._pressed = False
        self._over = threading.Event()
        self._tell = tell

    def __bool__(self) -> bool:
        return self._pressed

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Within the block, Ctrl-C is noted, and raises `KeyboardInterrupt` as ever.

        If the block does not end within `PATIENCE` seconds (a server may not answer), the process ends: everything can be
        stopped at any point and done again.
        """
        before = signal.getsignal(signal.SIGINT)
        if before is end_at_once:  # of the command's start, which is over
            before = signal.default_int_handler
        if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
            yield
            return
        heard, signals = os.pipe()  # told of signals at once, where a handler waits for what the main thread is at
        os.set_blocking(signals, False)
        signal.signal(signal.SIGINT, self._interrupt)
        woken = signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard,), name="modelstore-ctrl-c", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()
            signal.set_wakeup_fd(woken)
            signal.signal(signal.SIGINT, before)
            os.close(signals)

    def _interrupt(self, *_: object) -> None:
        self._pressed = True
        raise KeyboardInterrupt

    def _watch(self, heard: int) -> None:
        """End the process where Ctrl-C does not."""
        with os.fdopen(heard, "rb", buffering=0) as file:
            while told := file.read(1):
                if told[0] == signal.SIGINT and not self._over.wait(PATIENCE):
                    telling = threading.Thread(target=self._tell, daemon=True)  # nobody may read what it says
                    telling.start()
                    telling.join(PATIENCE)
                    _abandon()
                    os._exit(INTERRUPTED)


def _abandon() -> None:
    """Remove the file that is half-written, if one is: the thread that would do so does not come to it."""
    if "modelstore.execute.export.target" in sys.modules:
        from modelstore.execute.export.target import abandon

        removing = threading.Thread(target=abandon, daemon=True)  # a disk may not answer either
        removing.start()
        removing.join(PATIENCE)


def end_soon() -> None:
    """End this process, of which a command was stopped, where it waits at its end for threads that wait for a server."""
    end = threading.Timer(PATIENCE, os._exit, [INTERRUPTED])
    end.daemon = True
    end.start()


def _tell_stopped(given: Sequence[str], as_json: bool) -> None:
    command = given[0] if given else ""
    one_file = command == "export" and any(word.endswith(("gguf", "safetensors")) for word in given)
    goes_on = command in RESUMING and not one_file
    with suppress(OSError):  # nobody reads it: what was stopped ends all the same
        _say(
            "stopped" + "; the same command goes on from what is finished" * goes_on, kind="cancelled", as_json=as_json
        )


def _interrupted(given: Sequence[str], as_json: bool) -> Exception:
    _tell_stopped(given, as_json)
    ending: Exception = typer.Exit(INTERRUPTED)
    return ending


def usage(message: str) -> Exception:
    """The error that ends a command as wrongly used."""
    error: Exception = UsageError(message)
    return error


def explain(error: Exception, *, as_json: bool) -> int:
    """Say what went wrong, and give the exit code for it."""
    if isinstance(error, ModelStoreError):
        _say(as_json=as_json, **error.as_dict())  # type: ignore[arg-type]
        return FAILED
    if isinstance(error, ValueError):  # a wrong argument, such as a name or reference that cannot be one
        _say(str(error), kind="usage", as_json=as_json)
        return USAGE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename and str(error.filename) not in (error.strerror or "") else ""
        _say(f"{where}{explained(error)}", kind="system", as_json=as_json)
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
    message = wording.as_typed(message)
    if as_json:
        output.failure(json_line({"error": places | {"kind": kind, "message": message}}))
    else:
        output.failure(f"modelstore: {' '.join(message.split())}")
