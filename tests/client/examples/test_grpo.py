# SPDX-License-Identifier: Apache-2.0
"""The GRPO example: its parts on their own, and three steps of it against a real server."""

import asyncio
import dataclasses
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "client/python/examples"
sys.path.insert(0, str(EXAMPLES))

import torch  # noqa: E402

import bebop  # noqa: E402
import bundled  # noqa: E402
import episodes  # noqa: E402
import grpo_async  # noqa: E402
import keep  # noqa: E402
import learner  # noqa: E402

torch.set_num_threads(1)


# ---- the parts ----


def episode(length, trained, reward=0.0, version=0, first=3):
    """An episode of `length` tokens whose last `trained` ones the model sampled."""
    mask = np.arange(length) >= length - trained
    tokens = np.arange(first, first + length, dtype=np.int64)
    return episodes.Episode(tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32), mask.astype(np.float32), np.where(mask, version, -1), reward,
                            True, 1, False, 0, 0)


def test_advantages_are_normalized_within_the_group():
    assert learner.advantages_of([1, 0, 0, 0]) == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    assert learner.advantages_of([1, 1, 1]).tolist() == [0, 0, 0]


def test_packing_keeps_every_token_once_with_its_values():
    lengths = (40, 200, 7, 300, 90, 90, 90, 90, 250, 130)
    items = [(episode(length, length // 2, first=index), float(index + 1)) for index, length in enumerate(lengths)]
    found = {}
    for packed in learner.pack(items):
        assert packed.batch.tokens.shape[1] % learner.CHUNK == 0
        for row in range(len(packed.batch.tokens)):
            for document in packed.batch.documents[row].unique().tolist():
                if document < 0:
                    continue
                here = packed.batch.documents[row] == document
                advantage = packed.advantages[row][here]
                assert advantage.unique().numel() == 1 and advantage[0].item() not in found
                found[advantage[0].item()] = tuple(part[row][here].tolist() for part in (
                    packed.batch.tokens, packed.batch.positions, packed.batch.counts, packed.old_logprobs))
    assert sorted(found) == [advantage for _, advantage in items]
    for one, advantage in items:
        assert found[advantage] == (one.tokens.tolist(), list(range(len(one.tokens))), one.trained.tolist(), one.logprobs.tolist())


@pytest.fixture
def policy():
    return learner.Learner(bundled.MODEL, lr=1e-3, clip_low=0.2, clip_high=0.28)


def with_own_logprobs(policy, one, shift=0.0):
    """The same episode as if a policy had sampled it whose log-probabilities lie `shift` below those of `policy`."""
    (packed,) = learner.pack([(one, 1.0)])
    with torch.no_grad():
        values, _ = policy.logprobs(policy.weights, packed.batch)
    logprobs = np.zeros(len(one.tokens), np.float32)
    logprobs[one.trained] = values.numpy() - shift
    return dataclasses.replace(one, logprobs=logprobs)


def test_a_step_makes_rewarded_samples_likelier_and_others_less_likely(policy):
    good, bad = (with_own_logprobs(policy, episode(40, 20, reward, first=first)) for reward, first in ((1.0, 100), (0.0, 300)))
    stats = policy.step([episodes.Group(0, "math", "add2", [good, bad])])
    assert stats["trained_tokens"] == 40 and stats["clip_fraction"] == 0
    assert stats["ratio_min"] == pytest.approx(1, abs=1e-5) and stats["ratio_max"] == pytest.approx(1, abs=1e-5)
    after = [with_own_logprobs(policy, one).logprobs.sum() for one in (good, bad)]
    assert after[0] > good.logprobs.sum() and after[1] < bad.logprobs.sum()


def test_tokens_beyond_the_clip_have_no_gradient(policy):
    # A rewarded sample that is e^0.5 times likelier than when it was sampled, and an unrewarded one that is e^-0.5 times: both have moved far enough.
    good = with_own_logprobs(policy, episode(40, 20, 1.0, first=100), shift=0.5)
    bad = with_own_logprobs(policy, episode(40, 20, 0.0, first=300), shift=-0.5)
    before = {name: tensor.clone() for name, tensor in policy.tensors()}
    stats = policy.step([episodes.Group(0, "math", "add2", [good, bad])])
    assert stats["clip_fraction"] == 1 and stats["grad_norm"] == 0
    assert stats["ratio_max"] == pytest.approx(math.exp(0.5), rel=1e-4) and stats["ratio_min"] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.tensors())
    # Moved the wrong way, both are pulled back.
    good, bad = with_own_logprobs(policy, good, shift=-0.5), with_own_logprobs(policy, bad, shift=0.5)
    stats = policy.step([episodes.Group(0, "math", "add2", [good, bad])])
    assert stats["clip_fraction"] == 0 and stats["grad_norm"] > 0
    assert with_own_logprobs(policy, good).logprobs.sum() > good.logprobs.sum() - 0.5 * 20
    assert with_own_logprobs(policy, bad).logprobs.sum() < bad.logprobs.sum() + 0.5 * 20


def test_groups_without_signal_are_not_computed(policy):
    before = {name: tensor.clone() for name, tensor in policy.tensors()}
    stats = policy.step([episodes.Group(0, "math", "add2", [episode(40, 20, 1.0), episode(50, 20, 1.0)])])
    assert stats == {"trained_episodes": 0, "trained_tokens": 0}
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.tensors())


def entropy_of(policy, one):
    (packed,) = learner.pack([(one, 1.0)])
    with torch.no_grad():
        hidden = bundled.modeling.backbone(policy.weights, packed.batch.tokens, packed.batch.positions, packed.batch.documents, policy.config, 32)
        _, counted = bundled.data.targets_at(packed.batch, 1)
        return torch.distributions.Categorical(logits=bundled.modeling.logits_of(policy.weights, hidden[counted])).entropy().mean().item()


@pytest.mark.parametrize("bonus", [0.1, -0.1])
def test_an_entropy_bonus_moves_entropy_where_rewards_do_not(bonus):
    policy = learner.Learner(bundled.MODEL, 3e-5, 0.2, 0.28, bonus)
    ones = [with_own_logprobs(policy, episode(40, 20, 1.0, first=first)) for first in (100, 300)]
    before = [entropy_of(policy, one) for one in ones]
    stats = policy.step([episodes.Group(0, "math", "add2", ones)])
    # Rewards are equal and ratios are 1, so the loss is the bonus of the entropy, summed over the tokens and divided by their number.
    assert stats["trained_tokens"] == 40 and stats["loss"] == pytest.approx(-bonus * sum(before) / 2, rel=1e-3)
    assert (sum(entropy_of(policy, one) for one in ones) - sum(before)) / bonus > 0.1


@pytest.mark.parametrize("target, rests", [(0.99, True), (1.01, False)])
def test_an_entropy_bonus_rests_at_its_target(target, rests):
    policy = learner.Learner(bundled.MODEL, 3e-5, 0.2, 0.28, 0.1, target)
    ones = [with_own_logprobs(policy, episode(40, 20, 1.0, first=first)) for first in (100, 300)]  # sampled at an entropy of 1
    assert (policy.step([episodes.Group(0, "math", "add2", ones)])["trained_tokens"] == 0) == rests


def test_pushed_tensors_are_the_checkpoints(policy):
    from safetensors.torch import load_file

    expected = load_file(bundled.MODEL / "model.safetensors")
    pushed = dict(policy.tensors())
    assert pushed.keys() == expected.keys()
    assert all(pushed[name].dtype == tensor.dtype and torch.equal(pushed[name], tensor) for name, tensor in expected.items())


class ScriptedClient:
    """Answers generate calls with given texts and remembers the prompts. The weight version is the number of the call."""

    def __init__(self, tokenizer, texts, reason="STOP"):
        self.tokenizer, self.texts, self.reason, self.prompts = tokenizer, list(texts), reason, []

    async def generate_stream(self, prompt, *, n, **params):
        self.prompts.append(list(prompt))
        for index in range(n):
            ids = np.array(self.tokenizer.encode(self.texts.pop(0)).ids, np.int64)
            values = np.full(len(ids), -0.5, np.float32)
            steps = np.full(len(ids), len(self.prompts), np.int64)
            spec = bebop.SpecStats(2, 6, 3, 0, np.array([2, 2, 2]), np.array([1, 1, 1]), None)
            spans = tuple(bebop.WeightSpan(int(step), None, int(step), i, i + 1) for i, step in enumerate(steps))
            yield bebop.SampleResult(index, 0, ids, values, None, values, None, None, bebop.Finish(self.reason),
                                     bebop.Usage(0, 0, len(ids), 0, 0), spec, spans, None, None)


def tools_problem(kind="total"):
    return episodes.draw("tools", kind, random.Random(1), "train")


def play(policy, problem, texts, samples=1, reason="STOP"):
    client = ScriptedClient(policy.tokenizer, texts, reason)
    group = asyncio.run(episodes.Player(client, policy.tokenizer).play(0, problem, samples, 0))
    return group, client


def test_tool_calls_are_answered_and_only_the_models_tokens_are_trained(policy):
    problem = tools_problem()
    assert problem.num_turns == 3
    group, client = play(policy, problem, [problem.completion(turn) for turn in range(3)])
    (one,) = group.episodes
    assert one.reward == 1.0 and one.judged and one.turns == 3
    assert policy.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=False) == problem.text
    said = [policy.tokenizer.encode(problem.completion(turn)).ids for turn in range(3)]
    assert one.tokens[one.trained].tolist() == sum(said, [])
    assert one.versions[one.trained].tolist() == sum(([turn + 1] * len(ids) for turn, ids in enumerate(said)), [])
    assert (one.versions[~one.trained] == -1).all() and (one.logprobs[~one.trained] == 0).all()
    # Each turn's prompt is the transcript so far, token for token.
    size = 0
    for prompt in client.prompts:
        assert prompt == one.tokens[: len(prompt)].tolist() and len(prompt) > size
        size = len(prompt)


