# SPDX-License-Identifier: Apache-2.0
"""From raw records to numbers, tables and plots. Nothing is measured here, so it can be repeated in seconds.

Acceptance in percent is accepted drafts / drafts, which is (accept length - 1) / num_draft_tokens; alpha_i is accepted / reached at draft position i.
Differences to CE are taken seed by seed (same rollouts, same order, same prompts and seeds of decoding).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import estimates
import heads
import numpy as np
import plots
import rl_stage
import tables
import workloads
from estimates import Estimate, over_seeds
from harness import read_records
from measures import MODES, records_path
from plots import NAMES
from settings import Context

# Table 2 of the paper: acceptance (%) of CE, and differences to it; rejection, 3 drafts, Qwen3.5-35A3B. Its workloads are not ours.
PAPER_WORKLOADS = ("Math", "Code", "SWE", "Agent", "MT-Bench")
PAPER = {
    "ce": (75.0, 71.3, 75.1, 90.3, 65.3), "kl": (0.0, 0.0, 0.2, 0.2, 0.0), "reverse_kl": (1.3, 1.0, -0.2, 1.0, 0.5), "tv": (2.4, 2.5, 3.3, 5.2, 1.4),
    "e2e_tv": (3.0, 3.3, 8.0, 6.7, 2.3),
}
# Fig. 8 of the paper, in tokens of accept length a nat: "TO", whatever the loss, and "RS + CE" -1.68, "RS + TV" -0.06. Models and tasks of its own.
PAPER_SLOPES = {("ce", "target_only"): -1.68, ("tv", "target_only"): -1.68, ("ce", "rejection"): -1.68, ("tv", "rejection"): -0.06}
FLAGGED = 4.0  # |z| of decoding's acceptance against the summed overlap
# A z needs variance to be measured by: prompts, and refused drafts.
LEAST_PROMPTS, LEAST_REFUSALS = 20, 20


class Cells:
    """Decoding records by (loss, top_k, mode, temperature, workload), one a seed."""

    def __init__(self, context: Context) -> None:
        self.settings = context.settings
        self.losses = context.settings.losses
        self.records = read(context, "decode")
        grouped: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
        for record in self.records:
            key = tuple(record[name] for name in ("loss", "top_k", "mode", "temperature", "workload"))
            grouped[key][record["seed"]] = record
        self._grouped = {key: [by_seed[seed] for seed in sorted(by_seed)] for key, by_seed in grouped.items()}

    def get(self, loss: str, mode: str, workload: str, temperature: float = 1.0, top_k: int = 0) -> list[dict[str, Any]]:
        """Records in order of seed. KeyError: not measured."""
        key = (loss, top_k, mode, temperature, workload)
        if key not in self._grouped:
            raise KeyError(f"decode: no records of {key}; run the stage")
        return self._grouped[key]

    def per_prompt(self, records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> np.ndarray:
        """[seeds, prompts] of a value of the counts."""
        return np.array([[value(counts) for counts in record["prompts"]] for record in records])


def read(context: Context, stage: str) -> list[dict[str, Any]]:
    path = records_path(context, stage)
    if not path.exists():
        raise FileNotFoundError(f"{path}: stage {stage} has not run")
    return read_records(path)


def accepted(counts: dict[str, Any]) -> float:
    return float(sum(counts["accepted"]))


def drafts(counts: dict[str, Any]) -> float:
    return float(counts["drafts"])


def ratio_by_seed(cells: Cells, records: Sequence[dict[str, Any]], top: Callable[..., float], bottom: Callable[..., float]) -> np.ndarray:
    """sum(top) / sum(bottom) of every seed."""
    return cells.per_prompt(records, top).sum(1) / cells.per_prompt(records, bottom).sum(1)


def acceptance(cells: Cells, *where: Any, **more: Any) -> np.ndarray:
    """Accepted drafts / drafts in percent, one a seed."""
    return 100 * ratio_by_seed(cells, cells.get(*where, **more), accepted, drafts)


# ---- a: acceptance by loss and workload ----


def acceptance_table(cells: Cells, mode: str) -> tuple[dict[str, Any], str]:
    numbers: dict[str, Any] = {}
    rows = []
    for loss in cells.losses:
        row = [NAMES[loss]]
        for workload in workloads.WORKLOADS:
            mine, base = cells.get(loss, mode, workload), cells.get("ce", mode, workload)
            value, reference = acceptance(cells, loss, mode, workload), acceptance(cells, "ce", mode, workload)
            entry = {"acceptance": over_seeds(value).as_dict(), "by_seed": value.tolist()}
            if loss == "ce":
                row.append(tables.with_half(over_seeds(value)))
            else:
                gain = over_seeds(value - reference)
                prompts = estimates.bootstrap_difference(cells.per_prompt(mine, accepted), cells.per_prompt(mine, drafts),
                                                         cells.per_prompt(base, accepted), cells.per_prompt(base, drafts)).scaled(100)
                entry |= {"gain_over_seeds": gain.as_dict(), "gain_over_prompts": prompts.as_dict()}
                row.append(f"{tables.with_half(gain, sign=True)} [{tables.number(prompts.low, sign=True)}, {tables.number(prompts.high, sign=True)}]")
            numbers[f"{loss}/{workload}"] = entry
        if mode == "rejection":
            paper = PAPER.get(loss)
            row += ["–"] * len(PAPER_WORKLOADS) if paper is None else [tables.number(value, sign=loss != "ce") for value in paper]
        rows.append(row)
    start = ["start (before training)"] + [tables.number(acceptance(cells, "start", mode, workload)[0]) for workload in workloads.WORKLOADS]
    rows.append(start + ["–"] * (len(PAPER_WORKLOADS) if mode == "rejection" else 0))
    header = ["loss", *workloads.WORKLOADS] + ([f"paper: {name}" for name in PAPER_WORKLOADS] if mode == "rejection" else [])
    return numbers, tables.table(header, rows)


def spread_under_target_only(cells: Cells) -> tuple[dict[str, Any], str]:
    """How far apart losses are under each rule: largest minus smallest mean over seeds, per workload."""
    numbers: dict[str, Any] = {}
    rows = []
    for mode in MODES:
        row = [mode]
        for workload in workloads.WORKLOADS:
            means = [float(acceptance(cells, loss, mode, workload).mean()) for loss in cells.losses]
            numbers[f"{mode}/{workload}"] = max(means) - min(means)
            row.append(tables.number(max(means) - min(means)))
        rows.append(row)
    return numbers, tables.table(["largest minus smallest, points", *workloads.WORKLOADS], rows)


# ---- b: by draft position ----


def position_table(cells: Cells) -> tuple[dict[str, Any], str]:
    """alpha_i of every loss, mean over the three tasks; differences to CE seed by seed."""
    steps = range(cells.settings.num_draft_tokens)
    numbers: dict[str, Any] = {"by_task": {}}
    values: dict[str, list[np.ndarray]] = {}
    for loss in cells.losses:
        values[loss] = []
        for i in steps:
            by_task = []
            for task in workloads.IN_DOMAIN:
                alpha = 100 * ratio_by_seed(cells, cells.get(loss, "rejection", task), lambda counts, i=i: counts["accepted"][i],
                                            lambda counts, i=i: counts["drafted"][i])
                numbers["by_task"][f"{loss}/{task}/{i + 1}"] = over_seeds(alpha).as_dict()
                by_task.append(alpha)
            values[loss].append(np.mean(by_task, axis=0))
    rows = []
    for loss in cells.losses:
        row = [NAMES[loss]]
        for i in steps:
            gain = over_seeds(values[loss][i] - values["ce"][i])
            numbers[f"{loss}/{i + 1}"] = {"alpha": over_seeds(values[loss][i]).as_dict(), "gain": gain.as_dict()}
            row.append(tables.with_half(over_seeds(values[loss][i])) + ("" if loss == "ce" else f" ({tables.with_half(gain, sign=True)})"))
        rows.append(row)
    return numbers, tables.table(["loss", *(f"α{i + 1}, %" for i in steps)], rows)


# ---- the two counts of one thing ----


def consistency_table(cells: Cells, scores: list[dict[str, Any]]) -> tuple[dict[str, Any], str, str]:
    """Accepted drafts against the summed overlap of the same drafts: z of every head, mode, workload and position at temperature 1.

    Given what was drafted before, a reached draft is accepted with probability `overlap`, so a prompt's accepted - overlap has expectation 0 and
    prompts are independent (each has its own seed): the z of their sum needs no variance but theirs.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    flagged, left_out = [], 0
    for record in cells.records:
        if record["temperature"] != 1.0:
            continue
        for i in range(cells.settings.num_draft_tokens):
            refused = sum(counts["drafted"][i] - counts["accepted"][i] for counts in record["prompts"])
            if refused < LEAST_REFUSALS or len(record["prompts"]) < LEAST_PROMPTS:
                left_out += 1
                continue
            z = estimates.self_normalized([counts["accepted"][i] - counts["overlap"][i] for counts in record["prompts"]])
            groups[record["mode"], record["workload"]].append(z)
            if abs(z) > FLAGGED:
                flagged.append({**{name: record[name] for name in ("loss", "seed", "top_k", "mode", "workload")}, "position": i + 1, "z": z})
    rows, everything = [], []
    for (mode, workload), values in sorted(groups.items()):
        everything += values
        rows.append([mode, workload, str(len(values)), tables.number(float(np.mean(values)), 2, True), tables.number(float(np.std(values)), 2),
                     tables.number(float(np.max(np.abs(values))), 2)])
    if everything:
        rows.append(["all", "", str(len(everything)), tables.number(float(np.mean(everything)), 2, True), tables.number(float(np.std(everything)), 2),
                     tables.number(float(np.max(np.abs(everything))), 2)])
    first = tables.table(["mode", "workload", "z-scores", "mean", "standard deviation", "largest, absolute"], rows)

    beside = []
    for loss in ("start", *cells.losses):
        for i in range(cells.settings.num_draft_tokens):
            counted, summed = [], []
            for task in workloads.IN_DOMAIN:
                records = cells.get(loss, "rejection", task)
                counted.append(ratio_by_seed(cells, records, lambda counts, i=i: counts["accepted"][i], lambda counts, i=i: counts["drafted"][i]).mean())
                summed.append(ratio_by_seed(cells, records, lambda counts, i=i: counts["overlap"][i], lambda counts, i=i: counts["drafted"][i]).mean())
            forced = [np.sum([row[i] for row in record["overlap"]]) / np.sum([row[i] for row in record["rows"]]) for record in scores
                      if record["loss"] == loss and record["top_k"] == 0 and record["temperature"] == 1.0 and record["workload"] in workloads.IN_DOMAIN]
            beside.append((loss, i + 1, 100 * float(np.mean(counted)), 100 * float(np.mean(summed)), 100 * float(np.mean(forced))))
    second = tables.table(["loss", "position", "accepted, %", "overlap of the same drafts, %", "teacher-forced overlap, %"],
                          [[NAMES[loss], str(i), *(tables.number(value) for value in values)] for loss, i, *values in beside])
    numbers = {"flagged": flagged, "left_out": left_out, "z": {"/".join(key): values for key, values in groups.items()}, "beside": beside}
    return numbers, first, second


