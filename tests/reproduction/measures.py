# SPDX-License-Identifier: Apache-2.0
"""What is measured with the trained heads, all of it by bebop-server. Raw counts go into records/*.jsonl; nothing is judged here.

decode      real decoding: counts of every prompt, by head, mode, temperature and workload
score       teacher-forced overlaps of the same sequences for every head
throughput  tokens a second and a second of the server's processor time, heads in turn
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import heads
import numpy as np
import workloads
from harness import Decoding, Prompt, Server, Store, counts_of, decode, run_jobs
from heads import Head
from settings import Context

MODES = ("rejection", "target_only")
POSITION_BIN = 8  # tokens of output
ENTROPY_BIN, ENTROPY_BINS = 0.1, 30  # nats
GRID = 20  # cells a side of the boundary's histogram
SCORE_BATCH = 64  # sequences a request
SEED = 7_000_000  # of measured samples, apart from those of training


def records_path(context: Context, stage: str) -> Path:
    return context.work / "records" / f"{stage}.jsonl"


def all_heads(context: Context) -> list[Head]:
    return [heads.start_head(context), *heads.full_vocabulary(context), *heads.truncated(context)]


class Encoded:
    """The workloads' prompts as token ids, each encoded once."""

    def __init__(self, server: Server, count: int) -> None:
        self._prompts = {
            workload: [Prompt(workload, index, server.encode(text)) for index, text in enumerate(workloads.heldout(workload, count))]
            for workload in workloads.WORKLOADS
        }

    def take(self, workload: str, count: int) -> list[Prompt]:
        return self._prompts[workload][:count]


# ---- decode ----


def competed(samples: Iterable[Any], bin_of: Callable[[Any], np.ndarray], bins: int) -> dict[str, list[float]]:
    """Sums by bin over output tokens: `reached`, tokens that a draft competed for; `accepted`, those of them that were the draft; `tokens`, all;
    `entropy`, of the target's distribution at all of them. A token was competed for when it is an accepted draft (source >= 1) or the correction
    of a refused one (-1). bin_of: a sample's tokens -> bins; the last bin takes what lies beyond it."""
    reached, accepted, tokens, entropy = (np.zeros(bins) for _ in range(4))
    for sample in samples:
        where = np.minimum(bin_of(sample), bins - 1)
        drafted = (sample.token_source >= 1) | (sample.token_source == -1)
        np.add.at(reached, where, drafted)
        np.add.at(accepted, where, sample.token_source >= 1)
        np.add.at(tokens, where, 1)
        np.add.at(entropy, where, sample.entropy)
    return {"reached": reached.tolist(), "accepted": accepted.tolist(), "tokens": tokens.tolist(), "entropy": [round(value, 4) for value in entropy]}


def decode_cell(context: Context, server: Server, head: Head, prompts: list[Prompt], mode: str, temperature: float) -> dict[str, Any]:
    """Decodes one workload with the head that is loaded: one record."""
    settings = context.settings
    options = Decoding(mode=mode, num_draft_tokens=settings.num_draft_tokens, temperature=temperature, samples=settings.samples,
                       max_new_tokens=settings.max_new_tokens, seed=SEED, token_source=True)
    start = time.monotonic()
    groups = [group for _, group in decode(server, prompts, options)]
    samples = [sample for group in groups for sample in group.samples]
    return {
        **head.label, "mode": mode, "temperature": temperature, "workload": prompts[0].workload, "prompts": [counts_of(group) for group in groups],
        "by_place": competed(samples, lambda sample: np.arange(len(sample.token_ids)) // POSITION_BIN, -(-settings.max_new_tokens // POSITION_BIN)),
        "by_entropy": competed(samples, lambda sample: (sample.entropy / ENTROPY_BIN).astype(int), ENTROPY_BINS),
        "seconds": round(time.monotonic() - start, 3),
    }


def decode_plan(context: Context) -> list[tuple[Head, list[tuple[str, float, str, int]]]]:
    """Every head with its cells (mode, temperature, workload, number of prompts)."""
    settings = context.settings
    at_one = [(mode, 1.0, workload, settings.prompts) for mode in MODES for workload in workloads.WORKLOADS]
    elsewhere = [(mode, temperature, workload, settings.temperature_prompts) for temperature in settings.temperatures for mode in MODES
                 for workload in workloads.IN_DOMAIN]
    plan = [(head, at_one if head.loss == heads.START else at_one + elsewhere) for head in (heads.start_head(context), *heads.full_vocabulary(context))]
    return plan + [(head, [("rejection", 1.0, workload, settings.prompts) for workload in workloads.WORKLOADS]) for head in heads.truncated(context)]


def cell_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("loss", "seed", "top_k", "mode", "temperature", "workload"))


