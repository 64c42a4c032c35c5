# SPDX-License-Identifier: Apache-2.0
"""The clients against a real server."""

import asyncio
import pickle
import socket
import threading
import time

import numpy as np
import pytest

import bebop
from bebop.transport import RetryPolicy
from conftest import Server


@pytest.fixture
def client(server):
    with bebop.Client(server.rollout, server.admin, timeout=60) as connected:
        yield connected


@pytest.fixture
def prompt(client):
    return client.tokenize("12+30=")


def test_a_group_has_arrays_of_one_length(client, prompt):
    group = client.generate(np.array(prompt), n=3, sampling={"temperature": 1.0, "seed": 7}, max_new_tokens=12, logprobs=True, entropy=True,
                            token_source=True, prompt=True)
    assert [sample.sample_index for sample in group.samples] == [0, 1, 2]
    assert group.prompt_token_ids.tolist() == prompt
    for sample in group.samples:
        assert sample.token_ids.dtype == np.int64 and 0 < len(sample.token_ids) <= 12
        assert len(sample.logprobs) == len(sample.entropy) == len(sample.token_source) == len(sample.token_ids)
        assert sample.raw_logprobs is None and sample.draft_logprobs is None
        assert (sample.logprobs <= 0).all() and (sample.entropy >= 0).all()
        assert sample.finish.reason in ("STOP", "LENGTH")
        assert sample.weight_spans[0].start == 0 and sample.weight_spans[-1].end == len(sample.token_ids)
        assert sample.weight_steps.tolist() == [0] * len(sample.token_ids)
        assert sample.seed_used == 7


def test_the_seed_decides_the_tokens_and_score_agrees(client, prompt):
    params = {"seed": 11, "max_new_tokens": 16, "logprobs": True, "speculation": "coupled"}
    first, second = (client.generate(prompt, n=2, **params) for _ in range(2))
    for a, b in zip(first.samples, second.samples):
        assert a.token_ids.tolist() == b.token_ids.tolist()
    sample = first.samples[0]
    whole = prompt + sample.token_ids.tolist()
    [score] = client.score([whole], score_start=len(prompt), entropy=True, top_logprobs=2, token_ids_logprob=[5, 6], draft_depth=2)
    np.testing.assert_allclose(score.logprobs, sample.logprobs, atol=0.06)  # bf16, docs/numerics.md
    assert score.token_ids_logprobs.shape == (len(sample.token_ids), 2)
    assert [draft.depth for draft in score.draft] == [1, 2]
    assert all(((draft.overlap >= 0) & (draft.overlap <= 1 + 1e-6)).all() for draft in score.draft)
    assert (score.top_logprobs[0][0] >= score.top_logprobs[0][1]) and len(score.top_token_ids[0]) == 2


def test_speculation_statistics_add_up(client, prompt):
    group = client.generate(prompt, n=4, seed=3, max_new_tokens=24, speculation={"mode": "rejection", "num_draft_tokens": 3}, spec_detail=True)
    for sample in group.samples:
        spec = sample.spec
        assert spec.accepted_per_pos.sum() == spec.num_accepted_draft_tokens
        assert spec.drafted_per_pos[0] == spec.num_spec_steps
        assert spec.overlap_per_pos is not None
        if spec.num_spec_steps:
            assert 1.0 <= spec.accept_length <= 4.0


def test_a_stream_gives_samples_as_they_end(client, prompt):
    samples = list(client.generate_stream(prompt, n=3, max_new_tokens=8, logprobs=True))
    assert sorted(sample.sample_index for sample in samples) == [0, 1, 2]
    chunks, whole = {}, {}
    for event in client.generate_stream(prompt, n=2, seed=5, max_new_tokens=8, logprobs=True, stream_tokens=True, events=True):
        if isinstance(event, bebop.TokenChunk):
            assert event.start == len(chunks.setdefault(event.sample_index, []))
            chunks[event.sample_index].extend(event.token_ids.tolist())
        elif isinstance(event, bebop.SampleResult):
            whole[event.sample_index] = event.token_ids.tolist()
    assert chunks == whole and len(whole) == 2


def test_closing_a_stream_cancels_the_request(client, prompt):
    before = client.loads().cancelled
    stream = client.generate_stream(prompt, n=4, max_new_tokens=2000, ignore_eos=True, stream_tokens=True, events=True)
    next(stream)
    stream.close()
    end = time.monotonic() + 10
    while client.loads().cancelled == before:
        assert time.monotonic() < end, "the request was not cancelled"
        time.sleep(0.02)