# ---- c, d: entropy and temperature ----


def temperatures_of(cells: Cells) -> list[float]:
    return sorted({1.0, *cells.settings.temperatures})


def entropy_points(cells: Cells, loss: str, mode: str) -> np.ndarray:
    """[seeds, temperatures, tasks, 3]: entropy (nats a token), accept length, acceptance in percent, of the same prompts at every temperature."""
    count = cells.settings.temperature_prompts
    points = []
    for temperature, task in itertools.product(temperatures_of(cells), workloads.IN_DOMAIN):
        by_seed = []
        for record in cells.get(loss, mode, task, temperature):
            prompts = record["prompts"][:count]
            total = {name: sum(counts[name] for counts in prompts) for name in ("entropy", "tokens", "steps", "drafts")}
            hits = sum(map(accepted, prompts))
            by_seed.append((total["entropy"] / total["tokens"], 1 + hits / total["steps"], 100 * hits / total["drafts"]))
        points.append(by_seed)
    shape = (len(temperatures_of(cells)), len(workloads.IN_DOMAIN), cells.settings.seeds, 3)
    return np.array(points).reshape(shape).transpose(2, 0, 1, 3)


def entropy_table(cells: Cells) -> tuple[dict[str, Any], str]:
    """Slope of accept length over entropy, an intercept a task, temperature being what moves the entropy."""
    numbers: dict[str, Any] = {}
    rows = []
    for loss in cells.losses:
        row = [NAMES[loss]]
        for mode in MODES:
            points = entropy_points(cells, loss, mode)
            task = np.broadcast_to(np.arange(points.shape[2]), points.shape[1:3]).ravel()
            result = over_seeds([estimates.slope(seed[..., 0].ravel(), seed[..., 1].ravel(), task) for seed in points])
            numbers[f"{loss}/{mode}"] = {"slope": result.as_dict(), "points": points.mean(0).tolist()}
            paper = PAPER_SLOPES.get((loss, mode))
            row += [tables.with_half(result, 2, True), "–" if paper is None else tables.number(paper, 2)]
        rows.append(row)
    numbers["temperatures"] = temperatures_of(cells)
    return numbers, tables.table(["loss", *itertools.chain(*((f"{mode}, tokens a nat", "paper") for mode in MODES))], rows)


