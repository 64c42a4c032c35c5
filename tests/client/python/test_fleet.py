# SPDX-License-Identifier: Apache-2.0
"""Several servers as one, against servers in this process. test_rl_loop.py kills real ones."""

import asyncio
import collections
import concurrent.futures
import pickle
import threading
import time

import grpc
import numpy as np
import pytest

import bebop
from bebop import requests
from bebop.transport import RetryPolicy
from bebop.v1 import rollout_pb2
from conftest import ROOT
from fake_server import FakeServer
from test_weights import loaded, random_tensors

HASTY = RetryPolicy(connect_seconds=0.3, initial_seconds=0.01, max_seconds=0.05)


KINDS = ["Client", "AsyncClient", "Fleet", "AsyncFleet"]


def through(kind, fakes, call, retry=None):
    """What `call` returns for a client of that kind, blocking or not; fleets have all fakes, clients the first."""
    where = [([(fake.address, fake.address) for fake in fakes],), (fakes[0].address, fakes[0].address)][kind in KINDS[:2]]
    if not kind.startswith("Async"):
        with getattr(bebop, kind)(*where, timeout=20, retry=retry) as client:
            return call(client)

    async def run():
        async with getattr(bebop, kind)(*where, timeout=20, retry=retry) as client:
            return await call(client)

    return asyncio.run(run())


@pytest.fixture
def fakes():
    running = [FakeServer() for _ in range(3)]
    yield running
    for fake in running:
        fake.stop()


@pytest.fixture
def fleet(fakes):
    with bebop.Fleet([(fake.address, fake.address) for fake in fakes], balance="round_robin", timeout=20, retry=HASTY) as connected:
        yield connected


def who(group):
    """Which fake answered: it writes its port into the tokens."""
    return int(group.samples[0].token_ids[0])


def ports(fakes):
    return [fake.port % 1000 for fake in fakes]


def test_requests_go_round(fakes, fleet):
    counts = collections.Counter(who(fleet.generate([1], n=2)) for _ in range(9))
    assert counts == {port: 3 for port in ports(fakes)}
    assert len(list(fleet.generate_stream([1], n=2))) == 2


def test_affinity_is_stable_and_moves_only_what_it_must(fakes, fleet):
    keys = [f"session-{i}" for i in range(24)]
    first = {key: who(fleet.generate([1], affinity=key)) for key in keys}
    assert {key: who(fleet.generate([1], affinity=key)) for key in keys} == first and len(set(first.values())) == 3
    fakes[0].generate_error = grpc.StatusCode.UNAVAILABLE
    second = {key: who(fleet.generate([1], affinity=key)) for key in keys}
    gone = ports(fakes)[0]
    assert all(second[key] == first[key] for key in keys if first[key] != gone) and gone not in second.values()


def test_the_least_loaded_replica_is_next(fakes):
    with bebop.Fleet([fake.address for fake in fakes], retry=HASTY) as fleet:
        streams = [fleet.generate_stream([1], n=8), fleet.generate_stream([1], n=1), fleet.generate_stream([1], n=4)]
        taken = [int(next(stream).token_ids[0]) for stream in streams]  # held open: their samples count as running
        assert sorted(taken) == sorted(ports(fakes))
        assert who(fleet.generate([1])) == taken[1]
        streams[0].close()
        assert who(fleet.generate([1])) == taken[0]
        for stream in streams:
            stream.close()


def test_a_replica_that_is_gone_is_passed_over_and_comes_back(fakes, fleet):
    fakes[1].generate_error = grpc.StatusCode.UNAVAILABLE
    assert ports(fakes)[1] not in {who(fleet.generate([1])) for _ in range(6)}
    assert fleet.addresses[1] not in fleet.in_rotation
    fakes[1].generate_error = None
    end = time.monotonic() + 10
    while who(fleet.generate([1])) != ports(fakes)[1]:
        assert time.monotonic() < end
        time.sleep(0.02)
    # The same request, so that a server that had it knows it.
    fakes[0].generate_error = grpc.StatusCode.UNAVAILABLE
    for fake in fakes:
        fake.requests.clear()
    for _ in range(3):
        fleet.generate([1])
    ids = [request.request_id for fake in fakes for request in fake.requests]
    assert len(fakes[0].requests) == 1 and collections.Counter(ids)[fakes[0].requests[0].request_id] == 2


