"""How a cluster's actors are named and asked, and what Ray says of those that are gone, in this package's own errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

from modelstore.cluster.control.protocol import Control
from modelstore.errors import ModelStoreError, StorageError

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "modelstore"
DIRECTORY = "directory"
ANSWER = 20.0  # seconds that the directory may take, also to come up again
_AGAIN = 0.2  # seconds until a directory that just died is asked again


class HostGoneError(StorageError):
    """A host, or the cluster's directory, died or does not answer: another one takes its place, or has taken it."""


def actor(name: str) -> Any:
    """The handle of an actor of the cluster, by its name. `ValueError` if there is none."""
    return ray.get_actor(name, namespace=NAMESPACE)


def host_name(member: str) -> str:
    """The name under which a member's actor is known."""
    return f"host/{member}"


def told(error: BaseException, whom: str) -> BaseException:
    """An error of a call to `whom` as this package's: what it raised itself, or that it is gone. Pure."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, ray.exceptions.RayError):  # of one that it asked itself
            return told(cause, whom)
        if isinstance(cause, ModelStoreError | ValueError | TypeError | OSError):
            return cause
        return StorageError(f"{whom} failed: {_last_line(error)}; look at its log")
    if isinstance(error, ray.exceptions.RayError | FutureTimeoutError | ValueError):
        why = "does not answer" if isinstance(error, TimeoutError) else f"is gone ({_last_line(error)})"
        return HostGoneError(f"{whom} {why}: look at 'modelstore cluster status', and try again")
    return error


def answer(ref: Any, whom: str, seconds: float | None) -> Any:
    """The result of a call to `whom`. `HostGoneError` if it died or says nothing in time; its own errors as they are."""
    try:
        return ray.get(ref, timeout=seconds)
    except ray.exceptions.RayError as error:
        raise told(error, whom) from None


def answered(ref: Any, whom: str) -> Future[Any]:
    """As `answer`, as a future."""
    asked, given = ref.future(), Future[Any]()

    def take(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            given.set_result(done.result())
        else:
            given.set_exception(told(error, whom))

    asked.add_done_callback(take)
    return given


def failed(error: BaseException, whom: str) -> Future[Any]:
    """The future of a call to `whom` that could not be made."""
    made: Future[Any] = Future()
    made.set_exception(told(error, whom))
    return made


def ask_directory(method: Callable[Concatenate[Control, P], R], *arguments: P.args, **named: P.kwargs) -> R:
    """The answer of the cluster's directory: `ask_directory(Control.view)`. Errors as for `ask_directory_within`."""
    return ask_directory_within(ANSWER, method, *arguments, **named)


def ask_directory_within(
    seconds: float, method: Callable[Concatenate[Control, P], R], *arguments: P.args, **named: P.kwargs
) -> R:
    """The answer of the cluster's directory; one that just died is waited for, as it starts again by itself.

    `HostGoneError` if it says nothing in so many seconds, `StorageError` if the cluster has none.
    """
    end = time.monotonic() + seconds
    while True:
        left = max(0.1, end - time.monotonic())
        with contextlib.suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.ActorDiedError):
            return ask_directory_once(left, method, *arguments, **named)
        if time.monotonic() + _AGAIN > end:
            raise HostGoneError("the cluster's directory is gone: look at 'modelstore cluster status', and try again")
        time.sleep(_AGAIN)


def ask_directory_once(
    seconds: float, method: Callable[Concatenate[Control, P], R], *arguments: P.args, **named: P.kwargs
) -> R:
    """As `ask_directory_within`; an error of Ray's where it just died."""
    try:
        directory = actor(DIRECTORY)
    except ValueError:
        raise StorageError(
            "this Ray cluster has no store hosts: run 'modelstore cluster start --address auto' on one of its nodes"
        ) from None
    except ray.exceptions.RayError as error:
        raise told(error, "the Ray cluster") from None
    try:
        found: R = ray.get(getattr(directory, method.__name__).remote(*arguments, **named), timeout=seconds)
        return found
    except (ray.exceptions.ActorUnavailableError, ray.exceptions.ActorDiedError):
        raise
    except ray.exceptions.RayError as error:
        raise told(error, "the cluster's directory") from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1]:.200}" if lines else type(error).__name__