def token_entropy_table(cells: Cells) -> tuple[dict[str, Any], str]:
    """At temperature 1: slope of acceptance over the target's entropy at the token that a draft competed for, an intercept a task."""
    numbers: dict[str, Any] = {}
    rows = []
    for loss in cells.losses:
        row = [NAMES[loss]]
        for mode in MODES:
            tasks = [cells.get(loss, mode, task) for task in workloads.IN_DOMAIN]
            slopes = []
            for by_task in zip(*tasks):  # one seed
                x, y, weights, groups = ([] for _ in range(4))
                for number, record in enumerate(by_task):
                    bins = {name: np.array(values) for name, values in record["by_entropy"].items()}
                    here = bins["reached"] > 0
                    x.append(bins["entropy"][here] / bins["tokens"][here])
                    y.append(100 * bins["accepted"][here] / bins["reached"][here])
                    weights.append(bins["reached"][here])
                    groups.append(np.full(here.sum(), number))
                slopes.append(estimates.slope(*(np.concatenate(column) for column in (x, y, groups, weights))))
            total = {name: np.sum([record["by_entropy"][name] for by_seed in tasks for record in by_seed], axis=0)
                     for name in ("reached", "accepted", "tokens", "entropy")}
            enough = total["reached"] >= 50
            numbers[f"{loss}/{mode}"] = {
                "slope": over_seeds(slopes).as_dict(), "entropy": (total["entropy"][enough] / total["tokens"][enough]).tolist(),
                "acceptance": (100 * total["accepted"][enough] / total["reached"][enough]).tolist(), "reached": total["reached"][enough].tolist(),
            }
            row.append(tables.with_half(over_seeds(slopes), sign=True))
        rows.append(row)
    return numbers, tables.table(["loss", *(f"{mode}, points a nat" for mode in MODES)], rows)


