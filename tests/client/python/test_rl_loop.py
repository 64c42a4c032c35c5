# SPDX-License-Identifier: Apache-2.0
"""Weight updates, control and fleets against real servers on the bundled model."""

import asyncio
import hashlib
import json
import pickle
import threading
import time

import numpy as np
import pytest

import bebop
from bebop import requests, tensors
from conftest import MODEL, Server


def read_safetensors(path):
    """Name -> array; bfloat16 as its bits."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    out = {}
    for name, entry in json.loads(content[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = {"BF16": "<u2", "F32": "<f4"}[entry["dtype"]]
            out[name] = np.frombuffer(content[8 + size + begin:8 + size + end], dtype).reshape(entry["shape"])
    return out


@pytest.fixture(scope="module")
def checkpoint():
    return read_safetensors(MODEL / "model.safetensors")


def changed(checkpoint, seed, scale=0.05):
    """The checkpoint as float32 with a little noise: what a learner has after a step."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, array in checkpoint.items():
        values = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
        out[name] = values * (1 + scale * rng.standard_normal(values.shape, dtype=np.float32))
    return out


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """A server of our own, since versions stay: its root is a folder of ours."""
    root = tmp_path_factory.mktemp("weights")
    running = Server("--max-num-seqs", "8", "--weights-root", str(root))
    running.root = root
    yield running
    running.stop()


@pytest.fixture
def client(learner):
    with bebop.Client(learner.rollout, learner.admin, timeout=60) as connected:
        yield connected
        connected.resume()


@pytest.fixture
def prompt(client):
    return client.tokenize("12+30=")


def next_step(client):
    return client.weights.info().target_step + 1


def scores(client, prompt):
    return client.score([prompt + prompt], draft_depth=2)[0]


def test_the_checkpoint_pushed_to_itself_is_the_checkpoint(client, checkpoint, prompt):
    before, info = scores(client, prompt), client.weights.info(tensors=True)
    assert {spec.name for spec in info.tensors} == set(checkpoint)
    result = client.weights.update(checkpoint, next_step(client), label="same")
    assert (result.info.target_digest, result.info.draft_digest) == (info.target_digest, info.draft_digest) and result.info.label == "same"
    after = scores(client, prompt)
    np.testing.assert_array_equal(before.logprobs, after.logprobs)
    assert after.weight_step == result.info.target_step == before.weight_step + 1
    assert client.weights.check() == bebop.WeightCheck(True, True, info.target_digest, info.draft_digest)
    assert client.server_info().weight_step == result.info.target_step


def test_rounded_float32_is_what_the_server_then_runs(client, checkpoint, prompt):
    """bf16 round trip: the server's digests are those of our own rounding, and what it computes is what these bytes compute."""
    named = changed(checkpoint, 1)
    before = scores(client, prompt)
    result = client.weights.update(named, next_step(client))
    digests = {False: tensors.ComponentDigest(), True: tensors.ComponentDigest()}
    rounded = {}
    for spec in client.weights.info(tensors=True).tensors:
        rounded[spec.name] = tensors.round_to_bfloat16(named[spec.name]) if spec.dtype == "BF16" else named[spec.name]
        digests[tensors.is_draft(spec.name)].add(spec.name, spec.dtype, spec.shape, hashlib.sha256(rounded[spec.name].tobytes()).digest())
    assert result.info.target_digest == digests[False].hex() and result.info.draft_digest == digests[True].hex()
    changed_scores = scores(client, prompt)
    assert np.abs(changed_scores.logprobs - before.logprobs).max() > 1e-3
    assert np.abs(changed_scores.draft[0].overlap - before.draft[0].overlap).max() > 1e-4
    client.weights.update(rounded, next_step(client))
    np.testing.assert_array_equal(scores(client, prompt).logprobs, changed_scores.logprobs)
    client.weights.update(checkpoint, next_step(client))
    np.testing.assert_array_equal(scores(client, prompt).logprobs, before.logprobs)


def test_torch_tensors_and_a_target_alone(client, checkpoint):
    torch = pytest.importorskip("torch")
    state = {}
    for name, array in checkpoint.items():
        if array.dtype == np.uint16:
            tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array.copy())
        state[name.replace("model.language_model.", "_orig_mod.model.")] = torch.nn.Parameter(tensor)
    state["lm_head.weight"] = state["_orig_mod.model.embed_tokens.weight"]
    before = client.weights.info()
    target = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    with pytest.raises(ValueError, match="mtp.*components="):
        client.weights.update(target, before.target_step + 1)
    result = client.weights.update(((name, tensor) for name, tensor in target.items()), before.target_step + 1, components=["target"])
    assert (result.info.target_step, result.info.draft_step) == (before.target_step + 1, before.draft_step)
    assert result.info.target_digest == before.target_digest and result.info.draft_digest == before.draft_digest


