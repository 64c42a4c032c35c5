# SPDX-License-Identifier: Apache-2.0
"""The reinforcement-learning part without a server: what is planned and trained, and what the analysis makes of records whose truth is known."""

import dataclasses
import json
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import client_site  # noqa: E402

if client_site.missing_packages():
    pytest.skip(f"needs {', '.join(client_site.missing_packages())}", allow_module_level=True)

import estimates  # noqa: E402
import rl_analyse  # noqa: E402

WORKLOADS = ("math", "code")
PROMPTS = 6


def prompts_of(acceptance, entropy, workloads=WORKLOADS, seed=0):
    """Counts of PROMPTS prompts a workload, whose ratios are exactly these, though prompts differ in length."""
    rng = random.Random(seed)
    prompts = []
    for workload in workloads:
        for index in range(PROMPTS):
            steps = rng.randint(5, 20)
            reached = [steps, steps, steps]
            accepted = [3 * steps * acceptance, 0, 0]
            tokens = 10 * steps
            prompts.append({"workload": workload, "index": index, "tokens": tokens, "steps": steps, "drafts": 3 * steps, "drafted": reached,
                            "accepted": accepted, "entropy": tokens * entropy})
    return prompts


def record(version, acceptance, entropy, mode="rejection", loss="ce", seed=0, update=None, **options):
    job = {"policy": "falling", "version": version, "mode": mode, "loss": loss, "seed": seed, "update": update}
    return {"job": job, "prompts": prompts_of(acceptance, entropy, **options)}


def decoded(temperature, acceptance, entropy, mode="rejection", loss="ce", seed=0, top_k=0):
    """Records of the stage decode: one a workload."""
    return [{"loss": loss, "seed": seed, "top_k": top_k, "mode": mode, "temperature": temperature, "workload": workload,
             "prompts": prompts_of(acceptance, entropy, (workload,))} for workload in WORKLOADS]


def test_resampling_draws_prompts_within_their_workload_and_whole_seeds():
    strata = ["math"] * 5 + ["code"] * 3
    resampling = estimates.Resampling(strata, draws=500)
    assert (resampling.prompts[0] == 1).all() and (resampling.prompts[:, :5].sum(axis=1) == 5).all() and (resampling.prompts[:, 5:].sum(axis=1) == 3).all()
    assert 0.5 < resampling.prompts[1:].var() < 1.5  # draws with replacement: about 1 - 1/n
    assert (resampling.seeds(3)[0] == 1).all() and (resampling.seeds(3).sum(axis=1) == 3).all() and (resampling.seeds(1) == 1).all()
    counts = [np.full((8, 2), 1.0), np.full((8, 2), 10.0)]
    sums = resampling.sums(counts)
    assert sums[0].tolist() == [88, 88] and set(sums[:, 0]) == {16, 88, 160}  # both seeds, or either twice


def test_an_interval_is_as_wide_as_the_spread_of_prompts_says():
    rng = np.random.default_rng(5)
    drafts, truth = 60, 0.8
    accepted = rng.binomial(drafts, truth, size=400)
    one = record(0, 0.5, 0.3)
    one["prompts"] = [{"workload": "math", "index": index, "tokens": 1, "steps": 20, "drafts": drafts, "accepted": [int(value)], "entropy": 0.1}
                      for index, value in enumerate(accepted)]
    value = rl_analyse.Replay([one], "falling").acceptance(("rejection", "ce", None), 0)
    low, high = value.interval
    assert value.mean == accepted.sum() / (drafts * 400) and low < truth < high
    assert high - low == pytest.approx(2 * 1.96 * (truth * (1 - truth) / (drafts * 400)) ** 0.5, rel=0.15)


