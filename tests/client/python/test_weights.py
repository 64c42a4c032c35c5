# SPDX-License-Identifier: Apache-2.0
"""Weight updates against a server in this process: names, types, faults. test_rl_loop.py has the real one."""

import asyncio
import hashlib
import pickle
import threading
import time

import grpc
import numpy as np
import pytest

import bebop
from bebop import tensors, weight_plan, weights
from bebop.transport import RetryPolicy
from fake_server import SPECS, FakeServer, component_digest


@pytest.fixture
def fake():
    running = FakeServer()
    yield running
    running.stop()


@pytest.fixture
def client(fake):
    with bebop.Client(fake.address, fake.address, timeout=20, retry=RetryPolicy(connect_seconds=5, initial_seconds=0.01)) as connected:
        yield connected


def random_tensors(seed, names=lambda name: name):
    rng = np.random.default_rng(seed)
    return {names(name): rng.standard_normal(shape, dtype=np.float32) for name, _, shape in SPECS}


def wire(array, dtype):
    return (tensors.round_to_bfloat16(array.reshape(-1)) if dtype == "BF16" else array).tobytes()


def loaded(fake, named):
    """Whether the server has exactly these float32 tensors, in its own types."""
    plain = {tensors.plain_name(name): array for name, array in named.items()}
    return all(fake.tensors[name] == wire(plain[tensors.plain_name(name)], dtype) for name, dtype, _ in SPECS)


# ---- types ----


def exact_round(value):
    """Nearest bfloat16, ties to even, by comparing with both neighbours in exact arithmetic (float64 holds them and their midpoint)."""
    bits = np.float32(value).view(np.uint32)
    down = bits & 0xFFFF0000
    up = np.uint32(down + 0x10000)
    low, high = (np.array(b, np.uint32).view(np.float32).astype(np.float64) for b in (down, up))
    middle = (low + high) / 2
    exact = np.float64(np.float32(value))
    nearer_up = abs(exact) > abs(middle) or (exact == middle and (down >> 16) & 1)
    return int((up if nearer_up else down) >> 16)


def test_rounding_to_bfloat16_is_to_nearest_even():
    rng = np.random.default_rng(1)
    bits = np.concatenate([rng.integers(0, 0x7F000000, 3000, dtype=np.uint32), np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 1, 0x8000, 0x18000,
                                                                                        0x7FFF, 0], np.uint32)])
    values = np.concatenate([bits, bits | 0x80000000]).view(np.float32)
    np.testing.assert_array_equal(tensors.round_to_bfloat16(values), [exact_round(value) for value in values])


def test_values_that_are_not_finite_stay_so():
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32)
    rounded = (tensors.round_to_bfloat16(odd.view(np.float32)).astype(np.uint32) << 16).view(np.float32)
    assert np.isnan(rounded[:3]).all() and np.isposinf(rounded[3]) and np.isneginf(rounded[4]) and np.isposinf(rounded[5])


def test_every_kind_of_tensor_becomes_the_same_bytes():
    values = np.random.default_rng(2).standard_normal((5, 7)).astype(np.float16)  # exact in float32
    bits = tensors.round_to_bfloat16(values.astype(np.float32))
    expected = bits.tobytes()
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    kinds = [values, values.astype(np.float32), values.astype(np.float64), values.astype(">f4"), bits, np.asfortranarray(values)]
    for kind in kinds:
        assert b"".join(data for _, data in tensors.WireTensor("t", kind, "BF16").chunks(24)) == expected
    for kind in (bits, rounded):
        assert b"".join(data for _, data in tensors.WireTensor("t", kind, "F32").chunks(24)) == rounded.tobytes()
    torch = pytest.importorskip("torch")
    base = torch.from_numpy(values.copy())
    for kind in (base, base.float(), base.double(), base.float().bfloat16(), base.float().t().contiguous().t(), torch.nn.Parameter(base.float())):
        assert b"".join(data for _, data in tensors.WireTensor("t", kind, "BF16").chunks(24)) == expected
    assert b"".join(data for _, data in tensors.WireTensor("t", base.bfloat16(), "F32").chunks(24)) == rounded.tobytes()
    for refused in (torch.zeros(2, dtype=torch.int32), torch.zeros(2, device="meta")):
        with pytest.raises(TypeError, match="^t: "):
            tensors.WireTensor("t", refused, "BF16")


