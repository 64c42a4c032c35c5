# SPDX-License-Identifier: Apache-2.0
"""Errors of the server as exceptions, one class a status code."""

from __future__ import annotations

import grpc

from bebop.rpc import status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


class BebopError(Exception):
    """A call that failed.

    Attributes:
      code: name of the gRPC status code, e.g. "INVALID_ARGUMENT".
      message: the server's words; names the field, its value and the limit where there are such.
      reason: the server's machine-readable reason, e.g. "INVALID_FIELD"; empty when no server answered.
      metadata: what the reason is about: "field", "value", "limit", ...
      retry_after: seconds after which a repeat may succeed, or None.
    """

    code = "UNKNOWN"

    def __init__(self, message: str, *, code: str | None = None, reason: str = "", metadata: dict[str, str] | None = None,
                 retry_after: float | None = None):
        super().__init__(message)
        self.code = code or type(self).code
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code}{f' ({self.reason})' if self.reason else ''}: {self.message}"

    def __reduce__(self):
        return _rebuild, (type(self), self.message, self.code, self.reason, self.metadata, self.retry_after)

    @property
    def reached_server(self) -> bool:
        """False when the connection failed, as opposed to a server that refused."""
        return bool(self.reason) or self.code != "UNAVAILABLE"

    @property
    def is_refusal(self) -> bool:
        """Whether a server has said that it did nothing. Otherwise nobody knows: a call that was lost or cut off may have been carried out."""
        return self.code in _REFUSALS or (self.code == "UNAVAILABLE" and self.reached_server)


def _rebuild(cls, message, code, reason, metadata, retry_after):
    return cls(message, code=code, reason=reason, metadata=metadata, retry_after=retry_after)


def _subclass(code: str, doc: str) -> type[BebopError]:
    name = "".join(part.capitalize() for part in code.split("_")) + ("" if code.endswith("ERROR") else "Error")
    return type(name, (BebopError,), {"__doc__": doc, "__module__": __name__, "code": code})


InvalidArgumentError = _subclass("INVALID_ARGUMENT", "Bad parameters, a prompt too long, an unsupported combination.")
FailedPreconditionError = _subclass("FAILED_PRECONDITION", "The server's state does not allow it.")
AbortedError = _subclass("ABORTED", "Something else is in progress; repeat the whole sequence of calls.")
AlreadyExistsError = _subclass("ALREADY_EXISTS", "An id was used before with another body.")
NotFoundError = _subclass("NOT_FOUND", "An unknown request, handle or tensor.")
ResourceExhaustedError = _subclass("RESOURCE_EXHAUSTED", "The queue is full (retry_after is set), or the request can never fit.")
UnavailableError = _subclass("UNAVAILABLE", "No connection (reason is empty), or loading or draining (retry_after is set).")
DataLossError = _subclass("DATA_LOSS", "Bytes that do not match their digest; the server goes on as before.")
UnauthenticatedError = _subclass("UNAUTHENTICATED", "No token, or an unknown one.")
PermissionDeniedError = _subclass("PERMISSION_DENIED", "The token's role does not allow the call.")
UnimplementedError = _subclass("UNIMPLEMENTED", "This server does not have the call.")
DeadlineExceededError = _subclass("DEADLINE_EXCEEDED", "The timeout passed.")
CancelledError = _subclass("CANCELLED", "The call was cancelled.")
InternalError = _subclass("INTERNAL", "The server has failed.")

_REFUSALS = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "ABORTED", "ALREADY_EXISTS", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED",
                       "PERMISSION_DENIED", "UNIMPLEMENTED"})

_BY_CODE = {cls.code: cls for cls in (
    InvalidArgumentError, FailedPreconditionError, AbortedError, AlreadyExistsError, NotFoundError, ResourceExhaustedError, UnavailableError,
    DataLossError, UnauthenticatedError, PermissionDeniedError, UnimplementedError, DeadlineExceededError, CancelledError, InternalError)}


def from_rpc_error(error: grpc.RpcError) -> BebopError:
    """The exception for what grpc raised."""
    code = error.code().name
    reason, metadata, retry_after = "", {}, None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value)
        except Exception:  # noqa: BLE001 - a proxy may send anything; the code and message stand
            continue
        for detail in status.details:
            if detail.type_url == _ERROR_INFO:
                info = status_pb2.ErrorInfo.FromString(detail.value)
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.type_url == _RETRY_INFO:
                delay = status_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = delay.seconds + delay.nanos * 1e-9
    return _BY_CODE.get(code, BebopError)(error.details() or "", code=code, reason=reason, metadata=metadata, retry_after=retry_after)
