# SPDX-License-Identifier: Apache-2.0
"""Scrapes a real `bebop-server` under load: its counters add up in every scrape, and tell in the end what its clients got (I26).

usage: metrics_test.py BIN_DIR MODEL_DIR   (python3 alone, no packages)
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

BIN, MODEL = (os.path.abspath(path) for path in sys.argv[1:3])
del sys.argv[1:3]
READY = re.compile(r"^bebop-server ready: rollout=(\S+) admin=(\S+) model=(\S+) version=(\d+) http=(\S+)\n$")
LINE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\} (\S+)$')
TOKENS = "rollout rollout-token-0123456789\nweights weights-token-0123456789\n"


def clean_environment(**more):
    return {**{k: v for k, v in os.environ.items() if not k.startswith("BEBOP_")}, **more}


def scrape(address):
    """{(name, label set without model_name): value}"""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    series = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, labels, value = LINE.match(line).groups()
        labels = tuple(label for label in labels.split(",") if not label.startswith("model_name="))
        assert (name, labels) not in series, line
        series[name, labels] = float(value)
    return series


class MetricsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        tokens = os.path.join(cls.directory.name, "tokens")
        with open(tokens, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(TOKENS)
        cls.log = open(os.path.join(cls.directory.name, "stderr"), "w+")
        cls.process = subprocess.Popen(
            [os.path.join(BIN, "bebop-server"), "--model", MODEL, "--port", "0", "--admin-port", "0", "--http-port", "0", "--threads", "1",
             "--max-model-len", "512", "--max-num-seqs", "6", "--token-file", tokens, "--metrics-compat", "vllm"],
            stdout=subprocess.PIPE, stderr=cls.log, text=True, env=clean_environment())
        line = cls.process.stdout.readline()
        match = READY.match(line)
        assert match, f"no ready line but {line!r}"
        cls.rollout, cls.admin, _, _, cls.http = match.groups()

    @classmethod
    def tearDownClass(cls):
        cls.process.terminate()
        status = cls.process.wait(60)
        cls.log.seek(0)
        log = cls.log.read()
        cls.log.close()
        cls.directory.cleanup()
        assert status == 0, f"SIGTERM: exit status {status}"
        assert "token-0123456789" not in log, "a token is in the log"

    def token_file(self, token):
        path = os.path.join(self.directory.name, f"client-{token}")
        with open(path, "w") as file:
            file.write(token + "\n")
        return path

    def generate(self, requests, token="rollout-token-0123456789"):
        text = "".join(json.dumps(request) + "\n" for request in requests)
        result = subprocess.run([os.path.join(BIN, "bebop"), "--server", self.rollout, "--json", "generate", "--requests", "-"], input=text,
                                capture_output=True, text=True, timeout=120, env=clean_environment(BEBOP_TOKEN_FILE=self.token_file(token)))
        return result.returncode, [json.loads(line) for line in result.stdout.splitlines()], result.stderr

    def check(self, series):
        """What holds in every scrape, whatever goes on."""
        value = lambda name, *labels: series[name, labels]
        self.assertEqual(value("bebop:requests_submitted_total"),
                         sum(value(f"bebop:{name}") for name in ("requests_finished_total", "requests_cancelled_total", "requests_failed_total",
                                                                 "num_requests_running", "num_requests_waiting")))
        accepted = [value("bebop:spec_decode_num_accepted_tokens_per_pos_total", f'position="{i}"') for i in range(8)]
        drafted = [value("bebop:spec_decode_num_drafted_per_pos_total", f'position="{i}"') for i in range(8)]
        drafts = value("bebop:spec_decode_num_drafts_total")
        self.assertEqual(sum(accepted), value("bebop:spec_decode_num_accepted_tokens_total"))
        self.assertEqual(drafted[0], drafts)
        for i in range(8):
            self.assertLessEqual(accepted[i], drafted[i])
            if i > 0:
                self.assertLessEqual(drafted[i], accepted[i - 1])
        # Every verification yields its accepted drafts and one more token, less what a stop cut off.
        trimmed = value("bebop:spec_decode_num_trimmed_tokens_total")
        self.assertGreaterEqual(value("bebop:generation_tokens_total"), sum(accepted) - trimmed)
        self.assertEqual(value("vllm:spec_decode_num_drafts_total"), drafts)
        self.assertEqual(value("vllm:generation_tokens_total"), value("bebop:generation_tokens_total"))

    def test_counters_under_load(self):
        replies, threads, failures = [], [], []

        def load(worker):
            requests = [{"prompt_token_ids": [5 + worker, 6 + i], "num_samples": 2, "stopping": {"max_new_tokens": 20 + i, "ignore_eos": True},
                         "sampling": {"seed": str(worker * 100 + i)}, "speculation": {"mode": "REJECTION", "num_draft_tokens": 3}}
                        for i in range(12)]
            status, got, error = self.generate(requests)
            if status != 0:
                failures.append(error)
            replies.extend(got)

        for worker in range(3):
            threads.append(threading.Thread(target=load, args=(worker,)))
            threads[-1].start()
        num_busy, last = 0, None
        while any(thread.is_alive() for thread in threads):
            series = scrape(self.http)
            self.check(series)
            num_busy += series["bebop:groups_inflight", ()] > 0
            if last is not None:
                for key, value in series.items():
                    if key[0].endswith("_total"):
                        self.assertGreaterEqual(value, last[key], key)  # counters never go back
            last = series
            time.sleep(0.01)
        self.assertEqual(failures, [])
        self.assertGreater(num_busy, 0, "no scrape met a request")
        series = scrape(self.http)
        self.check(series)
        value = lambda name, *labels: series[name, labels]
        samples = [sample for reply in replies for sample in reply["samples"]]
        self.assertEqual(len(samples), 72)
        self.assertEqual(value("bebop:requests_submitted_total"), 36)
        self.assertEqual(value("bebop:requests_finished_total"), 36)
        self.assertEqual(value("bebop:request_success_total", 'finished_reason="length"'), 72)
        self.assertEqual(value("bebop:generation_tokens_total"), sum(len(sample["token_ids"]) for sample in samples))
        self.assertEqual(value("bebop:prompt_tokens_total"), 72)
        spec = lambda name: sum(int(sample["spec"][name]) for sample in samples)
        self.assertEqual(value("bebop:spec_decode_num_accepted_tokens_total"), spec("num_accepted_draft_tokens"))
        self.assertEqual(value("bebop:spec_decode_num_draft_tokens_total"), spec("num_draft_tokens"))
        self.assertEqual(value("bebop:spec_decode_num_drafts_total"), spec("num_spec_steps"))
        self.assertGreater(spec("num_accepted_draft_tokens"), 0)
        self.assertEqual(value("bebop:samples_by_version_spread", 'spread="0"'), 72)
        for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_queue_time_seconds", "request_decode_time_seconds"):
            self.assertEqual(value(f"bebop:{name}_count"), 72, name)
        self.assertGreater(value("bebop:e2e_request_latency_seconds_sum"), value("bebop:time_to_first_token_seconds_sum"))

    def test_tokens_on_a_real_server(self):
        call = lambda verb, **more: subprocess.run([os.path.join(BIN, "bebop"), "--server", self.rollout, *verb.split()], capture_output=True,
                                                   text=True, timeout=60, env=clean_environment(**more))
        self.assertEqual(call("health").returncode, 0)
        path, nobody = self.token_file("weights-token-0123456789"), self.token_file("nobodys-token-0123456789")
        none = call("info")
        self.assertNotEqual(none.returncode, 0)
        self.assertIn("NO_TOKEN", none.stderr)
        self.assertIn("UNKNOWN_TOKEN", call("info", BEBOP_TOKEN_FILE=nobody).stderr)
        self.assertEqual(call("info", BEBOP_TOKEN_FILE=path).returncode, 0)
        self.assertIn("NO_TOKEN", call("info", BEBOP_TOKEN="weights-token-0123456789").stderr, "tokens are in files, never in the environment")
        self.assertEqual(call(f"info --token-file {path}", BEBOP_TOKEN_FILE=nobody).returncode, 0)  # a flag wins
        bad = call(f"info --token-file {os.path.join(self.directory.name, 'tokens')}")  # the server's file
        self.assertEqual(bad.returncode, 2)
        self.assertIn("--token-file", bad.stderr)
        self.assertNotIn("token-0123456789", bad.stderr)
        wrong = call("generate --token-ids 1", BEBOP_TOKEN_FILE=path)
        self.assertIn("WRONG_ROLE", wrong.stderr)
        self.assertNotIn("weights-token", wrong.stderr)

    def test_probes(self):
        for path in ("/health", "/liveness", "/ready", "/version"):
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=20) as reply:
                self.assertEqual(reply.status, 200)
                body = reply.read()
        self.assertEqual(set(json.loads(body)), {"version", "boot_id"})


if __name__ == "__main__":
    unittest.main()
