# SPDX-License-Identifier: Apache-2.0
"""`bebop-train-mtp` on the bundled model, over real processes: rollouts of a server train a spoiled head, the server takes the trained one while it
runs and accepts more of its drafts; kills at any moment cost nothing but time; bad input is named.

usage: train_mtp_test.py BIN_DIR MODEL_DIR   (python3 alone, no packages)
"""

import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

BIN, MODEL = (os.path.abspath(path) for path in sys.argv[1:3])
del sys.argv[1:3]
TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models", "tasks.py")
READY = re.compile(r"^bebop-server ready: rollout=(\S+) admin=(\S+)")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("BEBOP_")}


def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return path


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def read_safetensors(path):
    """The header, where the data begin, and all bytes."""
    raw = bytearray(read_bytes(path))
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), 8 + size, raw


def program(name, *arguments, **options):
    return subprocess.run([os.path.join(BIN, name), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


def train_command(*arguments):
    return [os.path.join(BIN, "bebop-train-mtp"), "--model", MODEL, "--threads", "1", *map(str, arguments)]


def train(*arguments, **options):
    return subprocess.run(train_command(*arguments), capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


class TrainMtpTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.folder = cls.directory.name
        problems = subprocess.run([sys.executable, TASKS, "prompts", "--task", "math", "--n", "48", "--seed", "0", "--split", "train", "--tokenizer",
                                   os.path.join(MODEL, "tokenizer.json")], capture_output=True, text=True, check=True).stdout
        prompts = [json.dumps({"prompt_token_ids": problem["prompt_token_ids"]}) + "\n" for problem in json_lines(problems)]
        cls.train_prompts = write(cls.path("train_prompts.jsonl"), "".join(prompts[:40]))
        cls.test_prompts = write(cls.path("test_prompts.jsonl"), "".join(prompts[40:]))
        # The released head without the half of mtp.fc that reads the token: it still runs, and is accepted far less.
        header, start, raw = read_safetensors(os.path.join(MODEL, "mtp-ce.safetensors"))
        rows, cols = header["mtp.fc.weight"]["shape"]
        begin = start + header["mtp.fc.weight"]["data_offsets"][0]
        for row in range(rows):
            raw[begin + row * cols * 2 : begin + row * cols * 2 + cols] = bytes(cols)
        cls.spoiled = cls.path("spoiled.safetensors")
        with open(cls.spoiled, "wb") as file:
            file.write(raw)
        cls.log = open(cls.path("server.log"), "w+")
        cls.server = subprocess.Popen([os.path.join(BIN, "bebop-server"), "--model", MODEL, "--port", "0", "--admin-port", "0", "--threads", "1", "--weights-root",
                                       cls.folder], stdout=subprocess.PIPE, stderr=cls.log, text=True, env=ENVIRONMENT)
        line = cls.server.stdout.readline()
        match = READY.match(line)
        if not match:
            cls.log.seek(0)
            raise AssertionError(f"no ready line but {line!r}: {cls.log.read()}")
        cls.rollout, cls.admin = match.groups()
        # What all tests train on.
        cls.data = cls.path("rollouts.jsonl")
        made = program("bebop", "--server", cls.rollout, "rollouts", "--prompts", cls.train_prompts, "--out", cls.data, "--max-new-tokens", 64, "-n", 2, "--seed", 1,
                       "--mode", "off")  # the shipped head changes no sample
        assert made.returncode == 0, made.stderr

    @classmethod
    def tearDownClass(cls):
        cls.server.send_signal(signal.SIGTERM)
        cls.server.communicate(timeout=60)
        cls.log.close()
        cls.directory.cleanup()
        assert cls.server.returncode == 0

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    def accept_length(self):
        """Tokens an iteration, as the server counts them while it decodes. Prompts and seeds are always the same."""
        result = program("bebop", "--server", self.rollout, "--json", "generate", "--requests", self.test_prompts, "--max-new-tokens", 64, "-n", 4, "--seed", 7,
                         "--num-draft-tokens", 3)
        self.assertEqual(result.returncode, 0, result.stderr)
        specs = [sample["spec"] for line in json_lines(result.stdout) for sample in line["samples"]]
        steps = sum(int(spec["num_spec_steps"]) for spec in specs)
        return 1 + sum(int(spec["num_accepted_draft_tokens"]) for spec in specs) / steps

    def weights(self, *arguments):
        result = program("bebop", "--admin", self.admin, "--json", "weights", *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def assert_refused(self, result, status, *parts):
        self.assertEqual(result.returncode, status, result.stderr)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(errors), 1, result.stderr)
        for part in parts:
            self.assertIn(part, errors[0])

    def test_a_trained_head_is_hot_loaded_and_accepted_more(self):
        out = self.path("trained.safetensors")
        held = write(self.path("held.jsonl"), b"".join(read_bytes(self.data).splitlines(keepends=True)[:4]).decode())
        result = train("--mtp", self.spoiled, "--data", self.data, "--eval-data", held, "--out", out, "--loss", "e2e_tv", "--num-steps-ahead", 3, "--batch-tokens", 512,
                       "--lr", "1e-3", "--epochs", 2, "--json", "--log-every", 5)
        self.assertEqual(result.returncode, 0, result.stderr)
        before, *steps, last = json_lines(result.stdout)
        self.assertEqual((before["step"], last["step"], steps[-1]["step"]), (0, 24, 24))
        self.assertEqual(last["out"], out)
        self.assertEqual(last["data"]["documents"], 80)
        for line in steps:
            self.assertEqual(len(line["alpha"]), 3)
            for key in ("loss", "entropy_target", "entropy_draft", "kl", "tokens_per_second", "lr", "gradient_norm", "gemm_bound_fraction"):
                self.assertGreater(line[key], 0, key)
        for k in range(3):
            self.assertGreater(last["evaluation"]["alpha"][k], before["evaluation"]["alpha"][k] + 0.1)
        self.assertLess(last["evaluation"]["loss"], before["evaluation"]["loss"])
        self.assertFalse(os.path.exists(out + ".checkpoints"))
        # The checkpoint's names, shapes and types.
        shipped, trained = ({name: (entry["dtype"], entry["shape"]) for name, entry in read_safetensors(path)[0].items() if name != "__metadata__"}
                            for path in (os.path.join(MODEL, "mtp-ce.safetensors"), out))
        self.assertEqual(trained, shipped)

        shipped_length = self.accept_length()
        self.weights("push", self.spoiled, "--components", "draft", "--step", "1")
        spoiled_length = self.accept_length()
        self.weights("push", out, "--components", "draft", "--step", "2")
        trained_length = self.accept_length()
        print(f"accept length: shipped {shipped_length:.2f}, spoiled {spoiled_length:.2f}, trained {trained_length:.2f}", file=sys.stderr)
        self.assertLess(spoiled_length, 1.6)
        self.assertGreater(trained_length, spoiled_length + 0.5)
        pushed = self.weights("info")
        # The same by a path beneath --weights-root; equal weights decode equally.
        self.weights("update", "spoiled.safetensors", "--components", "draft", "--step", "3")
        self.assertEqual(self.accept_length(), spoiled_length)
        self.weights("update", "trained.safetensors", "--components", "draft", "--step", "4")
        self.assertEqual(self.accept_length(), trained_length)
        info = self.weights("info")
        self.assertEqual(info["draft_digest"], pushed["draft_digest"])
        self.assertEqual(info["target_step"], "0")
        self.assertIsNone(self.server.poll())
        # A server that starts with it has the same head.
        other = subprocess.Popen([os.path.join(BIN, "bebop-server"), "--model", MODEL, "--mtp", out, "--port", "0", "--admin-port", "0", "--threads", "1"],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)
        try:
            admin = READY.match(other.stdout.readline()).group(2)
            started = json.loads(program("bebop", "--admin", admin, "--json", "weights", "info").stdout)
            self.assertEqual(started["draft_digest"], info["draft_digest"])
        finally:
            other.kill()
            other.communicate()

    # What the tests of interruptions train: 11 steps, a checkpoint every 2.
    SHORT = ("--num-steps-ahead", "2", "--batch-tokens", "256", "--max-steps", "11", "--checkpoint-every", "2", "--lr", "1e-3", "--json", "--log-every", "1")

    def short(self, name, *arguments):
        return ("--mtp", self.spoiled, "--data", self.data, "--out", self.path(name), *self.SHORT, *arguments)

    def uninterrupted(self):
        out = self.path("whole.safetensors")
        if not os.path.exists(out):
            result = train(*self.short("whole.safetensors"))
            self.assertEqual(result.returncode, 0, result.stderr)
        return read_bytes(out)

    def interrupt(self, name, step, signal_number, *arguments):
        """Sends a signal when `step` is in the log; returns exit status, steps in the log and stderr."""
        process = subprocess.Popen(train_command(*self.short(name, *arguments)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        steps = []
        for line in process.stdout:
            steps.append(json.loads(line)["step"])
            if steps[-1] == step:
                process.send_signal(signal_number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, steps, errors

    def test_sigkill_loses_at_most_an_interval(self):
        whole, out = self.uninterrupted(), self.path("killed.safetensors")
        # Once before there is a checkpoint, then on and on.
        reached = 0
        for at in (1, 4, 7, 10):
            status, steps, errors = self.interrupt("killed.safetensors", at, signal.SIGKILL, "--resume")
            self.assertEqual(status, -signal.SIGKILL, errors)
            self.assertFalse(os.path.exists(out))
            self.assertLessEqual(reached - 2, steps[0] - 1)  # no more than an interval was done again
            reached = steps[-1]
        result = train(*self.short("killed.safetensors", "--resume"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("resumed: ", result.stderr)
        self.assertEqual(read_bytes(out), whole)
        self.assertFalse(os.path.exists(out + ".checkpoints"))

    def test_signals_save_and_say_how_to_go_on(self):
        whole = self.uninterrupted()
        for number in (signal.SIGTERM, signal.SIGINT):
            status, steps, errors = self.interrupt("stopped.safetensors", 3, number)
            self.assertEqual(status, 128 + number, errors)
            self.assertIn(f"stopped at step {steps[-1]}: ", errors)
            self.assertIn("--resume", errors)
            self.assertTrue(os.path.isdir(self.path(f"stopped.safetensors.checkpoints/step-{steps[-1]}")))
            # Its checkpoint is neither overwritten nor continued as something else.
            self.assert_refused(train(*self.short("stopped.safetensors")), 2, "--checkpoints: ", f"step-{steps[-1]}", "--resume")
            self.assert_refused(train(*self.short("stopped.safetensors", "--resume", "--loss", "tv")), 2, "--loss: the run that was stopped had e2e_tv, this one has tv")
            other = write(self.path("other.jsonl"), b"".join(read_bytes(self.data).splitlines(keepends=True)[1:]).decode())
            self.assert_refused(train(*self.short("stopped.safetensors", "--resume", "--data", other)), 2, "--data (SHA-256): the run that was stopped had ")
            # Threads are no part of a run.
            result = train(*self.short("stopped.safetensors", "--resume", "--threads", "2"))
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(json_lines(result.stdout)[0]["step"], steps[-1] + 1)
            self.assertEqual(read_bytes(self.path("stopped.safetensors")), whole)

    def test_signals_are_heard_while_it_evaluates(self):
        """Before the first step, between steps, and after the last one. An evaluation of all of `long` would end in a line of the log."""
        whole, out = self.uninterrupted(), self.path("judged.safetensors")
        long = ("--eval-data", write(self.path("long.jsonl"), read_bytes(self.data).decode() * 40))
        process = subprocess.Popen(train_command(*self.short("judged.safetensors", *long)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        while "products at" not in (line := process.stderr.readline()):
            self.assertNotEqual(line, "")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        self.assertEqual((process.returncode, output), (128 + signal.SIGTERM, ""), errors)
        self.assertIn("stopped at step 0: ", errors)
        status, steps, errors = self.interrupt("judged.safetensors", 1, signal.SIGTERM, "--resume")
        self.assertEqual(status, 128 + signal.SIGTERM, errors)
        # No checkpoint is due by itself: the evaluation has one.
        at = steps[-1] + 1
        status, steps, errors = self.interrupt("judged.safetensors", at, signal.SIGTERM, "--resume", *long, "--eval-every", "1", "--checkpoint-every", "100")
        self.assertEqual((status, steps), (128 + signal.SIGTERM, [at]), errors)
        self.assertTrue(os.path.isdir(f"{out}.checkpoints/step-{at}"))
        status, steps, errors = self.interrupt("judged.safetensors", 11, signal.SIGINT, "--resume", *long)
        self.assertEqual((status, steps[-1]), (128 + signal.SIGINT, 11), errors)
        self.assertEqual(steps.count(11), 1)
        self.assertIn("stopped at step 11: ", errors)
        self.assertFalse(os.path.exists(out))
        result = train(*self.short("judged.safetensors", "--resume"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(read_bytes(out), whole)

    def test_a_kill_while_it_evaluates_loses_no_step(self):
        long = ("--eval-data", self.path("killing.jsonl"), "--eval-every", "3", "--checkpoint-every", "100")
        write(self.path("killing.jsonl"), read_bytes(self.data).splitlines(keepends=True)[0].decode())
        process = subprocess.Popen(train_command(*self.short("judged2.safetensors", *long)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)
        lines = (json.loads(line) for line in process.stdout)
        while not ("evaluation" in (line := next(lines)) and line["step"] == 3):
            pass
        process.kill()
        process.communicate()
        self.assertTrue(os.path.isdir(self.path("judged2.safetensors.checkpoints/step-3")))

    def test_one_run_at_a_time(self):
        out, folder = self.path("one.safetensors"), self.path("one.safetensors.checkpoints")
        process = subprocess.Popen(train_command(*self.short("one.safetensors")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        process.stdout.readline()  # it trains
        process.send_signal(signal.SIGSTOP)
        self.assert_refused(train(*self.short("one.safetensors", "--resume")), 2, f"--checkpoints: {folder}: another run uses it")
        self.assert_refused(train(*self.short("two.safetensors", "--checkpoints", folder + "/", "--resume")), 2, f"--checkpoints: {folder}/: another run uses it")
        self.assert_refused(train(*self.short("one.safetensors", "--checkpoints", self.path("two.checkpoints"))), 2, f"--out: {out}: another run uses it")
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, errors)
        self.assertEqual(read_bytes(out), self.uninterrupted())
        left = [name for name in os.listdir(self.folder) if name.startswith(("one.", "two."))]
        self.assertEqual(left, ["one.safetensors"])

    def test_what_is_read_is_not_replaced(self):
        model = self.path("model")
        shutil.copytree(MODEL, model)
        # A checkpoint of two files, one of them with nothing but the MTP layer.
        sharded = self.path("sharded")
        os.mkdir(sharded)
        for name in ("config.json", "model.safetensors", "mtp-ce.safetensors"):
            shutil.copy(os.path.join(MODEL, name), sharded)
        tensors = [name for name in read_safetensors(os.path.join(MODEL, "mtp-ce.safetensors"))[0] if name != "__metadata__"]
        write(os.path.join(sharded, "model.safetensors.index.json"), json.dumps({"weight_map": {name: "mtp-ce.safetensors" for name in tensors}}))
        data = {name: shutil.copy(self.data, self.path(name)) for name in ("d.jsonl", "e.jsonl", "e2.jsonl.tmp")}
        link = self.path("link.jsonl")
        os.symlink(data["d.jsonl"], link)
        config = os.path.join(model, "config.json")
        paths = [*(os.path.join(folder, name) for folder in (model, sharded) for name in os.listdir(folder)), *data.values()]
        before = {path: read_bytes(path) for path in paths if os.path.isfile(path)}

        def refused(flag, *flags, folder=model):
            result = program("bebop-train-mtp", "--model", folder, "--threads", "1", "--max-steps", "1", *flags)
            self.assert_refused(result, 2, flag, "give a")
            self.assertEqual({path: read_bytes(path) for path in before}, before)

        data_flags = ("--data", data["d.jsonl"], "--eval-data", data["e.jsonl"])
        refused("of --data,", *data_flags, "--out", data["d.jsonl"])
        refused("of --data,", "--data", link, "--out", data["d.jsonl"])
        refused("of --data,", *data_flags, "--out", link)
        refused("of --data,", "--data", data["e2.jsonl.tmp"], "--out", self.path("e2.jsonl"))  # by OUT.tmp
        refused("of --eval-data,", *data_flags, "--out", data["e.jsonl"])
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            refused("of --model,", *data_flags, "--out", os.path.join(model, name))
        refused("of --model,", *data_flags, "--out", os.path.join(sharded, "mtp-ce.safetensors"), folder=sharded)
        refused("of --mtp,", *data_flags, "--mtp", sharded, "--out", os.path.join(sharded, "model.safetensors"))
        refused("--checkpoints: ", *data_flags, "--out", self.path("new.safetensors"), "--checkpoints", model)
        refused("--checkpoints: ", *data_flags, "--out", self.path("new.safetensors"), "--checkpoints", self.path("new.safetensors"))
        # A file of another run beside the model, which this one even begins from.
        head = os.path.join(model, "mtp-ce.safetensors")
        result = program("bebop-train-mtp", "--model", model, "--threads", "1", "--max-steps", "1", "--data", data["d.jsonl"], "--mtp", head, "--out", head)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotEqual(read_bytes(head), before[head])
        self.assertTrue(os.path.exists(config))

    def test_every_batch_is_a_step(self):
        # Half of the documents, and with a document a batch half of the batches, have no whole chain.
        lines = [json.dumps({"token_ids": [10 * i + j for j in range(8)], "loss_start": 0 if i % 2 else 7}) + "\n" for i in range(8)]
        flags = ("--data", write(self.path("half.jsonl"), "".join(lines)), "--batch-tokens", 8, "--json", "--log-every", 1, "--lr", "1e-4")
        result = train(*flags, "--out", self.path("half.safetensors"), "--epochs", 9, "--max-steps", 30)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual([line["step"] for line in json_lines(result.stdout)], [*range(1, 31), 30])
        result = train(*flags, "--out", self.path("half.safetensors"), "--epochs", 2, "--decay", "linear", "--warmup-ratio", "0.25")
        rates = [line["lr"] for line in json_lines(result.stdout)[:-1]]
        self.assertEqual([round(rate / 1e-4, 3) for rate in rates], [0.5, 1.0, *(round(1 - i / 6, 3) for i in range(1, 7))])

    def test_a_full_disk_keeps_the_last_checkpoint_and_the_old_file(self):
        out = write(self.path("full.safetensors"), "old")
        status, _, errors = self.interrupt("full.safetensors", 5, signal.SIGTERM)
        self.assertEqual(status, 128 + signal.SIGTERM, errors)

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

        for _ in range(2):
            result = train(*self.short("full.safetensors", "--resume"), preexec_fn=limit)
            self.assert_refused(result, 1, "full.safetensors.checkpoints/step-", "File too large", "--resume")
            self.assertEqual(read_bytes(out), b"old")
        result = train(*self.short("full.safetensors", "--resume"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(read_bytes(out), self.uninterrupted())

    def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(self):
        # Each step multiplies the matrices by about -1e6.
        result = train(*self.short("nan.safetensors", "--weight-decay", "1e6", "--lr", "1", "--warmup-ratio", "0", "--checkpoint-every", "1"))
        self.assert_refused(result, 1, "training: step ", "not finite", "step-", "/mtp.safetensors has the last good weights", "--mtp")
        self.assertFalse(os.path.exists(self.path("nan.safetensors")))
        kept = re.search(r"(\S+/step-\d+/mtp\.safetensors)", result.stderr).group(1)
        for name, entry in read_safetensors(kept)[0].items():
            self.assertTrue(name == "__metadata__" or entry["dtype"] == "F32")
        again = train("--mtp", kept, "--data", self.data, "--out", self.path("nan2.safetensors"), "--max-steps", 1, "--batch-tokens", 256, "--lr", "0")
        self.assertNotEqual(again.returncode, 2, again.stderr)  # it can be begun from
        # Weights that overflow at once: the batch's lines are named.
        header, start, raw = read_safetensors(self.spoiled)
        begin, end = header["mtp.norm.weight"]["data_offsets"]
        raw[start + begin : start + end] = b"\x7f\x7f" * ((end - begin) // 2)  # the largest finite numbers
        with open(self.path("huge.safetensors"), "wb") as file:
            file.write(raw)
        few = write(self.path("few.jsonl"), '{"token_ids": [1,2,3,4,5,6,7,8]}\n\n{"token_ids": [9,8,7,6,5,4,3,2]}\n')
        result = train("--mtp", self.path("huge.safetensors"), "--data", few, "--out", self.path("nan3.safetensors"))
        self.assert_refused(result, 1, "training: step 1: ", "there is no checkpoint yet")
        self.assertRegex(result.stderr, r"documents of lines (1, 3|3, 1)\b")

    def test_progress_on_a_terminal(self):
        outer, inner = pty.openpty()
        process = subprocess.Popen(train_command(*self.short("seen.safetensors")), stdout=subprocess.DEVNULL, stderr=inner, env=ENVIRONMENT)
        os.close(inner)
        seen = b""
        while True:
            try:
                piece = os.read(outer, 4096)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        os.close(outer)
        self.assertEqual(process.wait(60), 0)
        self.assertRegex(seen.decode(), r"step 11  batch 11/11 \(100 %\)  \d+ tokens/s  \d+ % of the GEMM bound  loss \d\.\d+  0 s left")
        result = train(*self.short("unseen.safetensors"))
        self.assertNotIn("left", result.stderr)

    def test_bad_input(self):
        def refused(*parts, status=2, data=self.data, out=self.path("bad.safetensors"), flags=()):
            started = time.monotonic()
            self.assert_refused(train("--data", data, "--out", out, *flags), status, *parts)
            self.assertLess(time.monotonic() - started, 10)
            self.assertFalse(os.path.exists(self.path("bad.safetensors")))

        bad = lambda text: write(self.path("bad.jsonl"), text)
        good = '{"token_ids": [1,2,3,4,5,6,7,8]}\n'
        refused("bad.jsonl: line 2: token_ids[1]: expected a token id in [0, 1023] as the model has them, got 1024 (data of another vocabulary)",
                data=bad(good + '{"token_ids": [1,1024]}\n'))
        refused("bad.jsonl: expected lines of JSON with documents, got an empty file", data=bad(""))
        refused("1 skipped with fewer than 7 tokens", data=bad('{"token_ids": [1,2,3]}\n'))
        refused("bad.jsonl: line 1: not valid JSON", data=bad("{\n"))
        refused("/none.jsonl", data=self.path("none.jsonl"))
        refused("expected documents with predictions that count for --loss e2e_tv at --num-steps-ahead 5, got none in 1 documents",
                data=bad('{"token_ids": [1,2,3,4,5,6,7,8], "loss_start": 7}\n'))
        refused("none.jsonl", flags=("--eval-data", self.path("none.jsonl")))
        refused("bad.jsonl: expected documents with predictions that count", flags=("--eval-data", bad('{"token_ids": [1,2,3,4,5,6,7,8], "loss_start": 7}\n')))
        refused("--out: /none/a.safetensors", "/none is no folder", out="/none/a.safetensors")
        refused("--out: ", "got a folder", out=self.folder)
        refused("--num-steps-ahead: 9 is not in [1, 8]", flags=("--num-steps-ahead", "9"))
        refused("--lr: nan is not in [0, 1]", flags=("--lr", "nan"))
        refused("--max-seq-len: 600 is more than --batch-tokens 512", flags=("--max-seq-len", "600", "--batch-tokens", "512"))
        refused("--max-seq-len: 4096 is more than max_position_embeddings 2048", flags=("--max-seq-len", "4096", "--batch-tokens", "8192"))
        refused("--loss", "mse", flags=("--loss", "mse"))
        refused("--truncate-top-k: 2000 is more than vocab_size 1024", flags=("--truncate-top-k", "2000"))
        refused("--truncate-top-k: 20 with --loss ce", flags=("--truncate-top-k", "20", "--loss", "ce"))
        refused("--device: tpu is not in this build; it has: cpu", flags=("--device", "tpu"))
        refused("--init-mtp: --mtp ", flags=("--init-mtp", "--mtp", self.spoiled))
        refused("--eval-every: 5 without --eval-data", flags=("--eval-every", "5"))
        refused("none.safetensors", flags=("--mtp", self.path("none.safetensors")))
        refused("--seed", "-1 is not in [0, 18446744073709551615]", flags=("--seed=-1",))
        refused("--data: missing", data="")
        self.assertEqual(train("--unknown").returncode, 2)
        self.assertEqual(program("bebop-train-mtp", "--help").returncode, 0)
        self.assertRegex(program("bebop-train-mtp", "--version").stdout, r"^bebop-train-mtp \d+\.\d+\.\d+\n$")

    def test_checkpoints_without_an_mtp_layer(self):
        """As transformers saves them; and one that never had any."""
        bare = self.path("bare")
        os.mkdir(bare)
        header, start, raw = read_safetensors(os.path.join(MODEL, "model.safetensors"))
        kept, data = {}, b""
        for name, entry in header.items():
            if name == "__metadata__" or "mtp." in name:
                continue
            begin, end = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(data), len(data) + end - begin]}
            data += raw[start + begin : start + end]
        text = json.dumps(kept).encode()
        with open(os.path.join(bare, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + data)
        config = json.loads(read_bytes(os.path.join(MODEL, "config.json")))
        config_path = write(os.path.join(bare, "config.json"), json.dumps(config))
        out = self.path("new.safetensors")
        flags = ("--model", bare, "--data", self.data, "--out", out, "--threads", "1", "--batch-tokens", "256", "--max-steps", "2", "--num-steps-ahead", "2")
        self.assert_refused(program("bebop-train-mtp", *flags), 2, "bare: expected mtp.* tensors to begin from, got none", "--mtp FILE", "--init-mtp")
        for loss in ("ce", "lk"):
            result = program("bebop-train-mtp", *flags, "--init-mtp", "--loss", loss, "--json", "--log-every", "1")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([line["step"] for line in json_lines(result.stdout)], [1, 2, 2])
        with open(config_path, "w") as file:
            file.write(json.dumps(config).replace('"mtp_num_hidden_layers": 1', '"mtp_num_hidden_layers": 0'))
        self.assert_refused(program("bebop-train-mtp", *flags, "--init-mtp"), 2, "config.json: mtp_num_hidden_layers: expected 1, got 0", "--init-mtp")


if __name__ == "__main__":
    unittest.main(verbosity=2)