def test_a_wrong_tool_call_ends_the_episode_without_reward(policy):
    problem = tools_problem()
    wrong = problem.completion(0).replace(problem.meta["calls"][0][1], "boat")
    assert wrong != problem.completion(0)
    group, client = play(policy, problem, [wrong])
    assert [(one.reward, one.judged, one.turns) for one in group.episodes] == [(0.0, True, 1)] and len(client.prompts) == 1


@pytest.mark.parametrize("reason", ["SUPERSEDED", "WEIGHT_POLICY", "ABORTED"])
def test_a_sample_that_the_server_cut_short_is_not_judged(policy, reason):
    problem = tools_problem("lookup")
    group, _ = play(policy, problem, [problem.completion(0)[:-20]], reason=reason)
    assert [one.judged for one in group.episodes] == [False]


def test_every_turn_is_a_document_of_which_the_turn_counts(policy):
    problem = tools_problem()
    group, client = play(policy, problem, [problem.completion(turn) for turn in range(3)])
    (one,) = group.episodes
    said = [policy.tokenizer.encode(problem.completion(turn)).ids for turn in range(3)]
    # What the server was given and what it answered, turn by turn.
    expected = [(prompt + answer, len(prompt)) for prompt, answer in zip(client.prompts, said)]
    assert list(keep.documents_of(one)) == expected
    assert list(keep.documents_of(episode(10, 0))) == []
    assert list(keep.documents_of(episode(5, 2, first=7))) == [([7, 8, 9, 10, 11], 3)]