def test_updates_while_samples_stream(client, learner, checkpoint, prompt):
    """Five updates while groups run: every token has a version, versions only rise, and more than one group saw several."""
    start, stop, results, errors = client.weights.info().target_step, threading.Event(), [], []

    def roll():
        try:
            with bebop.Client(learner.rollout, learner.admin, timeout=120) as own:
                while not stop.is_set():
                    results.extend(own.generate_stream(prompt, n=3, max_new_tokens=300, ignore_eos=True, logprobs=True))
        except bebop.BebopError as error:
            errors.append(error)

    threads = [threading.Thread(target=roll) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(5):
            time.sleep(0.3)
            named = changed(checkpoint, i, 1e-3)
            result = client.weights.update(iter(named.items()), start + 1 + i, label=f"u{i}", in_flight=("keep", "recompute")[i % 2])
            assert result.info.target_step == start + 1 + i and 0 <= result.swap_seconds < 5
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and len(results) >= 6
    for sample in results:
        assert sample.weight_spans[0].start == 0 and sample.weight_spans[-1].end == len(sample.token_ids) == len(sample.logprobs) == 300
        assert all(a.end == b.start and a.step < b.step for a, b in zip(sample.weight_spans, sample.weight_spans[1:]))
        assert all(start <= span.step <= start + 5 for span in sample.weight_spans)
        assert all(span.draft_step == span.step and span.label == f"u{span.step - start - 1}" for span in sample.weight_spans if span.step > start)
        assert (np.diff(sample.weight_steps) >= 0).all()
    assert len({step for sample in results for step in sample.weight_steps}) >= 4
    assert any(len(sample.weight_spans) > 1 for sample in results)
    check = client.weights.check()
    assert check.target_matches and check.draft_matches
    client.weights.update(checkpoint, start + 6)


def test_what_fails_leaves_the_version_as_it_was(client, checkpoint):
    before = client.weights.info()
    bad = changed(checkpoint, 2)
    name = next(reversed(list(bad)))
    bad[name] = bad[name].copy()
    bad[name].flat[0] = np.nan

    def dies():
        yield from list(checkpoint.items())[:30]
        raise RuntimeError("the learner died")

    step = before.target_step
    about = {"NON_FINITE": {"tensor": name, "element": "0"},
             "STEP_NOT_NEWER": {"field": "target_step", "value": str(step), "limit": f"> {step}"},
             "WRONG_BASE_STEP": {"field": "base_step", "value": str(step + 7), "limit": str(step)}}
    for call, error, reason in (
            (lambda: client.weights.update(bad, step + 1), bebop.InvalidArgumentError, "NON_FINITE"),
            (lambda: client.weights.update(checkpoint, step), bebop.FailedPreconditionError, "STEP_NOT_NEWER"),
            (lambda: client.weights.update(checkpoint, step + 1, base_step=step + 7), bebop.FailedPreconditionError, "WRONG_BASE_STEP"),
            (lambda: client.weights.update_from_path("../escape", step + 1), bebop.PermissionDeniedError, "OUTSIDE_ROOT"),
            (lambda: client.weights.update_from_path("nothing-here", step + 1), bebop.NotFoundError, None),
            (lambda: client.weights.update(dies(), step + 1), RuntimeError, None),
            (lambda: client.weights.update({**checkpoint, name: checkpoint[name][:1]}, step + 1), ValueError, None)):
        with pytest.raises(error) as info:
            call()
        assert reason is None or info.value.reason == reason
        if reason in about:  # for programs, beside the words
            assert about[reason].items() <= info.value.metadata.items()
        assert client.weights.info() == before  # nothing open, nothing changed


def test_a_second_learner_is_told_to_come_back(client, learner, checkpoint):
    began, go_on, seen = threading.Event(), threading.Event(), []

    def slow():
        for i, item in enumerate(checkpoint.items()):
            if i == 3:
                began.set()
                go_on.wait(30)
            yield item

    step = next_step(client)
    first = threading.Thread(target=lambda: seen.append(client.weights.update(slow(), step, update_id="first")))
    first.start()
    assert began.wait(30)
    with bebop.Client(learner.rollout, learner.admin, timeout=30) as second:
        with pytest.raises(bebop.AbortedError) as info:
            second.weights.update(checkpoint, step + 1)
        assert info.value.reason == "UPDATE_IN_PROGRESS"
        with pytest.raises(bebop.AlreadyExistsError) as info:
            second.weights.update(checkpoint, step + 1, update_id="first")
        assert info.value.reason == "UPDATE_ID_REUSED"
        assert second.weights.info().update.update_id == "first"  # the second's clean-up has left it alone
    go_on.set()
    first.join()
    assert seen and seen[0].info.target_step == step


def test_a_cancelled_update_leaves_the_version_as_it_was(client, learner, checkpoint):
    before = client.weights.info()

    async def run():
        reached = asyncio.Event()

        async def produce():
            for i, item in enumerate(checkpoint.items()):
                yield item
                if i == 20:
                    reached.set()
                    await asyncio.sleep(0.5)

        async with bebop.AsyncClient(learner.rollout, learner.admin, timeout=60) as other:
            task = asyncio.create_task(other.weights.update(produce(), before.target_step + 1))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await other.weights.info() == before
            result = await other.weights.update(produce(), before.target_step + 1)
            assert result.info.target_step == before.target_step + 1

    asyncio.run(run())


def test_deltas_and_files(client, learner, checkpoint, prompt):
    base = scores(client, prompt)
    step = client.weights.info().target_step
    name = next(name for name in checkpoint if name.endswith("layers.3.mlp.down_proj.weight") and not name.startswith("mtp."))
    client.weights.update({name: changed(checkpoint, 3, 0.5)[name]}, step + 1, encoding="delta", base_step=step)
    assert np.abs(scores(client, prompt).logprobs - base.logprobs).max() > 1e-4
    client.weights.update(checkpoint, step + 2, transport="disk", root=learner.root, path="back")
    np.testing.assert_array_equal(scores(client, prompt).logprobs, base.logprobs)
    assert client.weights.update_from_path("back", step + 1, rewind=True).info.target_step == step + 1
    client.weights.update(checkpoint, step + 3)


def test_requests_bound_the_weights_they_accept(client, prompt, checkpoint):
    step = client.weights.info().target_step
    with pytest.raises(bebop.FailedPreconditionError) as info:
        client.generate(prompt, max_new_tokens=2, weights={"min_step": step + 1})
    assert info.value.reason == "STEP_NOT_REACHED"
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(
        client.generate(prompt, max_new_tokens=2, weights={"min_step": step + 1, "wait_for_step": True})))
    thread.start()
    time.sleep(0.2)
    assert not waiting
    client.weights.update(checkpoint, step + 1)
    thread.join()
    assert waiting[0].samples[0].weight_steps.min() >= step + 1