def test_abort_returns_the_tokens_so_far(client, prompt):
    results = []
    thread = threading.Thread(target=lambda: results.append(client.generate(prompt, request_id="to-abort", max_new_tokens=2000, ignore_eos=True)))
    thread.start()
    end = time.monotonic() + 10
    while not client.abort("to-abort"):
        assert time.monotonic() < end and thread.is_alive()
        time.sleep(0.02)
    thread.join()
    assert results[0].samples[0].finish.reason == "ABORTED"
    assert client.abort(["to-abort", "never-was"]) == []


def test_errors_name_the_field(client, prompt):
    with pytest.raises(bebop.InvalidArgumentError) as info:
        client.generate(prompt, sampling={"temperature": -1.0})
    assert info.value.code == "INVALID_ARGUMENT" and info.value.reason and "temperature" in info.value.metadata["field"]
    assert "temperature" in str(info.value)
    copy = pickle.loads(pickle.dumps(info.value))
    assert type(copy) is bebop.InvalidArgumentError and copy.metadata == info.value.metadata and str(copy) == str(info.value)
    client.generate(prompt, request_id="twice", max_new_tokens=2, seed=1)
    with pytest.raises(bebop.AlreadyExistsError):
        client.generate(prompt, request_id="twice", max_new_tokens=3, seed=1)
    with pytest.raises(bebop.DeadlineExceededError):
        client.generate(prompt, max_new_tokens=2000, ignore_eos=True, timeout=0.05)


@pytest.mark.parametrize("call, error", [
    (lambda c: c.generate([1], temprature=1.0), TypeError), (lambda c: c.generate([1], sampling={"top": 1}), TypeError),
    (lambda c: c.generate([[1]]), TypeError), (lambda c: c.generate([1.5]), TypeError), (lambda c: c.generate([-1]), ValueError),
    (lambda c: c.generate([1], speculation="fast"), ValueError), (lambda c: c.generate([1], seed=1, sampling={"seed": 2}), TypeError)])
def test_wrong_names_and_types_are_refused_before_anything_is_sent(client, call, error):
    with pytest.raises(error):
        call(client)


def test_a_client_can_be_pickled(client, prompt):
    with pickle.loads(pickle.dumps(client)) as copy:
        assert copy.generate(prompt, max_new_tokens=2).samples


def test_information(client):
    assert client.health() == "SERVING" and client.health("bebop.v1.Rollout") == "SERVING"
    assert client.server_info().device == "cpu" and client.model_info().has_mtp
    assert client.detokenize(client.tokenize("abc 1+2")) == "abc 1+2"


def test_views_of_other_servers(client, prompt):
    sample = client.generate(prompt, max_new_tokens=4, logprobs=True).samples[0]
    meta = sample.to_sglang_meta_info()
    assert meta["weight_version"] == "0" and meta["completion_tokens"] == len(sample.token_ids)
    assert meta["finish_reason"]["type"] in ("stop", "length")
    assert sample.to_vllm_choice()["token_ids"] == sample.to_tinker()["tokens"] == sample.token_ids.tolist()


def test_the_asyncio_client_does_the_same(server, prompt):
    async def run():
        async with bebop.AsyncClient(server.rollout, server.admin, timeout=60) as client:
            groups = await asyncio.gather(*(client.generate(prompt, n=2, seed=i, max_new_tokens=8, speculation="coupled") for i in range(6)))
            streamed = [sample async for sample in client.generate_stream(prompt, n=2, seed=0, max_new_tokens=8, speculation="coupled")]
            with pytest.raises(bebop.InvalidArgumentError):
                await client.generate(prompt, max_new_tokens=0)
            task = asyncio.create_task(client.generate(prompt, max_new_tokens=2000, ignore_eos=True))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.wait_until_serving(5)
            assert await client.health() == "SERVING" and (await client.loads()).serving
            copy = pickle.loads(pickle.dumps(client))
            assert (await copy.score([prompt]))[0].logprobs.shape == (len(prompt) - 1,)
            await copy.close()
            return groups, streamed

    groups, streamed = asyncio.run(run())
    assert len(groups) == 6
    expected = {sample.sample_index: sample.token_ids.tolist() for sample in groups[0].samples}
    assert {sample.sample_index: sample.token_ids.tolist() for sample in streamed} == expected


