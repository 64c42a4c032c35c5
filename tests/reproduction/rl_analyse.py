# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the reinforcement-learning part, from the records of rl_replay.py alone (and decode's, for the slope over temperature).

Acceptance here is accepted drafts over verified drafts, counted by the server; for gamma drafts a verification the accept length is 1 + gamma times it.
Intervals are 95 % percentiles of a bootstrap over prompts, within each task, and over seeds where there are several; every head and
version is resampled alike, so differences are paired. Of three seeds a bootstrap sees two thirds of the variance between seeds.

How acceptance depends on entropy where nothing else changes, b, is taken from two sources before the run: over prompts, which differ in entropy
at temperature 1, and over temperatures, which also sharpen or flatten whatever draft and target differ in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from estimates import DRAWS, Estimate, Resampling
from plots import COLORS, NAMES, plt
from tables import table, with_bounds

COLUMNS = ("accepted", "drafts", "steps", "tokens", "entropy")
ACCEPTED, DRAFTS, STEPS, TOKENS, ENTROPY = range(5)
MODES = {"rejection": "RS", "target_only": "TO"}


def summed(prompt: dict[str, Any]) -> list[float]:
    """A prompt's counts in the order of COLUMNS."""
    return [sum(prompt["accepted"]), prompt["drafts"], prompt["steps"], prompt["tokens"], prompt["entropy"]]