def test_a_replica_with_other_weights_stays_out(fakes, fleet):
    fleet.weights.update(random_tensors(1), 3)
    fakes[2].generate_error = grpc.StatusCode.UNAVAILABLE
    for _ in range(3):
        fleet.generate([1])
    fakes[2].generate_error, fakes[2].step = None, 0  # as if restarted from its checkpoint
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert who(fleet.generate([1])) != ports(fakes)[2]
        time.sleep(0.02)
    fleet.weights.update(random_tensors(2), 4)
    assert fleet.in_rotation == fleet.addresses and {who(fleet.generate([1])) for _ in range(3)} == set(ports(fakes))


def test_when_none_can_the_last_reason_is_raised(fakes, fleet):
    for fake in fakes:
        fake.generate_error = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(bebop.UnavailableError):
        fleet.generate([1])
    for fake in fakes:
        fake.generate_error = grpc.StatusCode.INVALID_ARGUMENT
    end = time.monotonic() + 10
    while True:  # until they are in rotation again
        for fake in fakes:
            fake.requests.clear()
        try:
            fleet.generate([1])
        except bebop.InvalidArgumentError:
            break
        except bebop.UnavailableError:
            assert time.monotonic() < end
    assert sum(len(fake.requests) for fake in fakes) == 1  # what is wrong with the request is wrong everywhere


def test_a_stream_that_has_delivered_is_not_repeated(fakes, fleet):
    def broken(self, request, context):
        yield from list(FakeServer.GenerateStream(self, request, context))[:1]
        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    class Broken(FakeServer):
        GenerateStream = broken

    other = Broken()
    try:
        with bebop.Fleet([other.address], retry=HASTY) as lone:
            stream = lone.generate_stream([1], n=2)
            assert next(stream).sample_index == 0
            with pytest.raises(bebop.UnavailableError):
                next(stream)
        assert len(other.requests) == 1
    finally:
        other.stop()


def test_control_reaches_everybody(fakes, fleet):
    assert all(state.paused for state in fleet.pause("keep").values()) and all(fake.state.paused for fake in fakes)
    assert list(fleet.resume()) == fleet.addresses
    assert fleet.health() == {address: "SERVING" for address in fleet.addresses}
    fakes[1].stop()
    with pytest.raises(bebop.FleetError) as info:
        fleet.pause()
    assert list(info.value.errors) == [fleet.addresses[1]] and info.value.code == "UNAVAILABLE" and fleet.addresses[1] in str(info.value)
    assert sorted(info.value.results) == sorted(fleet.addresses[::2]) and fakes[0].state.paused and fakes[2].state.paused
    copy = pickle.loads(pickle.dumps(info.value))
    assert list(copy.errors) == list(info.value.errors) and str(copy) == str(info.value)
    assert fleet.health()[fleet.addresses[1]] == "UNAVAILABLE"


# ---- updates ----


def test_every_tensor_is_read_once_and_sent_to_all(fakes, fleet):
    named = random_tensors(2)
    reads = []
    results = fleet.weights.update(((name, reads.append(name) or array) for name, array in named.items()), 5)
    assert reads == list(named) and list(results) == fleet.addresses
    assert all(loaded(fake, named) and fake.step == 5 for fake in fakes)
    assert len({info.version for info in fleet.weights.info().values()}) == 1