def measure_decoding(context: Context) -> None:
    """All cells that are not there yet. A server keeps running; heads come and go by weight updates of the draft layer alone."""
    store = Store(records_path(context, "decode"))
    done = {cell_key(record) for record in store.records}

    def work(server: Server, head: Head, cells: list[tuple[str, float, str, int]], encoded: Encoded) -> None:
        start = time.monotonic()
        for mode, temperature, workload, count in cells:
            store.append(decode_cell(context, server, head, encoded.take(workload, count), mode, temperature))
        context.say(f"decode {head.name}: {len(cells)} cells in {time.monotonic() - start:.0f} s")

    run_plan(context, [(head, [cell for cell in cells if (*head.label.values(), *cell[:3]) not in done]) for head, cells in decode_plan(context)], work)
    store.close()


def check_trained(context: Context, wanted: Iterable[Head]) -> None:
    """FileNotFoundError: the file of one of them is not there."""
    for head in wanted:
        if not head.path(context).exists():
            raise FileNotFoundError(f"{head.path(context)}: stage train has not run")


def run_plan(context: Context, plan: list[tuple[Head, list[Any]]], work: Callable[[Server, Head, list[Any], Encoded], None]) -> None:
    """Starts the servers, loads every head that has cells left into one of them and calls work(server, head, its cells, prompts)."""
    settings = context.settings
    plan = [(head, cells) for head, cells in plan if cells]
    if not plan:
        return
    check_trained(context, [head for head, _ in plan])

    def job_of(head: Head, cells: list[Any]) -> Callable[[Server], None]:
        def job(server: Server) -> None:
            server.load_draft(head.path(context))
            work(server, head, cells, encoded)

        return job

    with heads.open_servers(context) as servers:
        encoded = Encoded(servers[0], max(settings.prompts, settings.temperature_prompts))
        run_jobs(servers, [job_of(head, cells) for head, cells in plan])


# ---- score ----


def sequences_of(context: Context) -> dict[str, list[tuple[int, list[int]]]]:
    """Per workload (number of prompt tokens, all tokens) of samples at temperature 1 without drafting: the same for every head."""
    store = Store(records_path(context, "sequences"))
    have = {record["workload"]: record["sequences"] for record in store.records}
    if len(have) < len(workloads.WORKLOADS):
        options = Decoding(mode="off", samples=1, max_new_tokens=context.settings.max_new_tokens, seed=2 * SEED, entropy=False, spec_detail=False)
        with heads.open_server(context) as server:
            encoded = Encoded(server, context.settings.score_sequences)
            for workload in workloads.WORKLOADS:
                if workload not in have:
                    groups = decode(server, encoded.take(workload, context.settings.score_sequences), options)
                    have[workload] = [[len(prompt.token_ids), prompt.token_ids + group.samples[0].token_ids.tolist()] for prompt, group in groups]
                    store.append({"workload": workload, "sequences": have[workload]})
    store.close()
    return have


def score_cell(server: Server, head: Head, workload: str, sequences: list[tuple[int, list[int]]], temperature: float, depth: int) -> dict[str, Any]:
    """Teacher-forced sums of one workload: per draft position and sequence, and how positions lie about the boundary.

    A base counts when the token that its first draft follows was generated; draft k of it is judged k tokens later. rows, overlap, argmax
    [sequence][k]: number of drafts, sum of sum_v min(p, q), sum of p(argmax q). wins: drafts with d_TV < 1 - p(argmax q). chains,
    accept_length [sequence]: bases with all drafts in the sequence, sum of 1 + a_1 + a_1 a_2 + ... grid [d_TV][1 - p(argmax q)]: of draft 1.
    """
    rows, overlaps, argmaxes, wins, chains, lengths = ([] for _ in range(6))
    entropy = tokens = 0.0
    grid = np.zeros((GRID, GRID), np.int64)
    for begin in range(0, len(sequences), SCORE_BATCH):
        batch = sequences[begin : begin + SCORE_BATCH]
        scores = server.client.score([ids for _, ids in batch], temperature=temperature, entropy=True, draft_depth=depth)
        for (prompt_tokens, ids), score in zip(batch, scores, strict=True):
            first = [prompt_tokens + draft.depth for draft in score.draft]  # position that counts first
            overlap = [draft.overlap[at - draft.start :].astype(np.float64) for draft, at in zip(score.draft, first)]
            argmax = [draft.argmax_prob[at - draft.start :].astype(np.float64) for draft, at in zip(score.draft, first)]
            rows.append([len(values) for values in overlap])
            overlaps.append([round(float(values.sum()), 5) for values in overlap])
            argmaxes.append([round(float(values.sum()), 5) for values in argmax])
            wins.append([int((one > other).sum()) for one, other in zip(overlap, argmax)])
            whole = len(overlap[-1])  # bases whose last draft lies in the sequence
            products = np.cumprod([values[:whole] for values in overlap], axis=0)
            chains.append(whole)
            lengths.append(round(float(whole + products.sum()), 5))
            generated = score.entropy[prompt_tokens - 1 :]  # entry 0 is position 1
            entropy, tokens = entropy + float(generated.sum(dtype=np.float64)), tokens + len(generated)
            cells = [np.minimum((np.clip(1 - values[0], 0, 1) * GRID).astype(int), GRID - 1) for values in (overlap, argmax)]
            np.add.at(grid, tuple(cells), 1)
    return {**head.label, "workload": workload, "temperature": temperature, "rows": rows, "overlap": overlaps, "argmax": argmaxes, "wins": wins,
            "chains": chains, "accept_length": lengths, "entropy": round(entropy, 4), "tokens": tokens, "grid": grid.tolist()}