@dataclasses.dataclass(frozen=True)
class Value:
    """An estimate with its resampled values; arithmetic keeps them paired."""

    draws: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.draws[0])

    @property
    def estimate(self) -> Estimate:
        return Estimate.of_draws(self.draws)

    @property
    def interval(self) -> tuple[float, float]:
        return self.estimate.low, self.estimate.high

    def __sub__(self, other: Value) -> Value:
        return Value(self.draws - other.draws)

    def __mul__(self, other: Value) -> Value:
        return Value(self.draws * other.draws)

    def show(self, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
        return with_bounds(self.estimate.scaled(scale), digits, sign)

    def as_dict(self) -> dict[str, float]:
        return self.estimate.as_dict()


def mean_of(values: Sequence[Value]) -> Value:
    return Value(np.mean([value.draws for value in values], axis=0))


def ratio_of(numerators: np.ndarray, denominators: np.ndarray) -> Value:
    """nan where there is nothing to divide by: entropy that does not vary has no slope."""
    return Value(np.divide(numerators, denominators, out=np.full(denominators.shape, np.nan), where=denominators > 0))


def slope_of(entropies: Sequence[Value], acceptances: Sequence[Value]) -> Value:
    """Least squares of acceptance on entropy, in each draw; nan where entropy does not vary."""
    x, y = (np.stack([value.draws for value in values]) for values in (entropies, acceptances))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return ratio_of((x * y).sum(axis=0), (x * x).sum(axis=0))


Group = tuple[str, str, str | None]  # mode, loss, update: the seeds of a kind of head
Slopes = dict[tuple[str, str], "Slope"]  # by mode and loss, of the frozen heads


class Replay:
    """The records of one policy, resampled together."""

    def __init__(self, records: Sequence[dict[str, Any]], policy: str, workload: str | None = None) -> None:
        """`workload`: of these prompts alone."""
        records = [record for record in records if record["job"]["policy"] == policy]
        if not records:
            raise ValueError(f"no records of policy {policy}")
        self.policy = policy
        self.versions = sorted({record["job"]["version"] for record in records})
        keys = [(prompt["workload"], prompt["index"]) for prompt in records[0]["prompts"]]
        kept = [place for place, key in enumerate(keys) if workload in (None, key[0])]
        self._resampling = Resampling([keys[place][0] for place in kept])
        self.num_draft_tokens = len(records[0]["prompts"][0]["accepted"])
        self._workloads = np.array([keys[place][0] for place in kept])
        self._counts: dict[tuple[Group, int], dict[int, np.ndarray]] = {}
        for record in records:
            job = record["job"]
            if [(prompt["workload"], prompt["index"]) for prompt in record["prompts"]] != keys:
                raise ValueError(f"{job}: other prompts than in the first record")
            counts = np.array([summed(record["prompts"][place]) for place in kept], np.float64)
            self._counts.setdefault(((job["mode"], job["loss"], job["update"]), job["version"]), {})[job["seed"]] = counts
        self._entropies: dict[int, Value] = {}  # by version; asked for by every group
        self.groups: list[Group] = list(dict.fromkeys(group for group, _ in self._counts))

    def _seeds(self, group: Group, version: int) -> list[np.ndarray]:
        mode, loss, update = group
        if update and version == self.versions[0]:  # an online head begins as the frozen one
            frozen = self._counts[(mode, loss, None), version]
            return [frozen[seed] for seed in sorted(self._counts[group, self.versions[-1]])]
        found = self._counts[group, version]
        return [found[seed] for seed in sorted(found)]

    def num_seeds(self, group: Group) -> int:
        return len(self._seeds(group, self.versions[-1]))

    def acceptance(self, group: Group, version: int) -> Value:
        sums = self._resampling.sums(self._seeds(group, version))
        return Value(sums[:, ACCEPTED] / sums[:, DRAFTS])

    def accept_length(self, group: Group, version: int) -> Value:
        sums = self._resampling.sums(self._seeds(group, version))
        return Value(1 + sums[:, ACCEPTED] / sums[:, STEPS])

    def entropy(self, version: int) -> Value:
        """Nats a token of the target. Every mode and head emits the same distribution, so all decodings count."""
        if version not in self._entropies:
            counts = sum(counts for (_, at), seeds in self._counts.items() if at == version for counts in seeds.values())
            sums = self._resampling.sums([counts])
            self._entropies[version] = Value(sums[:, ENTROPY] / sums[:, TOKENS])
        return self._entropies[version]

    def run_slope(self, group: Group) -> Value:
        """Over the versions: reinforcement learning as the source of entropy change."""
        return slope_of([self.entropy(version) for version in self.versions], [self.acceptance(group, version) for version in self.versions])

    def prompt_slope(self, group: Group) -> Value:
        """Over the prompts at the first version, a prompt as heavy as it has drafts, with an intercept a task."""
        numerator, denominator = np.zeros((2, DRAWS + 1))
        for workload in sorted(set(self._workloads)):
            moments = []
            for counts in self._seeds(group, self.versions[0]):
                weights = np.where(self._workloads == workload, counts[:, DRAFTS], 0.0)
                x, y = counts[:, ENTROPY] / counts[:, TOKENS], counts[:, ACCEPTED] / np.maximum(counts[:, DRAFTS], 1)
                moments.append(weights[:, None] * np.stack([np.ones_like(x), x, y, x * x, x * y], axis=1))
            total, x, y, xx, xy = self._resampling.sums(moments).T
            numerator, denominator = numerator + xy - x * y / total, denominator + xx - x * x / total
        return ratio_of(numerator, denominator)

    def mean_change(self, group: Group, other: Group | None = None) -> Value:
        """Mean over the versions after the first, of acceptance against `other`'s (None: against its own at the first)."""
        start = self.acceptance(group, self.versions[0])
        return mean_of([self.acceptance(group, version) - (self.acceptance(other, version) if other else start) for version in self.versions[1:]])


@dataclasses.dataclass(frozen=True)
class Slope:
    """Of a kind of head over temperature: acceptance a nat, and what it was fitted to."""

    value: Value
    temperatures: list[float]
    points: list[tuple[float, float]]  # (entropy, acceptance)


def temperature_slope(records: Sequence[dict[str, Any]], mode: str, loss: str, seeds: int, workloads: Sequence[str],
                      entropies: tuple[float, float]) -> Slope | None:
    """b of a kind of head from decode's records before any reinforcement learning. Fitted over the entropies that the run passes through: the
    temperatures within (lowest, highest) and the next one on either side. None: fewer than two temperatures were decoded."""
    cells: dict[float, dict[tuple[int, str], list[dict[str, Any]]]] = {}
    for record in records:
        if (record["mode"], record["loss"]) == (mode, loss) and not record["top_k"] and record["seed"] < seeds and record["workload"] in workloads:
            cells.setdefault(record["temperature"], {})[record["seed"], record["workload"]] = record["prompts"]
    whole = {temperature: cell for temperature, cell in cells.items() if len(cell) == seeds * len(workloads)}
    if len(whole) < 2:
        return None
    # Fewer prompts may have been decoded at other temperatures than at 1: those that all have.
    sizes = {workload: min(len(cell[seed, workload]) for cell in whole.values() for seed in range(seeds)) for workload in workloads}
    resampling = Resampling([workload for workload in workloads for _ in range(sizes[workload])], seed=1)
    points = []
    for temperature in sorted(whole):
        sums = resampling.sums([np.array([summed(prompt) for workload in workloads for prompt in whole[temperature][seed, workload][: sizes[workload]]],
                                         np.float64) for seed in range(seeds)])
        points.append((temperature, Value(sums[:, ENTROPY] / sums[:, TOKENS]), Value(sums[:, ACCEPTED] / sums[:, DRAFTS])))
    below = [index for index, point in enumerate(points) if point[1].mean < entropies[0]]
    above = [index for index, point in enumerate(points) if point[1].mean > entropies[1]]
    chosen = points[max(below, default=0) : min(above, default=len(points) - 1) + 1]
    if len(chosen) < 2:
        chosen = points
    value = slope_of([point[1] for point in chosen], [point[2] for point in chosen])
    return Slope(value, [point[0] for point in chosen], [(point[1].mean, point[2].mean) for point in points])


@dataclasses.dataclass(frozen=True)
class Split:
    """The change of acceptance from the first version to another: change = entropy + mismatch."""

    change: Value
    entropy: Value  # b (H_t - H_0)
    mismatch: Value


def split(replay: Replay, group: Group, version: int, slope: Value) -> Split:
    first = replay.versions[0]
    change = replay.acceptance(group, version) - replay.acceptance(group, first)
    entropy = slope * (replay.entropy(version) - replay.entropy(first))
    return Split(change, entropy, change - entropy)


# ---- tables ----


def name_of(group: Group) -> str:
    mode, loss, update = group
    return f"{MODES[mode]}, {NAMES[loss]}, " + (f"online {NAMES[update]}" if update else "frozen")


def runs_table(manifests: dict[str, dict[str, Any]], replays: Sequence[Replay]) -> str:
    rows = []
    for replay in replays:
        kept = manifests[replay.policy]["kept"]
        last = replay.versions[-1]
        rows.append([replay.policy, str(kept[-1]["version"] - kept[0]["version"]), str(len(replay.versions)),
                     f"{sum(entry['episodes'] for entry in kept[1:]):,}", f"{kept[1]['reward']:.3f} → {kept[-1]['reward']:.3f}",
                     replay.entropy(replay.versions[0]).show(digits=3), replay.entropy(last).show(digits=3)])
    return table(("policy", "steps", "checkpoints", "episodes", "reward, first → last interval", "held-out entropy, first, nats", "last"), rows)


def acceptance_table(replay: Replay) -> str:
    """Fig. 6 and 9a as numbers."""
    first, last = replay.versions[0], replay.versions[-1]
    rows = []
    for group in replay.groups:
        rows.append([name_of(group), str(replay.num_seeds(group)), replay.acceptance(group, first).show(100, 1), replay.acceptance(group, last).show(100, 1),
                     replay.accept_length(group, last).show(1, 2), replay.mean_change(group).show(100, 1, sign=True)])
    return table(("head", "seeds", f"acceptance at version {first}, %", f"at version {last}, %", f"accept length at version {last}",
                  "mean change over the run, points"), rows)


CONTRASTS: tuple[tuple[str, Group, Group, str], ...] = (
    ("TV frozen − CE frozen", ("rejection", "tv", None), ("rejection", "ce", None), "above throughout (Fig. 6)"),
    ("e2e TV frozen − CE frozen", ("rejection", "e2e_tv", None), ("rejection", "ce", None), "above throughout (Fig. 6)"),
    ("TV online TV − TV frozen", ("rejection", "tv", "tv"), ("rejection", "tv", None), "no help: about 0 (Fig. 9a)"),
    ("e2e TV online e2e TV − e2e TV frozen", ("rejection", "e2e_tv", "e2e_tv"), ("rejection", "e2e_tv", None), "no help: about 0 (Fig. 9a)"),
    ("TV online CE − TV frozen", ("rejection", "tv", "ce"), ("rejection", "tv", None), "pulled down (Fig. 9a)"),
    ("TV online CE − TV online TV", ("rejection", "tv", "ce"), ("rejection", "tv", "tv"), "below (Fig. 9a)"),
    ("TV online CE − CE online CE", ("rejection", "tv", "ce"), ("rejection", "ce", "ce"), "to the level of CE: about 0 (Fig. 9a)"),
    ("e2e TV online CE − e2e TV frozen", ("rejection", "e2e_tv", "ce"), ("rejection", "e2e_tv", None), "pulled down (Fig. 9a)"),
    ("CE online CE − CE frozen", ("rejection", "ce", "ce"), ("rejection", "ce", None), "–"),
    ("TV frozen − CE frozen, target-only", ("target_only", "tv", None), ("target_only", "ce", None), "within 0.3 (Fig. 5)"),
)


def contrasts_table(replays: Sequence[Replay]) -> str:
    """Differences of acceptance, mean over the versions after the first, with the paper's word on each."""
    rows = []
    for title, group, other, paper in CONTRASTS:
        if all(member in replay.groups for replay in replays for member in (group, other)):
            rows.append([title, *(replay.mean_change(group, other).show(100, 1, sign=True) for replay in replays), paper])
    return table(("difference of acceptance over the run, points", *(replay.policy for replay in replays), "the paper"), rows)


PAPER_SPLIT = {("rejection", "ce"): "−1.68; almost all entropy", ("target_only", "ce"): "−1.68; almost all entropy",
               ("target_only", "tv"): "−1.68; almost all entropy", ("rejection", "tv"): "−0.06; both near 0", ("rejection", "e2e_tv"): "both near 0"}


def split_table(replay: Replay, slopes: Slopes) -> str:
    """Fig. 3 as numbers, at the last version. Slopes are shown for the accept length, as in the paper: gamma times that of acceptance."""
    last, rows = replay.versions[-1], []
    for group in replay.groups:
        mode, loss, update = group
        if update is not None:
            continue
        row = [name_of(group), replay.run_slope(group).show(replay.num_draft_tokens, 2, sign=True), (replay.acceptance(group, last) - replay.acceptance(group, replay.versions[0]))
               .show(100, 1, sign=True)]
        for slope in (replay.prompt_slope(group), slopes[mode, loss].value if (mode, loss) in slopes else None):
            if slope is None:
                row += ["–"] * 3
            else:
                parts = split(replay, group, last, slope)
                row += [slope.show(replay.num_draft_tokens, 2, sign=True), parts.entropy.show(100, 1, sign=True), parts.mismatch.show(100, 1, sign=True)]
        rows.append([*row, PAPER_SPLIT.get((mode, loss), "–")])
    return table(("head", "γ × slope over the run, tokens a nat", f"Δα at version {last}, points", "γ b over prompts, tokens a nat", "of entropy, b ΔH",
                  "of mismatch", "γ b over temperature, tokens a nat", "of entropy, b ΔH", "of mismatch", "the paper: γ b; parts"), rows)


def task_table(records: Sequence[dict[str, Any]], policy: str, workloads: Sequence[str]) -> str:
    """The frozen heads and the online ones under rejection, by task."""
    replays = [Replay(records, policy, workload) for workload in workloads]
    rows = []
    for group in replays[0].groups:
        if group[0] == "rejection":
            rows.append([name_of(group), *(replay.mean_change(group).show(100, 1, sign=True) for replay in replays)])
    rows.append(["entropy, first → last, nats", *(f"{replay.entropy(replay.versions[0]).mean:.3f} → {replay.entropy(replay.versions[-1]).mean:.3f}"
                                                  for replay in replays)])
    return table(("mean change of acceptance over the run, points", *workloads), rows)


# ---- plots ----


def band(axes: Any, x: Sequence[float], values: Sequence[Value], **style: Any) -> None:
    line = axes.plot(x, [100 * value.mean for value in values], marker="o", markersize=3, **style)[0]
    low, high = zip(*(value.interval for value in values))
    axes.fill_between(x, 100 * np.array(low), 100 * np.array(high), color=line.get_color(), alpha=0.12, linewidth=0)


def draw_online(replays: Sequence[Replay]) -> Any:
    """Fig. 6 and 9a: acceptance under rejection along the run, and the entropy that it goes with."""
    figure, grid = plt.subplots(2, len(replays), figsize=(5.6 * len(replays), 6), sharex="col", sharey="row", squeeze=False,
                                gridspec_kw={"height_ratios": [3, 1]})
    styles = {"ce": "--", "tv": ":", "e2e_tv": ":"}
    for replay, top, bottom in zip(replays, *grid):
        for group in replay.groups:
            mode, loss, update = group
            if mode == "rejection":
                band(top, replay.versions, [replay.acceptance(group, version) for version in replay.versions], color=COLORS[loss],
                     linestyle=styles[update] if update else "-", label=name_of(group).removeprefix("RS, "))
        top.set_title(f"policy: {replay.policy}")
        entropies = [replay.entropy(version) for version in replay.versions]
        bottom.plot(replay.versions, [value.mean for value in entropies], color="black", marker="o", markersize=3)
        bottom.fill_between(replay.versions, *zip(*(value.interval for value in entropies)), color="black", alpha=0.12, linewidth=0)
        bottom.set_xlabel("version")
    grid[0][0].set_ylabel("acceptance, %")
    grid[1][0].set_ylabel("entropy, nats")
    grid[0][0].legend(fontsize=7)
    return figure


def draw_split(replays: Sequence[Replay]) -> Any:
    """Fig. 3: the change of acceptance against the first version, and its two parts with b over prompts."""
    kinds = [kind for kind in (("rejection", "ce"), ("rejection", "tv"), ("rejection", "e2e_tv"), ("target_only", "ce"), ("target_only", "tv"))
             if all((*kind, None) in replay.groups for replay in replays)]
    figure, grid = plt.subplots(len(replays), len(kinds), figsize=(3.1 * len(kinds), 2.7 * len(replays)), sharex="row", sharey=True, squeeze=False)
    for replay, row in zip(replays, grid):
        for kind, axes in zip(kinds, row):
            slope = replay.prompt_slope((*kind, None))
            parts = [split(replay, (*kind, None), version, slope) for version in replay.versions[1:]]
            for name, color in (("change", "black"), ("entropy", "tab:green"), ("mismatch", "tab:red")):
                band(axes, replay.versions[1:], [getattr(part, name) for part in parts], color=color,
                     label={"change": "Δα", "entropy": "entropy, b ΔH", "mismatch": "mismatch"}[name])
            axes.axhline(0, color="gray", linewidth=0.6)
            axes.set_title(f"{replay.policy}: {MODES[kind[0]]}, {NAMES[kind[1]]}", fontsize=9)
        row[0].set_ylabel("points")
    for axes in grid[-1]:
        axes.set_xlabel("version")
    grid[0][0].legend(fontsize=7)
    return figure


def draw_entropy(replays: Sequence[Replay], slopes: Slopes) -> Any:
    """Fig. 1 with both sources of entropy change: versions of the runs as dots, temperatures before the run as crosses."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for mode, axes in zip(MODES, panels):
        for loss in ("ce", "tv", "e2e_tv"):
            group = (mode, loss, None)
            if not all(group in replay.groups for replay in replays):
                continue
            for replay, marker in zip(replays, "osD^"):
                axes.plot([replay.entropy(version).mean for version in replay.versions], [100 * replay.acceptance(group, version).mean
                          for version in replay.versions], marker=marker, markersize=4, linestyle="none", color=COLORS[loss],
                          label=f"{NAMES[loss]}, {replay.policy}")
            if (mode, loss) in slopes:
                entropies, acceptances = zip(*slopes[mode, loss].points)
                axes.plot(entropies, 100 * np.array(acceptances), marker="x", linewidth=0.8, color=COLORS[loss], label=f"{NAMES[loss]}, temperature")
        axes.set_title({"rejection": "rejection sampling", "target_only": "target-only"}[mode])
        axes.set_xlabel("entropy, nats")
        if axes.has_data():
            axes.legend(fontsize=7)
    panels[0].set_ylabel("acceptance, %")
    return figure


def slopes_of(decode_records: Sequence[dict[str, Any]], replay: Replay, workloads: Sequence[str]) -> Slopes:
    """b of every frozen head that was decoded at several temperatures."""
    means = [replay.entropy(version).mean for version in replay.versions]
    slopes = {}
    for mode, loss, update in replay.groups:
        if update is None:
            slope = temperature_slope(decode_records, mode, loss, replay.num_seeds((mode, loss, None)), workloads, (min(means), max(means)))
            if slope is not None:
                slopes[mode, loss] = slope
    return slopes


def report(records: Sequence[dict[str, Any]], decode_records: Sequence[dict[str, Any]], manifests: dict[str, dict[str, Any]], workloads: Sequence[str],
           out: Path) -> tuple[dict[str, Any], dict[str, str], list[Path]]:
    """(numbers, tables in Markdown by name, plots) of what was replayed; plots are written to `out`."""
    replays = [Replay(records, policy) for policy in manifests]
    slopes = {replay.policy: slopes_of(decode_records, replay, workloads) for replay in replays}
    tables = {"rl_runs": runs_table(manifests, replays), "rl_contrasts": contrasts_table(replays)}
    numbers = {}
    for replay in replays:
        tables[f"rl_acceptance_{replay.policy}"] = acceptance_table(replay)
        tables[f"rl_split_{replay.policy}"] = split_table(replay, slopes[replay.policy])
        tables[f"rl_tasks_{replay.policy}"] = task_table(records, replay.policy, workloads)
        numbers[replay.policy] = numbers_of(replay, slopes[replay.policy])
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"rl_online": draw_online(replays), "rl_split": draw_split(replays), "rl_entropy": draw_entropy(replays, slopes[replays[0].policy])}
    files = []
    for name, figure in pictures.items():
        files.append(out / f"{name}.png")
        figure.tight_layout()
        figure.savefig(files[-1], dpi=72)
        plt.close(figure)
    return numbers, tables, files


def numbers_of(replay: Replay, slopes: Slopes) -> dict[str, Any]:
    """All that the tables and plots of a policy are made of."""
    numbers: dict[str, Any] = {"versions": replay.versions, "entropy": [replay.entropy(version).as_dict() for version in replay.versions], "heads": {}}
    for group in replay.groups:
        mode, loss, update = group
        numbers["heads"][name_of(group)] = entry = {
            "seeds": replay.num_seeds(group), "acceptance": [replay.acceptance(group, version).as_dict() for version in replay.versions],
            "accept_length": [replay.accept_length(group, version).as_dict() for version in replay.versions],
            "slope_over_run": replay.run_slope(group).as_dict(),
        }
        if update is None:
            sources = {"prompts": replay.prompt_slope(group)}
            if (mode, loss) in slopes:
                slope = slopes[mode, loss]
                sources["temperature"] = slope.value
                entry |= {"temperatures": slope.temperatures, "by_temperature": slope.points}
            for source, slope in sources.items():
                parts = [split(replay, group, version, slope) for version in replay.versions]
                entry[f"over_{source}"] = {"slope": slope.as_dict()} | {name: [getattr(part, name).as_dict() for part in parts]
                                                                         for name in ("change", "entropy", "mismatch")}
    return numbers
