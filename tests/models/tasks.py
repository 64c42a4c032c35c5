#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Synthetic tasks with exact checkers: arithmetic, small programs, tool calls.

The bundled model `bebop-tiny` is trained on these tasks, the evaluation samples them, and a learner can use `check` as
its reward. Only the Python standard library is needed.

Three tasks:

    math   addition, subtraction, multiplication, chains and word problems, solved in worked steps
    code   a program of a few lines, traced statement by statement
    tools  a multi-turn transcript: look up prices or stock, calculate, answer

Chat format (every `<|...|>` and `<tool...>` below is one token of tokenizer.json):

    <|im_start|>system\n...<|im_end|>\n          (tools only)
    <|im_start|>user\n...<|im_end|>\n
    <|im_start|>assistant\n...<|im_end|>\n

A prompt ends with "<|im_start|>assistant\n". A completion ends with "<|im_end|>", the end-of-sequence token.

Held-out split: a problem's `key` names what is asked (operands, program, items and values) but not how it is worded.
One key in ten, chosen by SHA-256, is held out, so no wording of a held-out problem is ever trained on.

Worked steps are worded at random on purpose: the model's entropy at temperature 1 is then real entropy over equally good
continuations, as in a language model, and not only uncertainty about digits.

Command line (JSON lines on stdout):

    tasks.py prompts --task math|code|tools|all --n N --seed S --split heldout|train [--tokenizer F]
    tasks.py check --prompts FILE --results FILE [--tokenizer F] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

TASKS = ("math", "code", "tools")
SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 10

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, TOOL_RESPONSE_END = "<tool_response>", "</tool_response>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE, TOOL_RESPONSE_END)

ASSISTANT = IM_START + "assistant\n"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of transcript. `trained` pieces are what the assistant says, up to and including `<|im_end|>`."""

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem with one reference transcript.

    `meta` is JSON-serialisable and holds all that `check` needs: `kind`, `key`, `answer`, and for tools also `calls` and
    `responses`. `segments` alternate between given text and assistant text, starting with given text.
    """

    task: str
    meta: dict[str, Any]
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def num_turns(self) -> int:
        """Number of assistant turns in the reference transcript."""
        return sum(segment.trained for segment in self.segments)

    def prompt(self, turn: int = 0) -> str:
        """The text up to assistant turn `turn` (0-based), earlier turns taken from the reference transcript."""
        return "".join(segment.text for segment in self.segments[: 2 * turn + 1])

    def completion(self, turn: int = 0) -> str:
        """The reference text of assistant turn `turn`."""
        return self.segments[2 * turn + 1].text


class Voice:
    """A random source that also counts the nats of its wording choices (`nats`), for the recipe's entropy estimate."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nats = 0.0

    def pick(self, *options: str) -> str:
        """One of `options`, all equally likely."""
        self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]

    def chance(self, probability: float) -> bool:
        """True with `probability`."""
        self.nats -= probability * math.log(probability) + (1 - probability) * math.log1p(-probability)
        return self.rng.random() < probability


def is_heldout(key: str) -> bool:
    """Whether the problem named by `key` belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == 0


def _user(text: str) -> str:
    return f"{IM_START}user\n{text}{IM_END}\n"


def _single_turn(task: str, kind: str, key: str, question: str, worked: str, answer: int) -> Problem:
    meta = {"kind": kind, "key": f"{task}:{key}", "answer": answer}
    completion = f"{worked.strip()}\nAnswer: {answer}{IM_END}"
    return Problem(task, meta, (Segment(_user(question) + ASSISTANT, False), Segment(completion, True)))


# ----------------------------------------------------------------------------------------------------------------------
# Math
# ----------------------------------------------------------------------------------------------------------------------


def _result(voice: Voice, expression: str, value: int) -> str:
    """A closing sentence that states `expression` = `value`."""
    lead = voice.pick("So ", "Thus ", "Hence ", "In the end ", "As a result ", "Finally ", "This means ", "Now ")
    form = voice.pick(
        f"{expression}={value}. ",
        f"we get {value}. ",
        f"the result is {value}. ",
        f"it is {value}. ",
        f"{expression} is {value}. ",
        f"we have {value}. ",
        f"the answer must be {value}. ",
    )
    return lead + form