@pytest.mark.parametrize("ordered", ["start", "push", "learner"])
def test_a_failure_before_the_last_step_leaves_all_as_they_were(fakes, fleet, ordered):
    named = random_tensors(3)
    if ordered == "start":
        fakes[1].step = 9  # refuses step 5
    if ordered == "push":
        named["mtp.norm.weight"][0] = np.nan

    def produce():
        for name, array in named.items():
            if ordered == "learner" and name == "mtp.fc.weight":
                raise RuntimeError("learner died")
            yield name, array

    with pytest.raises(RuntimeError if ordered == "learner" else bebop.FleetUpdateError) as info:
        fleet.weights.update(produce(), 5)
    assert all(fake.open is None and fake.num_updates == 0 for fake in fakes)
    if ordered != "learner":
        assert info.value.stage == ordered and info.value.updated == [] and info.value.unchanged == fleet.addresses and info.value.unknown == []
        assert info.value.reason == {"start": "STEP_NOT_NEWER", "push": "NON_FINITE"}[ordered]
    assert fleet.in_rotation == fleet.addresses


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_dead_replica_is_named_at_once(fakes, kind):
    """With the retries of the default policy, which try one server for 30 s."""
    fakes[1].stop()
    addresses = [fake.address for fake in fakes]
    for what in ("weights.update", "pause"):
        call = (lambda fleet: fleet.weights.update(random_tensors(7), 5)) if what == "weights.update" else (lambda fleet: fleet.pause())
        begin = time.monotonic()
        with pytest.raises(bebop.FleetError) as info:
            through(kind, fakes, call, retry=RetryPolicy())
        assert time.monotonic() - begin < 10
        error = info.value
        assert list(error.errors) == [addresses[1]] and error.code == "UNAVAILABLE" and addresses[1] in str(error)
        assert isinstance(error, bebop.FleetUpdateError) == (what == "weights.update")
        assert ("weight update (start)" if what == "weights.update" else "pause") in str(error)
    assert error.what == "pause" and sorted(error.results) == sorted(addresses[::2])
    for fake in fakes[::2]:
        assert fake.calls == [] and fake.step == 0  # no update began


def test_of_a_dead_replica_nobody_knows_the_weights(fakes, fleet):
    fakes[1].stop()
    with pytest.raises(bebop.FleetUpdateError) as info:
        fleet.weights.update(random_tensors(7), 5)
    assert info.value.unchanged == fleet.addresses[::2] and info.value.unknown == [fleet.addresses[1]] and info.value.updated == []
    assert fleet.in_rotation == fleet.addresses[::2]
    with bebop.Fleet([client for client in fleet.clients if client._server.address in info.value.unchanged]) as rest:
        assert sorted(rest.weights.update(random_tensors(7), 5)) == sorted(rest.addresses)


def test_a_replica_that_dies_while_tensors_come_ends_the_update(fakes, fleet):
    named = random_tensors(4)

    def produce():
        for name, array in named.items():
            if name == "mtp.fc.weight":
                fakes[1].stop()
            yield name, array

    with pytest.raises(bebop.FleetUpdateError) as info:
        fleet.weights.update(produce(), 5)
    assert list(info.value.errors) == [fleet.addresses[1]] and info.value.stage == "push"
    assert all(fake.step == 0 and fake.open is None for fake in fakes[::2])
    assert fleet.in_rotation == fleet.addresses[::2]
    assert {who(fleet.generate([1])) for _ in range(4)} == set(ports(fakes[::2]))


def test_after_a_partial_finish_it_is_known_who_has_what(fakes, fleet):
    named = random_tensors(5)
    fakes[0].finish_errors = [(grpc.StatusCode.DATA_LOSS, "before")]
    fakes[1].finish_errors = [(grpc.StatusCode.INTERNAL, "after")]
    with pytest.raises(bebop.FleetUpdateError) as info:
        fleet.weights.update(named, 5)
    error = info.value
    assert error.stage == "finish" and sorted(error.errors) == sorted(fleet.addresses[:2])
    assert error.unchanged == fleet.addresses[:1] and error.updated == fleet.addresses[1:] and error.unknown == []
    assert [error.versions[address].target_step for address in fleet.addresses] == [0, 5, 5] and "Steps now" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.updated == error.updated and copy.stage == "finish" and str(copy) == str(error)
    fleet.weights.update(named, 6)
    assert all(fake.step == 6 for fake in fakes)