def test_large_tensors_are_cast_piece_by_piece_and_torch_agrees():
    torch = pytest.importorskip("torch")
    values = torch.randn(1500, 1700)
    pieces = list(tensors.WireTensor("t", values, "BF16").chunks(4 << 20))
    assert len(pieces) > 1 and [offset for offset, _ in pieces] == np.cumsum([0] + [len(data) for _, data in pieces[:-1]]).tolist()
    assert b"".join(data for _, data in pieces) == values.bfloat16().view(torch.int16).numpy().tobytes()


def test_no_copy_where_the_type_is_right():
    array = np.zeros(8, np.uint16)
    [(_, view)] = tensors.WireTensor("t", array, "BF16").chunks(1 << 20)
    array[3] = 7
    assert bytes(view) == array.tobytes()
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(8, dtype=torch.bfloat16)
    [(_, view)] = tensors.WireTensor("t", tensor, "BF16").chunks(1 << 20)
    tensor[3] = 1.0
    assert bytes(view) == tensor.view(torch.int16).numpy().tobytes() and view[7] != 0


@pytest.mark.parametrize("bad", [np.zeros(3, np.int32), np.zeros(3, bool), [1.0, 2.0], np.zeros(3, np.complex64), "weights"])
def test_other_types_are_refused_by_name(bad):
    with pytest.raises(TypeError, match="^t: "):
        tensors.WireTensor("t", bad, "BF16")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight",
                                  "language_model.model.layers.0.mlp.up_proj.weight", "module.model.layers.0.mlp.up_proj.weight",
                                  "_orig_mod.model.layers.0._orig_mod.mlp.up_proj.weight",
                                  "module._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight"])
def test_wrappers_and_prefixes_are_understood(name):
    assert tensors.plain_name(name) == "layers.0.mlp.up_proj.weight" and not tensors.is_draft(name)


def test_names_that_are_not_prefixes_stay():
    assert tensors.plain_name("mtp.fc.weight") == "mtp.fc.weight" and tensors.is_draft("model.mtp.fc.weight")
    assert tensors.is_vision("model.visual.blocks.0.attn.qkv.weight") and tensors.plain_name("model.norm.weight") == "norm.weight"


# ---- updates ----


def test_an_update_brings_every_byte_and_the_version(fake, client):
    named = random_tensors(1)
    result = client.weights.update(named, 42, label="run-7")
    assert loaded(fake, named) and (fake.step, fake.draft_step, fake.label) == (42, 42, "run-7")
    assert result.info.target_step == 42 and result.kept_samples == 3 and result.sent_bytes == sum(map(len, fake.tensors.values()))
    assert fake.digests == {name: hashlib.sha256(data).digest() for name, data in fake.tensors.items()}
    # The digests of the result were announced, so that the server could compare.
    assert fake.expected.expect_target_digest == component_digest(fake.tensors, SPECS, False)
    assert fake.expected.expect_draft_digest == component_digest(fake.tensors, SPECS, True)
    assert client.weights.info() == result.info and client.weights.check().target_matches
    assert len(client.weights.info(tensors=True).tensors) == len(SPECS)
    assert fake.streams == 1
    bits = {name: np.frombuffer(fake.tensors[name], "<u2" if dtype == "BF16" else "<f4").reshape(shape) for name, dtype, shape in SPECS}
    client.weights.update(bits, 43)  # as it is: nothing to cast
    assert max(size for _, _, size in fake.chunks) == weight_plan.CHUNK_BYTES <= 4 << 20 and loaded(fake, named)


def test_an_iterator_is_consumed_lazily_and_once_and_may_reuse_its_memory(fake, client):
    named = random_tensors(2, lambda name: name.replace("model.language_model.", "module.model."))
    buffer = np.empty(max(array.size for array in named.values()), np.float32)
    alive = []

    def produce():
        for name, array in named.items():
            view = buffer[:array.size].reshape(array.shape)
            view[...] = array
            alive.append(name)
            yield name, view
            buffer.fill(np.nan)  # whatever was read of it later would be refused

    client.weights.update(produce(), 1)
    assert loaded(fake, named) and alive == list(named)


def test_torch_tensors_of_a_wrapped_model(fake, client):
    torch = pytest.importorskip("torch")
    named = random_tensors(3)
    state = {"_orig_mod." + name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in named.items()}
    state["model.visual.patch.weight"] = torch.zeros(3)
    state["lm_head.weight"] = state["_orig_mod.model.language_model.embed_tokens.weight"]
    client.weights.update(state, 1)
    assert loaded(fake, named)
    state["lm_head.weight"] = torch.nn.Parameter(state["lm_head.weight"] + 1)
    with pytest.raises(ValueError, match="lm_head.weight: differs from embed_tokens.weight"):
        client.weights.update(state, 2)
    assert fake.step == 1 and fake.open is None