def measure_scores(context: Context) -> None:
    sequences = sequences_of(context)
    store = Store(records_path(context, "score"))
    done = {(record["loss"], record["seed"], record["top_k"], record["workload"], record["temperature"]) for record in store.records}
    settings = context.settings

    def work(server: Server, head: Head, cells: list[tuple[str, float]], _: Encoded) -> None:
        for workload, temperature in cells:
            store.append(score_cell(server, head, workload, sequences[workload], temperature, settings.num_draft_tokens))

    cells = [(workload, temperature) for temperature in settings.score_temperatures for workload in workloads.WORKLOADS]
    scored = (heads.start_head(context), *heads.full_vocabulary(context))
    run_plan(context, [(head, [cell for cell in cells if (*head.label.values(), *cell) not in done]) for head in scored], work)
    store.close()
    context.say(f"score: {len(store.records)} cells")


# ---- throughput ----


def processor_seconds(process_id: int) -> float | None:
    """Of all threads of a process; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_throughput(context: Context) -> None:
    """One server; in every round each head decodes each workload once, in an order that rotates, so that what else the machine does falls on all."""
    settings = context.settings
    store = Store(records_path(context, "throughput"))
    done = {(record["round"], record["workload"], record["loss"], record["seed"], record["top_k"], record["mode"]) for record in store.records}
    seed = 0
    contestants = [(head, "rejection") for head in all_heads(context) if head.seed == seed] + [(heads.start_head(context), "off")]
    plan = []
    for number in range(settings.throughput_rounds):
        for workload in workloads.IN_DOMAIN:
            shift = (number * len(contestants)) // settings.throughput_rounds
            plan += [(number, workload, head, mode) for head, mode in contestants[shift:] + contestants[:shift]]
    plan = [entry for entry in plan if (entry[0], entry[1], *entry[2].label.values(), entry[3]) not in done]
    if not plan:
        return
    check_trained(context, [entry[2] for entry in plan])
    with heads.open_server(context) as server:
        encoded = Encoded(server, settings.throughput_prompts)
        warm = Decoding(samples=settings.samples, max_new_tokens=settings.max_new_tokens, entropy=False, spec_detail=False)
        list(decode(server, encoded.take(workloads.IN_DOMAIN[0], settings.throughput_prompts), warm))
        for number, workload, head, mode in plan:
            server.load_draft(head.path(context))
            options = Decoding(mode=mode, num_draft_tokens=settings.num_draft_tokens, samples=settings.samples, max_new_tokens=settings.max_new_tokens,
                               seed=SEED + number * 10_000, entropy=False, spec_detail=False)
            before, start = processor_seconds(server.process_id), time.monotonic()
            groups = [group for _, group in decode(server, encoded.take(workload, settings.throughput_prompts), options)]
            seconds, after = time.monotonic() - start, processor_seconds(server.process_id)
            counts = [counts_of(group) for group in groups]
            store.append({
                "round": number, "workload": workload, **head.label, "mode": mode, "tokens": sum(count["tokens"] for count in counts),
                "steps": sum(count["steps"] for count in counts), "accepted": sum(sum(count["accepted"]) for count in counts), "seconds": round(seconds, 4),
                "processor_seconds": None if after is None else round(after - before, 4), "load": os.getloadavg()[0],
            })
    store.close()
    context.say(f"throughput: {len(store.records)} runs")