def _opening(voice: Voice, expression: str) -> str:
    """An optional first sentence."""
    if voice.chance(0.4):
        return ""
    if voice.chance(0.4):
        lead = voice.pick("We need", "Let us find", "The task is", "I want", "We look for", "They ask for")
        return f"{lead} {expression}. "
    lead = voice.pick("Let us", "We can", "I will", "We should", "It is best to", "Now we")
    return f"{lead} {voice.pick('do it in steps', 'go step by step', 'work it out', 'take it slowly', 'split the work', 'do the parts')}. "


_PLACES = (("ones", "units", "last digits"), ("tens", "tens digits", "next digits"), ("hundreds", "first digits"))


def _add_columns(voice: Voice, a: int, b: int) -> str:
    """Column addition from the ones up, with carries."""
    steps, carry, place = [], 0, 0
    while a or b:
        da, db = a % 10, b % 10
        total = da + db + carry
        terms = f"{da}+{db}" + (f"+{carry}" if carry else "")
        name = voice.pick(*_PLACES[place])
        step = voice.pick(f"The {name} give ", f"{name.capitalize()}: ", f"Add the {name}: ", f"For the {name}, ")
        step += f"{terms}={total}"
        carry = total // 10
        if carry:
            verb = voice.pick("write", "keep", "put", "note")
            step += voice.pick(", ", "; ", ", so ") + f"{verb} {total % 10}" + voice.pick(" and carry 1", ", carry 1")
        steps.append(step + ". ")
        a, b, place = a // 10, b // 10, place + 1
    return "".join(steps)


def _add_parts(voice: Voice, a: int, b: int) -> str:
    """Addition by parts: add the tens of b, then its ones."""
    tens, ones = b // 10 * 10, b % 10
    join = voice.pick("then ", "and then ", "next ", "after that ")
    if not ones or not tens:
        return ""
    if voice.chance(0.5):
        return f"{voice.pick('First', 'Take', 'Now', 'Start with')} {a}+{tens}={a + tens}, {join}{a + tens}+{ones}={a + b}. "
    return f"{voice.pick('First', 'Take', 'Now', 'Start with')} {a}+{ones}={a + ones}, {join}{a + ones}+{tens}={a + b}. "


def _sub_parts(voice: Voice, a: int, b: int) -> str:
    """Subtraction by parts: take away the tens of b, then its ones."""
    tens, ones = b // 10 * 10, b % 10
    if not ones or not tens:
        return ""
    verb = voice.pick("take away", "remove", "subtract", "drop", "take off")
    lead = voice.pick("First ", "To start, ", "At first ", "Now ", "Here we ")
    link = voice.pick(": ", ", so ", " and get ", ", giving ")
    join = voice.pick(", then ", ", and then ", ", next ", ", after that ", ". Then ", "; now ")
    if voice.chance(0.3):
        return f"{lead}{verb} {ones}{link}{a}-{ones}={a - ones}{join}{a - ones}-{tens}={a - b}. "
    return f"{lead}{verb} {tens}{link}{a}-{tens}={a - tens}{join}{a - tens}-{ones}={a - b}. "


def _mul_parts(voice: Voice, a: int, b: int) -> str:
    """Two-digit a times one-digit b: split a into tens and ones."""
    tens, ones = a // 10 * 10, a % 10
    if not ones or not tens:
        return ""
    text = voice.pick(
        f"Split {a} into {tens} and {ones}: ",
        f"Use {a}={tens}+{ones}: ",
        f"Break {a} as {tens}+{ones}: ",
        "Multiply by parts: ",
        "Take the parts: ",
    )
    parts = [f"{tens}*{b}={tens * b}", f"{ones}*{b}={ones * b}"]
    if voice.chance(0.3):
        parts.reverse()
    text += parts[0] + voice.pick(", ", " and ", "; ", ", then ", ". Next ", ", also ") + parts[1] + ". "
    x, y = tens * b, ones * b
    return text + voice.pick("Add them: ", "The sum: ", "Now ", "Then ", "Together ", "We add: ", "Both make ") + f"{x}+{y}={x + y}. "


def _check_step(voice: Voice, text: str) -> str:
    """An optional check of the result, stated as an equation."""
    if voice.chance(0.15):
        return voice.pick("Check: ", "To check, ", "Indeed ", "And ") + text + ". "
    return ""