def keep_steps(keeper, policy, versions):
    """A batch of one group before each of `versions`; the episodes' tokens and the weights tell the batches apart."""
    for version in versions:
        ones = [dataclasses.replace(episode(10, 4, reward, first=version), entropies=np.full(10, version / 10, np.float32)) for reward in (0.0, 1.0)]
        keeper.add([episodes.Group(0, "math", "add2", ones)])
        policy.weights["model.language_model.norm.weight"].detach().fill_(version)
        keeper.reached(version)


def test_kept_checkpoints_and_the_rollouts_between_them(policy, tmp_path):
    folder = tmp_path / "kept"
    keeper = keep.Keeper(folder, 3, policy, {"seed": 7})
    keeper.reached(5)  # a run on a server that is at version 5 already
    keep_steps(keeper, policy, range(6, 13))
    assert not json.loads((folder / "manifest.json").read_text())["ended"]
    keeper.end(12)
    keeper.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["ended"] and manifest["arguments"] == {"seed": 7} and manifest["every"] == 3
    assert [entry["version"] for entry in manifest["kept"]] == [5, 8, 11, 12]
    assert "rollouts" not in manifest["kept"][0]
    for before, entry in zip(manifest["kept"], manifest["kept"][1:]):
        versions = range(before["version"] + 1, entry["version"] + 1)
        lines = [json.loads(line) for line in (folder / entry["rollouts"]).read_text().splitlines()]
        assert lines == [{"token_ids": list(range(version, version + 10)), "loss_start": 6} for version in versions for _ in range(2)]
        steps = len(versions)
        assert [entry[name] for name in ("steps", "episodes", "documents", "tokens", "loss_tokens")] == [steps, 2 * steps, 2 * steps, 20 * steps, 8 * steps]
        assert entry["reward"] == 0.5 and entry["entropy"] == pytest.approx(np.mean(versions) / 10, rel=1e-6)
        saved = learner.Learner(folder / entry["checkpoint"], 0, 0.2, 0.2)
        assert (saved.weights["model.language_model.norm.weight"] == entry["version"]).all()
    named = {entry[name] for entry in manifest["kept"] for name in ("checkpoint", "rollouts") if name in entry}
    assert {path.name for path in folder.iterdir()} == named | {"manifest.json"}  # and nothing half done
    with pytest.raises(ValueError, match="kept is not empty: it has manifest.json"):
        keep.Keeper(folder, 3, policy, {})