def no_mtp(named):
    return {name: array for name, array in named.items() if not name.startswith("mtp.")}


def test_without_the_mtp_layer_the_target_alone_must_be_asked_for(fake, client):
    named = random_tensors(4)
    with pytest.raises(ValueError, match=r"missing: mtp.fc.weight, mtp.norm.weight.*components=\[\"target\"\]"):
        client.weights.update(no_mtp(named), 1)
    assert fake.calls == []  # nothing was sent
    with pytest.raises(ValueError, match="missing: mtp.fc.weight"):
        client.weights.update(iter(no_mtp(named).items()), 1)  # seen only at the end
    assert fake.calls == ["start", "abort"] and fake.open is None and fake.step == 0
    client.weights.update(no_mtp(named), 1, components=["target"])
    assert (fake.step, fake.draft_step) == (1, 0) and not any(fake.tensors["mtp.fc.weight"])
    client.weights.update(named, 2, components="draft")  # the target's tensors are left out
    assert (fake.step, fake.draft_step) == (1, 2) and loaded(fake, named)


@pytest.mark.parametrize("change, message", [
    (lambda named: named.pop("model.language_model.norm.weight"), "missing: model.language_model.norm.weight"),
    (lambda named: named.update({"model.layers.9.x": np.zeros(1, np.float32)}), "model.layers.9.x: the server's model has no such tensor"),
    (lambda named: named.update({"model.norm.weight": np.zeros(32, np.float32)}), "model.norm.weight: came before"),
    (lambda named: named.update({"mtp.norm.weight": np.zeros((4, 8), np.float32)}), r"mtp.norm.weight: shape \[4, 8\], but the server's tensor has \[32\]")])
def test_tensors_that_do_not_fit_are_named_before_anything_is_sent(fake, client, change, message):
    named = random_tensors(5)
    change(named)
    with pytest.raises(ValueError, match=message):
        client.weights.update(named, 1)
    assert fake.calls == []
    with pytest.raises(ValueError, match=message):
        client.weights.update(iter(named.items()), 1)
    assert fake.calls == ["start", "abort"] and fake.step == 0


@pytest.mark.parametrize("options, message", [
    (dict(in_flight="maybe"), "in_flight: 'maybe' is none of keep"), (dict(components=["head"]), "components: 'head'"), (dict(components=[]), "empty"),
    (dict(encoding="xor"), "encoding: 'xor'"), (dict(encoding="delta"), "needs base_step"), (dict(transport="nccl"), "transport: 'nccl'"),
    (dict(transport="disk"), "needs path"), (dict(path="x"), "go with transport")])
def test_wrong_options_are_refused_before_anything_is_sent(fake, client, options, message):
    with pytest.raises(ValueError, match=message):
        client.weights.update({}, 1, **options)
    with pytest.raises(TypeError):
        client.weights.update({}, 1, steps=3)
    assert fake.calls == []


def test_an_admin_address_is_needed(fake):
    with bebop.Client(fake.address) as client:
        with pytest.raises(ValueError, match="admin="):
            client.weights.info()
        with pytest.raises(ValueError, match="admin="):
            client.pause()


def test_refusals_of_the_server_abort_the_update(fake, client):
    named = random_tensors(6)
    named["mtp.fc.weight"][3, 3] = np.inf
    with pytest.raises(bebop.InvalidArgumentError) as info:
        client.weights.update(named, 1)
    assert info.value.reason == "NON_FINITE" and info.value.metadata["field"] == "mtp.fc.weight"
    assert fake.calls == ["start", "abort"] and fake.open is None and fake.step == 0
    named["mtp.fc.weight"][3, 3] = 0
    client.weights.update(named, 5)
    with pytest.raises(bebop.FailedPreconditionError) as info:
        client.weights.update(named, 4)
    assert info.value.reason == "STEP_NOT_NEWER"
    client.weights.update(named, 4, rewind=True)
    assert fake.step == 4


