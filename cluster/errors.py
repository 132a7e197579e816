"""Every error pdserve raises on purpose.

    PdserveError
    ├── InvalidRequest        the caller's input; names the field and the limit
    ├── NotFound              no such model, request or worker
    ├── Unauthenticated       no or wrong credentials
    ├── PermissionDenied      known, but not allowed to do this
    ├── NotResumable          a request cannot be gone on with: expired, or not exactly
    ├── Overloaded            no room now; carries when to come back
    ├── DeadlineExceeded      the caller's time is over
    ├── Cancelled             the caller gave up
    ├── Unavailable           a part is missing or not ready; the same request may succeed later
    ├── HandoffRefused        a KV handoff failed a check; nothing of it was used
    ├── EngineFailed          an engine died or could not start
    └── ConfigError           the configuration cannot work; names the field and the remedy

`STATUS` maps each to its gRPC code and HTTP status; a subclass of none of these is a bug and
reaches clients as INTERNAL without its text.
"""

from __future__ import annotations

from dataclasses import dataclass


class PdserveError(Exception):
    """Base of all. `str(error)` is fit to show to a client.

    Attributes:
        retryable: the same work may succeed on another worker.
    """

    retryable = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(PdserveError):
    """The caller's input is wrong.

    Attributes:
        field: path of the offending field as the caller wrote it, such as `sampling.top_p`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class NotFound(PdserveError):
    """There is no such model, request or worker."""


class Unauthenticated(PdserveError):
    """No or wrong credentials."""


class PermissionDenied(PdserveError):
    """The caller is known, but may not do this."""


class NotResumable(PdserveError):
    """A request cannot be gone on with: it has expired, or its next token could not be exact."""


class Overloaded(PdserveError):
    """No room now.

    Attributes:
        retry_after_seconds: when a retry has a chance.
    """

    retryable = True

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(PdserveError):
    """The caller's deadline has passed."""


class Cancelled(PdserveError):
    """The caller cancelled the request."""


class Unavailable(PdserveError):
    """A part of the cluster is missing or not ready."""

    retryable = True


class HandoffRefused(PdserveError):
    """A KV handoff failed a check. The blocks were discarded."""

    retryable = True


class EngineFailed(PdserveError):
    """An engine died or could not start."""

    retryable = True


class ConfigError(PdserveError):
    """The configuration cannot work on this machine or at all."""


@dataclass(frozen=True)
class Status:
    """What a client sees of an error: a google.rpc.Code and an HTTP status."""

    grpc_code: int
    http_status: int
    name: str


STATUS: dict[type[PdserveError], Status] = {
    InvalidRequest: Status(3, 400, "INVALID_ARGUMENT"),
    NotFound: Status(5, 404, "NOT_FOUND"),
    Unauthenticated: Status(16, 401, "UNAUTHENTICATED"),
    PermissionDenied: Status(7, 403, "PERMISSION_DENIED"),
    NotResumable: Status(9, 410, "FAILED_PRECONDITION"),
    Overloaded: Status(8, 429, "RESOURCE_EXHAUSTED"),
    DeadlineExceeded: Status(4, 504, "DEADLINE_EXCEEDED"),
    Cancelled: Status(1, 499, "CANCELLED"),
    Unavailable: Status(14, 503, "UNAVAILABLE"),
    HandoffRefused: Status(14, 503, "UNAVAILABLE"),
    EngineFailed: Status(14, 503, "UNAVAILABLE"),
    ConfigError: Status(9, 500, "FAILED_PRECONDITION"),
}

INTERNAL = Status(13, 500, "INTERNAL")


def status_of(error: BaseException) -> Status:
    """The status a client gets for `error`; INTERNAL for what is not a PdserveError."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return INTERNAL


def error_from_code(grpc_code: int, message: str, retryable: bool) -> PdserveError:
    """The error that a worker sent as a code and a message."""
    for kind, status in STATUS.items():
        if status.grpc_code == grpc_code and kind not in (HandoffRefused, EngineFailed):
            error = kind("", message) if kind is InvalidRequest else kind(message)
            break
    else:
        error = PdserveError(message)
    error.retryable = retryable
    return error