def temperature_table(cells: Cells) -> tuple[dict[str, Any], str]:
    """Acceptance by temperature, mean over the three tasks."""
    numbers: dict[str, Any] = {"temperatures": temperatures_of(cells)}
    rows = []
    for mode, loss in itertools.product(MODES, cells.losses):
        points = entropy_points(cells, loss, mode)[..., 2].mean(2)  # [seeds, temperatures]
        values = [over_seeds(points[:, index]) for index in range(points.shape[1])]
        numbers[f"{loss}/{mode}"] = [value.as_dict() for value in values]
        rows.append([mode, NAMES[loss], *(tables.with_half(value) for value in values)])
    entropies = np.mean([entropy_points(cells, loss, mode)[..., 0].mean((0, 2)) for mode in MODES for loss in cells.losses], axis=0)
    numbers["entropy"] = entropies.tolist()
    rows.append(["", "entropy, nats", *(tables.number(value, 3) for value in entropies)])
    return numbers, tables.table(["mode", "loss", *(f"T = {value:g}" for value in temperatures_of(cells))], rows)


def output_position_numbers(cells: Cells) -> dict[str, Any]:
    """Acceptance (%) of the drafts that competed for a token, and entropy, by the token's place in the output; bins of all seeds together."""
    numbers: dict[str, Any] = {}
    for mode, loss, task in itertools.product(MODES, cells.losses, workloads.IN_DOMAIN):
        total = {name: np.sum([record["by_place"][name] for record in cells.get(loss, mode, task)], axis=0)
                 for name in ("reached", "accepted", "tokens", "entropy")}
        with np.errstate(invalid="ignore"):
            numbers[f"{loss}/{mode}/{task}"] = {
                "reached": total["reached"].tolist(), "acceptance": (100 * total["accepted"] / total["reached"]).tolist(),
                "entropy": (total["entropy"] / total["tokens"]).tolist(),
            }
    return numbers