def test_the_change_of_acceptance_splits_into_entropy_and_mismatch():
    """Acceptance is 0.95 - 0.5 H at every temperature; along the run 0.03 more are lost at version 20 than that."""
    entropies = {0: 0.3, 10: 0.25, 20: 0.1}
    records = [record(version, 0.95 - 0.5 * entropy - (0.03 if version == 20 else 0), entropy) for version, entropy in entropies.items()]
    sweep = sum((decoded(temperature, 0.95 - 0.5 * entropy, entropy) for temperature, entropy in ((0.3, 0.05), (0.7, 0.2), (1.0, 0.35))), [])
    sweep += decoded(0.1, 0.5, 0.01) + decoded(1.5, 0.5, 0.6)  # beyond the next on either side of the run's entropies
    sweep += decoded(0.7, 0.1, 0.2, top_k=8) + decoded(0.7, 0.1, 0.2, mode="target_only") + decoded(0.7, 0.1, 0.2, loss="tv")  # of no concern
    replay = rl_analyse.Replay(records, "falling")
    slopes = rl_analyse.slopes_of(sweep, replay, WORKLOADS)
    slope = slopes["rejection", "ce"]
    assert slope.value.mean == pytest.approx(-0.5) and slope.temperatures == [0.3, 0.7, 1.0] and len(slope.points) == 5
    for version, mismatch in ((10, 0.0), (20, -0.03)):
        parts = rl_analyse.split(replay, ("rejection", "ce", None), version, slope.value)
        assert parts.entropy.mean == pytest.approx(-0.5 * (entropies[version] - 0.3)) and parts.mismatch.mean == pytest.approx(mismatch, abs=1e-9)
        assert parts.change.mean == pytest.approx(parts.entropy.mean + mismatch)
        assert parts.mismatch.interval == pytest.approx((mismatch, mismatch), abs=1e-9)  # every prompt has the same ratios
    # Over the run, mismatch is taken for entropy: 0.3, 0.25, 0.1 nats against 0.80, 0.825, 0.87.
    assert replay.run_slope(("rejection", "ce", None)).mean == pytest.approx(np.polyfit([0.3, 0.25, 0.1], [0.80, 0.825, 0.87], 1)[0])
    assert rl_analyse.temperature_slope(sweep[:2], "rejection", "ce", 1, WORKLOADS, (0.1, 0.3)) is None


def test_the_slope_over_prompts_has_an_intercept_a_task_and_weighs_drafts():
    """Acceptance is a task's level - 0.6 H + noise, and tasks with more entropy have a higher level."""
    rng = np.random.default_rng(3)
    prompts, x, y, weights, tasks = [], [], [], [], []
    for index in range(300):
        workload = WORKLOADS[index % 2]
        entropy, drafts = 0.2 + 0.1 * rng.random() + (0.3 if workload == "code" else 0), int(rng.integers(5, 60))
        acceptance = (0.9 if workload == "code" else 0.6) - 0.6 * entropy + 0.05 * rng.standard_normal()
        prompts.append({"workload": workload, "index": index, "tokens": 10, "steps": drafts, "drafts": drafts, "accepted": [drafts * acceptance],
                        "entropy": 10 * entropy})
        x, y, weights, tasks = [*x, entropy], [*y, acceptance], [*weights, drafts], [*tasks, workload]
    one = record(0, 0.5, 0.3) | {"prompts": prompts}
    slope = rl_analyse.Replay([one], "falling").prompt_slope(("rejection", "ce", None))
    design = np.stack([x, [task == "math" for task in tasks], [task == "code" for task in tasks]], axis=1) * np.sqrt(weights)[:, None]
    assert slope.mean == pytest.approx(np.linalg.lstsq(design, np.array(y) * np.sqrt(weights), rcond=None)[0][0], rel=1e-9)
    assert slope.interval[0] < -0.6 < slope.interval[1] and slope.interval[1] - slope.interval[0] < 0.6


def test_online_heads_begin_as_the_frozen_ones_of_the_same_seeds():
    records = [record(0, 0.8 + 0.05 * seed, 0.3, loss="tv", seed=seed) for seed in range(3)]
    records += [record(10, 0.7, 0.2, loss="tv", seed=seed) for seed in range(3)] + [record(10, 0.9, 0.2, loss="tv", seed=0, update="tv")]
    replay = rl_analyse.Replay(records, "falling")
    frozen, online = ("rejection", "tv", None), ("rejection", "tv", "tv")
    assert replay.num_seeds(frozen) == 3 and replay.num_seeds(online) == 1
    assert replay.acceptance(frozen, 0).mean == pytest.approx(0.85) and replay.acceptance(online, 0).mean == pytest.approx(0.8)
    assert replay.mean_change(online).mean == pytest.approx(0.1) and replay.mean_change(online, frozen).mean == pytest.approx(0.2)
    assert replay.accept_length(frozen, 10).mean == pytest.approx(1 + 3 * 0.7)