def test_calls_wait_for_a_server_that_starts_later(prompt):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []

    def start():
        time.sleep(0.5)
        started.append(Server("--port", str(port)))

    thread = threading.Thread(target=start)
    thread.start()
    try:
        with bebop.Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_seconds=0.3)) as client:
            assert client.generate(prompt, max_new_tokens=2, timeout=60).samples
    finally:
        thread.join()
        for running in started:
            running.stop()
    for retry in (None, RetryPolicy(connect_seconds=0.5)):
        begin = time.monotonic()
        with bebop.Client(f"127.0.0.1:{port}", retry=retry) as client:
            with pytest.raises(bebop.UnavailableError) as info:
                client.health()
            assert not info.value.reached_server
            with pytest.raises(bebop.BebopError):
                client.wait_until_serving(0.5)
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize("kind", [bebop.Client, bebop.AsyncClient, bebop.Fleet])
@pytest.mark.parametrize("address", ["http://127.0.0.1:50051", "https://host:50051", "grpc://host:1", "nonsense", "host:", "host:port", "host:70000", "::1:50051",
                                     "host:50051/path", "unix:", ""])
def test_what_is_no_address_is_refused_before_anything_is_sent(kind, address):
    make = (lambda: kind([address])) if kind is bebop.Fleet else (lambda: kind(address))
    with pytest.raises(ValueError, match="rollout: .*expected HOST:PORT"):
        make()
    if kind is not bebop.Fleet and address:
        with pytest.raises(ValueError, match="admin: "):
            kind("127.0.0.1:50051", address)


@pytest.mark.parametrize("address", ["host:1", "a.b.c:65535", "[::1]:50051", "unix:/tmp/socket", "dns:///host:50051", "ipv4:127.0.0.1:50051", "dns:50051"])
def test_what_is_an_address(address):
    bebop.Client(address, address).close()


def test_swapped_ports_are_named(server, prompt):
    with bebop.Client(server.admin, server.rollout, timeout=20) as swapped:
        for call, port in ((swapped.weights.info, server.rollout), (swapped.pause, server.rollout),
                           (lambda: swapped.generate(prompt), server.admin), (lambda: list(swapped.generate_stream(prompt)), server.admin)):
            with pytest.raises(bebop.UnimplementedError) as info:
                call()
            assert info.value.message.startswith(port + " does not serve this call")
            assert info.value.message.endswith("is it the rollout port?" if port == server.rollout else "is it the admin port?")


def test_what_is_tried_again_and_how_long():
    policy = RetryPolicy(connect_seconds=30, initial_seconds=1, max_seconds=4)
    unreachable = bebop.UnavailableError("connection refused")
    assert 0.5 <= policy.delay(unreachable, 1, 0.0) <= 1 and 2 <= policy.delay(unreachable, 9, 20.0) <= 4
    assert policy.delay(unreachable, 9, 29.9) is None
    full = bebop.ResourceExhaustedError("queue full", reason="CAPACITY", retry_after=7.0)
    assert policy.delay(full, 5000, 1e6) == 7.0  # until the call's own timeout
    for error in (bebop.ResourceExhaustedError("too large", reason="CANNOT_FIT"), bebop.InvalidArgumentError("no", reason="INVALID_FIELD"),
                  bebop.UnavailableError("drain", reason="DRAINING", retry_after=1.0),
                  bebop.AbortedError("busy", reason="UPDATE_IN_PROGRESS", retry_after=1.0)):
        assert policy.delay(error, 1, 0.0) is None


def test_a_full_queue_is_retried_until_it_has_room(prompt):
    running = Server("--max-num-seqs", "1", "--max-queued-requests", "1")
    try:
        with bebop.Client(running.rollout, retry=None) as hasty, bebop.Client(running.rollout, timeout=120) as patient:
            results = []

            def generate(tokens):
                results.append(patient.generate(prompt, max_new_tokens=tokens, ignore_eos=True))

            threads = [threading.Thread(target=generate, args=(tokens,)) for tokens in (800, 20)]  # one runs, one waits
            end = time.monotonic() + 30
            for thread, state in zip(threads, ((1, 0), (1, 1))):  # one after the other: together, the second might find the queue full, too
                thread.start()
                while ((loads := hasty.loads()).running_requests, loads.waiting_requests) != state:
                    assert time.monotonic() < end
                    time.sleep(0.005)
            with pytest.raises(bebop.ResourceExhaustedError) as info:
                hasty.generate(prompt, max_new_tokens=1)
            assert info.value.retry_after is not None
            threads += [threading.Thread(target=generate, args=(20,)) for _ in range(2)]
            for thread in threads[2:]:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(results) == 4
    finally:
        running.stop()
