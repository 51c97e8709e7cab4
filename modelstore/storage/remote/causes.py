"""The meaning of a client library's error: the cause in a few words, what to do, and whether it passes by itself."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

_DEBUG = "\n\nDebug source"  # what follows is obstore's account of its own structures: read here, never shown
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>")
_MESSAGE = re.compile(r"<Message>\s*([^<]*?)\s*</Message>")
_URL = re.compile(r"https?://[^\s'\",]+")
_PREFIX = re.compile(r"^(Generic \w+ error: )?(Error performing \w+ \S+ in \S+ - )?")  # obstore's
_MARKUP = re.compile(r"<[^>]*>|\s+")

_PASSING_STATUS = frozenset({408, 425, 429})
# Codes that arrive with a status which does not say so: RequestTimeout is a 400, a conditional conflict is a 409.
_PASSING_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "InternalFailure",
        "OperationAborted",
        "OperationTimedOut",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServerBusy",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)
_PASSING_WORDS = ("reduce your request rate", "SlowDown")
_PASSING_ERRNO = frozenset(
    {errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH}
)
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_NO_BUCKET_WORDS = (*_NO_BUCKET, "specified bucket does not exist")
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_BAD_CREDENTIALS = frozenset(
    {
        "AuthenticationFailed",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "NoAuthenticationInformation",
        "NotSignedUp",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
_CREDENTIALS = "check the credentials (keys in the environment, profile, or storage_options)"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a request failed. `passes`: by itself; None if nothing tells. `unreachable`: nobody answered.

    `refused`: these credentials are not valid, or may not do it.
    """

    what: str
    advice: str = ""
    passes: bool | None = None
    unreachable: bool = False
    no_bucket: bool = False
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.advice}" if self.advice else self.what


@dataclass(frozen=True, slots=True)
class _Said:
    """The content of one error, taken out of a library's own form."""

    text: str  # for a person, without markup
    everything: str
    status: int | None
    code: str
    host: str


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def cause_of(error: BaseException) -> Cause:
    """The cause that the error, or one below it, tells most of.

    A cause that stays (403, 404, …) wins over one that passes, wherever it is in the chain: libraries wrap what happened.
    """
    found = [_cause(one) for one in chain(error)]
    known = [cause for cause in found if cause.passes is not None]
    staying = [cause for cause in known if not cause.passes]
    if staying:
        return next((cause for cause in staying if cause.advice), staying[0])
    return next((cause for cause in known if cause.advice), known[0]) if known else found[0]


def _cause(error: BaseException) -> Cause:
    said = _said(error)
    return (
        _broken(error, said)
        or _unreachable(error, said)
        or _answered(said)
        or _broke_off(error, said)
        or Cause(said.text, passes=_plain(error))
    )


def _broken(error: BaseException, said: _Said) -> Cause | None:
    """The errors before anything was sent."""
    if type(error).__name__ == "PanicException":
        return Cause(
            f"the client cannot use its settings ({said.text})", "check the keys, the region and the endpoint", False
        )
    if _of(
        error, "botocore.exceptions", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"
    ) or _of(error, "botocore.exceptions", "SSOError", "TokenRetrievalError", "ProfileNotFound"):
        return Cause(f"there are no usable credentials ({said.text})", _CREDENTIALS, False)
    marker = "credential provider: "
    if _of(error, "obstore.exceptions", "UnauthenticatedError") and marker in said.text:
        reason = said.text.partition(marker)[2].partition(": ")[2]
        return Cause(reason or said.text, passes=False)
    return None


def _unreachable(error: BaseException, said: _Said) -> Cause | None:
    """No connection: the name, TLS, nobody at the port."""
    everything, host = said.everything, said.host or "the server"
    names = {type(one).__name__ for one in (error, getattr(error, "os_error", None)) if one is not None}
    if "InvalidCertificate" in everything or "CERTIFICATE_VERIFY_FAILED" in everything:
        return Cause(
            f"TLS: the certificate of {host} is not trusted or not its own",
            "give the authority that signed it by AWS_CA_BUNDLE or verify, and address it by its name",
            False,
        )
    if "InvalidContentType" in everything or "WRONG_VERSION_NUMBER" in everything:
        return Cause(f"TLS: {host} does not speak it", "write http:// in the endpoint, or give its TLS port", False)
    if "AlertReceived" in everything or "PeerIncompatible" in everything or "handshake failure" in everything:
        return Cause(f"TLS: {host} and this machine agree on no version or cipher", "check the endpoint", False)
    if (
        "dns error" in everything
        or "gaierror" in names
        or names & {"ClientConnectorDNSError"}
        or "Name or service" in everything
    ):
        return Cause(
            f"no host has the name {host}",
            "check the endpoint (AWS_ENDPOINT_URL, endpoint_url) and the network",
            False,
            True,
        )
    if (
        "ConnectionRefused" in everything
        or isinstance(error, ConnectionRefusedError)
        or "Connect call failed" in everything
    ):
        return Cause(f"{host} refuses connections", "start the server, or check the endpoint and its port", True, True)
    if _of(error, "botocore.exceptions", "EndpointConnectionError"):
        return Cause(f"{host} cannot be reached", "check the endpoint and the network", True, True)
    return None