def _worked(voice: Voice, op: str, a: int, b: int) -> str:
    """Worked steps of a op b, ending with a sentence that states the value."""
    if op == "+":
        parts = _add_parts(voice, a, b) if voice.chance(0.4) else _add_columns(voice, a, b)
        return parts + _result(voice, f"{a}+{b}", a + b) + _check_step(voice, f"{a + b}-{b}={a}")
    if op == "-":
        return _sub_parts(voice, a, b) + _result(voice, f"{a}-{b}", a - b) + _check_step(voice, f"{a - b}+{b}={a}")
    return _mul_parts(voice, a, b) + _result(voice, f"{a}*{b}", a * b)


def _math_question(voice: Voice, expression: str) -> str:
    return voice.pick(
        f"What is {expression}?",
        f"Compute {expression}.",
        f"{expression}=?",
        f"Find {expression}.",
        f"Please work out {expression}.",
    )


def _math_binary(kind: str, op: str, draw: Callable[[random.Random], tuple[int, int]]) -> Callable[[Voice], Problem]:
    def make(voice: Voice) -> Problem:
        a, b = draw(voice.rng)
        expression = f"{a}{op}{b}"
        value = {"+": a + b, "-": a - b, "*": a * b}[op]
        question = _math_question(voice, expression)
        voice.nats = 0.0
        worked = _opening(voice, expression) + _worked(voice, op, a, b)
        return _single_turn("math", kind, expression, question, worked, value)

    return make


def _draw_sub(rng: random.Random) -> tuple[int, int]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return max(a, b), min(a, b)


def _make_chain(voice: Voice) -> Problem:
    """a*b+c or a*b-c with one-digit a, b and two-digit c."""
    rng = voice.rng
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    op = rng.choice("+-")
    c = rng.randint(10, 99) if op == "+" or a * b <= 10 else rng.randint(2, a * b)
    if op == "-" and a * b <= 10:
        op = "+"
    expression = f"{a}*{b}{op}{c}"
    question = _math_question(voice, expression)
    voice.nats = 0.0
    product = a * b
    value = product + c if op == "+" else product - c
    worked = _opening(voice, expression)
    worked += voice.pick("First ", "The product is ", "Multiply first: ", "Start with ", "We have ")
    worked += f"{a}*{b}={product}. " + _worked(voice, op, product, c)
    return _single_turn("math", "chain", expression, question, worked, value)


_NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia", "Leo", "Zoe")
_THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "cups", "shells")


def _make_word(voice: Voice) -> Problem:
    """A word problem of two steps: some bags of things, then more or fewer of them."""
    rng = voice.rng
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    bags, each = rng.randint(2, 9), rng.randint(2, 9)
    product = bags * each
    gain = product < 12 or rng.random() < 0.5
    other = rng.randint(10, 60) if gain else rng.randint(2, product)
    value = product + other if gain else product - other
    change = voice.pick("buys", "finds", "gets") if gain else voice.pick("sells", "loses", "gives away")
    question = f"{name} has {bags} {voice.pick('bags', 'boxes')} with {each} {thing} each and {change} {other}"
    question += " more. How many now?" if gain else ". How many are left?"
    voice.nats = 0.0
    worked = voice.pick("At first there are ", f"{name} starts with ", "In all there are ", f"{name} has ", "We count ")
    worked += f"{bags}*{each}={product}" + voice.pick(f" {thing}. ", ". ", " to begin with. ")
    worked += voice.pick(f"{name} {change} {other}, so ", "Then ", "Now ", f"With {other} {'more' if gain else 'fewer'}, ", "After that ")
    op = "+" if gain else "-"
    worked += f"we {'add' if gain else 'subtract'} {other}: {product}{op}{other}={value}. " if voice.chance(0.3) else f"{product}{op}{other}={value}. "
    if voice.chance(0.4):
        worked += voice.pick(f"{name} has {value} {thing}. ", f"So {value} {thing}. ", f"There are {value} {thing}. ", f"That is {value}. ")
    return _single_turn("math", "word", f"{name},{thing},{bags}*{each}{op}{other}", question, worked, value)


# ----------------------------------------------------------------------------------------------------------------------
# Code
# ----------------------------------------------------------------------------------------------------------------------

_VARIABLES = ("a", "b", "c", "x", "y", "n", "s", "t")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    ">": lambda x, y: x > y,
    "<": lambda x, y: x < y,
    "==": lambda x, y: x == y,
}


def _code_question(voice: Voice, program: str) -> str:
    lead = voice.pick("What does this print?", "Run this program.", "What is the output?", "Trace this code.")
    return f"{lead}\n{program}"


