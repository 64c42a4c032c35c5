# SPDX-License-Identifier: Apache-2.0
"""Device tests in phases (see gpu.sh). Python's standard library only: it has to run where nothing can be installed.

Phases
  kernels    every operator against its CPU twin (device tests under tests/kernels)
  engine     the model and the engine against the CPU backend: float32 and bfloat16, greedy tokens, joint pairs, state over many windows
             (device tests elsewhere under tests/)
  server     bebop-server and bebop on the bundled model: --device cuda against --device cpu, and `bebop verify`
  training   bebop-train-mtp on the bundled model: --device cuda against --device cpu, and its bits twice
  memcheck, racecheck, synccheck, initcheck   one tool of compute-sanitizer each over the kernel tests; `sanitizer` stands for all four

Exit status: 0 everything that was asked for passed; 1 something failed, or nothing ran; 2 bad arguments.
A test that skips is not a test that passed: a phase with a program whose tests all skipped fails.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TREE = HERE.parent  # the source tree, or the unpacked bundle
PHASE_SECONDS = float(os.environ.get("BEBOP_GPU_PHASE_SECONDS", 460))  # of the 480 that a phase may take
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
PHASES = ["kernels", "engine", "server", "training", *TOOLS]
READY_SECONDS = 240  # from the start of a server to its ready line
READY = re.compile(r"^bebop-server ready: rollout=(\S+) admin=(\S+)")
MODEL = TREE / "tests" / "models" / "bebop-tiny"

sys.path.insert(0, str(TREE / "deploy"))
import cublas_path  # noqa: E402

# |log p on the device - log p on the CPU| of the same tokens. In float32 both are the same numbers up to the order of sums: the limit that holds
# against transformers (docs/numerics.md). In bfloat16 activations round at 2^-8 on the device, and the mean over tokens is judged, as in `bebop verify`.
FLOAT32_TOLERANCE = 2e-4
BFLOAT16_MEAN_TOLERANCE = 0.03
# Relative, of a step's loss: cuda_training_test allows 2 % of a second step. At a rate of 1e-4, as Adam's first steps go by signs: at 1e-3 six of
# them were up to 3.1 % apart for a while (emulated).
TRAINING_LOSS_TOLERANCE = 0.03


class Failure(Exception):
    """A check that did not hold; the text says which and by how much."""


class Run:
    """One invocation: where programs are, how to start them, and what has come out so far."""

    def __init__(self, args):
        self.device = args.device
        self.root = pathlib.Path(args.bundle or args.build).resolve()
        manifest = self.root / "manifest.json"
        if manifest.is_file():
            self.manifest = json.loads(manifest.read_text())
        else:
            import bundle_manifest
            self.manifest = bundle_manifest.manifest(self.root)
        if self.manifest["device"] != self.device:
            sys.exit(f"error: {self.root} is a build for --device {self.manifest['device']}, not {self.device}")
        self.results = []
        self.deadline = math.inf
        if args.list:
            return
        self.out = pathlib.Path(args.out or os.environ.get("OUT") or TREE / "build" / "gpu").resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = open(self.out / "gpu.log", "a", encoding="utf-8")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("BEBOP_")}
        if self.device == "cuda" and not cublas_path.system_has_it():
            folder = cublas_path.wheel_folder()
            if folder:
                old = os.environ.get("LD_LIBRARY_PATH")
                self.environment["LD_LIBRARY_PATH"] = folder + (":" + old if old else "")

    def say(self, line):
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def record(self, phase, name, status, seconds, detail=""):
        """status: pass, fail, skip (the test itself said so) or not-run (no time left, tool missing)."""
        self.results.append({"phase": phase, "name": name, "status": status, "seconds": round(seconds, 2), "detail": detail})
        self.say(f"{status.upper():7} {phase:9} {name:44} {seconds:7.1f} s  {detail}")

    def left(self):
        return self.deadline - time.monotonic()

    def gtest(self, phase, test, prefix=(), name=None, tail=()):
        """Runs a test program (perhaps under a tool); its counts come from the report that gtest itself writes."""
        name = name or test["name"]
        if self.left() < 5:
            self.record(phase, name, "not-run", 0, "the phase's time is over")
            return
        report = self.out / f"{phase}-{name.replace('/', '-')}.json"
        report.unlink(missing_ok=True)
        command = [*prefix, str(self.root / test["program"]), *test["arguments"], f"--gtest_output=json:{report}", *tail]
        started = time.monotonic()
        status, output = execute(command, min(self.left(), max(test["timeout_s"], 60) * (8 if prefix else 1)), self.environment)
        seconds = time.monotonic() - started
        self.log.write(f"$ {' '.join(command)}\n{output}\nexit status {status}\n")
        counts = gtest_counts(report)
        if status is None:
            self.record(phase, name, "fail", seconds, "did not end in time")
        elif status != 0 or counts is None or counts["failed"]:
            why = f"exit status {status}" if counts is None or not counts["failed"] else f"{counts['failed']} of {counts['tests']} failed"
            self.record(phase, name, "fail", seconds, why)
            self.say("\n".join("    " + line for line in failure_lines(output)))
        elif not counts["tests"]:
            self.record(phase, name, "fail", seconds, "no test in it ran")
        elif counts["skipped"] == counts["tests"]:
            self.record(phase, name, "skip", seconds, f"all {counts['tests']} skipped: {skip_reason(output)}")
        else:
            skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
            self.record(phase, name, "pass", seconds, f"{counts['tests'] - counts['skipped']} passed{skipped}")


def execute(command, seconds, environment):
    """(exit status, or None when it did not end in time; stdout and stderr)."""
    process = subprocess.Popen(command, cwd=TREE, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def gtest_counts(report):
    """{tests, failed, skipped}, or None when the program wrote no report."""
    try:
        suites = json.loads(report.read_text())["testsuites"]
    except (OSError, ValueError, KeyError):
        return None
    tests = [test for suite in suites for test in suite["testsuite"] if test.get("status") == "RUN"]
    return {"tests": len(tests), "failed": sum("failures" in test for test in tests),
            "skipped": sum(test.get("result") == "SKIPPED" for test in tests)}


def skip_reason(output):
    """What the first GTEST_SKIP said: gtest prints it under `FILE:LINE: Skipped`."""
    lines = output.splitlines()
    for line, reason in zip(lines, lines[1:]):
        if line.endswith(": Skipped"):
            return reason.strip()[:120] or "no reason given"
    return "no reason given"


def failure_lines(output):
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [i for i, line in enumerate(lines) if re.search(r"Failure|FAILED|error|ERROR|=========", line)]
    return (lines[telling[0]:telling[0] + 25] if telling else lines[-25:]) or ["(no output)"]


def tests_of(run, phase):
    """The test programs of a phase; tests/support tests the emulated device itself, which is no phase here."""
    tests = [test for test in run.manifest["tests"] if not test["folder"].startswith("tests/support")]
    if phase == "engine":
        return [test for test in tests if not test["folder"].startswith("tests/kernels")]
    if phase == "kernels" or phase in TOOLS:
        return [test for test in tests if test["folder"].startswith("tests/kernels")]
    return []


def kernels(run):
    for test in tests_of(run, "kernels"):
        run.gtest("kernels", test)


def engine(run):
    for test in tests_of(run, "engine"):
        run.gtest("engine", test)


def sanitizer(run, tool):
    """One tool over every kernel test. The tests' shapes are small ones already: the emulated device runs them, too."""
    if run.device != "cuda":
        run.record(tool, "compute-sanitizer", "skip", 0, "the emulated device has checks of its own")
        return
    tool_path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(tool_path, os.X_OK):
        run.record(tool, "compute-sanitizer", "not-run", 0, "the tool is not on this machine")
        return
    tests = tests_of(run, tool)
    if not tests:
        return
    # Some systems do not let the tool reach the device; then its findings would be about that.
    _, output = execute([tool_path, "--error-exitcode", "97", str(run.root / tests[0]["program"])], 120, run.environment)
    if re.search(r"Device not supported|not supported on this|Unable to launch|Internal Sanitizer Error", output):
        run.log.write(output)
        run.record(tool, "compute-sanitizer", "not-run", 0, "the tool does not work with this machine's device")
        return
    for test in tests:
        run.gtest(tool, test, prefix=[tool_path, "--tool", tool, "--error-exitcode", "97", "--print-limit", "5"], name=f"{tool}/{test['name']}")


