#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the logs of grpo_async.py (PNG) and prints the numbers behind the pictures.

    plot.py run LOG --out DIR    reward, entropy, accept length; where the time goes; staleness and clipping
    plot.py pair --drafted LOG... --plain LOG... --out DIR    step and rollout times of runs that differ in drafting alone

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PARTS = ("rollout", "train", "sync")
COLORS = {"rollout": "tab:blue", "train": "tab:orange", "sync": "tab:green"}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Records by kind. A last line that was cut off by the end of the run is left out."""
    records: dict[str, list[dict[str, Any]]] = {"run": [], "eval": [], "step": []}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of JSON") from None
        records[record["kind"]].append(record)
    if not records["step"]:
        raise ValueError(f"{path}: no steps")
    return records


def column(steps: list[dict[str, Any]], name: str) -> np.ndarray:
    """Values of one field; nan where a step has none."""
    return np.array([np.nan if step.get(name) is None else step[name] for step in steps], np.float64)


def smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    """Mean of the last `window` values, without those that are nan."""
    return np.array([np.nanmean(values[max(0, end - window) : end]) if np.isfinite(values[max(0, end - window) : end]).any() else np.nan
                     for end in range(1, len(values) + 1)])


def save(figure: Any, out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out / name, dpi=72)
    plt.close(figure)
    print(f"{out / name}: {(out / name).stat().st_size // 1024} kB")


def curve(axis: Any, x: np.ndarray, values: np.ndarray, label: str | None = None, color: str = "tab:blue") -> None:
    axis.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(x, smooth(values), color=color, label=label)


def draw_run(log: Path, out: Path) -> None:
    records = read(log)
    steps, evaluations = records["step"], records["eval"]
    x = column(steps, "step") + 1

    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    axis = axes[0, 0]
    curve(axis, x, column(steps, "reward"), "all")
    for task, color in (("code", "tab:orange"), ("math", "tab:green"), ("tools", "tab:red")):
        values = np.array([step["reward_by_task"].get(task, np.nan) for step in steps])
        axis.plot(x, smooth(values), color=color, label=task, linewidth=0.9)
    axis.set(title="training reward (mean of 15 steps)", xlabel="step", ylim=(None, 1.01))
    axis.legend(loc="lower right")
    axis = axes[0, 1]
    if len(evaluations) > 1:
        before, after = evaluations[0]["reward"], evaluations[-1]["reward"]
        names = [name for name in before if name in after]
        for offset, (result, label) in enumerate(((before, f"version {evaluations[0]['version']}"),
                                                  (after, f"version {evaluations[-1]['version']}"))):
            middle = np.array([result[name]["reward"] for name in names])
            error = np.array([[middle[i] - result[name]["low"], result[name]["high"] - middle[i]] for i, name in enumerate(names)]).T
            axis.errorbar(middle, np.arange(len(names)) + 0.35 * offset, xerr=error, fmt="o", markersize=4, capsize=2, label=label)
        axis.set_yticks(np.arange(len(names)) + 0.17, names)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.legend(loc="lower left")
    axis.set(title="held-out reward, 95 % interval", xlim=(None, 1.01))
    curve(axes[1, 0], x, column(steps, "entropy"))
    axes[1, 0].set(title="entropy of the sampling policy, nats a token", xlabel="step")
    if np.isfinite(column(steps, "accept_length")).any():
        curve(axes[1, 1], x, column(steps, "accept_length"))
    axes[1, 1].set(title="accept length, tokens a verification", xlabel="step")
    save(figure, out, "grpo_reward.png")

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    axes[0].stackplot(x, *(smooth(column(steps, f"{part}_seconds")) for part in PARTS), labels=PARTS, colors=COLORS.values())
    axes[0].set(title="seconds of a step (mean of 15 steps)", xlabel="step")
    axes[0].legend(loc="upper right")
    curve(axes[1], x, column(steps, "staleness_mean"), "mean")
    axes[1].plot(x, column(steps, "staleness_max"), ".", markersize=2, color="tab:gray", label="largest")
    axes[1].set(title="staleness of a token, versions", xlabel="step", ylim=(0, None))
    axes[1].legend(loc="upper right")
    curve(axes[2], x, 100 * column(steps, "clip_fraction"), "tokens clipped, %")
    curve(axes[2], x, 1000 * column(steps, "kl"), "KL to the sampling version, 1e-3 nats", "tab:orange")
    axes[2].set(title="off-policy", xlabel="step", ylim=(0, None))
    axes[2].legend(loc="upper right")
    save(figure, out, "grpo_time.png")

    total = column(steps, "step_seconds").sum()
    shares = ", ".join(f"{part} {100 * column(steps, f'{part}_seconds').sum() / total:.1f} %" for part in PARTS)
    print(f"{len(steps)} steps in {total / 60:.1f} minutes, {total / len(steps):.2f} s a step: {shares}")
    print(f"{column(steps, 'tokens').sum():.0f} tokens, {column(steps, 'episodes').sum():.0f} episodes, "
          f"{column(steps, 'mixed_episodes').sum():.0f} of them sampled by more than one version")
    print(f"staleness: mean {np.average(column(steps, 'staleness_mean'), weights=column(steps, 'tokens')):.3f}, "
          f"largest {column(steps, 'staleness_max').max():.0f}; groups thrown away {steps[-1]['groups_thrown_away']}")
    print(f"load: {column(steps, 'load').min():.1f} to {column(steps, 'load').max():.1f}")
    head, tail = steps[: len(steps) // 10 or 1], steps[-(len(steps) // 10 or 1) :]
    for name in ("reward", "entropy", "accept_length", "clip_fraction", "kl", "step_seconds"):
        print(f"{name}: first tenth {np.nanmean(column(head, name)):.5g}, last tenth {np.nanmean(column(tail, name)):.5g}")
    for evaluation in evaluations:
        for name, value in evaluation["reward"].items():
            print(f"version {evaluation['version']} {name}: {100 * value['reward']:.1f} % "
                  f"[{100 * value['low']:.1f}, {100 * value['high']:.1f}] of {value['n']}")


def ratio_of_means(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    """mean(top) / mean(bottom), with a 95 % bootstrap interval over steps."""
    rng = np.random.default_rng(0)
    draws = [rng.choice(top, len(top)).mean() / rng.choice(bottom, len(bottom)).mean() for _ in range(2000)]
    return (top.mean() / bottom.mean(), *np.percentile(draws, [2.5, 97.5]))


def draw_pair(drafted: list[Path], plain: list[Path], out: Path) -> None:
    # The first step of a run holds what happens once, such as the first allocation of every buffer.
    runs = {label: [read(log)["step"][1:] for log in logs] for label, logs in (("with drafting", drafted), ("without", plain))}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for (label, logs), color in zip(runs.items(), ("tab:blue", "tab:orange")):
        for number, steps in enumerate(logs):
            for axis, name in zip(axes, ("rollout_seconds", "step_seconds")):
                axis.plot(column(steps, "step") + 1, column(steps, name), ".-", color=color, label=None if number else label)
    for axis, name in zip(axes, ("rollout", "step")):
        axis.set(title=f"seconds of a {name}", xlabel="step", ylim=(0, None))
        axis.legend()
    save(figure, out, "grpo_drafting.png")
    first, second = ([step for steps in logs for step in steps] for logs in runs.values())
    for label, rows in zip(runs, (first, second)):
        accept = column(rows, "accept_length")
        print(f"{label}: {len(rows)} steps, {column(rows, 'tokens').mean():.0f} tokens a step, "
              f"accept length {np.nanmean(accept) if np.isfinite(accept).any() else float('nan'):.2f}, "
              + ", ".join(f"{part} {column(rows, f'{part}_seconds').mean():.3f} s" for part in (*PARTS, "step"))
              + f", reward {column(rows, 'reward').mean():.3f}, load {column(rows, 'load').min():.1f} to {column(rows, 'load').max():.1f}")
    for name in ("rollout_seconds", "step_seconds"):
        value, low, high = ratio_of_means(column(first, name), column(second, name))
        print(f"{name}: with / without drafting = {value:.3f} [{low:.3f}, {high:.3f}]")
    value, low, high = ratio_of_means(*(column(rows, "rollout_seconds") / column(rows, "tokens") for rows in (first, second)))
    print(f"rollout seconds a token: with / without drafting = {value:.3f} [{low:.3f}, {high:.3f}]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="one run")
    run.add_argument("log", type=Path)
    pair = verbs.add_parser("pair", help="runs with and without drafting")
    pair.add_argument("--drafted", type=Path, nargs="+", required=True)
    pair.add_argument("--plain", type=Path, nargs="+", required=True)
    for verb in (run, pair):
        verb.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    try:
        if arguments.verb == "run":
            draw_run(arguments.log, arguments.out)
        else:
            draw_pair(arguments.drafted, arguments.plain, arguments.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