def _set(voice: Voice, name: str, value: int) -> str:
    """Says that `name` starts as `value`."""
    return voice.pick(
        f"{name} is {value}. ",
        f"{name}={value}. ",
        f"Set {name} to {value}. ",
        f"{name} starts as {value}. ",
        f"First {name}={value}. ",
    )


def _assign(voice: Voice, name: str, expression: str, value: int) -> str:
    """Says that `name` becomes `expression` = `value`."""
    lead = voice.pick("", "Then ", "Now ", "Next ", "So ", "After that ", "Here ")
    form = voice.pick("=", " is ", " becomes ", " turns into ", " gets ", " is set to ")
    return f"{lead}{name}{form}{expression}={value}. "


def _prints(voice: Voice, name: str, value: int) -> str:
    lead = voice.pick("So ", "At the end ", "Finally ", "Thus ", "In the end ", "Hence ")
    return lead + voice.pick(
        f"it prints {value}.",
        f"the output is {value}.",
        f"{name} is {value}.",
        f"print shows {value}.",
        f"{value} is printed.",
        "we are done.",
    )


def _step(rng: random.Random, value: int) -> tuple[str, int, int]:
    """An operator and operand that keep `value` in 0..99: (op, operand, new value)."""
    choices = []
    if value < 90:
        choices.append("+")
    if value >= 10:
        choices.append("-")
    if value <= 12:
        choices.append("*")
    op = rng.choice(choices)
    if op == "+":
        operand = rng.randint(1, 9)
        return op, operand, value + operand
    if op == "-":
        operand = rng.randint(1, 9)
        return op, operand, value - operand
    operand = rng.randint(2, 5)
    return op, operand, value * operand


def _make_assign(voice: Voice) -> Problem:
    """Two variables, three or four statements."""
    rng = voice.rng
    first, second = rng.sample(_VARIABLES, 2)
    values = {first: rng.randint(2, 20)}
    lines = [f"{first}={values[first]}"]
    op, operand, values[second] = _step(rng, values[first])
    lines.append(f"{second}={first}{op}{operand}")
    trace: list[tuple[str, str, int]] = [(second, f"{values[first]}{op}{operand}", values[second])]
    if rng.random() < 0.5:
        op, operand, new = _step(rng, values[second])
        lines.append(f"{second}={second}{op}{operand}")
        trace.append((second, f"{values[second]}{op}{operand}", new))
        values[second] = new
    total = values[first] + values[second]
    lines.append(f"{first}={first}+{second}")
    trace.append((first, f"{values[first]}+{values[second]}", total))
    lines.append(f"print({first})")
    program = "\n".join(lines)
    question = _code_question(voice, program)
    voice.nats = 0.0
    worked = _set(voice, first, values[first]) + "".join(_assign(voice, *entry) for entry in trace)
    return _single_turn("code", "assign", program, question, worked + _prints(voice, first, total), total)


def _make_if(voice: Voice) -> Problem:
    """One variable, a step, a comparison with two branches."""
    rng = voice.rng
    name = rng.choice(_VARIABLES)
    start = rng.randint(2, 20)
    op, operand, value = _step(rng, start)
    compare = rng.choice(tuple(_COMPARE)[:2])
    limit = max(1, value + rng.choice((-7, -4, -2, -1, 1, 2, 4, 7)))
    holds = _COMPARE[compare](value, limit)
    yes, no = rng.randint(1, 9), rng.randint(1, 9)
    program = (
        f"{name}={start}\n{name}={name}{op}{operand}\nif {name}{compare}{limit}:\n  {name}={name}+{yes}\n"
        f"else:\n  {name}={name}-{no}\nprint({name})"
    )
    question = _code_question(voice, program)
    voice.nats = 0.0
    result = value + yes if holds else value - no
    worked = _set(voice, name, start) + _assign(voice, name, f"{start}{op}{operand}", value)
    if holds:
        worked += f"{value}{compare}{limit} " + voice.pick("holds", "is true", "is met", "is right")
        worked += voice.pick(", so ", " and ", ": ", "; ") + f"{name}={value}+{yes}={result}. "
    else:
        worked += f"{value}{compare}{limit} " + voice.pick("fails", "is false", "is not met", "is wrong")
        worked += voice.pick(", so ", " and ", ": ", "; ") + f"{name}={value}-{no}={result}. "
    return _single_turn("code", "if", program, question, worked + _prints(voice, name, result), result)


