#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of tasks.py: checkers accept right answers and reject wrong ones, answers are right, splits are disjoint."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import tempfile
import unittest
from pathlib import Path

import tasks

TOKENIZER = Path(__file__).parent / "bebop-tiny" / "tokenizer.json"


def _problems(task: str, count: int, split: str = "train") -> list[tasks.Problem]:
    rng = random.Random(f"test/{task}/{split}")
    return [tasks.draw_problem(task, rng, split) for _ in range(count)]


class ReferenceTest(unittest.TestCase):
    def test_reference_completions_are_solved(self) -> None:
        for task in tasks.TASKS:
            for problem in _problems(task, 300):
                for turn in range(problem.num_turns):
                    meta = {**problem.meta, "turn": turn}
                    self.assertTrue(tasks.check(task, meta, problem.completion(turn)), problem.text)

    def test_worked_equations_are_true(self) -> None:
        """Every `expression=value` of a worked math step holds."""
        for problem in _problems("math", 500):
            for left, right in re.findall(r"(\d[\d+*-]*)=(\d+)(?![\d+*-])", problem.completion()):
                self.assertEqual(eval(left), int(right), problem.text)

    def test_code_answers_are_what_python_prints(self) -> None:
        for problem in _problems("code", 300):
            program = problem.meta["key"].removeprefix("code:")
            self.assertIn(program, problem.prompt())
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, {})
            self.assertEqual(int(printed.getvalue()), problem.meta["answer"], program)

    def test_math_answers_follow_from_the_key(self) -> None:
        for problem in _problems("math", 500):
            expression = problem.meta["key"].removeprefix("math:").split(",")[-1]
            self.assertEqual(eval(expression), problem.meta["answer"])

    def test_segments_alternate_and_end_with_the_end_token(self) -> None:
        for task in tasks.TASKS:
            for problem in _problems(task, 50):
                self.assertEqual([s.trained for s in problem.segments], [False, True] * problem.num_turns)
                for turn in range(problem.num_turns):
                    self.assertTrue(problem.prompt(turn).endswith(tasks.ASSISTANT))
                    self.assertTrue(problem.completion(turn).endswith(tasks.IM_END))


class CheckerTest(unittest.TestCase):
    def test_number(self) -> None:
        meta = {"answer": 42}
        for text in ("Answer: 42", "So 42.\nAnswer: 42<|im_end|>", "x\nAnswer: 42<|im_end|>\nAnswer: 7", "\nAnswer: 42 "):
            self.assertTrue(tasks.check("math", meta, text), text)
        for text in ("", "42", "Answer: 41", "Answer: 042x", "Answer: 42 or 43", "Answer: 42\nmore", "The Answer: 42",
                     "Answer: 4<|im_end|>2", "Answer: 7<|im_end|>\nAnswer: 42"):  # fmt: skip
            self.assertFalse(tasks.check("math", meta, text), text)

    def test_negative_number(self) -> None:
        self.assertTrue(tasks.check("code", {"answer": -3}, "Answer: -3<|im_end|>"))
        self.assertFalse(tasks.check("code", {"answer": -3}, "Answer: 3<|im_end|>"))

    def test_off_by_one_references_are_rejected(self) -> None:
        for task in ("math", "code"):
            for problem in _problems(task, 100):
                answer = problem.meta["answer"]
                wrong = problem.completion().replace(f"Answer: {answer}", f"Answer: {answer + 1}")
                self.assertFalse(tasks.check(task, problem.meta, wrong))

    def test_call(self) -> None:
        meta = {"answer": 21, "calls": [["price", "lamp"], ["calc", "3*7"], ["calc", "9-4"]], "responses": [7, 21, 5]}

        def call(body: str, turn: int, before: str = "Let me see. ", after: str = "<|im_end|>") -> bool:
            return tasks.check("tools", {**meta, "turn": turn}, f"{before}<tool_call>{body}</tool_call>{after}")

        lamp = '{"name":"price","arguments":{"item":"lamp"}}'
        self.assertTrue(call(lamp, 0))
        self.assertTrue(call('{"arguments": {"item": "lamp"}, "name": "price"}', 0, before="", after=""))
        self.assertTrue(call('{"name":"calc","arguments":{"expr":"3*7"}}', 1))
        self.assertTrue(call('{"name":"calc","arguments":{"expr":"7*3"}}', 1))
        self.assertTrue(call('{"name":"calc","arguments":{"expr":"9-4"}}', 2))
        self.assertFalse(call('{"name":"calc","arguments":{"expr":"4-9"}}', 2))
        self.assertFalse(call('{"name":"calc","arguments":{"expr":"3*8"}}', 1))
        self.assertFalse(call('{"name":"stock","arguments":{"item":"lamp"}}', 0))
        self.assertFalse(call('{"name":"price","arguments":{"item":"desk"}}', 0))
        self.assertFalse(call('{"name":"price","arguments":{"item":"lamp","n":1}}', 0))
        self.assertFalse(call('{"name":"price","arguments":{"item":["lamp"]}}', 0))
        self.assertFalse(call('{"name":["price"],"arguments":{"item":"lamp"}}', 0))
        self.assertFalse(call('{"name":"price"', 0))
        self.assertFalse(call("[]", 0))
        self.assertFalse(call(lamp, 0, after=" and so on"))
        self.assertFalse(call(lamp, 0, before=f"<tool_call>{lamp}</tool_call>"))
        self.assertFalse(tasks.check("tools", {**meta, "turn": 0}, "Answer: 21<|im_end|>"))
        self.assertTrue(tasks.check("tools", {**meta, "turn": 3}, "It is 21.\nAnswer: 21<|im_end|>"))
        self.assertFalse(tasks.check("tools", {**meta, "turn": 3}, f"<tool_call>{lamp}</tool_call>\nAnswer: 21<|im_end|>"))

    def test_episode(self) -> None:
        """Playing the reference turns through `next_turn` rebuilds the reference prompts."""
        for problem in _problems("tools", 50):
            meta, prompt = {**problem.meta, "turn": 0}, problem.prompt(0)
            for turn in range(problem.num_turns - 1):
                following = tasks.next_turn(meta, prompt, problem.completion(turn))
                assert following is not None
                meta, prompt = following
                self.assertEqual(prompt, problem.prompt(turn + 1))
            self.assertIsNone(tasks.next_turn(meta, prompt, problem.completion(problem.num_turns - 1)))
            self.assertIsNone(tasks.next_turn({**problem.meta, "turn": 0}, problem.prompt(0), "no call<|im_end|>"))


