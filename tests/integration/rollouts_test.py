# SPDX-License-Identifier: Apache-2.0
"""`bebop rollouts` against a real `bebop-server` with dummy weights: whatever ends a run, the same command finishes it, with the samples of a run that
nothing ended.

usage: rollouts_test.py BIN_DIR   (python3 alone, no packages)
"""

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from cli_test import BIN, Server, bebop, clean_environment

NUM_PROMPTS = 32
NAMED = 7  # this prompt, counted from 0, has a name and a seed of its own
FLAGS = ("--seed", "11", "-n", "2", "--max-new-tokens", "40", "--ignore-eos", "--temperature", "0.9", "--concurrency", "4")


def prompt_lines():
    """JSON lines, with a blank one in front: names count lines, not prompts."""
    prompts = [{"prompt_token_ids": [1 + i % 3, 9, 200 - i]} for i in range(NUM_PROMPTS)]
    prompts[5] = prompts[2] | {}  # twice the same prompt
    prompts[NAMED] |= {"request_id": "named", "sampling": {"seed": "77"}, "num_samples": 3}
    return [""] + [json.dumps(prompt) for prompt in prompts]


def tokens(line):
    return line["request_id"], [sample["token_ids"] for sample in line["samples"]]


class Rollouts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.TemporaryDirectory()
        cls.prompts = os.path.join(cls.root.name, "prompts.jsonl")
        with open(cls.prompts, "w") as file:
            file.write("\n".join(prompt_lines()) + "\n")
        cls.server = Server("--threads", "1")
        cls.whole = os.path.join(cls.root.name, "whole.jsonl")
        status, out, err = bebop("rollouts", "--prompts", cls.prompts, "--out", cls.whole, *FLAGS, "--json", server=cls.server.rollout)
        assert (status, err) == (0, ""), err
        cls.summary = json.loads(out)
        cls.expected = [tokens(line) for line in cls.read(cls.whole)]

    @classmethod
    def tearDownClass(cls):
        status, _ = cls.server.stop()
        cls.root.cleanup()
        assert status == 0, f"SIGTERM: exit status {status}"

    @staticmethod
    def read(path):
        """Every line has to be whole."""
        with open(path) as file:
            text = file.read()
        assert text == "" or text.endswith("\n"), text[-80:]
        return [json.loads(line) for line in text.splitlines()]

    def command(self, out, *more, prompts=None, flags=FLAGS):
        return [os.path.join(BIN, "bebop"), "rollouts", "--prompts", prompts or self.prompts, "--out", out, *flags, "--json", *more]

    def start(self, out, *more, server=None, **options):
        environment = clean_environment() | {"BEBOP_SERVER": (server or self.server).rollout}
        return subprocess.Popen(self.command(out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)

    def run_to_end(self, out, *more, server=None, **options):
        command = self.command(out, *more, **options)[1:]
        status, text, err = bebop(*command, server=(server or self.server).rollout)
        return status, json.loads(text) if text else None, err

    def out(self, name):
        return os.path.join(self.root.name, name)

    def submitted(self, server=None):
        return int(json.loads(bebop("loads", "--json", server=(server or self.server).rollout)[1])["submitted"])

    def wait_for_lines(self, out, count):
        deadline = time.time() + 60
        while time.time() < deadline:
            try:
                with open(out, "rb") as file:
                    if file.read().count(b"\n") >= count:
                        return
            except FileNotFoundError:
                pass
            time.sleep(0.002)
        self.fail(f"{out} has not got {count} lines")

    def finish(self, out, server=None):
        """The same command once more: what is there stays and is not asked again, what comes is what an undisturbed run has."""
        with open(out) as file:
            there = {json.loads(line)["request_id"]: json.loads(line) for line in file if line.endswith("\n")}
        before = self.submitted(server)
        status, summary, err = self.run_to_end(out, server=server)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(summary["there"], NUM_PROMPTS)
        self.assertEqual(summary["written"], NUM_PROMPTS - len(there))
        self.assertEqual(self.submitted(server) - before, NUM_PROMPTS - len(there))
        lines = self.read(out)
        self.assertEqual([tokens(line) for line in lines], self.expected)
        for line in lines:
            if line["request_id"] in there:
                self.assertEqual(line, there[line["request_id"]])
        self.assertFalse(os.path.exists(out + ".tmp"))

    def test_lines_are_what_a_trainer_reads(self):
        lines = self.read(self.whole)
        wanted = [json.loads(line) for line in prompt_lines() if line]
        self.assertEqual(len(lines), NUM_PROMPTS)
        for i, (line, prompt) in enumerate(zip(lines, wanted)):
            self.assertEqual(line["prompt_token_ids"], prompt["prompt_token_ids"])
            self.assertEqual(line["request_id"], "named" if i == NAMED else f"line-{i + 2}")
            self.assertEqual(len(line["samples"]), 3 if i == NAMED else 2)
            for sample in line["samples"]:
                self.assertEqual(len(sample["token_ids"]), 40)
                self.assertAlmostEqual(sample["applied"]["sampling"]["temperature"], 0.9, places=6)
        seeds = [line["samples"][0]["seed_used"] for line in lines]
        self.assertEqual(seeds[NAMED], "77")
        self.assertEqual(len(set(seeds)), NUM_PROMPTS)
        self.assertNotEqual(lines[2]["samples"][0]["token_ids"], lines[5]["samples"][0]["token_ids"])  # the same prompt twice
        # The same line as `generate` prints: its seed reproduces it.
        status, out, err = bebop("generate", "--json", "--token-ids", " ".join(map(str, wanted[3]["prompt_token_ids"])), "-n", "2", "--max-new-tokens", "40",
                                 "--ignore-eos", "--temperature", "0.9", "--seed", seeds[3], server=self.server.rollout)
        self.assertEqual(status, 0, err)
        generated = json.loads(out)
        self.assertEqual(generated.keys(), lines[3].keys())
        self.assertEqual([s["token_ids"] for s in generated["samples"]], self.expected[3][1])
        self.assertEqual({k: self.summary[k] for k in ("out", "prompts", "there", "written", "refused", "samples", "tokens", "finish", "seed")},
                         {"out": self.whole, "prompts": NUM_PROMPTS, "there": NUM_PROMPTS, "written": NUM_PROMPTS, "refused": 0,
                          "samples": 2 * NUM_PROMPTS + 1, "tokens": 40 * (2 * NUM_PROMPTS + 1), "finish": {"LENGTH": 2 * NUM_PROMPTS + 1}, "seed": "11"})
        self.assertGreater(self.summary["tokens_per_second"], 0)

    def test_killed_at_any_moment(self):
        for lines in (1, 10, 20):
            for attempt in range(5):  # one may end before the kill reaches it
                out = self.out(f"killed-{lines}-{attempt}.jsonl")
                before = self.submitted()
                process = self.start(out)
                self.wait_for_lines(out, lines)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                with open(out, "rb") as file:
                    there = file.read().count(b"\n")
                if there < NUM_PROMPTS:
                    break
            self.assertLess(there, NUM_PROMPTS, "it was always too quick to be killed")
            self.assertLessEqual(self.submitted() - before - there, 4, "more is lost than was in flight")
            self.finish(out)

    def test_a_torn_line_is_cut(self):
        with open(self.whole, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        for name, kept, tail in (("torn", 20, lines[20][:-30]), ("no-newline", 31, lines[31][:-1]), ("one-byte", 3, b"{"),
                                 ("beyond", NUM_PROMPTS, lines[0][:-5])):
            out = self.out(name + ".jsonl")
            shutil.copy(self.whole + ".run", out + ".run")
            with open(out, "wb") as file:
                file.write(b"".join(lines[:kept]) + tail)
            status, summary, err = self.run_to_end(out)
            self.assertEqual((status, err, summary["written"]), (0, "", NUM_PROMPTS - kept))
            self.assertEqual([tokens(line) for line in self.read(out)], self.expected)

    def test_order_of_arrival_becomes_that_of_the_prompts(self):
        with open(self.whole, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        out = self.out("shuffled.jsonl")
        shutil.copy(self.whole + ".run", out + ".run")
        with open(out, "wb") as file:
            file.write(b"".join(reversed(lines)))
        self.finish(out)
        with open(out, "rb") as file:
            self.assertEqual(file.read(), b"".join(lines))

    def refused(self, part, out, *more, **options):
        with open(out, "rb") as file:
            before = file.read()
        requests = self.submitted()
        status, summary, err = self.run_to_end(out, *more, **options)
        self.assertEqual((status, summary), (2, None), err)
        self.assertEqual(err.count("\n"), 1, err)
        for text in [part] if isinstance(part, str) else part:
            self.assertIn(text, err)
        with open(out, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertEqual(self.submitted(), requests)

    def test_another_run_is_refused_with_both_values(self):
        out = self.out("refused.jsonl")
        with open(self.whole + ".run") as file:
            run = json.load(file)
        with open(self.whole, "rb") as file:
            lines = file.read().splitlines(keepends=True)

        def make(body):
            shutil.copy(self.whole + ".run", out + ".run")
            with open(out, "wb") as file:
                file.write(body)

        make(b"".join(lines[:10]))
        changed = self.out("changed.jsonl")
        with open(changed, "w") as file:
            file.write("\n".join(prompt_lines()[:-1] + [json.dumps({"prompt_token_ids": [4]})]) + "\n")
        self.refused(("--prompts", run["prompts_sha256"], "SHA-256"), out, prompts=changed)
        self.refused(("--seed: 12", "expected 11"), out, flags=("--seed", "12") + FLAGS[2:])
        self.refused(("sampling.temperature", "0.9", "0.5"), out, flags=FLAGS[:7] + ("--temperature", "0.5"))
        self.refused(("num_samples", "2"), out, flags=FLAGS[:2] + FLAGS[4:])
        # Lines that these prompts cannot have made.
        make(lines[0] + lines[1].replace(b'"request_id":"line-3"', b'"request_id":"line-99"'))
        self.refused(("line 2", "line-99"), out)
        make(lines[0] + lines[0])
        self.refused(("line 2", "line-2", "already"), out)
        make(lines[0].replace(b'"prompt_token_ids":[1,', b'"prompt_token_ids":[2,'))
        self.refused(("line 1", "[2 9 200]", "[1 9 200]", "line 2 of"), out)
        make(b"{}{}\n" + lines[0])
        self.refused("line 1", out)
        os.unlink(out + ".run")
        self.refused(out + ".run", out)
        with open(out + ".run", "w") as file:
            file.write("{}")
        self.refused(out + ".run", out)
        # The seed may be left out: that of the run counts.
        make(b"".join(lines[:10]))
        status, _, err = self.run_to_end(out, flags=FLAGS[2:])
        self.assertEqual((status, err), (0, ""))
        self.assertEqual([tokens(line) for line in self.read(out)], self.expected)

    def test_usage(self):
        out = self.out("usage.jsonl")
        bad = self.out("bad.jsonl")
        for text, parts in (('{"prompt_token_ids":[1]}\n{"prompt":[1]}\n', ("line 2", "prompt")), ("\n\n", ("no prompts",)), ("[1]\n", ("line 1",)),
                            ('{"request_id":"a"}\n\n{"request_id":"a"}\n', ("line 3", '"a"', "line 1")),
                            ('{"prompt_token_ids":[1]}\n{"request_id":"line-1"}\n', ("line 2", '"line-1"', "line 1"))):
            with open(bad, "w") as file:
                file.write(text)
            status, summary, err = self.run_to_end(out, prompts=bad)
            self.assertEqual((status, summary), (2, None), err)
            for part in parts:
                self.assertIn(part, err)
        for options in ({"prompts": "/nowhere/at/all"}, {"prompts": self.root.name}, {"flags": FLAGS + ("--concurrency", "0")}):
            self.assertEqual(self.run_to_end(out, **options)[0], 2)
        self.assertFalse(os.path.exists(out))
        self.assertEqual(self.run_to_end("/nowhere/at/all")[0], 2)
        self.assertEqual(self.run_to_end("/dev/null")[0], 2)

    def test_one_writer_at_a_time(self):
        out = self.out("twice.jsonl")
        first = self.start(out)
        self.wait_for_lines(out, 1)
        first.send_signal(signal.SIGSTOP)
        status, _, err = self.run_to_end(out)
        self.assertEqual(status, 2)
        self.assertIn("another bebop rollouts", err)
        first.send_signal(signal.SIGCONT)
        self.assertEqual(first.communicate(timeout=60)[1], "")
        self.assertEqual([tokens(line) for line in self.read(out)], self.expected)

    def test_refused_prompts_are_told_and_the_rest_go_on(self):
        prompts = self.out("some-bad.jsonl")
        lines = prompt_lines()
        lines[3] = json.dumps({"prompt_token_ids": [999]})
        with open(prompts, "w") as file:
            file.write("\n".join(lines) + "\n")
        out = self.out("some-bad-out.jsonl")
        for written in (NUM_PROMPTS - 1, 0):  # the second run asks for the refused one alone
            status, summary, err = self.run_to_end(out, prompts=prompts)
            self.assertEqual(status, 1)
            self.assertRegex(err, r"^error: INVALID_ARGUMENT INVALID_FIELD: prompt_token_ids\[0\]: 999.*\(line 4 of .*some-bad.jsonl\)\n$")
            self.assertEqual((summary["written"], summary["refused"], summary["there"]), (written, 1, NUM_PROMPTS - 1))
            self.assertEqual([tokens(line) for line in self.read(out)], self.expected[:2] + self.expected[3:])

    def test_full_queue_is_waited_out(self):
        server = Server("--threads", "1", "--max-num-seqs", "16", "--max-queued-requests", "4")
        out = self.out("queue.jsonl")
        status, summary, err = self.run_to_end(out, "--concurrency", "32", server=server, flags=FLAGS[:-2])
        self.assertEqual((status, err), (0, ""))
        self.assertEqual([tokens(line) for line in self.read(out)], self.expected)
        self.assertGreater(int(json.loads(bebop("loads", "--json", server=server.rollout)[1])["refused"]), 0, "nothing was refused")
        server.stop()

    def test_server_killed_midway(self):
        server = Server("--threads", "1")
        out = self.out("lost.jsonl")
        process = self.start(out, server=server)
        self.wait_for_lines(out, 3)
        server.stop(signal.SIGKILL)
        summary, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 3, err)
        there = len(self.read(out))
        self.assertEqual(json.loads(summary)["there"], there)
        self.assertRegex(err, rf"^error: UNAVAILABLE: .*; {out} has {there} of {NUM_PROMPTS} prompts, and the same command goes on from there\n$")
        self.assertEqual(self.run_to_end(out, server=server)[0], 3)  # still gone
        self.finish(out)

    def test_server_drained_midway(self):
        server = Server("--threads", "1", "--drain-timeout", "0")
        out = self.out("drained.jsonl")
        process = self.start(out, server=server)
        self.wait_for_lines(out, 3)
        server.stop()
        summary, err = process.communicate(timeout=60)
        self.assertIn(process.returncode, (1, 3), err)
        self.assertIn("and the same command goes on from there", err)
        self.assertLess(json.loads(summary)["there"], NUM_PROMPTS)
        self.finish(out)

    def test_paused_midway(self):
        """A pause that cuts samples short costs time, not tokens."""
        out = self.out("paused.jsonl")
        process = self.start(out)
        self.wait_for_lines(out, 3)
        self.assertEqual(bebop("pause", "--mode", "abort", admin=self.server.admin)[0], 0)
        self.assertEqual(bebop("resume", admin=self.server.admin)[0], 0)
        _, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertEqual([tokens(line) for line in self.read(out)], self.expected)

    def test_a_server_that_stands_still_ends_the_run(self):
        """It is not the prompts' fault: they are not refused one after the other, each at its deadline."""
        server = Server("--threads", "1")
        out = self.out("standing.jsonl")
        self.assertEqual(bebop("pause", "--mode", "keep", admin=server.admin)[0], 0)
        status, summary, err = self.run_to_end(out, "--timeout", "1", server=server)
        self.assertEqual((status, summary["written"], summary["refused"]), (4, 0, 0), err)
        self.assertRegex(err, rf"^error: DEADLINE_EXCEEDED DEADLINE: .*paused.*; {out} has 0 of {NUM_PROMPTS} prompts, and the same command goes "
                              r"on from there\n$")
        self.assertLessEqual(self.submitted(server), 4)
        self.assertEqual(bebop("resume", admin=server.admin)[0], 0)
        self.finish(out, server=server)
        # Nor that it has not got the weights yet.
        prompts = self.out("later.jsonl")
        with open(prompts, "w") as file:
            file.write(json.dumps({"prompt_token_ids": [4], "weights": {"min_step": "9"}}) + "\n" + json.dumps({"prompt_token_ids": [5]}) + "\n")
        status, summary, err = self.run_to_end(self.out("later-out.jsonl"), server=server, prompts=prompts)
        self.assertEqual((status, summary["refused"]), (1, 0), err)
        self.assertRegex(err, r"^error: FAILED_PRECONDITION STEP_NOT_REACHED: .*goes on from there\n$")
        server.stop()

    def test_a_run_that_has_ended_asks_for_nothing_again(self):
        """The disk is full, and a pause cuts short what is in flight: nobody waits for samples that have no place."""
        server = Server("--threads", "1")
        prompts, out = self.out("long.jsonl"), self.out("long-out.jsonl")
        with open(prompts, "w") as file:  # the first is over soon, and its line is long
            file.write(json.dumps({"prompt_token_ids": [7] * 1500, "stopping": {"max_new_tokens": 1}}) + "\n")
            file.writelines(json.dumps({"prompt_token_ids": [8, i]}) + "\n" for i in range(3))

        def limited():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

        command = self.command(out, prompts=prompts, flags=("--seed", "1", "--max-new-tokens", "2000", "--ignore-eos", "--concurrency", "4"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited,
                                   env=clean_environment() | {"BEBOP_SERVER": server.rollout})

        def loads():
            return {k: int(v) for k, v in json.loads(bebop("loads", "--json", server=server.rollout)[1]).items() if k in ("submitted", "finished")}

        deadline = time.time() + 60
        while loads() != {"submitted": 4, "finished": 1} and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # until the line has met its limit
        self.assertEqual(loads(), {"submitted": 4, "finished": 1}, "the long ones are over already, or the short one is not")
        self.assertEqual(bebop("pause", "--mode", "abort", admin=server.admin)[0], 0)
        _, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1, err)
        self.assertIn("long-out.jsonl: File too large", err)
        self.assertEqual(loads()["submitted"], 4)
        server.stop()

    def test_disk_full_midway(self):
        out = self.out("full.jsonl")
        limit = os.path.getsize(self.whole) // 2

        def limited():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        process = self.start(out, preexec_fn=limited)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, err)
        self.assertIn("full.jsonl: File too large", err)
        self.assertIn("goes on from there", err)
        self.assertGreater(len(self.read(out)), 5)
        self.finish(out)

    def test_a_run_without_seed_goes_on_with_its_own(self):
        out = self.out("unseeded.jsonl")
        status, summary, err = self.run_to_end(out, flags=FLAGS[2:])
        self.assertEqual((status, err), (0, ""))
        self.assertNotEqual(summary["seed"], "11")
        lines = self.read(out)
        with open(out) as file:
            text = file.readlines()
        with open(out, "w") as file:
            file.writelines(text[:15])
        status, again, err = self.run_to_end(out, flags=FLAGS[2:])
        self.assertEqual((status, err, again["seed"], again["written"]), (0, "", summary["seed"], NUM_PROMPTS - 15))
        self.assertEqual([tokens(line) for line in self.read(out)], [tokens(line) for line in lines])

    def test_progress_on_a_terminal(self):
        terminal, other_end = pty.openpty()
        process = subprocess.Popen(self.command(self.out("terminal.jsonl"))[:-1], stdout=subprocess.PIPE, stderr=other_end, text=True,
                                   env=clean_environment() | {"BEBOP_SERVER": self.server.rollout})
        os.close(other_end)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # its last writer is gone
                break
            if not part:
                break
            shown += part
        os.close(terminal)
        out, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0)
        self.assertRegex(shown.decode(), rf"rollouts: \d+/{NUM_PROMPTS}, \d+ tokens/s, \d+:\d\d:\d\d left")
        self.assertRegex(out, rf"terminal.jsonl: {NUM_PROMPTS} of {NUM_PROMPTS} prompts; in this run {NUM_PROMPTS} with .* tokens/s, accept length [1-9]\.[0-9]+; seed 11\n$")


if __name__ == "__main__":
    unittest.main()