def _make_loop(voice: Voice) -> Problem:
    """An accumulator over a short range."""
    rng = voice.rng
    name = rng.choice(_VARIABLES)
    start, rounds, form = rng.randint(0, 20), rng.randint(2, 4), rng.choice(("const", "index", "scaled"))
    factor = rng.randint(2, 9)
    term = {"const": str(factor), "index": "i", "scaled": f"i*{factor}"}[form]
    program = f"{name}={start}\nfor i in range({rounds}):\n  {name}={name}+{term}\nprint({name})"
    question = _code_question(voice, program)
    voice.nats = 0.0
    value = start
    worked = _set(voice, name, start)
    if voice.chance(0.4):
        worked += voice.pick(f"The loop runs {rounds} times. ", f"There are {rounds} rounds. ", f"i goes to {rounds - 1}. ", f"We loop {rounds} times. ")
    for i in range(rounds):
        add = {"const": factor, "index": i, "scaled": i * factor}[form]
        worked += voice.pick(f"i={i}: ", f"With i={i}, ", f"For i={i} ", f"At i={i}, ", f"Round {i}: ")
        worked += f"{name}={value}+{add}={value + add}" + voice.pick(". ", "; ")
        value += add
    return _single_turn("code", "loop", program, question, worked + _prints(voice, name, value), value)


# ----------------------------------------------------------------------------------------------------------------------
# Tools
# ----------------------------------------------------------------------------------------------------------------------

_ITEMS = (
    "lamp", "chair", "desk", "phone", "clock", "shirt", "hat", "shoe", "bag", "ring", "cup", "plate",
    "bike", "ball", "book", "pen", "radio", "watch", "table", "mirror", "bottle", "jacket", "glove", "scarf",
)  # fmt: skip
_SYSTEM = f"{IM_START}system\nTools: price(item), stock(item), calc(expr).{IM_END}\n"


def _call_text(name: str, argument: str) -> str:
    key = "expr" if name == "calc" else "item"
    return TOOL_CALL + json.dumps({"name": name, "arguments": {key: argument}}, separators=(",", ":")) + TOOL_CALL_END


def _response_text(value: int) -> str:
    """What the environment appends after a tool call: the response turn and the next assistant header."""
    return "\n" + _user(f"{TOOL_RESPONSE}{value}{TOOL_RESPONSE_END}") + ASSISTANT


def _call_remark(voice: Voice, name: str, argument: str) -> str:
    """An optional sentence or two before a call."""
    if voice.chance(0.15):
        return ""
    lead = voice.pick("I will ", "Let me ", "Now I ", "We can ", "First I ", "I should ")
    if name == "calc":
        verb = voice.pick("calculate", "compute", "work out", "find", "get", "do")
        what = voice.pick(" that", " the result", f" {argument}", " the numbers", " this sum", " it")
    else:
        verb = voice.pick("look up", "check", "ask for", "find", "get", "read")
        what = voice.pick(f" the {name}", f" the {argument}", f" the {name} of the {argument}", " that", " this", f" its {name}")
    tail = voice.pick(". ", " first. ", " with a tool. ", " now. ", " for you. ")
    return lead + verb + what + tail


def _final_remark(voice: Voice, value: int, subject: str) -> str:
    lead = voice.pick("So ", "Thus ", "Now I know: ", "As it turns out, ", "Good, ", "Well, ", "From the tools, ")
    return lead + voice.pick(
        f"the {subject} is {value}.",
        f"it is {value}.",
        f"the tool says {value}.",
        f"the result is {value}.",
        f"that makes {value}.",
        f"I found {value}.",
        f"we have {value}.",
    )