def uninterrupted(client, prompt, **params):
    return [sample.token_ids.tolist() for sample in client.generate(prompt, **params).samples]


def wait_for_tokens(client, before, count):
    """Until the server has generated `count` tokens since `before`."""
    end = time.monotonic() + 20
    while client.loads().generated_tokens < before + count:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_samples_that_a_pause_cut_short_are_resumed(client, prompt, monkeypatch):
    params = dict(n=2, seed=9, max_new_tokens=1000, ignore_eos=True, logprobs=True, speculation="coupled")
    expected = uninterrupted(client, prompt, **params)
    cut = []
    before = client.loads().generated_tokens
    thread = threading.Thread(target=lambda: cut.append(client.generate(prompt, **params)))
    thread.start()
    wait_for_tokens(client, before, 20)
    state = client.pause("abort")
    thread.join()
    assert state.paused and state.aborted_samples == 2
    group = cut[0]
    assert len(group.unfinished) == 2 and all(sample.finish.reason == "ABORTED" and sample.abort_epoch == state.abort_epoch for sample in group.samples)
    client.resume()
    whole = client.resume_samples(pickle.loads(pickle.dumps(group)))
    assert [sample.token_ids.tolist() for sample in whole.samples] == expected
    with monkeypatch.context() as context:  # one handle a request: what a group of long samples comes to
        context.setattr(requests, "MAX_RESUME_BYTES", max(len(sample.resume_handle) for sample in group.samples))
        assert [sample.token_ids.tolist() for sample in client.resume_samples(group).samples] == expected
    assert all(len(sample.logprobs) == 1000 and sample.finished for sample in whole.samples)
    del params["n"]
    again = client.resume_samples(group.samples[:1], prompt, **params)
    assert again.samples[0].token_ids.tolist() == expected[0]
    with pytest.raises(bebop.InvalidArgumentError) as info:
        client.resume_samples(group.samples, prompt, **{**params, "max_new_tokens": 300})
    assert info.value.reason == "RESUME_MISMATCH"
    assert client.resume_samples(whole) is whole