class SplitTest(unittest.TestCase):
    def test_splits_are_disjoint_and_sized(self) -> None:
        for task in tasks.TASKS:
            train = {problem.meta["key"] for problem in _problems(task, 2000)}
            heldout = {problem.meta["key"] for problem in _problems(task, 500, "heldout")}
            self.assertFalse(train & heldout)
            self.assertTrue(all(tasks.is_heldout(key) for key in heldout))
        share = sum(tasks.is_heldout(f"math:{a}+{b}") for a in range(100) for b in range(100)) / 10000
        self.assertAlmostEqual(share, 1 / tasks.HELDOUT_ONE_IN, delta=0.01)

    def test_wording_does_not_change_the_split(self) -> None:
        """The key names the operands and not the question's words."""
        self.assertTrue(all(p.meta["key"].split(":")[1] in p.text for p in _problems("math", 200) if p.meta["kind"] == "add2"))

    def test_draws_depend_on_the_seed_alone(self) -> None:
        first, again = (list(tasks.draw_prompts("math", 20, 7, "heldout")) for _ in range(2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, list(tasks.draw_prompts("math", 20, 8, "heldout")))


class CommandLineTest(unittest.TestCase):
    def _run(self, *arguments: str) -> tuple[int, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            status = tasks.main(arguments)
        return status, out.getvalue()

    def test_prompts_then_check(self) -> None:
        status, text = self._run("prompts", "--task", "math", "--n", "4", "--seed", "3")
        self.assertEqual(status, 0)
        records = [json.loads(line) for line in text.splitlines()]
        self.assertEqual(len(records), 4)
        with tempfile.TemporaryDirectory() as folder:
            prompts, results = Path(folder, "prompts"), Path(folder, "results")
            prompts.write_text(text)
            lines = [{"id": record["id"], "completion": f"Answer: {record['meta']['answer']}"} for record in records[:3]]
            lines.append({"id": records[3]["id"], "completions": ["Answer: -1", "nothing"]})
            results.write_text("".join(json.dumps(line) + "\n" for line in lines))
            status, out = self._run("check", "--prompts", str(prompts), "--results", str(results), "--json")
            self.assertEqual(json.loads(out), {"math": {"samples": 5, "solved": 3, "solved_percent": 60.0}})
            results.write_text('{"id":"other","completion":""}\n')
            self.assertEqual(self._run("check", "--prompts", str(prompts), "--results", str(results))[0], 2)

    def test_results_as_token_ids(self) -> None:
        """A GenerateResult line is read through tokenizer.json."""
        tokenizer = tasks.BytePairTokenizer(str(TOKENIZER))
        line = json.dumps({"request_id": "r", "samples": [{"token_ids": tokenizer.encode("Answer: 42<|im_end|>")}]})
        self.assertEqual(list(tasks.read_results([line], tokenizer)), [("r", ["Answer: 42<|im_end|>"])])
        with self.assertRaises(ValueError):
            list(tasks.read_results([line]))


class TokenizerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.tokenizer = tasks.BytePairTokenizer(str(TOKENIZER))

    def test_round_trip(self) -> None:
        for task in tasks.TASKS:
            for problem in _problems(task, 50):
                self.assertEqual(self.tokenizer.decode(self.tokenizer.encode(problem.text)), problem.text)

    def test_segments_tokenize_alone_as_together(self) -> None:
        """Training tokenizes segment by segment, a server the whole prompt; both must give the same ids."""
        for task in tasks.TASKS:
            for problem in _problems(task, 100):
                apart = [index for segment in problem.segments for index in self.tokenizer.encode(segment.text)]
                self.assertEqual(apart, self.tokenizer.encode(problem.text))

    def test_special_tokens_are_single_and_digits_stand_alone(self) -> None:
        for token in tasks.SPECIAL_TOKENS:
            self.assertEqual(len(self.tokenizer.encode(token)), 1)
        self.assertEqual(len(self.tokenizer.encode("12345")), 5)
        with self.assertRaises(ValueError):
            self.tokenizer.encode("\u00e9")


if __name__ == "__main__":
    unittest.main()