def _make_tools(voice: Voice) -> Problem:
    """A shop question that needs one to three tool calls."""
    rng = voice.rng
    kind = rng.choice(("lookup", "total", "pair", "left"))
    item = rng.choice(_ITEMS)
    calls: list[tuple[str, str]] = []
    responses: list[int] = []
    if kind == "lookup":
        tool = rng.choice(("price", "stock"))
        value = rng.randint(2, 99)
        calls, responses = [(tool, item)], [value]
        answer, subject, key = value, tool, f"{tool},{item},{value}"
        if tool == "price":
            question = voice.pick(f"What is the price of a {item}?", f"How much is a {item}?", f"What does a {item} cost?")
        else:
            question = voice.pick(f"How many {item}s are in stock?", f"What is the stock of {item}s?", f"How many {item}s do we have?")
    elif kind == "total":
        count, price = rng.randint(2, 9), rng.randint(2, 30)
        answer, subject, key = count * price, "total", f"{item},{count},{price}"
        calls, responses = [("price", item), ("calc", f"{count}*{price}")], [price, answer]
        question = voice.pick(f"What do {count} {item}s cost?", f"How much are {count} {item}s?", f"I want {count} {item}s. What is the total?")
    elif kind == "pair":
        other = rng.choice([name for name in _ITEMS if name != item])
        price, other_price = rng.randint(2, 49), rng.randint(2, 49)
        answer, subject, key = price + other_price, "sum", f"{item},{other},{price},{other_price}"
        calls = [("price", item), ("price", other), ("calc", f"{price}+{other_price}")]
        responses = [price, other_price, answer]
        question = voice.pick(f"What do a {item} and a {other} cost?", f"How much are a {item} and a {other}?", f"I want a {item} and a {other}. What is the sum?")
    else:
        stock = rng.randint(12, 99)
        sold = rng.randint(2, stock - 1)
        answer, subject, key = stock - sold, "rest", f"{item},{stock},{sold}"
        calls, responses = [("stock", item), ("calc", f"{stock}-{sold}")], [stock, answer]
        question = voice.pick(f"If we sell {sold} {item}s, how many are left?", f"We ship {sold} {item}s. How many stay?", f"How many {item}s are left after {sold} go?")
    voice.nats = 0.0
    segments = [Segment(_SYSTEM + _user(question) + ASSISTANT, False)]
    for call, response in zip(calls, responses, strict=True):
        segments.append(Segment(_call_remark(voice, *call) + _call_text(*call) + IM_END, True))
        segments.append(Segment(_response_text(response), False))
    segments.append(Segment(f"{_final_remark(voice, answer, subject)}\nAnswer: {answer}{IM_END}", True))
    meta = {
        "kind": kind,
        "key": f"tools:{kind}:{key}",
        "answer": answer,
        "calls": [list(call) for call in calls],
        "responses": responses,
    }
    return Problem("tools", meta, tuple(segments))


# ----------------------------------------------------------------------------------------------------------------------
# Drawing problems
# ----------------------------------------------------------------------------------------------------------------------

_MAKERS: dict[str, tuple[tuple[int, Callable[[Voice], Problem]], ...]] = {
    "math": (
        (4, _math_binary("add2", "+", lambda rng: (rng.randint(10, 99), rng.randint(10, 99)))),
        (4, _math_binary("sub2", "-", _draw_sub)),
        (3, _math_binary("add3", "+", lambda rng: (rng.randint(100, 999), rng.randint(100, 999)))),
        (3, _math_binary("mul", "*", lambda rng: (rng.randint(11, 99), rng.randint(2, 9)))),
        (3, _make_chain),
        (3, _make_word),
    ),
    "code": ((1, _make_assign), (1, _make_if), (1, _make_loop)),
    "tools": ((1, _make_tools),),
}


def draw_problem(task: str, rng: random.Random, split: str = "train", voice: Voice | None = None) -> Problem:
    """One random problem of `task` from `split`. `voice`, when given, must wrap `rng` and receives the wording nats."""
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"unknown task {task!r} or split {split!r}")
    voice = voice or Voice(rng)
    weights, makers = zip(*_MAKERS[task], strict=True)
    while True:
        problem = rng.choices(makers, weights)[0](voice)
        if is_heldout(problem.meta["key"]) == (split == "heldout"):
            return problem