def test_pause_keep_stands_still_and_goes_on(client, prompt):
    params = dict(n=2, seed=4, max_new_tokens=1000, ignore_eos=True, speculation="coupled")
    expected = uninterrupted(client, prompt, **params)
    tokens, results = {0: [], 1: []}, {}

    def stream():
        for event in client.generate_stream(prompt, events=True, stream_tokens=True, **params):
            if isinstance(event, bebop.TokenChunk):
                assert event.start == len(tokens[event.sample_index])
                tokens[event.sample_index].extend(event.token_ids.tolist())
            elif isinstance(event, bebop.SampleResult):
                results[event.sample_index] = event.token_ids.tolist()

    before = client.loads().generated_tokens
    thread = threading.Thread(target=stream)
    thread.start()
    wait_for_tokens(client, before, 20)
    assert client.pause("keep").paused
    made = client.loads().generated_tokens - before
    end = time.monotonic() + 20
    while sum(map(len, tokens.values())) < made:  # what was made before the pause comes
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    assert 20 <= made < 2000 and client.loads().generated_tokens - before == made == sum(map(len, tokens.values())) and not results
    assert client.loads().running_sequences == 2 and client.flush_cache().paused
    assert not client.resume().paused
    thread.join()
    assert [results[0], results[1]] == [tokens[0], tokens[1]] == expected
    with pytest.raises(bebop.FailedPreconditionError) as info:
        client.flush_cache()
    assert info.value.reason == "NOT_PAUSED"


def test_sleep_wake_and_speculation(client, prompt):
    before = uninterrupted(client, prompt, n=1, seed=2, max_new_tokens=20, speculation="coupled")
    assert set(client.sleep().sleeping) == {"weights", "kv_cache"}
    assert client.wake_up().sleeping == ()
    assert uninterrupted(client, prompt, n=1, seed=2, max_new_tokens=20, speculation="coupled") == before
    default = client.server_info().default_speculation
    assert client.set_speculation("off").speculation.mode == "off"
    assert client.generate(prompt, max_new_tokens=20).samples[0].spec.num_draft_tokens == 0
    state = client.set_speculation({"mode": "rejection", "num_draft_tokens": 1})
    assert state.speculation == bebop.Speculation("rejection", 1)
    client.set_speculation({"mode": type(default).Mode.Name(default.mode), "num_draft_tokens": default.num_draft_tokens})


def test_a_detached_group_outlives_its_caller(client, prompt):
    params = dict(request_id=f"detached-{time.monotonic_ns()}", n=1, seed=1, max_new_tokens=300, ignore_eos=True, detach=True)
    with pytest.raises(bebop.DeadlineExceededError):
        client.generate(prompt, timeout=0.05, **params)
    assert len(client.generate(prompt, **params).samples[0].token_ids) == 300


def test_a_fleet_with_a_server_killed_in_the_middle(checkpoint):
    servers = [Server("--max-num-seqs", "4") for _ in range(2)]
    try:
        with bebop.Fleet([(server.rollout, server.admin) for server in servers], timeout=60,
                         retry=bebop.RetryPolicy(connect_seconds=1.0, max_seconds=0.3)) as fleet:
            prompt = fleet.tokenize("12+30=")
            results = fleet.weights.update(changed(checkpoint, 5), 1)
            assert [result.info.target_step for result in results.values()] == [1, 1]
            assert len({info.version for info in fleet.weights.info().values()}) == 1
            same = [fleet.generate(prompt, seed=3, max_new_tokens=12, speculation="coupled").samples[0].token_ids.tolist() for _ in range(2)]
            assert same[0] == same[1]
            survivor = fleet.clients[0].weights.info()

            def produce():
                for i, item in enumerate(checkpoint.items()):
                    if i == 40:
                        servers[1].process.kill()
                        servers[1].process.wait()
                    yield item

            with pytest.raises(bebop.FleetUpdateError) as info:
                fleet.weights.update(produce(), 2)
            assert list(info.value.errors) == [servers[1].rollout] and info.value.stage == "push" and info.value.updated == []
            assert fleet.clients[0].weights.info() == survivor
            assert fleet.in_rotation == [servers[0].rollout]
            assert all(fleet.generate(prompt, max_new_tokens=4, affinity=f"s{i}").samples for i in range(6))
    finally:
        for server in servers:
            server.stop()