def test_a_run_that_breaks_leaves_whole_files_only(policy, tmp_path, monkeypatch):
    keeper = keep.Keeper(tmp_path, 2, policy, {})
    keeper.reached(0)
    keep_steps(keeper, policy, (1, 2))
    good = (tmp_path / "manifest.json").read_text()
    whole = {path.name for path in tmp_path.iterdir()}
    save = policy.save

    def full(directory):
        save(directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "save", full)
    with pytest.raises(OSError, match="No space"):
        keep_steps(keeper, policy, (3, 4))
    keeper.close()
    assert (tmp_path / "manifest.json").read_text() == good
    assert {path.name for path in tmp_path.iterdir()} - whole == {"version-000004.tmp"}
    assert len((tmp_path / "rollouts-000000-000002.jsonl").read_text().splitlines()) == 4


def test_mix_names_tasks_and_kinds():
    assert episodes.parse_mix("code/if=0.5, math=2,tools") == {("code", "if"): 0.5, ("math", None): 2.0, ("tools", None): 1.0}
    with pytest.raises(ValueError, match="unknown task 'poem'"):
        episodes.parse_mix("poem=1")
    assert episodes.draw("code", "if", random.Random(0), "heldout").meta["kind"] == "if"
    with pytest.raises(ValueError, match="no kind 'while'"):
        episodes.draw("code", "while", random.Random(0), "train")


def test_wilson_interval():
    low, high = grpo_async.wilson(45, 50)
    assert (low, high) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert grpo_async.wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)


class SlowPlayer:
    """Groups end when the test says so, with the version that held when they began."""

    def __init__(self):
        self.begun, self.version, self.waiting = 0, 0, []

    async def play(self, index, problem, samples, seed, **weights):
        self.begun += 1
        done, version = asyncio.get_running_loop().create_future(), self.version
        self.waiting.append(done)
        await done
        return episodes.Group(index, problem.task, problem.meta["kind"], [episode(10, 5, version=version) for _ in range(samples)])


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_groups_are_begun_only_while_they_can_be_used(staleness):
    async def check():
        player = SlowPlayer()
        arguments = grpo_async.parse_arguments(["--groups", "3", "--samples", "2", "--max-staleness", str(staleness)])
        rollouts = grpo_async.Rollouts(player, arguments, 0)
        taking = asyncio.create_task(rollouts.take())
        await asyncio.sleep(0.01)
        assert player.begun == 3 * (1 + staleness)
        # The groups of batch 0 end first, but for one, which gets older than allowed.
        late = player.waiting.pop(0)
        for version in range(staleness + 1):
            for done in player.waiting[:3] if version else player.waiting[:2]:
                done.set_result(None)
            player.waiting = player.waiting[3 if version else 2 :]
            if version == 0 and staleness == 0:
                late.set_result(None)
            elif version == 0:
                player.waiting.pop(0).set_result(None)
            assert len(await taking) == 3
            player.version = version + 1
            rollouts.advance(player.version)
            await asyncio.sleep(0.01)
            assert player.begun == 3 * (player.version + 1 + staleness)
            taking = asyncio.create_task(rollouts.take())
            await asyncio.sleep(0.01)
        if staleness:
            late.set_result(None)
            await asyncio.sleep(0.01)
            assert rollouts.thrown_away == 1
            assert player.begun == 3 * (player.version + 1 + staleness) + 1  # another one in its place
        taking.cancel()
        await rollouts.stop()

    asyncio.run(check())