def draw_prompts(task: str, count: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """`count` prompt records `{id, task, prompt, meta}`; tools prompts start at a random turn (`meta.turn`)."""
    rng = random.Random(f"{task}/{split}/{seed}")
    for index in range(count):
        problem = draw_problem(task, rng, split)
        turn = rng.randrange(problem.num_turns)
        yield {
            "id": f"{task}-{split}-{seed}-{index}",
            "task": task,
            "prompt": problem.prompt(turn),
            "meta": {**problem.meta, "turn": turn},
        }


# ----------------------------------------------------------------------------------------------------------------------
# Checking
# ----------------------------------------------------------------------------------------------------------------------

_ANSWER = re.compile(r"(?:^|\n)Answer: (-?\d{1,9})\s*\Z")
_BINARY = re.compile(r"(\d{1,6})([-+*])(\d{1,6})")


def _strip_end(completion: str) -> str:
    """The text up to the first end-of-sequence token."""
    return completion.split(IM_END, 1)[0]


def parse_answer(completion: str) -> int | None:
    """The number of the last line `Answer: N`, or None when the completion does not end with one."""
    match = _ANSWER.search(_strip_end(completion))
    return int(match.group(1)) if match else None


def parse_call(completion: str) -> tuple[str, str] | None:
    """(tool, argument) of the one tool call that ends the completion, or None when there is not exactly that."""
    text = _strip_end(completion)
    if text.count(TOOL_CALL) != 1 or not text.rstrip().endswith(TOOL_CALL_END):
        return None
    body = text.split(TOOL_CALL, 1)[1].rstrip()[: -len(TOOL_CALL_END)]
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    arguments = call["arguments"]
    if call["name"] not in ("price", "stock", "calc") or len(arguments) != 1:
        return None
    ((key, value),) = arguments.items()
    if key != ("expr" if call["name"] == "calc" else "item") or not isinstance(value, str):
        return None
    return call["name"], value


def _same_call(got: tuple[str, str] | None, want: Sequence[str]) -> bool:
    """Equal calls; `calc` may swap the operands of + and *."""
    if got is None or got[0] != want[0]:
        return False
    if got[1] == want[1]:
        return True
    if got[0] != "calc":
        return False
    a, b = _BINARY.fullmatch(got[1]), _BINARY.fullmatch(want[1])
    return bool(a and b and a.group(2) == b.group(2) in "+*" and (a.group(1), a.group(3)) == (b.group(3), b.group(1)))


def check(task: str, meta: dict[str, Any], completion: str) -> bool:
    """Whether `completion` solves the prompt described by `meta`. Exact; the wording of the steps is free."""
    if task == "tools" and meta.get("turn", 0) < len(meta["calls"]):
        return _same_call(parse_call(completion), meta["calls"][meta.get("turn", 0)])
    return TOOL_CALL not in _strip_end(completion) and parse_answer(completion) == meta["answer"]


def next_turn(meta: dict[str, Any], prompt: str, completion: str) -> tuple[dict[str, Any], str] | None:
    """Plays the environment of a tools problem for one turn.

    Returns (meta, prompt) of the next assistant turn when `completion` is the right call, else None: the episode is over,
    and `check(task, meta, completion)` of its last turn says whether it was solved.
    """
    turn = meta.get("turn", 0)
    if turn >= len(meta["calls"]) or not check("tools", meta, completion):
        return None
    return {**meta, "turn": turn + 1}, prompt + _strip_end(completion) + IM_END + _response_text(meta["responses"][turn])


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE vocabularies use for the 256 bytes, mapped back to the bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in kept}
    moved = [byte for byte in range(256) if byte not in kept]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(moved)}


class BytePairTokenizer:
    """A plain byte-level BPE over tokenizer.json, enough to run these tasks without any package.

    Encodes ASCII text only (the standard library has no Unicode letter classes); special tokens are parsed and, when
    decoding, kept. Immutable after construction.
    """

    # The pattern of train_tokenizer.py with its Unicode classes narrowed to ASCII.
    _SPLIT = re.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
        from_char = _byte_alphabet()
        self._to_char = {byte: char for char, byte in from_char.items()}
        self._vocabulary: dict[str, int] = spec["model"]["vocab"]
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
        self._ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
        self._specials: dict[str, int] = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
        self._special = re.compile("(" + "|".join(map(re.escape, self._specials)) + ")")
        self._bytes = {
            index: bytes(from_char[char] for char in token)
            for token, index in self._vocabulary.items()
            if token not in self._specials
        }
        self._bytes.update({index: token.encode() for token, index in self._specials.items()})

    def encode(self, text: str) -> list[int]:
        """Token ids of ASCII `text`."""
        if not text.isascii():
            raise ValueError("only ASCII text can be encoded here")
        ids: list[int] = []
        for part in self._special.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
            else:
                for word in self._SPLIT.findall(part):
                    ids += self._merge([self._to_char[byte] for byte in word.encode()])
        return ids

    def _merge(self, symbols: list[str]) -> list[int]:
        """Applies merges in order of rank, leftmost first, until none is left."""
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, math.inf))
            if best not in self._ranks:
                break
            index = pairs.index(best)
            symbols[index : index + 2] = [best[0] + best[1]]
        return [self._vocabulary[symbol] for symbol in symbols]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of `token_ids`. Ids past the tokenizer's last one are padding of the embedding and have no text."""
        return b"".join(self._bytes.get(int(index), b"") for index in token_ids).decode("utf-8", errors="replace")