def test_a_replica_of_unknown_version_is_out_until_it_agrees(fakes):
    named = random_tensors(6)
    gate = threading.Event()

    class Lost(FakeServer):
        """Commits, but neither says so nor answers afterwards, until the gate opens."""

        def FinishWeightUpdate(self, request, context):
            FakeServer.FinishWeightUpdate(self, request, context)
            context.abort(grpc.StatusCode.INTERNAL, "lost")

        def GetWeightInfo(self, request, context):
            if self.num_updates and not gate.is_set():
                context.abort(grpc.StatusCode.INTERNAL, "lost")
            return FakeServer.GetWeightInfo(self, request, context)

    odd = Lost()
    try:
        with bebop.Fleet([(fake.address, fake.address) for fake in [*fakes[:2], odd]], balance="round_robin", timeout=20, retry=HASTY) as mixed:
            with pytest.raises(bebop.FleetUpdateError) as info:
                mixed.weights.update(named, 5)
            assert info.value.unknown == [odd.address] and info.value.updated == mixed.addresses[:2]
            assert mixed.in_rotation == mixed.addresses[:2]
            assert odd.port % 1000 not in {who(mixed.generate([1])) for _ in range(6)}
            gate.set()
            end = time.monotonic() + 10
            while odd.port % 1000 not in {who(mixed.generate([1])) for _ in range(3)}:
                assert time.monotonic() < end
                time.sleep(0.05)
    finally:
        odd.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_start_leaves_another_learners_update_alone(fakes, kind):
    """Two learners, one id, different steps: the second is refused, and its clean-up must not end the first's."""
    named = random_tensors(8)
    began, go_on = threading.Event(), threading.Event()

    def slow():
        for i, item in enumerate(named.items()):
            if i == 2:
                began.set()
                assert go_on.wait(30)
            yield item

    with bebop.Client(fakes[0].address, fakes[0].address, timeout=20) as first, concurrent.futures.ThreadPoolExecutor(1) as pool:
        update = pool.submit(first.weights.update, slow(), 5, update_id="ours")
        try:
            assert began.wait(30)
            with pytest.raises(bebop.BebopError) as info:
                through(kind, fakes, lambda client: client.weights.update(named, 6, update_id="ours"))
            assert info.value.reason == "UPDATE_ID_REUSED" and "abort" not in fakes[0].calls
        finally:
            go_on.set()
        assert update.result(30).info.target_step == 5
    assert loaded(fakes[0], named) and fakes[0].step == 5
    for fake in fakes[1:]:  # began there, so that it has to be ended there
        assert fake.open is None and fake.step == 0 and fake.calls == ([] if kind in KINDS[:2] else ["start", "abort"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_whose_reply_is_lost_is_aborted(fakes, kind):
    fakes[0].start_errors = [grpc.StatusCode.INTERNAL]
    with pytest.raises(bebop.BebopError) as info:
        through(kind, fakes, lambda client: client.weights.update(random_tensors(9), 1))
    assert info.value.code == "INTERNAL" and fakes[0].calls == ["start", "abort"]
    assert all(fake.open is None and fake.step == 0 for fake in fakes)


@pytest.mark.parametrize("kind", KINDS)
def test_handles_too_large_for_one_request_go_in_several(fakes, kind, monkeypatch):
    assert f"kResumeBytes = {requests.MAX_RESUME_BYTES >> 20} << 20;" in (ROOT / "server/limits.h").read_text()
    monkeypatch.setattr(requests, "MAX_RESUME_BYTES", 100)
    for fake in fakes:
        fake.max_resume_bytes = 100
    sizes = {0: 40, 1: 60, 2: 30, 4: 71, 5: 99}  # 3 has ended

    def partial_sample(i):
        return bebop.SampleResult.from_proto(rollout_pb2.SampleResult(sample_index=i, token_ids=[i], resume_handle=bytes([i]) * sizes.get(i, 0)))

    group = bebop.GroupResult("g", tuple(partial_sample(i) for i in range(6)), request=requests.generate_request([1, 2], n=6, seed=3))
    whole = through(kind, fakes, lambda client: client.resume_samples(group))
    assert [sample.sample_index for sample in whole.samples] == list(range(6)) and whole.samples[3] is group.samples[3]
    assert not whole.unfinished and all(len(whole.samples[i].token_ids) == 2 for i in sizes)
    sent = [request for fake in fakes for request in fake.requests]
    assert sorted([handle[0] for handle in request.resume] for request in sent) == [[0, 1], [2], [4], [5]]
    assert all(request.num_samples == len(request.resume) and request.sampling.seed == 3 and list(request.prompt_token_ids) == [1, 2] for request in sent)
    assert len({request.request_id for request in sent}) == 4
    for _ in range(2):  # a caller's own id: repeats find their requests
        through(kind, fakes, lambda client: client.resume_samples(group.samples, [1, 2], request_id="mine", seed=3))
    again = collections.Counter((request.request_id, request.resume[0]) for fake in fakes for request in fake.requests if request not in sent)
    assert sorted(again.values()) == [2] * 4 and "mine" in {request_id for request_id, _ in again}


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several_requests_that_fails_fails_the_call(fakes, kind, monkeypatch):
    monkeypatch.setattr(requests, "MAX_RESUME_BYTES", 1)
    for fake in fakes:
        fake.max_resume_bytes = 2
    samples = [bebop.SampleResult.from_proto(rollout_pb2.SampleResult(sample_index=i, resume_handle=bytes([i]) * size)) for i, size in ((0, 1), (1, 3))]
    with pytest.raises(bebop.InvalidArgumentError, match="resume: 1 handles"):
        through(kind, fakes, lambda client: client.resume_samples(samples, [1]))


def test_replicas_of_different_models_are_refused(fakes):
    other = FakeServer(specs=[("model.norm.weight", "BF16", (7,))])
    try:
        with bebop.Fleet([(fakes[0].address, fakes[0].address), (other.address, other.address)]) as fleet:
            with pytest.raises(ValueError, match="not the same model"):
                fleet.weights.update(random_tensors(1), 1)
        assert fakes[0].calls == [] and other.calls == []
    finally:
        other.stop()


@pytest.mark.parametrize("replicas, error", [([], ValueError), ([5], TypeError), (["a:1", "a:1"], ValueError)])
def test_what_makes_no_fleet(replicas, error):
    with pytest.raises(error):
        bebop.Fleet(replicas)
    with pytest.raises(ValueError, match="balance"):
        bebop.Fleet(["a:1"], balance="random")


def test_a_fleet_can_be_pickled_and_takes_clients(fakes):
    clients = [bebop.Client(fake.address, fake.address) for fake in fakes]
    with pickle.loads(pickle.dumps(bebop.Fleet(clients, balance="round_robin"))) as copy:
        assert {who(copy.generate([1])) for _ in range(3)} == set(ports(fakes))
    for client in clients:
        client.close()


def test_the_asyncio_fleet_does_the_same(fakes):
    named = random_tensors(7)

    async def run():
        async with bebop.AsyncFleet([(fake.address, fake.address) for fake in fakes], balance="round_robin", timeout=20, retry=HASTY) as fleet:
            groups = await asyncio.gather(*(fleet.generate([1], n=2) for _ in range(9)))
            assert collections.Counter(map(who, groups)) == {port: 3 for port in ports(fakes)}
            results = await fleet.weights.update(named, 2)
            assert list(results) == fleet.addresses and all(loaded(fake, named) for fake in fakes)
            fakes[0].finish_errors = [(grpc.StatusCode.DATA_LOSS, "before")]
            with pytest.raises(bebop.FleetUpdateError) as info:
                await fleet.weights.update(named, 3)
            assert info.value.unchanged == fleet.addresses[:1] and info.value.updated == fleet.addresses[1:]
            fakes[1].generate_error = grpc.StatusCode.UNAVAILABLE
            assert {who(await fleet.generate([1])) for _ in range(6)} == {ports(fakes)[0], ports(fakes)[2]}
            assert len([sample async for sample in fleet.generate_stream([1], n=3)]) == 3
            assert all(state.paused for state in (await fleet.pause()).values())
            fakes[2].stop()
            with pytest.raises(bebop.FleetError):
                await fleet.resume()
            assert (await fleet.health())[fleet.addresses[2]] == "UNAVAILABLE"
            assert fleet.in_rotation == fleet.addresses[:1]

    asyncio.run(run())


def test_cancelling_a_fleet_update_aborts_it_everywhere(fakes):
    async def run():
        reached = asyncio.Event()

        async def produce():
            yield "mtp.norm.weight", np.zeros(32, np.float32)
            reached.set()
            await asyncio.sleep(0.2)
            yield "mtp.fc.weight", np.zeros((32, 64), np.float32)

        async with bebop.AsyncFleet([(fake.address, fake.address) for fake in fakes], timeout=20) as fleet:
            task = asyncio.create_task(fleet.weights.update(produce(), 1))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(fake.open is None and fake.step == 0 for fake in fakes)

    asyncio.run(run())