def test_plots_and_the_numbers_beside_them(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import plot

    evaluation = {"all": {"n": 100, "reward": 0.5, "low": 0.4, "high": 0.6}}
    logs = {}
    for name, rollout in (("drafted", 1.0), ("plain", 2.0)):
        steps = [{"kind": "step", "step": index, "reward": index / 30, "reward_by_task": {"math": 0.5}, "entropy": 0.3,
                  "accept_length": 3.0 if name == "drafted" else None, "tokens": 100, "episodes": 8, "mixed_episodes": 0, "groups_thrown_away": 0,
                  "staleness_mean": 0.5, "staleness_max": 1, "kl": 0.001, "clip_fraction": 0.01, "load": 1.0, "rollout_seconds": rollout,
                  "train_seconds": 2.0, "sync_seconds": 0.5, "step_seconds": rollout + 2.5} for index in range(30)]
        ends = [{"kind": "eval", "version": version, "reward": evaluation} for version in (0, 30)]
        logs[name] = tmp_path / f"{name}.jsonl"
        # The last line is half a record, as a killed run leaves it.
        logs[name].write_text("\n".join(map(json.dumps, [*ends, *steps])) + '\n{"kind": "st')
    plot.draw_run(logs["drafted"], tmp_path)
    plot.draw_pair([logs["drafted"]], [logs["plain"]], tmp_path)
    printed = capsys.readouterr().out
    assert "rollout 28.6 %, train 57.1 %, sync 14.3 %" in printed and "version 30 all: 50.0 % [40.0, 60.0] of 100" in printed
    assert "rollout_seconds: with / without drafting = 0.500 [0.500, 0.500]" in printed
    for name in ("grpo_reward.png", "grpo_time.png", "grpo_drafting.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "broken.jsonl").write_text("{]\n{}\n")
    with pytest.raises(ValueError, match="broken.jsonl:1"):
        plot.read(tmp_path / "broken.jsonl")


# ---- against the server ----


@pytest.fixture(scope="module")
def server():
    program = os.environ.get("BEBOP_SERVER", str(ROOT / "build/cpu-release/bin/bebop-server"))
    flags = ["--model", str(bundled.MODEL), "--dtype", "float32", "--threads", "1", "--port", "0", "--admin-port", "0"]
    process = subprocess.Popen([program, *flags], stdout=subprocess.PIPE, text=True)
    matches = (re.match(r"bebop-server ready: .*rollout=(\S+).*admin=(\S+)", line) for line in process.stdout)
    ports = next((match.groups() for match in matches if match), None)
    if ports is None:
        raise RuntimeError(f"{program} ended with status {process.wait()} before it was ready")
    yield ports
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def train(server, folder, *flags):
    """Runs the example as a user does; returns its log by kind."""
    log = folder / "log.jsonl"
    command = [sys.executable, str(EXAMPLES / "grpo_async.py"), "--server", server[0], "--admin", server[1], "--log", str(log), "--groups", "4",
               "--samples", "4", "--mix", "code/if=0.7,tools=0.3", "--max-new-tokens", "96", "--eval", "4", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    records = {"run": [], "eval": [], "step": []}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        records[record["kind"]].append(record)
    assert len(records["run"]) == 1 and len(records["eval"]) == 2
    return records


STEP_FIELDS = {"reward", "reward_by_task", "entropy", "accept_length", "tokens", "staleness_mean", "staleness_max", "rollout_seconds",
               "train_seconds", "sync_seconds", "step_seconds", "swap_seconds", "load", "version", "new_version"}


def test_on_policy_steps(server, tmp_path):
    kept = tmp_path / "kept"
    records = train(server, tmp_path, "--steps", "3", "--max-staleness", "0", "--speculation", "coupled", "--save", str(tmp_path / "trained"),
                    "--keep", str(kept), "--keep-every", "2")
    assert [(step["version"], step["new_version"]) for step in records["step"]] == [(0, 1), (1, 2), (2, 3)]
    assert [record["version"] for record in records["eval"]] == [0, 3]
    assert all(record["reward"]["all"]["n"] == 12 for record in records["eval"])
    assert any(step["trained_episodes"] for step in records["step"])
    for step in records["step"]:
        assert STEP_FIELDS <= step.keys()
        assert step["tokens"] > 0 and step["tokens_without_version"] == 0 and step["staleness_max"] == 0
        assert 1 <= step["accept_length"] <= 4 and 0 <= step["reward"] <= 1
        assert step["step_seconds"] == pytest.approx(step["rollout_seconds"] + step["train_seconds"] + step["sync_seconds"])
        if step["trained_episodes"]:
            # The server samples with the very weights that the learner computes with: what is left is the order of additions.
            assert step["ratio_min"] == pytest.approx(1, abs=1e-3) and step["ratio_max"] == pytest.approx(1, abs=1e-3)
            assert math.isfinite(step["loss"]) and step["clip_fraction"] == 0 and step["grad_norm"] > 0
    # What was kept: versions 0, 2 and 3, and every token that the steps between them report.
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["ended"] and [entry["version"] for entry in manifest["kept"]] == [0, 2, 3]
    for entry, steps in zip(manifest["kept"][1:], (records["step"][:2], records["step"][2:])):
        lines = [json.loads(line) for line in (kept / entry["rollouts"]).read_text().splitlines()]
        assert len(lines) == sum(step["turns"] for step in steps) == entry["documents"]
        assert sum(len(line["token_ids"]) - line["loss_start"] for line in lines) == sum(step["tokens"] for step in steps)
        assert entry["entropy"] == pytest.approx(sum(step["entropy"] * step["tokens"] for step in steps) / entry["loss_tokens"], rel=1e-5)
    for entry, same_as in ((manifest["kept"][0], bundled.MODEL), (manifest["kept"][2], tmp_path / "trained")):
        assert (kept / entry["checkpoint"] / "model.safetensors").read_bytes() == (same_as / "model.safetensors").read_bytes()
    # What the server holds now is what the learner saved.
    trained = learner.Learner(tmp_path / "trained", lr=0, clip_low=0.2, clip_high=0.2)
    with bebop.Client(server[0], server[1]) as client:
        assert client.weights.info().target_step == 3
        prompt = bundled.tasks.draw_problem("code", random.Random(5), "heldout").text
        tokens = trained.tokenizer.encode(prompt).ids
        score = client.score([tokens])[0]
    assert score.weight_step == 3
    one = episode(len(tokens), len(tokens) - 1)
    one.tokens[:] = tokens
    assert with_own_logprobs(trained, one).logprobs[1:] == pytest.approx(score.logprobs, abs=1e-4)
    original = learner.Learner(bundled.MODEL, lr=0, clip_low=0.2, clip_high=0.2)
    assert abs(with_own_logprobs(original, one).logprobs[1:] - score.logprobs).max() > 1e-4


def test_asynchronous_steps_on_a_server_with_other_weights(server, tmp_path):
    with bebop.Client(server[0], server[1]) as client:
        before = client.weights.info().target_step
    records = train(server, tmp_path, "--steps", "3", "--max-staleness", "1", "--in-flight", "recompute")
    # A learner that starts from the checkpoint first pushes that, as a newer version.
    first = before + 1 if before else 0
    assert [step["new_version"] for step in records["step"]] == [first + 1, first + 2, first + 3]
    for step in records["step"]:
        assert step["tokens_without_version"] == 0 and 0 <= step["staleness_mean"] <= step["staleness_max"] <= 1
        assert math.isfinite(step.get("loss", 0.0))
    assert any(step["staleness_max"] == 1 for step in records["step"])


def test_refusals_end_the_run_with_a_message(server, capsys):
    arguments = ["--server", server[0], "--admin", server[1], "--eval", "0", "--steps", "1"]
    assert grpo_async.main([*arguments, "--max-new-tokens", "1000000"]) == 1
    assert re.search(r"error: .*max_new_tokens", capsys.readouterr().err)
    assert grpo_async.main([*arguments, "--mix", "poem"]) == 1
    assert "error: mix: unknown task 'poem'" in capsys.readouterr().err
    assert grpo_async.main([*arguments, "--keep", str(EXAMPLES)]) == 1
    assert "examples is not empty" in capsys.readouterr().err
