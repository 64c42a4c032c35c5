# SPDX-License-Identifier: Apache-2.0
"""bebop.adapters.slime with a double of slime (slime_double.py), against a running server."""

import asyncio
import socket

import numpy as np
import pytest
import slime_double
from slime_double import Sample

import bebop

PROMPT = "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def arguments(server):
    slime_double.install()
    slime_double.GenerateState(None).aborted = False
    return lambda **more: slime_double.arguments(bebop_servers=[f"{server.rollout},{server.admin}"], **more)


def test_a_group_of_samples(arguments, server):
    samples = [Sample(prompt=PROMPT) for _ in range(4)]
    results = asyncio.run(slime_double.generate_group(arguments(), samples))
    assert [result is sample for result, sample in zip(results, samples)] == [True] * 4
    with bebop.Client(server.rollout, admin=server.admin) as client:
        prompt_ids = client.tokenize(PROMPT, parse_special=True)
        step = client.weights.info().target_step
        for sample in samples:
            assert sample.tokens[:len(prompt_ids)] == prompt_ids and len(sample.tokens) == len(prompt_ids) + sample.response_length
            assert 0 < sample.response_length <= 24 and sample.loss_mask == [1] * sample.response_length
            assert sample.response == client.detokenize(sample.tokens[len(prompt_ids):])
            assert sample.status == (Sample.Status.COMPLETED if sample.tokens[-1] == 944 else Sample.Status.TRUNCATED)
            scored = client.score([sample.tokens], score_start=len(prompt_ids))[0]
            assert np.allclose(sample.rollout_log_probs, scored.logprobs, atol=0.05)
            assert sample.weight_versions == [str(step)]
            assert 0 < sample.spec["accepted"] <= sample.spec["drafted"] <= 3 * sample.spec["verifications"]
    assert len({tuple(sample.tokens) for sample in samples}) > 1  # siblings are drawn apart


def test_sampling_parameters_arrive(arguments):
    greedy = [Sample(prompt=PROMPT) for _ in range(2)]
    asyncio.run(slime_double.generate_group(arguments(rollout_temperature=0.0), greedy))
    assert greedy[0].tokens == greedy[1].tokens
    seeded = [Sample(prompt=PROMPT) for _ in range(2)]
    asyncio.run(slime_double.generate_group(arguments(), seeded, sampling_seed=5))
    assert seeded[0].tokens == seeded[1].tokens
    short = Sample(prompt=PROMPT)
    asyncio.run(slime_double.generate_group(arguments(rollout_max_response_len=3), [short]))
    assert (short.response_length, short.status) == (3, Sample.Status.TRUNCATED)


def test_a_sample_goes_on_where_it_was_cut(arguments, server):
    """--partial-rollout: slime stops the rollout, keeps what there is, and calls again later."""
    args = arguments(partial_rollout=True, rollout_max_response_len=1500)

    async def scenario(sample):
        async with bebop.AsyncClient(server.rollout, admin=server.admin) as client:
            before = (await client.loads()).generated_tokens
            running = asyncio.create_task(slime_double.generate_group(args, [sample], ignore_eos=True))
            while (await client.loads()).generated_tokens == before:
                await asyncio.sleep(0.01)
        slime_double.GenerateState(args).aborted = True
        await running
        slime_double.GenerateState(args).aborted = False

    sample = Sample(prompt=PROMPT)
    asyncio.run(scenario(sample))
    assert sample.status == Sample.Status.ABORTED and 0 < sample.response_length < 1500
    before = list(sample.tokens)
    args.rollout_max_response_len = sample.response_length + 5
    asyncio.run(slime_double.generate_group(args, [sample], ignore_eos=True))
    assert sample.tokens[:len(before)] == before and len(sample.tokens) == len(before) + 5
    assert len(sample.rollout_log_probs) == sample.response_length == args.rollout_max_response_len
    asyncio.run(slime_double.generate_group(args, [sample]))  # nothing left of its budget
    assert sample.response_length == args.rollout_max_response_len and sample.status == Sample.Status.TRUNCATED


def test_a_server_that_is_gone_does_not_keep_samples_from_ending(arguments, server, monkeypatch):
    """An abort asks every server, since nobody knows which one has the request."""
    import bebop.adapters.slime

    monkeypatch.setattr(bebop.adapters.slime, "_ABORT_SECONDS", 0.5)
    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{probe.getsockname()[1]}"
        args = arguments(partial_rollout=True, rollout_max_response_len=1900)
        args.bebop_servers = [f"{gone},{gone}", *args.bebop_servers]
        samples = [Sample(prompt=PROMPT) for _ in range(3)]

        async def scenario():
            async with bebop.AsyncClient(server.rollout, admin=server.admin) as client:
                before = (await client.loads()).generated_tokens
                running = asyncio.create_task(slime_double.generate_group(args, samples, ignore_eos=True))
                while (loads := await client.loads()).running_sequences < 3 or loads.generated_tokens < before + 10:
                    assert not running.done()
                    await asyncio.sleep(0.01)
            slime_double.GenerateState(args).aborted = True
            await asyncio.wait_for(running, 30)
            args.bebop_servers = [f"{gone},{gone}"]
            with pytest.raises(bebop.FleetError):  # none has answered
                await bebop.adapters.slime._abort(bebop.adapters.slime.fleet_of(args), "nobody's")

        asyncio.run(scenario())
    assert all(sample.status == Sample.Status.ABORTED and sample.response_length < 1900 for sample in samples)


@pytest.mark.parametrize("partial_rollout", [False, True])
def test_cancelling_the_coroutine_cancels_the_request(arguments, server, partial_rollout):
    async def scenario():
        sample = Sample(prompt=PROMPT)
        running = asyncio.create_task(slime_double.generate_group(
            arguments(rollout_max_response_len=1900, partial_rollout=partial_rollout), [sample], ignore_eos=True))
        async with bebop.AsyncClient(server.rollout, admin=server.admin) as client:
            before = (await client.loads()).cancelled
            while (await client.loads()).running_sequences == 0:
                await asyncio.sleep(0.02)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            for _ in range(100):
                loads = await client.loads()
                if loads.running_sequences == 0:
                    break
                await asyncio.sleep(0.05)
            assert (loads.running_sequences, loads.cancelled) == (0, before + 1)  # not simply finished

    asyncio.run(scenario())


@pytest.mark.parametrize("change, params, sample, message", [
    (dict(bebop_servers=None), {}, {}, "bebop_servers: not given"),
    (dict(use_rollout_routing_replay=True), {}, {}, "use_rollout_routing_replay"),
    (dict(rollout_top_p=0.9), {}, {}, "--rollout-top-p 1.0"),
    ({}, dict(no_stop_trim=False), {}, "no_stop_trim"),
    ({}, dict(frequency_penalty=0.1), {}, "no 'frequency_penalty'"),
    ({}, {}, dict(multimodal_inputs={"images": [b"x"]}), "bebop serves text"),
    ({}, {}, dict(prompt=[{"role": "user", "content": "x"}]), "--apply-chat-template"),
])
def test_what_bebop_has_not_is_refused(arguments, change, params, sample, message):
    args = arguments()
    for name, value in change.items():
        setattr(args, name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        asyncio.run(slime_double.generate_group(args, [Sample(**{"prompt": PROMPT, **sample})], **params))


def test_truncated_sampling_is_fine_in_evaluation(arguments):
    sample = Sample(prompt=PROMPT)
    asyncio.run(slime_double.generate_group(arguments(rollout_top_p=0.9), [sample], evaluation=True))
    assert sample.response_length > 0
