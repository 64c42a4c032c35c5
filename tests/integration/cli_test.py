# SPDX-License-Identifier: Apache-2.0
"""`bebop` against a real `bebop-server` with dummy weights: what cli.md promises, over real processes.

usage: cli_test.py BIN_DIR   (python3 alone, no packages)
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

BIN = os.path.abspath(sys.argv.pop(1))

CONFIG = {
    "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 256,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}, "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": True, "eos_token_id": 0, "max_position_embeddings": 2048, "hidden_act": "silu", "attention_bias": False,
}
READY = re.compile(r"^bebop-server ready: rollout=(127\.0\.0\.1:\d+) admin=(127\.0\.0\.1:\d+) model=(\S+) version=(\d+)\n$")


def clean_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("BEBOP_")}


class Server:
    def __init__(self, *flags):
        self.directory = tempfile.TemporaryDirectory()
        model = os.path.join(self.directory.name, "dummy-model")
        os.mkdir(model)
        with open(os.path.join(model, "config.json"), "w") as file:
            json.dump(CONFIG, file)
        command = [os.path.join(BIN, "bebop-server"), "--model", model, "--load-format", "dummy", "--dtype", "float32", "--port", "0",
                   "--admin-port", "0", *flags]
        self.log = open(os.path.join(self.directory.name, "stderr"), "w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=clean_environment())
        line = self.process.stdout.readline()
        match = READY.match(line)
        if not match:
            self.log.seek(0)
            raise AssertionError(f"no ready line but {line!r}; stderr: {self.log.read()}")
        self.rollout, self.admin, self.model, self.version = match.groups()

    def stop(self, signal_number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        rest, _ = self.process.communicate(timeout=60)
        self.log.close()
        self.directory.cleanup()
        return self.process.returncode, rest


def bebop(*arguments, server=None, admin=None, stdin=None, timeout=120):
    environment = clean_environment()
    if admin:
        environment["BEBOP_ADMIN"] = admin
    if server:
        environment["BEBOP_SERVER"] = server
    result = subprocess.run([os.path.join(BIN, "bebop"), *arguments], input=stdin, capture_output=True, text=True, timeout=timeout,
                            env=environment)
    return result.returncode, result.stdout, result.stderr


class WithServer(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()

    @classmethod
    def tearDownClass(cls):
        status, rest = cls.server.stop()
        assert status == 0, f"SIGTERM: exit status {status}"
        assert rest == "", f"more on stdout than the ready line: {rest!r}"

    def call(self, *arguments, **options):
        return bebop(*arguments, server=self.server.rollout, **options)

    def json(self, *arguments, **options):
        status, out, err = self.call("--json", *arguments, **options)
        self.assertEqual(status, 0, err)
        self.assertEqual(out.count("\n"), 1, out)
        return json.loads(out)

    def test_info_health_loads(self):
        info = self.json("info")
        self.assertEqual(info["api_version"], "bebop.v1")
        self.assertEqual(info["load_format"], "dummy")
        self.assertTrue(info["synthetic_acceptance_allowed"])
        self.assertEqual(info["served_model_name"], "dummy-model")
        self.assertEqual(info["vocab_size"], 256)
        self.assertEqual(info["num_full_attention_layers"], 1)
        self.assertEqual(self.json("health"), {"status": "SERVING"})
        self.assertEqual(self.json("health", "--service", "bebop.v1.Rollout"), {"status": "SERVING"})
        self.assertEqual(bebop("health", "--server", self.server.admin)[0], 0)
        for verb in ("info", "health", "loads"):
            self.assertEqual(bebop(verb, "--admin", self.server.admin)[0], 0)  # --server would be another port
            self.assertEqual(self.call(verb, "--admin", "127.0.0.1:1", "--server", self.server.rollout)[0], 0)
        self.assertEqual(bebop("health", admin=self.server.admin)[0], 0)
        self.assertEqual(self.call("health", admin="127.0.0.1:1")[0], 0)
        self.assertEqual(self.call("info", "--admin", "127.0.0.1:1", "--timeout", "20")[0], 3)  # a flag wins over BEBOP_SERVER
        loads = self.json("loads")
        total = sum(int(loads[k]) for k in ("finished", "cancelled", "failed", "running_requests", "waiting_requests"))
        self.assertEqual(int(loads["submitted"]), total)

    def test_generate_json(self):
        result = self.json("generate", "--token-ids", "1 2 3", "-n", "3", "--max-new-tokens", "9", "--seed", "5", "--ignore-eos", "--logprobs",
                           "--mode", "coupled", "--num-draft-tokens", "2")
        self.assertEqual([s["sample_index"] for s in result["samples"]], [0, 1, 2])
        for sample in result["samples"]:
            self.assertEqual(len(sample["token_ids"]), 9)
            self.assertEqual(len(sample["logprobs"]), 9)
            self.assertEqual(sample["entropy"], [])  # default-valued fields are printed
            self.assertEqual(sample["finish"]["reason"], "LENGTH")
            self.assertEqual(sample["seed_used"], "5")  # 64-bit integers are strings
            self.assertEqual(sample["applied"]["speculation"], {"mode": "COUPLED", "num_draft_tokens": 2})
            self.assertEqual(sample["weight_spans"], [{"step": "0", "draft_step": "0", "start": 0, "end": 9}])
            self.assertEqual(len(sample["spec"]["drafted_per_pos"]), 2)
        again = self.json("generate", "--token-ids", "[1,2,3]", "-n", "3", "--max-new-tokens", "9", "--seed", "5", "--ignore-eos",
                          "--mode", "coupled", "--num-draft-tokens", "0")
        self.assertEqual([s["token_ids"] for s in again["samples"]], [s["token_ids"] for s in result["samples"]])

    def test_generate_for_people_falls_back_to_ids(self):
        status, out, err = self.call("generate", "--token-ids", "1 2 3", "--max-new-tokens", "4", "--ignore-eos")
        self.assertEqual(status, 0, err)
        self.assertRegex(out, r"\[sample 0: 4 tokens, LENGTH.*\]\n\d+ \d+ \d+ \d+\n")
        self.assertEqual(err, "")  # no progress without a terminal

    def test_stream(self):
        status, out, err = self.call("generate", "--token-ids", "1 2 3", "--max-new-tokens", "6", "--ignore-eos", "--stream", "--json")
        self.assertEqual(status, 0, err)
        events = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(next(iter(events[0])), "admitted")
        self.assertEqual(next(iter(events[-1])), "group_done")
        streamed = [t for e in events if "token_chunk" in e for t in e["token_chunk"]["token_ids"]]
        self.assertEqual(streamed, next(e for e in events if "sample_result" in e)["sample_result"]["token_ids"])

    def test_batch_keeps_order_and_goes_on_after_errors(self):
        lines = []
        for i in range(20):
            lines.append(json.dumps({"request_id": f"batch-{i}", "prompt_token_ids": [i + 1], "stopping": {"max_new_tokens": 1 + (20 - i) * 3},
                                     "sampling": {"seed": str(i)}}))
        lines[4] = "{not json"
        lines[7] = json.dumps({"prompt_token_ids": [999]})
        lines[9] = json.dumps({"prompt_token_ids": [1], "no_such_field": 1})
        status, out, err = self.call("generate", "--requests", "-", "--json", "--ignore-eos", stdin="\n".join(lines) + "\n")
        self.assertEqual(status, 1, err)
        replies = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(len(replies), 20)
        for i, reply in enumerate(replies):
            if i in (4, 7, 9):
                self.assertEqual(reply["error"]["code"], "INVALID_ARGUMENT")
            else:
                self.assertEqual(reply["request_id"], f"batch-{i}")
                self.assertEqual(len(reply["samples"][0]["token_ids"]), 1 + (20 - i) * 3)  # --ignore-eos fills what the line leaves unset
        self.assertIn("line 5", replies[4]["error"]["message"])
        self.assertEqual([replies[i]["error"]["reason"] for i in (4, 9)], ["MALFORMED_LINE"] * 2)
        self.assertEqual(replies[7]["error"]["reason"], "INVALID_FIELD")
        self.assertIn("prompt_token_ids[0]", replies[7]["error"]["message"])
        self.assertEqual(self.call("generate", "--requests", "/nowhere/at/all")[0], 2)

    def test_score_agrees_with_generate(self):
        prompt = [5, 6, 7, 8]
        line = {"prompt_token_ids": prompt, "stopping": {"max_new_tokens": 12, "ignore_eos": True},
                "output": {"raw_logprobs": True, "entropy": True}, "speculation": {"mode": "REJECTION", "num_draft_tokens": 3}}
        sample = self.json("generate", "--requests", "-", stdin=json.dumps(line))["samples"][0]
        score = self.json("score", "--requests", "-", stdin=json.dumps(
            {"sequences": [{"token_ids": prompt + sample["token_ids"]}], "score_start": 4, "entropy": True, "top_logprobs": 2,
             "token_ids_logprob": [3], "draft_depth": 2}))["scores"][0]
        self.assertEqual(len(score["logprobs"]), 12)
        for a, b in zip(sample["raw_logprobs"], score["logprobs"]):
            self.assertAlmostEqual(a, b, delta=1e-3)
        for a, b in zip(sample["entropy"], score["entropy"]):
            self.assertAlmostEqual(a, b, delta=1e-3)
        self.assertEqual(len(score["top_logprobs"]), 12)
        self.assertEqual([d["depth"] for d in score["draft"]], [1, 2])
        for draft in score["draft"]:
            self.assertEqual(draft["start"], 4)
            self.assertTrue(all(0 <= x <= 1 + 1e-6 for x in draft["overlap"]))

    def test_score_flags_fill_what_a_line_leaves_unset(self):
        lines = [{"sequences": [{"token_ids": [1, 2, 3, 4]}]}, {"sequences": [{"token_ids": [1, 2, 3, 4]}], "score_start": 3}]
        status, out, err = self.call("score", "--requests", "-", "--json", "--score-start", "2", "--top-logprobs", "3", "--entropy",
                                     "--draft-depth", "1", stdin="\n".join(json.dumps(line) for line in lines))
        self.assertEqual(status, 0, err)
        for line, positions in zip(out.splitlines(), (2, 1), strict=True):
            score = json.loads(line)["scores"][0]
            self.assertEqual(len(score["logprobs"]), positions)
            self.assertEqual(len(score["entropy"]), positions)
            self.assertEqual([len(top["token_ids"]) for top in score["top_logprobs"]], [3] * positions)
            self.assertEqual(len(score["draft"]), 1)

    def test_text_needs_a_tokenizer(self):
        for arguments in (("tokenize", "hello"), ("detokenize", "1", "2"), ("generate", "hello"),
                          ("generate", "--token-ids", "1", "--stop", "x")):
            status, out, err = self.call(*arguments)
            self.assertEqual(status, 1)
            self.assertIn("FAILED_PRECONDITION NO_TOKENIZER", err)
            self.assertEqual(out, "")

    def test_exit_statuses(self):
        status, _, err = self.call("generate", "--token-ids", "1", "--temperature", "-1")
        self.assertEqual(status, 1)
        self.assertIn("INVALID_ARGUMENT INVALID_FIELD: sampling.temperature: -1", err)
        for arguments in ((), ("frobnicate",), ("generate",), ("generate", "--token-ids", "x"), ("generate", "--top-k", "many", "--token-ids", "1"),
                          ("generate", "--mode", "fast", "--token-ids", "1"), ("generate", "--token-ids", "1", "--seed", "-1"),
                          ("bench", "--seed", "18446744073709551616"), ("verify", "--seed", "x"), ("health", "--no-such-flag"), ("score",), ("--timeout", "0", "info")):
            status, out, err = self.call(*arguments)
            self.assertEqual(status, 2, arguments)
            self.assertTrue(err.startswith("error: "), err)
        for flag in ("--server", "--admin"):  # at once, where a wrong address would be tried again and again
            for address in ("http://127.0.0.1:50051", "nonsense", "127.0.0.1:", "127.0.0.1:99999"):
                status, _, err = self.call("info", flag, address)
                self.assertEqual(status, 2, err)
                self.assertIn(f'error: {flag} or BEBOP_{flag[2:].upper()}: "{address}": expected HOST:PORT', err)
        status, _, err = bebop("weights", "info", admin=self.server.rollout)  # the two ports swapped
        self.assertEqual(status, 1)
        self.assertIn("UNIMPLEMENTED: this address does not serve the call: generation and scores are on the rollout port, weights and control on", err)
        for arguments in (("generate",), ("pause",), ("weights",), ("weights", "push")):
            self.assertIn(f"Usage: bebop {' '.join(arguments)}", self.call(*arguments, "--help")[1])
        self.assertIn("'frobnicate'", self.call("frobnicate")[2])
        self.assertIn("'--frob'", self.call("--frob")[2])
        for value in ("-1", "18446744073709551616"):
            self.assertRegex(self.call("generate", "--token-ids", "1", "--seed", value)[2], f"--seed.*{value}")
        self.assertEqual(bebop("info", "--server", "127.0.0.1:1", "--timeout", "20")[0], 3)
        self.assertEqual(self.call("--timeout", "0.05", "generate", "--token-ids", "1", "-n", "1000", "--ignore-eos")[0], 4)
        self.assertEqual(self.call("info", "--timeout", "20")[0], 0)  # global flags after the verb, too

    def test_bench(self):
        result = self.json("bench", "--num-requests", "6", "--concurrency", "3", "--prompt-len", "5", "--output-len", "40", "--num-samples", "2",
                           "--mode", "rejection", "--num-draft-tokens", "3", "--synthetic-accept-length", "2.5", "--warmup", "1")
        for key in ("tokens_per_second", "iterations_per_second", "samples_per_second", "effective_gb_per_second", "bytes_per_iteration"):
            self.assertGreater(result[key], 0, key)
        self.assertEqual(result["errors"], 0)
        self.assertEqual(result["tokens"], 6 * 2 * 40)
        # The solved acceptance s satisfies 1 + s + s^2 + s^3 = 2.5; some 190 iterations measured.
        self.assertAlmostEqual(result["accept_length"], 2.5, delta=0.5)
        self.assertEqual(len(result["acceptance_per_position"]), 3)
        for key in ("ttft_ms", "inter_token_ms"):
            self.assertGreater(result[key]["p99"], 0)
            self.assertGreaterEqual(result[key]["p99"], result[key]["p50"])
        plain = self.json("bench", "--num-requests", "4", "--rate", "50", "--output-len", "8", "--mode", "off", "--warmup", "0")
        self.assertEqual(plain["accept_length"], 1.0)
        self.assertLess(plain["bytes_per_iteration"], result["bytes_per_iteration"])
        status, _, err = self.call("bench", "--synthetic-accept-length", "9", "--num-draft-tokens", "3", "--mode", "rejection")
        self.assertEqual(status, 2)
        self.assertIn("[1, 4]", err)

    def test_verify(self):
        result = self.json("verify", "--num-prompts", "2", "--num-samples", "1024", "--seed", "3", "--greedy-tokens", "16")
        self.assertTrue(result["passed"], [t for t in result["tests"] if not t["passed"]])
        names = [t["name"] for t in result["tests"]]
        for part in ("target_only/token2", "rejection/pair1-2", "coupled/token1", "rejection/logprob_max_difference",
                     "coupled/greedy_token_differences", "coupled/token_differences_at_8"):
            self.assertTrue(any(part in name for name in names), part)
        for test in result["tests"]:
            self.assertLessEqual(test["statistic"], test["threshold"])
            self.assertGreater(test["samples"], 0)


class Weights(unittest.TestCase):
    """`bebop weights` on the bundled model; checkpoints are copies of it with other values."""

    MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models", "bebop-tiny")

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.TemporaryDirectory()
        cls.server = Server("--model", cls.MODEL, "--load-format", "auto", "--weights-root", cls.root.name)
        cls.checkpoint = os.path.join(cls.root.name, "new")
        os.mkdir(cls.checkpoint)
        cls.write(os.path.join(cls.checkpoint, "model.safetensors"), lambda name: name.endswith("norm.weight"))

    @classmethod
    def tearDownClass(cls):
        status, _ = cls.server.stop()
        cls.root.cleanup()
        assert status == 0, f"SIGTERM: exit status {status}"

    @classmethod
    def write(cls, path, changes, byte=0, drop=None):
        """The bundled checkpoint with one byte of every value of some tensors changed, and without `drop`."""
        with open(os.path.join(cls.MODEL, "model.safetensors"), "rb") as file:
            data = bytearray(file.read())
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        body = data[8 + size:]
        for name, entry in header.items():
            if name != "__metadata__" and changes(name):
                begin, end = entry["data_offsets"]
                for at in range(begin + byte, end, 4 if entry["dtype"] == "F32" else 2):
                    body[at] ^= 0x10
        if drop:
            begin, end = header.pop(drop)["data_offsets"]
            body = body[:begin] + body[end:]
            for name, entry in header.items():
                if name != "__metadata__" and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + body)

    def weights(self, *arguments, **options):
        return bebop("weights", *arguments, admin=self.server.admin, **options)

    def json(self, *arguments):
        status, out, err = self.weights(*arguments, "--json")
        self.assertEqual(status, 0, err)
        self.assertEqual(err, "", "progress is for terminals")
        return json.loads(out)

    def score(self):
        status, out, err = bebop("score", "--token-ids", "5 6 7 8 9 10", "--json", server=self.server.rollout)
        self.assertEqual(status, 0, err)
        return json.loads(out)["scores"][0]["logprobs"]

    def test_push_update_info_check(self):
        old = self.json("info")
        old_score = self.score()
        step = int(old["target_step"])
        pushed = self.json("push", self.checkpoint, "--step", str(step + 1), "--label", "first", "--in-flight", "wait")
        self.assertEqual(pushed["info"]["target_step"], str(step + 1))
        self.assertEqual(pushed["info"]["label"], "first")
        info = self.json("info")
        self.assertNotEqual(info["target_digest"], old["target_digest"])
        self.assertEqual(info["target_digest"], pushed["info"]["target_digest"])
        self.assertNotEqual(self.score(), old_score)
        check = self.json("check")
        self.assertTrue(check["target_matches"] and check["draft_matches"])
        # Back to the bundled weights, from a file of ours; then the others again, from the server's disk.
        back = self.json("push", os.path.join(self.MODEL, "model.safetensors"), "--step", str(step), "--rewind", "--base-step", str(step + 1))
        self.assertEqual(back["info"]["target_digest"], old["target_digest"])
        self.assertEqual(self.score(), old_score)
        again = self.json("update", "new", "--step", str(step + 2), "--in-flight", "abort")
        self.assertEqual(again["info"]["target_digest"], info["target_digest"])
        draft = self.json("push", self.MODEL, "--step", str(step + 3), "--components", "draft")
        self.assertEqual((draft["info"]["target_step"], draft["info"]["draft_step"]), (str(step + 2), str(step + 3)))
        status, out, _ = self.weights("info")
        self.assertEqual(status, 0)
        self.assertIn(again["info"]["target_digest"], out)
        self.assertEqual(self.json("abort"), {"update_id": ""})

    def test_a_killed_server_comes_back_with_a_true_version(self):
        """SIGKILL at moments spread over whole updates, from both sources (reliability.md, I14): weights live in memory alone, so what a restart says is
        what the checkpoint holds; files that were read are as they were. A push is stopped to see where it stands, so that some are cut for certain."""
        original = self.json("info")["target_digest"] if self.json("info")["target_step"] == "0" else None
        with open(os.path.join(self.checkpoint, "model.safetensors"), "rb") as file:
            before = file.read()
        committed = open_updates = 0
        for i in range(10):
            server = Server("--model", self.MODEL, "--load-format", "auto", "--weights-root", self.root.name)
            info = json.loads(bebop("weights", "info", "--json", admin=server.admin)[1])
            original = original or info["target_digest"]
            self.assertEqual((info["target_step"], info["draft_step"], info["target_digest"]), ("0", "0", original))
            check = json.loads(bebop("weights", "check", "--json", admin=server.admin)[1])
            self.assertTrue(check["target_matches"] and check["draft_matches"])
            command = [os.path.join(BIN, "bebop"), "weights", *(["push", self.checkpoint] if i % 2 else ["update", "new"]), "--step", "1"]
            update = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment() | {"BEBOP_ADMIN": server.admin})
            if i % 2:
                while update.poll() is None:  # on in small steps, until a part of it is there: more each time
                    time.sleep(0.004)
                    update.send_signal(signal.SIGSTOP)
                    stands = json.loads(bebop("weights", "info", "--json", admin=server.admin)[1]).get("update", {})
                    if stands and int(stands.get("received_bytes", 0)) * 10 >= int(stands["expected_bytes"]) * (i - 1):
                        open_updates += 1
                        break
                    update.send_signal(signal.SIGCONT)
            else:
                time.sleep(0.025 * i)
            server.stop(signal.SIGKILL)
            update.send_signal(signal.SIGCONT)
            out, err = update.communicate(timeout=60)
            self.assertIn(update.returncode, (0, 1, 3), err)
            committed += update.returncode == 0
        self.assertLess(committed, 10, "no update was cut")
        self.assertGreater(open_updates, 0, "no kill met an open update")
        with open(os.path.join(self.checkpoint, "model.safetensors"), "rb") as file:
            self.assertEqual(file.read(), before)

    def refused(self, code, reason, part, *arguments):
        before = self.json("info")
        status, out, err = self.weights(*arguments)
        self.assertEqual((status, out), (1, ""), err)
        self.assertRegex(err, f"^error: {code} {reason}: ")
        self.assertIn(part, err)
        self.assertEqual(err.count("\n"), 1)
        self.assertEqual(self.json("info"), before)

    def test_refusals(self):
        file = os.path.join(self.root.name, "bad.safetensors")
        with open(os.path.join(self.MODEL, "model.safetensors"), "rb") as source:
            size = int.from_bytes(source.read(8), "little")
            norm = next(name for name in json.loads(source.read(size)) if name.endswith("layers.0.input_layernorm.weight"))
        self.refused("FAILED_PRECONDITION", "STEP_NOT_NEWER", "target_step", "push", self.checkpoint, "--step", "0")
        self.refused("FAILED_PRECONDITION", "WRONG_BASE_STEP", "99", "push", self.checkpoint, "--step", "100", "--base-step", "99")
        self.write(file, lambda name: False, drop=norm)
        self.refused("INVALID_ARGUMENT", "MISSING_TENSOR", norm, "push", file, "--step", "100")
        self.refused("FAILED_PRECONDITION", "INCOMPLETE", norm, "update", "bad.safetensors", "--step", "100")
        self.refused("PERMISSION_DENIED", "OUTSIDE_ROOT", "../x", "update", "../x", "--step", "100")
        self.refused("NOT_FOUND", "NOT_FOUND", "nothing", "update", "nothing", "--step", "100")

    def test_usage(self):
        for arguments in (["push", self.checkpoint], ["push", "--step", "1"], ["push", self.checkpoint, "--step", "-1"], ["push", "/nowhere", "--step", "1"],
                          ["push", self.checkpoint, "--step", "1", "--components", "head"], ["push", self.checkpoint, "--step", "1", "--in-flight", "now"],
                          ["update", "--step", "1"], []):
            status, out, err = self.weights(*arguments)
            self.assertEqual((status, out), (2, ""), arguments)
            self.assertRegex(err, "^error: ")
        self.assertEqual(bebop("weights", "info", admin="127.0.0.1:1")[0], 3)
        self.assertEqual(self.weights("--help")[0], 0)


class ServerProcess(unittest.TestCase):
    def start_fails(self, *flags):
        started = time.time()
        result = subprocess.run([os.path.join(BIN, "bebop-server"), *flags], capture_output=True, text=True, timeout=30, env=clean_environment())
        self.assertLess(time.time() - started, 10)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertEqual(result.stdout, "")
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(errors), 1, result.stderr)
        self.assertEqual(result.stderr.splitlines()[-1], errors[0])
        return errors[0]

    def test_bad_starts(self):
        self.assertIn("--model", self.start_fails())
        self.assertIn("--bogus", self.start_fails("--model", "m", "--bogus"))
        self.assertIn("/nowhere/at/all", self.start_fails("--model", "/nowhere/at/all"))
        error = self.start_fails("--model", "m", "--host", "0.0.0.0")
        self.assertIn("0.0.0.0", error)
        self.assertIn("--insecure-no-auth", error)
        self.assertIn("--token-file", error)
        self.assertIn("/nowhere/tokens", self.start_fails("--model", "m", "--token-file", "/nowhere/tokens"))
        with tempfile.TemporaryDirectory() as directory:
            with open(os.path.join(directory, "config.json"), "w") as file:
                json.dump({**CONFIG, "hidden_act": "gelu"}, file)
            error = self.start_fails("--model", directory, "--load-format", "dummy")
            self.assertIn("hidden_act", error)
            self.assertIn("gelu", error)
            with open(os.path.join(directory, "config.json"), "w") as file:
                json.dump(CONFIG, file)
            error = self.start_fails("--model", directory, "--load-format", "dummy", "--kv-cache-bytes", "65536")
            self.assertIn("--kv-cache-bytes: 65536", error)
            error = self.start_fails("--model", directory, "--load-format", "dummy", "--max-model-len", "100000")
            self.assertIn("--max-model-len: 100000", error)

    def test_a_port_in_use_is_one_line(self):
        with tempfile.TemporaryDirectory() as directory, socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            with open(os.path.join(directory, "config.json"), "w") as file:
                json.dump(CONFIG, file)
            result = subprocess.run([os.path.join(BIN, "bebop-server"), "--model", directory, "--load-format", "dummy", "--port", port, "--admin-port", "0"],
                                    capture_output=True, text=True, timeout=60, env=clean_environment())
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stderr.splitlines()[-1], f"error: --host/--port: cannot listen on 127.0.0.1:{port}: Address already in use")
        options = re.compile(r"#.*|[a-z-]+:.*|  .*")  # what is printed before
        self.assertEqual([line for line in result.stderr.splitlines()[:-1] if not options.fullmatch(line)], [])

    def test_check_config_and_version(self):
        result = subprocess.run([os.path.join(BIN, "bebop-server"), "--model", "m", "--check-config"], capture_output=True, text=True, timeout=30,
                                env={**clean_environment(), "BEBOP_MAX_MODEL_LEN": "123"})
        self.assertEqual(result.returncode, 0)
        self.assertIn("max-model-len: 123", result.stderr)
        self.assertEqual(result.stdout, "")
        result = subprocess.run([os.path.join(BIN, "bebop-server"), "--version"], capture_output=True, text=True, timeout=30)
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout, r"^bebop-server \d+\.\d+\.\d+\n$")

    def test_drain_returns_partial_tokens(self):
        server = Server("--drain-timeout", "0.3")
        client = subprocess.Popen([os.path.join(BIN, "bebop"), "--json", "generate", "--token-ids", "1", "--ignore-eos", "-n", "64"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**clean_environment(), "BEBOP_SERVER": server.rollout})
        deadline = time.time() + 30
        while time.time() < deadline:
            _, out, _ = bebop("loads", "--json", server=server.rollout)
            if int(json.loads(out)["generated_tokens"]) > 0:
                break
            time.sleep(0.05)
        status, _ = server.stop()
        self.assertEqual(status, 0)
        out, err = client.communicate(timeout=30)
        self.assertEqual(client.returncode, 0, err)
        samples = json.loads(out)["samples"]
        self.assertEqual(len(samples), 64)  # none is lost
        self.assertTrue(any(s["finish"]["reason"] == "DRAINED" for s in samples))

    def test_pause_and_resume_on_another_server(self):
        """What a pause cuts short goes on elsewhere, from the command line alone, and is what it would have been undisturbed."""
        first, second = Server("--max-model-len", "700"), Server("--max-model-len", "900", "--speculation", "off")
        body = {"prompt_token_ids": [1, 2, 3], "num_samples": 2, "sampling": {"seed": "7"}, "stopping": {"ignore_eos": True}}

        def generate(server, request):
            return subprocess.Popen([os.path.join(BIN, "bebop"), "--json", "generate", "--requests", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True, env={**clean_environment(), "BEBOP_SERVER": server.rollout}), json.dumps(request) + "\n"

        def admin(server, *arguments):
            status, out, err = bebop("--json", *arguments, admin=server.admin)
            self.assertEqual(status, 0, err)
            return json.loads(out)

        client, line = generate(first, body)
        undisturbed = json.loads(client.communicate(line, timeout=120)[0])["samples"]
        before = int(self.loads(first)["generated_tokens"])
        client, line = generate(first, {**body, "request_id": "again"})
        client.stdin.write(line)
        client.stdin.close()
        client.stdin = None
        deadline = time.time() + 60
        while int(self.loads(first)["generated_tokens"]) < before + 50 and time.time() < deadline:
            time.sleep(0.01)
        state = admin(first, "pause", "--mode", "abort")
        self.assertTrue(state["paused"])
        self.assertEqual(state["abort_epoch"], "1")
        cut = [s for s in json.loads(client.communicate(timeout=60)[0])["samples"] if s["finish"]["reason"] == "ABORTED"]
        self.assertEqual(len(cut), state["aborted_samples"])
        self.assertTrue(cut)
        status, out, _ = bebop("pause", admin=first.admin)  # for people
        self.assertEqual(status, 0)
        self.assertIn("paused", out)
        self.assertFalse(admin(first, "resume")["paused"])
        client, line = generate(second, {"prompt_token_ids": [1, 2, 3], "resume": [s["resume_handle"] for s in cut]})
        resumed = json.loads(client.communicate(line, timeout=120)[0])["samples"]
        self.assertEqual([s["token_ids"] for s in resumed], [undisturbed[s["sample_index"]]["token_ids"] for s in resumed])
        self.assertEqual([s["sample_index"] for s in resumed], [s["sample_index"] for s in cut])
        for server in (first, second):
            self.assertEqual(server.stop()[0], 0)

    def loads(self, server):
        status, out, err = bebop("loads", "--json", server=server.rollout)
        self.assertEqual(status, 0, err)
        return json.loads(out)

    def test_steering(self):
        server = Server()
        spec = ("--admin", server.admin, "--json", "spec")
        state = json.loads(bebop(*spec, "--mode", "coupled", "--num-draft-tokens", "2")[1])
        self.assertEqual(state["speculation"], {"mode": "COUPLED", "num_draft_tokens": 2})
        self.assertEqual(json.loads(bebop(*spec)[1])["speculation"], {"mode": "COUPLED", "num_draft_tokens": 2})
        status, _, err = bebop(*spec, "--num-draft-tokens", "9")
        self.assertEqual(status, 1)
        self.assertIn("speculation.num_draft_tokens", err)
        status, _, err = bebop("flush-cache", admin=server.admin)
        self.assertEqual(status, 1)
        self.assertIn("NOT_PAUSED", err)
        asleep = json.loads(bebop("--json", "sleep", "--tags", "kv_cache", admin=server.admin)[1])
        self.assertEqual(asleep["sleeping"], ["kv_cache"])
        self.assertEqual(bebop("health", "--admin", server.admin)[0], 0)  # asleep is not ill
        self.assertEqual(json.loads(bebop("--json", "wake-up", admin=server.admin)[1])["sleeping"], [])
        for wrong in (("pause", "--mode", "stop"), ("sleep", "--tags", "disk"), ("drain", "--deadline", "soon")):
            self.assertEqual(bebop(*wrong, admin=server.admin)[0], 2, wrong)
        self.assertEqual(bebop("resume", "--timeout", "20", admin="127.0.0.1:1")[0], 3)
        drained = json.loads(bebop("--json", "drain", "--deadline", "1", admin=server.admin)[1])
        self.assertTrue(drained["draining"])
        self.assertEqual(bebop("health", "--server", server.rollout)[0], 1)
        status, _, err = bebop("generate", "--token-ids", "1", server=server.rollout)
        self.assertEqual(status, 1)
        self.assertIn("DRAINING", err)
        self.assertEqual(server.stop()[0], 0)  # the process had waited for its end

    def wait_until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), deadline, "waited in vain")
            time.sleep(0.02)

    def test_second_signal_stops_at_once(self):
        server = Server("--drain-timeout", "60")
        client = subprocess.Popen([os.path.join(BIN, "bebop"), "--json", "generate", "--token-ids", "1", "--ignore-eos", "-n", "1024"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**clean_environment(), "BEBOP_SERVER": server.rollout})
        self.wait_until(lambda: int(json.loads(bebop("loads", "--json", server=server.rollout)[1]).get("running_requests", 0)) > 0)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        self.assertIsNone(server.process.poll())  # still draining
        started = time.time()
        status, _ = server.stop(signal.SIGINT)
        self.assertLess(time.time() - started, 5)
        self.assertEqual(status, 128 + signal.SIGINT)  # the second signal's number
        client.communicate(timeout=30)
        self.assertNotEqual(client.returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