@pytest.mark.parametrize("lost", [[0], [1], [2], [3, 0, 1], [5]])
def test_a_lost_stream_goes_on(fake, client, lost):
    fake.lose_stream_after = list(lost)
    named = random_tensors(7)
    result = client.weights.update(named, 1)
    assert loaded(fake, named) and fake.streams == len(lost) + 1 and fake.calls == ["start", "finish"]
    assert result.sent_bytes == sum(map(len, fake.tensors.values()))


def test_what_the_server_has_is_not_sent_again(fake, client):
    fake.lose_stream_after = [5]
    client.weights.update(random_tensors(8), 1)
    assert len(fake.chunks) == len(set(fake.chunks)) == len(SPECS) + 8  # the tensor of 9,000,000 bytes has nine


def test_windows_are_acknowledged(fake, client, monkeypatch):
    monkeypatch.setattr(weights, "WINDOW_BYTES", 1 << 20)
    fake.lose_stream_after = [1, 0]
    named = random_tensors(9)
    client.weights.update(named, 1)
    assert loaded(fake, named) and fake.streams > 3


def test_without_retries_a_lost_stream_ends_the_update(fake):
    fake.lose_stream_after = [2]
    with bebop.Client(fake.address, fake.address, retry=None) as client:
        with pytest.raises(bebop.UnavailableError):
            client.weights.update(random_tensors(7), 1)
    assert fake.calls == ["start", "abort"] and fake.step == 0


def test_a_lost_reply_of_the_last_step_is_asked_for_again(fake, client):
    fake.finish_errors = [(grpc.StatusCode.UNAVAILABLE, "after")]
    named = random_tensors(10)
    assert client.weights.update(named, 3).info.target_step == 3
    assert loaded(fake, named) and fake.num_updates == 1 and fake.calls == ["start", "finish", "finish"]


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def test_whatever_the_learner_raises_aborts_the_update(fake, client):
    def produce(error):
        yield "mtp.norm.weight", np.zeros(32, np.float32)
        raise error

    def senders():
        return [thread for thread in threading.enumerate() if "ThreadPoolExecutor" not in thread.name]

    threads = len(senders())
    for error in (Interrupt(), RuntimeError("out of memory")):
        with pytest.raises(type(error)):
            client.weights.update(produce(error), 1)
        assert fake.open is None and fake.step == 0
    assert fake.calls == ["start", "abort"] * 2
    end = time.monotonic() + 5
    while len(senders()) > threads:  # no thread waits for tensors that will not come
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_delta_brings_some_tensors(fake, client):
    named = random_tensors(11)
    client.weights.update(named, 1)
    change = {"model.norm.weight": np.full(32, 2.0, np.float32)}
    with pytest.raises(TypeError, match="mapping or a list"):
        client.weights.update(iter(change.items()), 2, encoding="delta", base_step=1)
    with pytest.raises(bebop.FailedPreconditionError):
        client.weights.update(change, 2, encoding="delta", base_step=0)
    client.weights.update(list(change.items()), 2, encoding="delta", base_step=1)
    named["model.language_model.norm.weight"] = change["model.norm.weight"]
    assert loaded(fake, named) and fake.step == 2


def test_progress_is_told(fake, client):
    seen = []
    client.weights.update(random_tensors(12), 1, progress=lambda sent, total, name: seen.append((sent, total, name)))
    total = sum(map(len, fake.tensors.values()))
    assert seen[-1] == (total, total, "mtp.norm.weight") and [sent for sent, _, _ in seen] == sorted({sent for sent, _, _ in seen})