def test_records_of_other_prompts_are_refused():
    other = record(10, 0.8, 0.2)
    other["prompts"].pop()
    with pytest.raises(ValueError, match="version.: 10.*other prompts"):
        rl_analyse.Replay([record(0, 0.8, 0.3), other], "falling")
    with pytest.raises(ValueError, match="no records of policy rising"):
        rl_analyse.Replay([record(0, 0.8, 0.3)], "rising")


def test_tables_and_plots(tmp_path):
    records, kinds = [], [("rejection", "ce", None), ("target_only", "ce", None), ("rejection", "tv", None), ("rejection", "tv", "tv"), ("rejection", "tv", "ce")]
    for version, entropy in ((0, 0.3), (10, 0.2)):
        for mode, loss, update in kinds:
            if version or not update:
                records.append(record(version, 0.9 - 0.4 * entropy + (0.02 if loss == "tv" else 0) - (0.02 if update == "ce" else 0), entropy, mode, loss, 0,
                                      update))
    sweep = sum((decoded(temperature, 0.9 - 0.4 * entropy, entropy, mode, loss) for temperature, entropy in ((0.5, 0.15), (1.0, 0.3), (1.3, 0.4))
                 for mode in ("rejection", "target_only") for loss in ("ce", "tv")), [])
    manifest = {"kept": [{"version": 0}, {"version": 5, "episodes": 10, "reward": 0.5}, {"version": 10, "episodes": 12, "reward": 0.75}]}
    numbers, tables, files = rl_analyse.report(records, sweep, {"falling": manifest}, WORKLOADS, tmp_path)
    assert "| falling | 10 | 2 | 22 | 0.500 → 0.750 | 0.300 [0.300, 0.300] | 0.200 [0.200, 0.200] |" in tables["rl_runs"]
    assert "| TV frozen − CE frozen | +2.0 [+2.0, +2.0] | above" in tables["rl_contrasts"]
    assert "| TV online CE − TV frozen | −2.0 [−2.0, −2.0] | pulled" in tables["rl_contrasts"]
    assert "| TV online CE − TV online TV | −2.0 [−2.0, −2.0] | below" in tables["rl_contrasts"]
    assert "CE online CE" not in tables["rl_contrasts"]  # not measured
    assert "| RS, TV, online CE | 1 | 80.0 [80.0, 80.0] | 82.0 [82.0, 82.0] | 3.46 [3.46, 3.46] | +2.0 [+2.0, +2.0] |" in tables["rl_acceptance_falling"]
    over_temperature = "| −1.20 [−1.20, −1.20] | +4.0 [+4.0, +4.0] |"  # gamma is 3
    assert "| RS, CE, frozen | −1.20 [−1.20, −1.20] | +4.0 [+4.0, +4.0] |" in tables["rl_split_falling"] and over_temperature in tables["rl_split_falling"]
    assert "| RS, TV, frozen | +4.0 [+4.0, +4.0] | +4.0 [+4.0, +4.0] |" in tables["rl_tasks_falling"]
    frozen = numbers["falling"]["heads"]["RS, CE, frozen"]["over_temperature"]
    assert frozen["change"][1]["mean"] == pytest.approx(0.04) and frozen["mismatch"][1]["high"] == pytest.approx(0, abs=1e-9)
    json.dumps(numbers)
    assert [path.name for path in files] == ["rl_online.png", "rl_split.png", "rl_entropy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


# ---- plan and updates: these import bebop, which needs the client beside them ----


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    client_site.add(tmp_path_factory.mktemp("client") / "client")
    import rl_replay

    return rl_replay


TRAINER = """#!/usr/bin/env python3
import json, pathlib, sys
flags = {flag: value for flag, value in zip(sys.argv[1:], sys.argv[2:]) if flag.startswith("--")}
start = json.loads(pathlib.Path(flags["--mtp"]).read_text())
if flags["--loss"] == "kl":
    sys.exit("error: loss is not finite")
data = [json.loads(line) for line in open(flags["--data"])]
pathlib.Path(flags["--out"]).write_text(json.dumps(start + [[flags["--loss"], pathlib.Path(flags["--model"]).name, [line["token_ids"][0] for line in data]]]))
"""


@pytest.fixture
def context(replay, tmp_path):
    """A trainer that writes down what it was given; a policy of three checkpoints with ten documents of ten tokens between them."""
    import rl_run
    from settings import QUICK, Context, Programs

    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(trainer.stat().st_mode | stat.S_IXUSR)
    policy = tmp_path / "rl/short/policy"
    policy.mkdir(parents=True)
    kept = [{"version": 0, "checkpoint": "v0"}, {"version": 2, "checkpoint": "v2", "rollouts": "a"}, {"version": 4, "checkpoint": "v4", "rollouts": "b"}]
    (policy / "manifest.json").write_text(json.dumps({"ended": True, "kept": kept}))
    for name, base in (("a", 0), ("b", 100)):
        (policy / name).write_text("".join(json.dumps({"token_ids": [base + line] * 10, "loss_start": 1}) + "\n" for line in range(10)))
    (tmp_path / "heads").mkdir()
    for name in ("tv-0", "tv-1", "kl-0"):
        (tmp_path / f"heads/{name}.safetensors").write_text(json.dumps([name]))
    said = []
    programs = Programs(Path("none"), trainer, Path("none"))
    context = Context(QUICK, tmp_path, Path("none"), Path("none"), "cpu", programs, said.append)
    settings = dataclasses.replace(rl_run.QUICK, online=(rl_run.Online("tv", "ce", 2),), online_tokens=35)
    return context, settings, rl_run.Policy("short", 4, 2), said


def test_an_online_head_goes_from_checkpoint_to_checkpoint(replay, context):
    context, settings, policy, said = context
    replay.update_all(context, settings, policy)
    for seed in range(2):
        arm = replay.Arm("tv", seed, "ce")
        heads = [json.loads(replay.head_path(context, policy, arm, version).read_text()) for version in (2, 4)]
        (start, first), (_, _, second) = heads[0], heads[1]
        assert start == f"tv-{seed}" and heads[1][:2] == heads[0] and (first[:2], second[:2]) == (["ce", "v2"], ["ce", "v4"])
        # 35 tokens want four documents of ten, of the steps before that checkpoint, none twice.
        assert len(set(first[2])) == 4 and set(first[2]) <= set(range(10)) and len(set(second[2])) == 4 and set(second[2]) <= set(range(100, 110))
    assert len(said) == 2
    # Called again it trains nothing, and after a head was lost only that one, from the head before it.
    lost = replay.head_path(context, policy, replay.Arm("tv", 1, "ce"), 4)
    content = lost.read_text()
    lost.unlink()
    replay.update_all(context, settings, policy)
    assert lost.read_text() == content and len(said) == 3 and "1 updates" in said[-1]


def test_a_trainer_that_fails_is_named_with_its_last_words(replay, context):
    import rl_run

    context, settings, policy, _ = context
    with pytest.raises(RuntimeError, match="(?s)--loss kl.*ended with status 1:.*loss is not finite"):
        replay.update_all(context, dataclasses.replace(settings, online=(rl_run.Online("kl", "kl", 1),)), policy)


def test_what_is_decoded_at_a_version(replay):
    import rl_run

    settings = dataclasses.replace(rl_run.QUICK, seeds={"ce": 2, "kl": 1}, target_only=("ce",), online=(rl_run.Online("ce", "tv", 1),))
    first, later = (list(replay.jobs_of(settings, rl_run.Policy("p", 1, 1), version, 0)) for version in (0, 5))
    names = [(job.arm.name, job.mode) for job in first]
    assert names == [("ce-0", "rejection"), ("ce-0", "target_only"), ("ce-1", "rejection"), ("ce-1", "target_only"), ("kl-0", "rejection")]
    assert [(job.arm.name, job.mode) for job in later] == [*names, ("ce-0+tv", "rejection")]
    assert later[-1].key == {"policy": "p", "version": 5, "mode": "rejection", "loss": "ce", "seed": 0, "update": "tv"}


def test_a_folder_of_other_settings_is_refused(replay, context):
    import rl_run
    import rl_stage

    context, settings, _, _ = context
    rl_stage.check_same(context, settings)
    rl_stage.check_same(context, settings)
    with pytest.raises(ValueError, match="prompts = 8, now it is 9"):
        rl_stage.check_same(context, dataclasses.replace(settings, prompts=9))


def test_every_scale_updates_heads_that_it_measures_frozen(replay):
    import rl_run
    import settings

    assert rl_run.SCALES.keys() == settings.SCALES.keys()
    for name, scale in rl_run.SCALES.items():
        common = settings.SCALES[name]
        assert all(online.seeds <= scale.seeds.get(online.start, 0) for online in scale.online), name
        assert all(loss in common.losses and seeds <= common.seeds for loss, seeds in scale.seeds.items()), name
        assert set(scale.target_only) <= scale.seeds.keys(), name