class Server:
    """bebop-server on the bundled model."""

    def __init__(self, run, device, dtype):
        self.run = run
        self.name = f"{device}-{dtype}"
        self.log = open(run.out / f"server-{self.name}.log", "w", encoding="utf-8")
        flags = ["--model", str(MODEL), "--device", device, "--dtype", dtype, "--port", "0", "--admin-port", "0"]
        if device != "cpu":
            # Rows independent of their batch, so that drafting can be compared token by token.
            flags.append("--batch-invariant")
        if device == "emulated":
            flags += ["--max-num-seqs", "4", "--max-model-len", "256"]
        self.process = subprocess.Popen([str(run.root / "bin" / "bebop-server"), *flags], cwd=TREE, env=run.environment, text=True,
                                        stdout=subprocess.PIPE, stderr=self.log)
        match = READY.match(self.first_line())
        if not match:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            raise Failure(f"bebop-server {' '.join(flags)} exited with {self.process.returncode}: {self.last_words()}")
        self.rollout, self.admin = match.groups()

    def first_line(self):
        """What the server prints when it is ready; empty when it ended, or did not get that far in time."""
        readable, _, _ = select.select([self.process.stdout], [], [], max(1.0, min(READY_SECONDS, self.run.left())))
        return self.process.stdout.readline() if readable else ""

    def last_words(self):
        self.log.flush()
        text = pathlib.Path(self.log.name).read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "no message"

    def call(self, *arguments, lines=None, seconds=300):
        """Parsed replies of one `bebop --json` call."""
        command = [str(self.run.root / "bin" / "bebop"), "--server", self.rollout, "--json", *arguments]
        if lines is not None:
            command += ["--requests", "-"]
        done = subprocess.run(command, input=None if lines is None else "".join(json.dumps(line) + "\n" for line in lines), text=True,
                              capture_output=True, timeout=seconds, env=self.run.environment)
        self.run.log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            raise Failure(f"{' '.join(arguments)} on {self.name}: exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def stop(self):
        """The exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.log.close()
        self.process.stdout.close()
        return status


def requests(prompt_ids, num_tokens, num_draft_tokens, temperature, samples=1):
    return [{"prompt_token_ids": ids, "num_samples": samples, "sampling": {"temperature": temperature, "seed": str(77 + i)},
             "stopping": {"max_new_tokens": num_tokens, "ignore_eos": True}, "output": {"logprobs": True},
             "speculation": {"mode": "REJECTION" if num_draft_tokens else "OFF", "num_draft_tokens": num_draft_tokens}}
            for i, ids in enumerate(prompt_ids)]


def compare_logprobs(name, device_values, cpu_values, dtype):
    if len(device_values) != len(cpu_values) or not device_values:
        raise Failure(f"{name}: {len(device_values)} values against {len(cpu_values)}")
    differences = [abs(a - b) for a, b in zip(device_values, cpu_values)]
    if not all(map(math.isfinite, differences)):
        raise Failure(f"{name}: a log-probability is not finite")
    worst, mean = max(differences), sum(differences) / len(differences)
    if dtype == "float32" and not worst <= FLOAT32_TOLERANCE:
        raise Failure(f"{name}: log-probabilities differ by {worst:.3g} > {FLOAT32_TOLERANCE}")
    if dtype == "bfloat16" and not mean <= BFLOAT16_MEAN_TOLERANCE:
        raise Failure(f"{name}: log-probabilities differ by {mean:.3g} in the mean > {BFLOAT16_MEAN_TOLERANCE}")
    return f"{len(differences)} log-probabilities, differences: worst {worst:.2g}, mean {mean:.2g}"


def server(run):
    """For each precision: a server on the device and one on the CPU, the same requests to both."""
    if not {"bin/bebop-server", "bin/bebop"} <= set(run.manifest["programs"]):
        run.record("server", "programs", "not-run", 0, "bebop-server and bebop are not in this build")
        return
    emulated = run.device == "emulated"
    num_tokens, draft_counts = (10, [1, 3]) if emulated else (64, list(range(1, 9)))
    sys.path.insert(0, str(TREE / "tests" / "models"))
    import tasks
    texts = [prompt["prompt"] for task in (["math"] if emulated else ["math", "code", "tools"])
             for prompt in tasks.draw_prompts(task, 2, seed=7, split="heldout")]

    for dtype in ["float32", "bfloat16"]:
        servers = []

        def check(name, function):
            """Runs one check; a failure of it does not end the phase."""
            if run.left() < 10:
                run.record("server", f"{dtype}/{name}", "not-run", 0, "the phase's time is over")
                return None
            started = time.monotonic()
            try:
                result = function()
                run.record("server", f"{dtype}/{name}", "pass", time.monotonic() - started, result if isinstance(result, str) else "")
                return result
            except Exception as error:  # noqa: BLE001 - a reply of another shape is a failed check, too
                run.record("server", f"{dtype}/{name}", "fail", time.monotonic() - started, f"{type(error).__name__}: {error}")
                return None

        def start():
            for device in (run.device, "cpu"):
                servers.append(Server(run, device, dtype))
                info = servers[-1].call("info")[0]
                if not info["device"].startswith(device) or info["dtype"] != dtype or servers[-1].call("health")[0]["status"] != "SERVING":
                    raise Failure(f"asked for {device} {dtype}, the server says {info['device']} {info['dtype']}")
            return f"serving on {run.device} and cpu"

        def tokens(server, num_draft_tokens, temperature=0, samples=1):
            lines = requests(prompt_ids, num_tokens, num_draft_tokens, temperature, samples)
            return [sample for reply in server.call("generate", lines=lines) for sample in reply["samples"]]

        def greedy():
            plain = [sample["token_ids"] for sample in tokens(device, 0)]
            if not all(len(ids) == num_tokens for ids in plain):
                raise Failure("a greedy sample is too short")
            for count in draft_counts:
                drafted = tokens(device, count)
                if [sample["token_ids"] for sample in drafted] != plain:
                    raise Failure(f"greedy tokens with {count} drafts differ from those without")
                if not sum(sample["spec"]["num_draft_tokens"] for sample in drafted):
                    raise Failure(f"nothing was drafted with {count} drafts a step")
            return f"{len(plain)} sequences of {num_tokens}, drafts 0 = {', '.join(map(str, draft_counts))}"

        def score():
            sampled = [(ids, sample) for ids, sample in zip(prompt_ids, tokens(device, 3, temperature=1))]
            lines = [{"sequences": [{"token_ids": ids + sample["token_ids"]}], "score_start": len(ids)} for ids, sample in sampled]
            on_device, on_cpu = ([value for reply in s.call("score", lines=lines) for value in reply["scores"][0]["logprobs"]]
                                 for s in (device, cpu))
            reported = [value for _, sample in sampled for value in sample["logprobs"]]
            return compare_logprobs("score", on_device, on_cpu, dtype) + "; reported: " + compare_logprobs("generate", reported, on_cpu, dtype)

        def greedy_of_both():
            """The device's greedy tokens are, to the CPU, argmaxes up to rounding."""
            plain = tokens(device, 0)
            lines = [{"sequences": [{"token_ids": ids + sample["token_ids"]}], "score_start": len(ids), "top_logprobs": 1}
                     for ids, sample in zip(prompt_ids, plain)]
            gaps = []
            for reply in cpu.call("score", lines=lines):
                got = reply["scores"][0]
                gaps += [top["logprobs"][0] - value for top, value in zip(got["top_logprobs"], got["logprobs"])]
            limit = 2 * FLOAT32_TOLERANCE if dtype == "float32" else 0.5
            if len(gaps) != len(plain) * num_tokens or not max(gaps) <= limit:
                raise Failure(f"a greedy token of the device is {max(gaps):.3g} below the CPU's best, more than {limit}")
            return f"{sum(gap == 0 for gap in gaps)} of {len(gaps)} tokens are the CPU's, the others within {max(gaps):.2g}"

        def repeated():
            first, second = tokens(device, 3, temperature=1, samples=2), tokens(device, 3, temperature=1, samples=2)
            if [s["token_ids"] for s in first] != [s["token_ids"] for s in second]:
                raise Failure("the same seeds gave other tokens")
            return f"{len(first)} samples twice"

        def verify():
            lines = device.call("verify", "--num-prompts", "4", "--num-samples", "2048", "--greedy-tokens", "48", "--seed", "5")
            return f"{len(lines)} results"

        try:
            if check("start", start) is None:
                continue
            device, cpu = servers
            prompt_ids = [line["token_ids"] for line in cpu.call("tokenize", lines=[{"text": text, "parse_special": True} for text in texts])]
            check("greedy_equal_for_all_drafts", greedy)
            check("greedy_tokens_against_cpu", greedy_of_both)
            check("logprobs_against_cpu", score)
            check("same_seed_same_tokens", repeated)
            if not emulated:
                check("verify", verify)
        finally:
            statuses = [s.stop() for s in servers]
            if statuses and any(statuses):
                run.record("server", f"{dtype}/stop", "fail", 0, f"exit statuses after SIGTERM: {statuses}")


def training(run):
    """The same steps on the device, there again, and on the CPU."""
    if "bin/bebop-train-mtp" not in run.manifest["programs"]:
        run.record("training", "programs", "not-run", 0, "bebop-train-mtp is not in this build")
        return
    emulated = run.device == "emulated"
    documents, length, batch_tokens, steps, ahead = (6, 14, 32, 2, 2) if emulated else (64, 200, 2048, 6, 5)
    draw = random.Random(5)
    data = run.out / "training.jsonl"
    data.write_text("".join(json.dumps({"token_ids": [draw.randrange(200) for _ in range(length + i)], "loss_start": 2}) + "\n"
                            for i in range(documents)))

    def train(device, name):
        out = run.out / f"training-{name}.safetensors"
        shutil.rmtree(f"{out}.checkpoints", ignore_errors=True)
        command = [str(run.root / "bin" / "bebop-train-mtp"), "--model", str(MODEL), "--data", str(data), "--out", str(out), "--device", device,
                   "--num-steps-ahead", str(ahead), "--batch-tokens", str(batch_tokens), "--max-steps", str(steps), "--lr", "1e-4", "--log-every", "1",
                   "--json"]
        status, output = execute(command, run.left(), run.environment)
        run.log.write(f"$ {' '.join(command)}\n{output}\nexit status {status}\n")
        if status != 0:
            raise Failure(f"bebop-train-mtp --device {device}: exit status {status}: {output.strip()[-300:]}")
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return [line for line in lines if "loss" in line], out.read_bytes()

    started = time.monotonic()
    try:
        on_device, on_cpu = train(run.device, "device"), train("cpu", "cpu")
        again = train(run.device, "again")
        losses = [(line["loss"], other["loss"]) for line, other in zip(on_device[0], on_cpu[0])]
        if len(losses) != steps or len(on_cpu[0]) != steps:
            raise Failure(f"expected {steps} steps, got {len(on_device[0])} on the device and {len(on_cpu[0])} on the CPU")
        worst = max(abs(mine / other - 1) for mine, other in losses)
        if not worst <= TRAINING_LOSS_TOLERANCE:
            raise Failure(f"losses differ by {worst:.2%}: {losses}")
        if on_device[1] != again[1]:
            raise Failure("the same command wrote other weights")
        run.record("training", "e2e_tv", "pass", time.monotonic() - started,
                   f"{steps} steps of {ahead}, loss {losses[0][0]:.4f} to {losses[-1][0]:.4f}, within {worst:.2%} of the CPU's; bits repeat")
    except Exception as error:  # noqa: BLE001 - an output of another shape is a failed check, too
        run.record("training", "e2e_tv", "fail", time.monotonic() - started, f"{type(error).__name__}: {error}")


def device_name():
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=60, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none that nvidia-smi knows"


def main():
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the phases and the tests that each would run")
    parser.add_argument("--only", action="append", choices=[*PHASES, "sanitizer"], help="a phase; repeatable; default: all")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bundle", help="an unpacked bundle; default: the one that this script lies in")
    where.add_argument("--build", help="a build tree; default outside a bundle: build/cuda-release or build/cuda-emulated")
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda")
    parser.add_argument("--out", help="folder of the logs; default: $OUT, then build/gpu")
    args = parser.parse_args()
    chosen = [phase for name in args.only or PHASES for phase in (TOOLS if name == "sanitizer" else [name])]
    if not args.bundle and not args.build:
        if (TREE / "manifest.json").is_file():
            args.bundle = str(TREE)
        else:
            args.build = str(TREE / "build" / ("cuda-release" if args.device == "cuda" else "cuda-emulated"))
    root = pathlib.Path(args.bundle or args.build)
    if not (root / "manifest.json").is_file() and not (root / "CMakeCache.txt").is_file():
        if args.list:
            print("\n".join(PHASES))
            print("(no build or bundle here: --bundle DIR or --build DIR shows the tests, too)")
            return 0
        sys.exit(f"error: {root} is neither a bundle nor a build tree")
    run = Run(args)
    if args.list:
        for phase in PHASES:
            print(phase)
            for test in tests_of(run, phase):
                print(f"  {test['name']}")
        return 0

    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    name = device_name() if args.device == "cuda" else "emulated"
    run.say(f"bebop {run.manifest['version']}, device: {name}, {started}, phases: {' '.join(chosen)}")
    summary = []
    for phase in chosen:
        before, begin = len(run.results), time.monotonic()
        run.deadline = begin + PHASE_SECONDS
        try:
            if phase in TOOLS:
                sanitizer(run, phase)
            else:
                {"kernels": kernels, "engine": engine, "server": server, "training": training}[phase](run)
        except Exception as error:  # noqa: BLE001 - the report of what has run must not be lost
            run.record(phase, "phase", "fail", time.monotonic() - begin, f"{type(error).__name__}: {error}")
        own = run.results[before:]
        counts = {status: sum(r["status"] == status for r in own) for status in ("pass", "fail", "skip", "not-run")}
        # What did not run has not passed. compute-sanitizer is the exception that says so: the tool may not exist, or not work, on a machine.
        excused = phase in TOOLS and not counts["pass"] and not counts["fail"]
        passed = not counts["fail"] and (excused or counts["pass"] > 0 and not counts["not-run"] and not counts["skip"])
        summary.append({"phase": phase, "passed": passed, "seconds": round(time.monotonic() - begin, 1), **counts})
        run.say(f"== {phase}: {'passed' if passed else 'FAILED'}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped, "
                f"{counts['not-run']} not run, {summary[-1]['seconds']} s")
    document = {"version": run.manifest["version"], "device": name, "started": started, "host": platform.platform(),
                "phases": summary, "tests": run.results}
    for path in (run.out / "gpu.json", run.out / f"gpu-{'-'.join(args.only or ['all'])}.json"):
        path.write_text(json.dumps(document, indent=1) + "\n")
    run.log.close()
    return 0 if all(phase["passed"] for phase in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