def test_a_checkpoint_on_disk_is_whole_and_readable(fake, client, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    named = random_tensors(13)

    fake.weights_root = tmp_path
    client.weights.update(iter(reversed(list(named.items()))), 1, transport="disk", root=tmp_path, path="step-1")
    assert loaded(fake, named) and [file.name for file in (tmp_path / "step-1").iterdir()] == ["model.safetensors"]
    assert fake.expected.expect_target_digest == component_digest(fake.tensors, SPECS, False)
    read = safetensors.load_file(tmp_path / "step-1" / "model.safetensors")
    assert sorted(read) == sorted(name for name, _, _ in SPECS) and read["model.language_model.layers.0.linear_attn.A_log"].numpy().dtype == np.float32
    named["mtp.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="mtp.norm.weight: shape"):
        client.weights.update(iter(named.items()), 2, transport="disk", root=tmp_path, path="step-2")
    assert list((tmp_path / "step-2").iterdir()) == [] and fake.open is None
    assert client.weights.update_from_path("step-1", 7).info.target_step == 7
    for options, error in ((dict(transport="stream"), TypeError), (dict(in_flight="never"), ValueError)):
        with pytest.raises(error):
            client.weights.update_from_path("step-1", 8, **options)
    with pytest.raises(ValueError, match="path: empty"):
        client.weights.update_from_path("", 8)


# ---- asyncio ----


def test_the_asyncio_client_updates_too(fake):
    named = random_tensors(14)
    main = threading.get_ident()
    producers = set()

    async def produce():
        for item in named.items():
            producers.add(threading.get_ident())
            await asyncio.sleep(0)
            yield item

    async def run():
        async with bebop.AsyncClient(fake.address, fake.address, timeout=20) as client:
            result = await client.weights.update(produce(), 1, label="a")
            assert result.info.target_step == 1 and loaded(fake, named)
            assert (await client.weights.info()) == result.info and (await client.weights.check()).draft_matches
            await client.weights.update(named, 2)
            with pytest.raises(ValueError, match="missing: mtp.fc.weight"):
                await client.weights.update(no_mtp(named), 3)
            assert await client.weights.abort() == ""

    asyncio.run(run())
    assert fake.step == 2 and producers == {main}


def test_cancelling_a_task_aborts_its_update(fake):
    async def run():
        reached = asyncio.Event()

        async def produce():
            yield "mtp.norm.weight", np.zeros(32, np.float32)
            reached.set()
            await asyncio.sleep(60)
            yield "mtp.fc.weight", np.zeros((32, 64), np.float32)

        async with bebop.AsyncClient(fake.address, fake.address, timeout=20) as client:
            task = asyncio.create_task(client.weights.update(produce(), 1))
            await reached.wait()
            begin = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - begin < 20  # not when the learner has its next tensor
            assert fake.open is None and fake.step == 0 and (await client.weights.info()).update is None

    asyncio.run(run())


def test_cancelling_stops_a_learner_that_never_waits(fake):
    async def run():
        reached = asyncio.Event()
        sent = []

        def produce():
            for name in ("mtp.norm.weight", "model.norm.weight", "model.layers.0.linear_attn.A_log", "model.embed_tokens.weight"):
                sent.append(name)
                if len(sent) == 2:
                    reached.set()
                time.sleep(0.2)
                yield name, np.zeros(next(shape for other, _, shape in SPECS if tensors.plain_name(other) == tensors.plain_name(name)), np.float32)

        async with bebop.AsyncClient(fake.address, fake.address, timeout=20) as client:
            task = asyncio.create_task(client.weights.update(produce(), 1, update_id="c"))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(sent) < 4 and fake.open is None

    asyncio.run(run())


# ---- control ----


def test_control_calls_say_what_they_are_told(fake, client):
    assert client.pause("abort", clear_cache=True).abort_epoch == 1
    assert fake.requests[-1].mode == 1 and fake.requests[-1].clear_cache
    assert client.flush_cache().paused and not client.resume().paused
    with pytest.raises(bebop.FailedPreconditionError, match="NOT_PAUSED"):
        client.flush_cache()
    assert client.sleep("kv_cache").sleeping == ("kv_cache",) and client.wake_up().sleeping == ()
    assert client.set_speculation("off").speculation == bebop.Speculation("off", None)
    assert client.set_speculation(num_draft_tokens=2).speculation == bebop.Speculation("off", 2)
    assert client.drain(0.5).draining and fake.requests[-1].deadline_seconds == 0.5
    for call in (lambda: client.pause("gently"), lambda: client.set_speculation("fast")):
        with pytest.raises(ValueError):
            call()

    async def run():
        async with bebop.AsyncClient(fake.address, fake.address) as other:
            assert (await other.pause()).paused and not (await other.resume()).paused
            assert (await other.sleep(["weights"])).sleeping == ("weights",) and (await other.wake_up()).sleeping == ()
            assert (await other.set_speculation({"mode": "coupled", "num_draft_tokens": 1})).speculation == bebop.Speculation("coupled", 1)

    asyncio.run(run())


def test_tokens_travel_as_metadata(fake, tmp_path, monkeypatch):
    with bebop.Client(fake.address, fake.address, token="secret") as client:
        pickle.loads(pickle.dumps(client)).weights.info()
        assert fake.metadata["authorization"] == "Bearer secret" and "secret" not in repr(client)
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv("BEBOP_TOKEN_FILE", str(file))
    with bebop.Client(fake.address, fake.address) as client:
        client.weights.info()
        assert fake.metadata["authorization"] == "Bearer from-file"
