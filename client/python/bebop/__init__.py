# SPDX-License-Identifier: Apache-2.0
"""Client of the bebop rollout server.

    import bebop

    with bebop.Client("127.0.0.1:50051") as client:
        group = client.generate([17, 4, 99], n=8, sampling=dict(temperature=1.0), max_new_tokens=64, logprobs=True)
        for sample in group.samples:
            print(sample.token_ids, sample.logprobs, sample.finish.reason)

`client.weights.update(model.state_dict(), step=1)` brings new weights while it generates. `AsyncClient` has the same methods as
coroutines, `Fleet` and `AsyncFleet` are several replicas as one. Every failure is a `BebopError`.
"""

from bebop.aio import AsyncClient
from bebop.client import Client
from bebop.control import ControlState, Speculation
from bebop.errors import (AbortedError, AlreadyExistsError, BebopError, CancelledError, DataLossError, DeadlineExceededError,
                          FailedPreconditionError, InternalError, InvalidArgumentError, NotFoundError, PermissionDeniedError,
                          ResourceExhaustedError, UnauthenticatedError, UnavailableError, UnimplementedError)
from bebop.fleet import AsyncFleet, Fleet, FleetError, FleetUpdateError
from bebop.results import (Admitted, DraftScore, Finish, GroupResult, SampleResult, SequenceScore, SpecStats, Timing, TokenChunk, Usage,
                           WeightSpan)
from bebop.transport import RetryPolicy, Tls
from bebop.weight_plan import OpenUpdate, TensorSpec, UpdateResult, WeightCheck, WeightInfo

__version__ = "0.1.0"

__all__ = [
    "AbortedError", "Admitted", "AlreadyExistsError", "AsyncClient", "AsyncFleet", "BebopError", "CancelledError", "Client", "ControlState",
    "DataLossError", "DeadlineExceededError", "DraftScore", "FailedPreconditionError", "Finish", "Fleet", "FleetError", "FleetUpdateError",
    "GroupResult",
    "InternalError", "InvalidArgumentError", "NotFoundError", "OpenUpdate", "PermissionDeniedError", "ResourceExhaustedError",
    "RetryPolicy", "SampleResult", "SequenceScore", "SpecStats", "Speculation", "TensorSpec", "Timing", "Tls", "TokenChunk", "UnauthenticatedError",
    "UnavailableError", "UnimplementedError", "UpdateResult", "Usage", "WeightCheck", "WeightInfo", "WeightSpan",
]
