# SPDX-License-Identifier: Apache-2.0
"""What both clients share: channel options, credentials, and when to try again."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import time
from typing import Any

import grpc

from bebop.errors import BebopError, from_rpc_error

# Replies are as large as what was asked for; the server's own limit decides what may be sent. A proxy of the environment is for the web.
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 60_000),
]


# A default of arguments whose None means something.
UNSET: Any = object()


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Which failures are tried again, and how long.

    Only failures that a repeat can cure. Those that the server marks with RetryInfo (queue full, loading) are repeated until the call's timeout,
    without one for ever; a server that cannot be reached, for connect_seconds. Every call of this package is safe to repeat: requests carry an
    id that the server recognises. A draining server is left at once.
    """

    connect_seconds: float = 30.0
    initial_seconds: float = 0.1
    max_seconds: float = 10.0

    def delay(self, error: BebopError, attempt: int, elapsed: float) -> float | None:
        """Seconds to wait before attempt + 1 (attempts count from 1), `elapsed` seconds after the first began; None: give up."""
        if error.reason == "DRAINING" or error.code == "ABORTED":  # ABORTED: the whole sequence has to be repeated, if it is still wanted
            return None
        backoff = min(self.max_seconds, self.initial_seconds * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            return max(error.retry_after, backoff)
        if error.reached_server or elapsed + backoff > self.connect_seconds:
            return None
        return backoff


@dataclasses.dataclass(frozen=True)
class Tls:
    """Certificates in PEM files. `ca`: whom to trust, None for the system's; `certificate` and `key`: our own, for mutual TLS."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        def read(path):
            if path is None:
                return None
            with open(path, "rb") as file:
                return file.read()

        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.certificate))


def check_address(name: str, address: str) -> None:
    """Raises ValueError for what would otherwise be tried again and again: a web address, or one without a port."""
    scheme, colons, rest = address.partition("://")
    if colons and scheme not in _SCHEMES:
        raise ValueError(f"{name}: {address!r}: expected HOST:PORT, without {scheme}://")
    if address.partition(":")[0] in _SCHEMES and not re.fullmatch(r"[^:]+:\d*", address):
        return  # gRPC knows what it means
    port = re.fullmatch(r"(?:\[[^\[\]]+\]|[^:/\[\]]+):(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 65536:
        raise ValueError(f"{name}: {address!r}: expected HOST:PORT, or [IPV6]:PORT, with a port from 1 to 65535")


# Of gRPC's names that are no host: https://github.com/grpc/grpc/blob/master/doc/naming.md
_SCHEMES = frozenset({"dns", "unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds"})


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Everything needed to connect; plain data, so that clients can be pickled. `port`: which of a server's two it is, "rollout" or "admin"."""

    address: str
    tls: Tls | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    port: str = "rollout"

    def __post_init__(self):
        check_address(self.port, self.address)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def error(self, rpc_error: grpc.RpcError) -> BebopError:
        """The exception for what grpc raised of a call there."""
        error = from_rpc_error(rpc_error)
        if error.code == "UNIMPLEMENTED" and not error.message:  # a server of ours would say more
            other = "admin" if self.port == "rollout" else "rollout"
            error.message = f"{self.address} does not serve this call: it was given as the {self.port} port; is it the {other} port?"
        return error


def require_admin(admin: Endpoint | None) -> Endpoint:
    if admin is None:
        raise ValueError('weights and control are on the admin port, and this client has no address of it: give admin="host:50052"')
    return admin


def read_token(token: str | None, token_file: str | None) -> str | None:
    """The bearer token: given, in a file (first line), or in the file that BEBOP_TOKEN_FILE names."""
    if token is not None and token_file is not None:
        raise TypeError("give token or token_file, not both")
    path = token_file if token is None else None
    if token is None and path is None:
        path = os.environ.get("BEBOP_TOKEN_FILE")
    if path:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    return token


class Deadline:
    """A timeout that repeats of a call share. None or infinity: no limit."""

    def __init__(self, timeout: float | None):
        self._begin = time.monotonic()
        self._end = None if timeout is None or timeout == math.inf else time.monotonic() + timeout

    def remaining(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def no_limit(self) -> float:
        """As remaining, with infinity for no limit: a call's default timeout is not for calls that may take long."""
        left = self.remaining()
        return math.inf if left is None else left

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def allows(self, seconds: float) -> bool:
        return self._end is None or time.monotonic() + seconds < self._end
