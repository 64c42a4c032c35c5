# SPDX-License-Identifier: Apache-2.0
"""The reproduction without a server: estimates against known answers, records that survive a kill, prompts that stay apart."""

import dataclasses
import json
import math
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import client_site  # noqa: E402

if client_site.missing_packages():
    pytest.skip(f"needs {', '.join(client_site.missing_packages())}", allow_module_level=True)

import estimates  # noqa: E402
import tables  # noqa: E402
import workloads  # noqa: E402


def test_interval_over_seeds_is_students():
    estimate = estimates.over_seeds([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert estimate.mean == 2 and estimate.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(estimates.over_seeds([5.0]).low)


def test_interval_over_seeds_covers_at_its_rate():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        estimate = estimates.over_seeds(rng.normal(3.0, 2.0, 3))
        inside += estimate.low <= 3.0 <= estimate.high
    assert 0.93 < inside / 2000 < 0.97


def test_bootstrap_is_paired_by_prompt():
    rng = np.random.default_rng(2)
    difficulty = rng.uniform(0.2, 0.9, 60)
    drafts = np.full((2, 60), 300.0)
    base = np.stack([300 * difficulty, 300 * difficulty])
    better = base + 3.0  # one point on every prompt, whatever its difficulty
    estimate = estimates.bootstrap_difference(better, drafts, base, drafts)
    assert estimate.mean == pytest.approx(0.01) and estimate.half < 1e-9
    # Unpaired, the spread of prompts would hide the point.
    apart = estimates.bootstrap_difference(better[:, rng.permutation(60)], drafts, base, drafts)
    assert apart.half > 0.02


def test_bootstrap_weighs_prompts_by_their_drafts():
    estimate = estimates.bootstrap_difference(np.array([[90.0, 1.0]]), np.array([[100.0, 10.0]]), np.array([[50.0, 5.0]]), np.array([[100.0, 10.0]]))
    assert estimate.mean == pytest.approx(91 / 110 - 0.5)


def test_self_normalized_sum_is_standard_normal():
    rng = np.random.default_rng(3)
    values = []
    for _ in range(3000):
        chance = rng.uniform(0.5, 0.99, 100)
        count = rng.integers(5, 40, 100)
        values.append(estimates.self_normalized(rng.binomial(count, chance) - count * chance))
    assert abs(np.mean(values)) < 0.08 and np.std(values) == pytest.approx(1, abs=0.05) and np.max(np.abs(values)) < 4.5
    assert abs(estimates.self_normalized(rng.binomial(30, 0.85, 400) - 30 * 0.9)) > 4


def test_slope_leaves_levels_of_groups_out():
    x = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    groups = np.array([0, 0, 0, 1, 1, 1])
    assert estimates.slope(x, -2 * x + np.where(groups == 0, 5.0, 100.0), groups) == pytest.approx(-2)
    # Weights of 0 leave points out.
    assert estimates.slope(x, np.where(x == 2, 99, 3 * x), groups, np.array([1, 1, 0, 1, 1, 1])) == pytest.approx(3)


def test_correlation():
    x = np.arange(20.0)
    assert estimates.correlation(x, 3 * x + 1).mean == pytest.approx(1)
    estimate = estimates.correlation(x, np.tile([1.0, -1.0], 10))
    assert estimate.low < estimate.mean < estimate.high and abs(estimate.mean) < 0.2


def test_tables_replace_their_own_place_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: one -->\nold\n<!-- end -->\nbetween\n<!-- table: two -->\nkept\n<!-- end -->\nafter\n")
    tables.fill(page, {"one": "| new |"})
    assert page.read_text() == "before\n<!-- table: one -->\n| new |\n<!-- end -->\nbetween\n<!-- table: two -->\nkept\n<!-- end -->\nafter\n"
    with pytest.raises(ValueError, match="three"):
        tables.fill(page, {"three": "x"})


def test_workloads_are_fixed_and_apart_from_training():
    for workload in workloads.WORKLOADS:
        prompts = workloads.heldout(workload, 30)
        assert prompts == workloads.heldout(workload, 40)[:30] and len(set(prompts)) > 25
    first, second = workloads.training(50, 0), workloads.training(50, 1)
    assert first == workloads.training(50, 0) and len(set(first) & set(second)) < 5
    # Small numbers repeat: of the training split, some of so many would be among those. (A tool's first question does not tell the held-out answer.)
    seen = set(workloads.training(8000, 0))
    assert not seen & {prompt for workload in ("math", "code", "digits", "shuffled", "text") for prompt in workloads.heldout(workload, 300)}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    client_site.add(tmp_path_factory.mktemp("client"))
    import harness

    return harness


def test_store_survives_a_kill_in_the_middle_of_a_line(harness, tmp_path):
    path = tmp_path / "records" / "stage.jsonl"
    store = harness.Store(path)
    store.append({"cell": 1})
    store.append({"cell": 2})
    store.close()
    path.write_bytes(path.read_bytes() + b'{"cell": 3, "prom')
    store = harness.Store(path)
    assert [record["cell"] for record in store.records] == [1, 2]
    store.append({"cell": 3})
    store.close()
    assert [json.loads(line)["cell"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_store_names_a_broken_line(harness, tmp_path):
    path = tmp_path / "stage.jsonl"
    path.write_text('{"cell": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="stage.jsonl:2"):
        harness.Store(path)


def test_jobs_stop_at_the_first_failure(harness):
    ran = []

    def job(number):
        def work(server):
            ran.append(number)
            time.sleep(0.01)
            if number == 2:
                raise RuntimeError("job 2")

        return work

    harness.run_jobs(["one", "other"], [job(number) for number in (0, 1, 3, 4)])
    assert sorted(ran) == [0, 1, 3, 4]
    ran.clear()
    with pytest.raises(RuntimeError, match="job 2"):
        harness.run_jobs(["one", "other"], [job(number) for number in range(50)])
    assert 2 in ran and len(ran) < 10


def program(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def context(harness, tmp_path):
    """Of two servers; programs that a test writes itself."""
    from settings import QUICK, Context, Programs

    programs = Programs(*(tmp_path / name for name in ("server", "trainer", "client")))
    return Context(dataclasses.replace(QUICK, seeds=1, rollouts=3), tmp_path, tmp_path, tmp_path, "cpu", programs, print)


# As bebop-train-mtp: at "stop after" it ends with its last checkpoint at "checkpoint"; a folder of checkpoints wants --resume.
TRAINER = """
import json, pathlib, sys
flags = {flag: value for flag, value in zip(sys.argv[1:], sys.argv[2:]) if flag.startswith("--")}
plan = json.loads(pathlib.Path(flags["--data"]).read_text())
checkpoint = pathlib.Path(flags["--out"] + ".checkpoint")
if checkpoint.exists() and "--resume" not in sys.argv:
    sys.exit("error: --checkpoints: is of a run that was stopped")
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
for step in range(first + 1, 7):
    print(json.dumps({"step": step, "alpha": [plan["run"]], "tokens": 10 * step}), flush=True)
    if step == plan["stop after"]:
        if plan["checkpoint"]:
            checkpoint.write_text(str(plan["checkpoint"]))
        print('{"step": 9, "al', end="")
        sys.exit(130)
print(json.dumps({"step": 6, "evaluation": None, "tokens": 60}))
pathlib.Path(flags["--out"]).touch()
checkpoint.unlink(missing_ok=True)
"""


def test_a_training_that_was_stopped_goes_on(context):
    import heads

    program(context.programs.trainer, TRAINER)
    head = heads.Head("tv", 0)
    for path in (head.path(context), heads.rollouts_path(context, 0)):
        path.parent.mkdir(exist_ok=True)
    heads.Head(heads.START, 0).path(context).touch()
    # Stopped before there is a checkpoint, after step 5 with one at step 3, after step 4 at once, and not at all.
    for run, (stop, checkpoint) in enumerate([(2, 0), (5, 3), (4, 4), (0, 0)]):
        heads.rollouts_path(context, 0).write_text(json.dumps({"run": run, "stop after": stop, "checkpoint": checkpoint}))
        if stop:
            with pytest.raises(RuntimeError, match="trainer .*ended with status 130"):
                heads.train(context, head)
        else:
            heads.train(context, head)
    log = heads.training_log(head.path(context))
    assert [(line["step"], *line.get("alpha", "-")) for line in log] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (6, 3), (6, "-")]
    heads.train(context, head)  # nothing is left to do
    assert heads.training_log(head.path(context)) == log
    # Trained anew, the log is of the new head alone.
    head.path(context).unlink()
    heads.train(context, head)
    assert [line["step"] for line in heads.training_log(head.path(context))] == [1, 2, 3, 4, 5, 6, 6]


SERVER = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
number = len(list(here.glob("pid-*")))
(here / f"pid-{number}-{os.getpid()}").touch()
plan = (here / "plan").read_text().split()[number]
if plan == "absent":
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN if plan == "deaf" else lambda *_: os._exit(4 if plan == "fails" else 0))
print("bebop-server ready: rollout=127.0.0.1:1 admin=127.0.0.1:1", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("plan", "message"), [("fine absent", "ended with status 3 before it was ready"), ("fails fine", "ended with status 4"),
                                               ("fine fails", "ended with status 4"), ("deaf deaf", "did not end within"), ("fine fine", None)])
def test_no_server_is_left_running(harness, context, monkeypatch, plan, message):
    import heads

    monkeypatch.setattr(harness, "STOP_SECONDS", 1)
    program(context.programs.server, SERVER)
    (context.work / "plan").write_text(plan)
    if message:
        with pytest.raises(RuntimeError, match=message), heads.open_servers(context):
            pass
    else:
        with pytest.raises(KeyError, match="of the body"), heads.open_servers(context) as servers:
            assert len(servers) == 2
            raise KeyError("of the body")
    started = [path.name.rsplit("-", 1)[1] for path in context.work.glob("pid-*")]
    assert len(started) == 2 and not [pid for pid in started if Path(f"/proc/{pid}").exists()]


CLIENT = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
runs = here / "runs"
runs.write_text(str(int(runs.read_text()) + 1 if runs.exists() else 1))
# All lines, and a kill before they are in order; then in order.
if not out.exists():
    out.write_text("3\\n1\\n2\\n")
    sys.exit(137)
out.write_text("1\\n2\\n3\\n")
"""


def test_rollouts_that_were_not_put_in_order_are_not_done(harness, context, monkeypatch):
    import heads

    program(context.programs.server, SERVER)
    program(context.programs.client, CLIENT)
    (context.work / "plan").write_text("fine fine")
    monkeypatch.setattr(harness.Server, "encode", lambda self, text: [len(text)])
    with pytest.raises(RuntimeError, match="ended with status 137"):
        heads.make_rollouts(context)
    heads.make_rollouts(context)
    assert heads.rollouts_path(context, 0).read_text() == "1\n2\n3\n"
    heads.make_rollouts(context)
    assert (context.work / "runs").read_text() == "2"


def test_what_is_flagged_is_not_published(context, tmp_path, monkeypatch):
    import analyse

    page, picture = tmp_path / "reproduction.md", tmp_path / "one.png"
    text = "<!-- table: one -->\nold\n<!-- end -->\n"
    page.write_text(text)
    picture.write_bytes(b"png")
    flagged = [{"loss": "tv", "z": 5.0}]
    monkeypatch.setattr(analyse, "report", lambda context, out: ({"consistency": {"flagged": flagged}}, {"one": "new"}, [picture]))
    with pytest.raises(RuntimeError, match="disagree.*in 1 places"):
        analyse.run(context, publish=tmp_path)
    assert page.read_text() == text and not (tmp_path / "reproduction").exists() and (tmp_path / "report/one.md").read_text() == "new\n"
    flagged.clear()
    analyse.run(context, publish=tmp_path)
    assert page.read_text() == text.replace("old", "new") and (tmp_path / "reproduction/one.png").read_bytes() == b"png"


def test_counts_by_bin(harness):
    import measures

    class Sample:
        token_ids = np.zeros(5, np.int64)
        token_source = np.array([0, 1, 2, -1, -2])
        entropy = np.array([0.05, 0.15, 0.15, 9.0, 0.0], np.float32)

    by_entropy = measures.competed([Sample()], lambda sample: (sample.entropy / 0.1).astype(int), 3)
    assert by_entropy["reached"] == [0, 2, 1] and by_entropy["accepted"] == [0, 2, 0] and by_entropy["tokens"] == [2, 2, 1]
    by_place = measures.competed([Sample()], lambda sample: np.arange(len(sample.token_ids)) // 2, 2)
    assert by_place["reached"] == [1, 2] and by_place["accepted"] == [1, 1]


def test_another_setting_is_refused(harness, tmp_path):
    import reproduce

    reproduce.check_same_run(tmp_path, {"lr": 1, "model": "a"})
    reproduce.check_same_run(tmp_path, {"lr": 1, "model": "a"})
    with pytest.raises(ValueError, match="lr = 1, now it is 2"):
        reproduce.check_same_run(tmp_path, {"lr": 2, "model": "a"})