def _answered(said: _Said) -> Cause | None:
    """A server's answer, by its code and status."""
    status, code = said.status, said.code
    if code in _NO_BUCKET or any(word in said.everything for word in _NO_BUCKET_WORDS):
        return Cause("the bucket or container does not exist", "create it, or check its name", False, no_bucket=True)
    if "Received redirect without LOCATION" in said.everything or code in _OTHER_REGION or status in (301, 307):
        return Cause(
            f"the bucket lies in another region ({said.text})",
            "give its region (AWS_REGION, or storage_options region)",
            False,
        )
    if status is None and not code:
        return None
    passes = code in _PASSING_CODES or status in _PASSING_STATUS or (status or 0) >= 500
    if not passes and status == 409 and not code:  # a conflict among writers; who asked for a new object looks first
        passes = True
    if passes:
        advice = ""
    elif code == "RequestTimeTooSkewed":
        advice = "set this machine's clock"
    elif code in _BAD_CREDENTIALS or status == 401:
        advice = _CREDENTIALS
    elif status == 403:
        advice = "check what these credentials may do there, and their secret"
    elif status in (405, 501):
        advice = "use a server that has this request"
    else:
        advice = ""
    return Cause(said.text, advice, passes, refused=not passes and (status in (401, 403) or code in _BAD_CREDENTIALS))


def _broke_off(error: BaseException, said: _Said) -> Cause | None:
    """A connection that ended, stalled, or gave a part of the answer."""
    if _of(error, "obstore.exceptions", "GenericError"):
        if "HTTP error" not in said.everything or "kind: Decode" in said.everything:
            return Cause(said.text, passes=None)
        slow = "kind: Timeout" in said.everything
        what = "did not answer in time" if slow else "ended the connection before its answer was whole"
        return Cause(f"{said.host or 'the server'} {what}", passes=True)
    if (
        # A short body; its code 400 is not a server's status.
        _of(error, "aiohttp.http_exceptions", "PayloadEncodingError")
        or _of(error, "aiohttp", "ClientConnectionError", "ClientPayloadError")
        or _of(error, "botocore.exceptions", "HTTPClientError", "IncompleteReadError")
        or _of(error, "botocore.parsers", "ResponseParserError")  # a throttled answer can be cut short
    ):
        return Cause(said.text, passes=True)
    return None


def _plain(error: BaseException) -> bool | None:
    """True passes, False stays, None says nothing: of Python's own errors."""
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError)):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)):
        return True
    if any(word in str(error) for word in _PASSING_WORDS):
        return True
    return True if isinstance(error, OSError) and error.errno in _PASSING_ERRNO else None


def _said(error: BaseException) -> _Said:
    everything = str(error)
    shown = everything.split(_DEBUG, 1)[0]
    status, code, message = _response(error)
    if status is None and (match := _STATUS.search(shown)):
        status = int(match.group(1))
    if not code and (match := _CODE.search(everything)):
        code = match.group(1)
    if not message and (match := _MESSAGE.search(everything)):
        message = match.group(1)
    address = _URL.search(everything)
    if status is not None or code:
        what = " ".join(part for part in (str(status or ""), code) if part)
        text = f"the server answered {what}" + (f", {message.rstrip('.')!r}" if message else "")
    else:
        text = " ".join(_MARKUP.sub(" ", _PREFIX.sub("", shown)).split())[:300] or type(error).__name__
    host = urlsplit(address.group(0)).netloc.rpartition("@")[2] if address else ""
    if not host and getattr(error, "host", None):
        host = f"{error.host}:{getattr(error, 'port', '')}"  # type: ignore[attr-defined]
    return _Said(text, everything, status, code, host)


def _response(error: BaseException) -> tuple[int | None, str, str]:
    """Status, code and message that an error carries: botocore's response, or attributes as in aiohttp, gcsfs and azure."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        told = response.get("Error") or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(told.get("Code") or "")
        return (
            (status if isinstance(status, int) else None),
            ("" if code.isdigit() else code),
            str(told.get("Message") or ""),
        )
    if _of(error, "aiohttp.http_exceptions", "PayloadEncodingError"):
        return None, "", ""
    for attribute in ("status", "status_code", "code"):
        if isinstance(status := getattr(error, attribute, None), int) and 100 <= status < 600:
            return (
                status,
                "",
                str(getattr(error, "message", "") or "").splitlines()[0][:200] if getattr(error, "message", "") else "",
            )
    return None, "", ""


def _of(error: BaseException, module: str, *names: str) -> bool:
    """Whether the error is one of these classes of a library; one that is not loaded has raised nothing."""
    loaded: ModuleType | None = sys.modules.get(module)
    return loaded is not None and isinstance(error, tuple(getattr(loaded, name) for name in names))