def read_results(lines: Iterable[str], tokenizer: BytePairTokenizer | None = None) -> Iterator[tuple[str, list[str]]]:
    """(id, completions) of each result line.

    A line is `{"id", "completion"}`, `{"id", "completions": [...]}`, or a `GenerateResult` (`request_id`, `samples[]` with
    `token_ids`, which needs `tokenizer`).
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = json.loads(line)
        name = record.get("id") or record.get("request_id")
        if "completion" in record:
            yield name, [record["completion"]]
        elif "completions" in record:
            yield name, record["completions"]
        elif "samples" in record:
            if tokenizer is None:
                raise ValueError(f"line {number} holds token ids: --tokenizer is required")
            yield name, [tokenizer.decode(sample["token_ids"]) for sample in record["samples"]]
        else:
            raise ValueError(f"line {number} has none of completion, completions, samples")


def score_results(prompts: Iterable[dict[str, Any]], results: Iterable[tuple[str, list[str]]]) -> dict[str, dict[str, float]]:
    """Per task: number of samples, number solved and `solved_percent`. A result with an unknown id is an error."""
    by_id = {prompt["id"]: prompt for prompt in prompts}
    counts: dict[str, list[int]] = {}
    for name, completions in results:
        if name not in by_id:
            raise ValueError(f"result for unknown prompt id {name!r}")
        prompt = by_id[name]
        count = counts.setdefault(prompt["task"], [0, 0])
        count[0] += len(completions)
        count[1] += sum(check(prompt["task"], prompt["meta"], completion) for completion in completions)
    return {
        task: {"samples": total, "solved": solved, "solved_percent": round(100.0 * solved / max(total, 1), 2)}
        for task, (total, solved) in sorted(counts.items())
    }


def _open(path: str):
    return sys.stdin if path == "-" else open(path, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prompts and exact checkers of the synthetic tasks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    prompts = verbs.add_parser("prompts", help="print prompt records as JSON lines")
    prompts.add_argument("--task", choices=(*TASKS, "all"), default="all")
    prompts.add_argument("--n", type=int, default=100, help="prompts per task")
    prompts.add_argument("--seed", type=int, default=0)
    prompts.add_argument("--split", choices=SPLITS, default="heldout")
    prompts.add_argument("--tokenizer", help="tokenizer.json, to add `prompt_token_ids`")
    prompts.add_argument("--format", choices=("records", "requests"), default="records",
                         help="requests: lines for `bebop rollouts --prompts`, with token ids alone; needs --tokenizer")
    checker = verbs.add_parser("check", help="print solved %% of results")
    checker.add_argument("--prompts", required=True, help="file from `prompts`")
    checker.add_argument("--results", required=True, help="JSON lines of results, - for stdin")
    checker.add_argument("--tokenizer", help="tokenizer.json, to read results that hold token ids")
    checker.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)

    if arguments.verb == "prompts":
        if arguments.format == "requests" and not arguments.tokenizer:
            parser.error("--format requests needs --tokenizer")
        try:
            tokenizer = BytePairTokenizer(arguments.tokenizer) if arguments.tokenizer else None
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {arguments.tokenizer}: {error}", file=sys.stderr)
            return 2
        for task in TASKS if arguments.task == "all" else (arguments.task,):
            for record in draw_prompts(task, arguments.n, arguments.seed, arguments.split):
                if tokenizer:
                    record["prompt_token_ids"] = tokenizer.encode(record["prompt"])
                if arguments.format == "requests":
                    record = {"request_id": record["id"], "prompt_token_ids": record["prompt_token_ids"]}
                print(json.dumps(record))
        return 0
    try:
        tokenizer = BytePairTokenizer(arguments.tokenizer) if arguments.tokenizer else None
        with _open(arguments.prompts) as prompt_file, _open(arguments.results) as result_file:
            records = [json.loads(line) for line in prompt_file if line.strip()]
            scores = score_results(records, read_results(result_file, tokenizer))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(scores))
    else:
        for task, score in scores.items():
            print(f"{task:6} solved {score['solved_percent']:6.2f} %  ({score['solved']} of {score['samples']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