# ---- e: the boundary between the rules ----


def boundary_table(cells: Cells, scores: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """d_TV and 1 - p(argmax q), teacher-forced over all draft positions, beside what decoding did at draft 1."""
    numbers: dict[str, Any] = {"points": [], "grid": {}}
    decoded: dict[tuple[str, str], float] = {}
    for loss, workload in itertools.product(cells.losses, workloads.WORKLOADS):
        by_mode = [ratio_by_seed(cells, cells.get(loss, mode, workload), lambda counts: counts["accepted"][0], lambda counts: counts["drafted"][0]).mean()
                   for mode in MODES]
        decoded[loss, workload] = 100 * float(by_mode[0] - by_mode[1])
    grouped: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for record in scores:
        if record["loss"] in cells.losses:
            grouped[record["loss"], record["workload"], record["temperature"]].append(record)
    rows, agree, total = [], 0, 0
    for (loss, workload, temperature), records in sorted(grouped.items()):
        by_seed = []
        for record in records:
            count, overlap, argmax, wins = (np.sum(record[name], axis=0) for name in ("rows", "overlap", "argmax", "wins"))
            by_seed.append((1 - overlap.sum() / count.sum(), 1 - argmax.sum() / count.sum(), wins.sum() / count.sum(), (overlap[0] - argmax[0]) / count[0]))
        distance, missed, share, first = (over_seeds([seed[i] for seed in by_seed]) for i in range(4))
        point = {"loss": loss, "workload": workload, "temperature": temperature, "distance": distance.as_dict(), "missed": missed.as_dict(),
                 "share": share.as_dict()}
        if temperature == 1.0:
            difference = decoded[loss, workload]
            point["decoded"] = difference
            total += 1
            agree += (difference > 0) == (first.mean > 0)
            key = workload
            grid = np.sum([record["grid"] for record in records], axis=0)
            numbers["grid"][key] = (np.array(numbers["grid"].get(key, 0)) + grid).tolist()
            rows.append([workload, NAMES[loss], tables.with_half(distance, 3), tables.with_half(missed, 3), tables.number(100 * share.mean, 0),
                         tables.number(100 * first.mean, 1, True), tables.number(difference, 1, True)])
        numbers["points"].append(point)
    numbers |= {"agree": agree, "total": total}
    rows.sort(key=lambda row: workloads.WORKLOADS.index(row[0]))
    header = ["workload", "loss", "d_TV", "1 − p(argmax q)", "drafts with d_TV smaller, %", "teacher-forced α1 of rejection − target-only, points", "decoded, points"]
    return numbers, tables.table(header, rows)


# ---- f: truncated TV ----


def top_k_table(context: Context, cells: Cells) -> tuple[dict[str, Any], str]:
    """Acceptance after training TV on the target's K most likely tokens alone, against full-vocabulary TV."""
    numbers: dict[str, Any] = {"gradient_norms": {}}
    rows = []
    for top_k in (0, *sorted(context.settings.top_k, reverse=True)):
        name = "all" if top_k == 0 else str(top_k)
        row = [name]
        for workload in workloads.WORKLOADS:
            value = acceptance(cells, "tv", "rejection", workload, top_k=top_k)
            gain = over_seeds(value - acceptance(cells, "tv", "rejection", workload))
            numbers[f"{name}/{workload}"] = {"acceptance": over_seeds(value).as_dict(), "gain": gain.as_dict()}
            row.append(tables.with_half(over_seeds(value)) if top_k == 0 else tables.with_half(gain, sign=True))
        rows.append(row)
        logs = [heads.training_log(heads.Head("tv", seed, top_k).path(context)) for seed in range(context.settings.seeds)]
        numbers["gradient_norms"][name] = [[line["gradient_norm"] for line in log if "gradient_norm" in line] for log in logs]
    return numbers, tables.table(["K", *workloads.WORKLOADS], rows)


# ---- h: throughput ----


def throughput_table(context: Context) -> tuple[dict[str, Any], str]:
    """Every run against CE's run of the same round and workload."""
    records = read(context, "throughput")
    base = {(record["round"], record["workload"]): record for record in records
            if record["loss"] == "ce" and record["mode"] == "rejection" and record["top_k"] == 0}
    grouped: dict[tuple[str, int, str, str], list[tuple[float, float, float]]] = defaultdict(list)
    lengths: dict[tuple[str, int, str, str], list[float]] = defaultdict(list)

    def rates(record: dict[str, Any]) -> tuple[float, float, float]:
        length = 1 + record["accepted"] / record["steps"] if record["steps"] else 1.0
        processor = record["processor_seconds"]
        return length, record["tokens"] / record["seconds"], record["tokens"] / processor if processor else float("nan")

    for record in records:
        key = (record["loss"], record["top_k"], record["mode"], record["workload"])
        mine, reference = rates(record), rates(base[record["round"], record["workload"]])
        lengths[key].append(mine[0])
        grouped[key].append(tuple(one / other for one, other in zip(mine, reference)))
    points = [{"loss": loss, "top_k": top_k, "mode": mode, "workload": workload, "accept_length": float(np.mean(lengths[loss, top_k, mode, workload])),
               **{name: over_seeds([value[i] for value in values]).as_dict() for i, name in enumerate(("length_ratio", "wall_ratio", "processor_ratio"))}}
              for (loss, top_k, mode, workload), values in grouped.items()]
    drafted = [point for point in points if point["mode"] == "rejection" and (point["loss"], point["top_k"]) != ("ce", 0)]
    gains = {name: np.array([point[name]["mean"] for point in drafted]) for name in ("length_ratio", "wall_ratio", "processor_ratio")}
    numbers: dict[str, Any] = {"points": points, "load": [min(record["load"] for record in records), max(record["load"] for record in records)]}
    for name in ("wall_ratio", "processor_ratio"):
        if np.isfinite(gains[name]).all():
            numbers[f"r_{name}"] = estimates.correlation(gains["length_ratio"], gains[name]).as_dict()
    rows = []
    for point in points:
        label = NAMES[point["loss"]] + (f", top {point['top_k']}" if point["top_k"] else "") if point["mode"] == "rejection" else "no drafting"
        rows.append([point["workload"], label, tables.number(point["accept_length"], 3),
                     *(tables.with_half(Estimate(**point[name]), 3) for name in ("length_ratio", "wall_ratio", "processor_ratio"))])
    rows.sort(key=lambda row: workloads.WORKLOADS.index(row[0]))
    header = ["workload", "head", "tokens a target pass", "against CE", "tokens/s against CE", "tokens per processor second against CE"]
    return numbers, tables.table(header, rows)


# ---- what was done ----


def processor() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("model name")] if path.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def setup_table(context: Context, cells: Cells, throughput: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    settings = context.settings
    logs = [heads.training_log(head.path(context)) for head in heads.full_vocabulary(context)]
    tokens = [log[-1]["tokens"] for log in logs]
    decoded = sum(counts["tokens"] for record in cells.records for counts in record["prompts"])
    times = {}
    for line in (context.work / "times.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        times[record["stage"]] = times.get(record["stage"], 0.0) + record["seconds"]
    rows = [
        ["losses; seeds", f"{', '.join(NAMES[loss] for loss in settings.losses)}; {settings.seeds}"],
        ["rollouts of a seed", f"{settings.rollouts} sequences, {min(tokens)} to {max(tokens)} tokens with their prompts, seen once"],
        ["training", f"{settings.num_steps_ahead} recurrent steps, learning rate {settings.lr:g}, {settings.batch_tokens} tokens a batch, {logs[0][-1]['step']} steps"],
        ["heads", f"{len(logs)}, and {len(heads.truncated(context))} with truncated TV"],
        ["decoding at temperature 1", f"{settings.prompts} prompts a workload, {settings.samples} samples each, at most {settings.max_new_tokens} tokens"],
        ["decoding at other temperatures", f"{settings.temperature_prompts} prompts a task, {settings.samples} samples each"],
        ["tokens decoded", f"{decoded / 1e6:.1f} million"],
        ["machine", f"{context.device}: {processor()}; load while throughput was measured {min(run['load'] for run in throughput):.1f} to "
                    f"{max(run['load'] for run in throughput):.1f}"],
        ["minutes", ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in times.items())],
    ]
    return {"tokens": tokens, "decoded": decoded, "times": times}, tables.table(["", ""], rows)


def recipe_table(context: Context) -> str:
    """Teacher-forced overlap (%), mean over the draft positions, of the last quarter of short trainings: batches that were not seen before."""
    rows = []
    for lr in heads.RECIPE_RATES:
        row = [f"{lr:g}"]
        for loss in heads.RECIPE_LOSSES:
            alphas = [np.mean(line["alpha"]) for line in heads.training_log(heads.recipe_path(context, loss, lr)) if "alpha" in line]
            row.append(tables.number(100 * float(np.mean(alphas[-len(alphas) // 4 :])), 2))
        rows.append(row)
    return tables.table(["learning rate", *(f"{NAMES[loss]}, %" for loss in heads.RECIPE_LOSSES)], rows)


# ---- all of it ----


def report(context: Context, out: Path) -> tuple[dict[str, Any], dict[str, str], list[Path]]:
    """(numbers, tables in Markdown by name, plots) of what has been measured; plots are written to `out`."""
    cells, scores = Cells(context), read(context, "score")
    numbers: dict[str, Any] = {}
    pages: dict[str, str] = {}
    numbers["setup"], pages["setup"] = setup_table(context, cells, read(context, "throughput"))
    numbers["acceptance"], pages["acceptance"] = acceptance_table(cells, "rejection")
    numbers["target_only"], pages["target_only"] = acceptance_table(cells, "target_only")
    numbers["spread"], pages["spread"] = spread_under_target_only(cells)
    numbers["positions"], pages["positions"] = position_table(cells)
    numbers["consistency"], pages["consistency"], pages["beside"] = consistency_table(cells, scores)
    numbers["entropy"], pages["entropy"] = entropy_table(cells)
    numbers["token_entropy"], pages["token_entropy"] = token_entropy_table(cells)
    numbers["temperature"], pages["temperature"] = temperature_table(cells)
    numbers["output"] = output_position_numbers(cells)
    numbers["boundary"], pages["boundary"] = boundary_table(cells, scores)
    if context.settings.top_k:
        numbers["top_k"], pages["top_k"] = top_k_table(context, cells)
    numbers["throughput"], pages["throughput"] = throughput_table(context)
    pictures = plots.draw_all(numbers, context.settings.losses, out)
    if heads.recipe_path(context, heads.RECIPE_LOSSES[-1], heads.RECIPE_RATES[-1]).exists():
        pages["recipe"] = recipe_table(context)
    if records_path(context, rl_stage.STAGE).exists():
        numbers["rl"], rl_pages, rl_pictures = rl_stage.analyse(context, out)
        pages |= rl_pages
        pictures += rl_pictures
    else:
        context.say("rl: not measured, its tables stay as they are")
    return numbers, pages, pictures


def run(context: Context, publish: Path | None) -> None:
    """Numbers (report/numbers.json), tables (report/*.md) and plots (report/*.png) of what has been measured; with `publish`, a docs folder,
    also into its page. RuntimeError: the two counts of acceptance disagree; the report is there to look at, and nothing is published."""
    out = context.work / "report"
    out.mkdir(exist_ok=True)
    numbers, pages, pictures = report(context, out)
    for name, content in pages.items():
        (out / f"{name}.md").write_text(content + "\n", encoding="utf-8")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    context.say(f"report: {len(pages)} tables, {len(pictures)} plots in {out}")
    flagged = numbers["consistency"]["flagged"]
    if flagged:
        raise RuntimeError(f"decoding's acceptance and the summed overlap disagree, |z| > {FLAGGED:g}, in {len(flagged)} places; first: {flagged[0]}")
    if publish:
        tables.fill(publish / "reproduction.md", pages)
        for picture in pictures:
            target = publish / "reproduction" / picture.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(picture.read_bytes())
        context.say(f"published in {publish}")
