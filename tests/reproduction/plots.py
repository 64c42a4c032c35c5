# SPDX-License-Identifier: Apache-2.0
"""Pictures of numbers that analyse.py computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import workloads

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"start": "start", "ce": "CE", "kl": "KL", "reverse_kl": "reverse KL", "tv": "TV", "e2e_tv": "e2e TV", "lk": "LK"}  # on pages
COLORS = {"start": "black", "ce": "tab:gray", "kl": "tab:brown", "reverse_kl": "tab:green", "tv": "tab:blue", "e2e_tv": "tab:red", "lk": "tab:purple"}
MARKERS = dict(zip(workloads.WORKLOADS, "osD^v*"))


def draw_all(numbers: Mapping[str, Any], losses: Sequence[str], out: Path) -> list[Path]:
    """Every plot; returns the files."""
    pictures: list[tuple[str, Callable[..., Any]]] = [
        ("acceptance", draw_acceptance), ("positions", draw_positions), ("entropy", draw_entropy), ("temperature", draw_temperature),
        ("boundary", draw_boundary), ("top_k", draw_top_k), ("throughput", draw_throughput),
    ]
    files = []
    for name, draw in pictures:
        if name not in numbers:
            continue
        figure = draw(numbers, losses)
        figure.tight_layout()
        files.append(out / f"{name}.png")
        figure.savefig(files[-1], dpi=72)
        plt.close(figure)
    return files


def _bounds(estimate: Mapping[str, float]) -> list[float]:
    """Distances from the mean, for error bars; 0 where there is no interval."""
    return [float(np.nan_to_num(estimate["mean"] - estimate["low"])), float(np.nan_to_num(estimate["high"] - estimate["mean"]))]


def draw_acceptance(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """Gain over CE, under rejection and under target-only."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8), sharey=True)
    others = [loss for loss in losses if loss != "ce"]
    for axis, key, title in ((axes[0], "acceptance", "rejection"), (axes[1], "target_only", "target-only")):
        for number, loss in enumerate(others):
            gains = [numbers[key][f"{loss}/{workload}"]["gain_over_seeds"] for workload in workloads.WORKLOADS]
            x = np.arange(len(gains)) + (number - len(others) / 2 + 0.5) * 0.8 / len(others)
            axis.bar(x, [gain["mean"] for gain in gains], 0.8 / len(others), color=COLORS[loss], label=NAMES[loss],
                     yerr=np.array([_bounds(gain) for gain in gains]).T, error_kw={"linewidth": 0.8})
        axis.set_xticks(range(len(workloads.WORKLOADS)), workloads.WORKLOADS)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title=f"acceptance against CE, points: {title}")
    axes[0].legend(fontsize=8)
    return figure


def draw_positions(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """alpha_i by draft position, a panel a task."""
    figure, axes = plt.subplots(1, len(workloads.IN_DOMAIN), figsize=(12, 3.6))
    by_task = numbers["positions"]["by_task"]
    steps = sorted({int(key.rsplit("/", 1)[1]) for key in by_task})
    for axis, task in zip(axes, workloads.IN_DOMAIN):
        for loss in losses:
            values = [by_task[f"{loss}/{task}/{i}"] for i in steps]
            axis.errorbar(steps, [value["mean"] for value in values], yerr=np.array([_bounds(value) for value in values]).T, color=COLORS[loss],
                          marker="o", markersize=3, capsize=2, linewidth=1, label=NAMES[loss])
        axis.set(title=f"{task}: acceptance given it was reached, %", xlabel="draft position", xticks=steps)
    axes[0].legend(fontsize=8)
    return figure


def draw_entropy(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """Above: accept length over mean entropy, every point one temperature and task, lines of the fitted slope. Below: acceptance of single drafts
    over the entropy at their token."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharey="row")
    for column, (mode, title) in enumerate((("rejection", "rejection"), ("target_only", "target-only"))):
        for loss in losses:
            entry = numbers["entropy"][f"{loss}/{mode}"]
            points = np.array(entry["points"])  # [temperatures, tasks, 3]
            # The tasks' levels are taken out, as in the fit.
            x = points[..., 0] - points[..., 0].mean(0) + points[..., 0].mean()
            y = points[..., 1] - points[..., 1].mean(0) + points[..., 1].mean()
            axis = axes[0, column]
            axis.plot(x.ravel(), y.ravel(), "o", markersize=3, color=COLORS[loss], alpha=0.5)
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, y.mean() + entry["slope"]["mean"] * (ends - x.mean()), color=COLORS[loss], label=f"{NAMES[loss]} {entry['slope']['mean']:+.2f}")
            single = numbers["token_entropy"][f"{loss}/{mode}"]
            axes[1, column].plot(single["entropy"], single["acceptance"], ".-", color=COLORS[loss], linewidth=0.8,
                                 label=f"{NAMES[loss]} {single['slope']['mean']:+.1f}")
        axes[0, column].set(title=f"accept length by temperature: {title}", xlabel="mean entropy, nats a token (tasks' levels taken out)")
        axes[1, column].set(title=f"acceptance of a draft, %, at temperature 1: {title}", xlabel="entropy of the target at that token, nats")
        for axis in axes[:, column]:
            axis.legend(fontsize=8)
    return figure


def draw_temperature(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """Acceptance by temperature, and by place in the output."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    for loss in losses:
        for mode, style in (("rejection", "-"), ("target_only", ":")):
            values = numbers["temperature"][f"{loss}/{mode}"]
            axes[0].plot(numbers["temperature"]["temperatures"], [value["mean"] for value in values], style, color=COLORS[loss], marker=".",
                         label=NAMES[loss] if style == "-" else None)
    axes[0].set(title="acceptance, %, by temperature (solid rejection, dotted target-only)", xlabel="temperature")
    axes[0].legend(fontsize=8)
    for loss in [loss for loss in ("ce", "e2e_tv") if loss in losses]:
        for mode, style in (("rejection", "-"), ("target_only", ":")):
            entries = [numbers["output"][f"{loss}/{mode}/{task}"] for task in workloads.IN_DOMAIN]
            reached = np.sum([entry["reached"] for entry in entries], axis=0)
            hits = np.sum([np.nan_to_num(entry["acceptance"]) * entry["reached"] for entry in entries], axis=0)
            enough = reached >= 50
            places = (np.arange(len(reached)) + 0.5) * 8
            axes[1].plot(places[enough], (hits / np.maximum(reached, 1))[enough], style, color=COLORS[loss], marker=".", label=f"{NAMES[loss]}, {mode}")
    axes[1].set(title="acceptance of reached drafts, %, by place in the output", xlabel="token of the output")
    axes[1].legend(fontsize=8)
    return figure


def draw_boundary(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """d_TV against 1 - p(argmax q): means of workloads, and single drafts."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for point in numbers["boundary"]["points"]:
        axes[0].plot(point["missed"]["mean"], point["distance"]["mean"], MARKERS[point["workload"]], color=COLORS[point["loss"]], markersize=5, alpha=0.8)
    limit = 1.05 * max(max(point["missed"]["mean"], point["distance"]["mean"]) for point in numbers["boundary"]["points"])
    axes[0].plot([0, limit], [0, limit], color="black", linewidth=0.8)
    axes[0].text(0.62 * limit, 0.3 * limit, "rejection accepts more")
    axes[0].text(0.05 * limit, 0.8 * limit, "target-only accepts more")
    handles = [plt.Line2D([], [], color=COLORS[loss], marker="s", linestyle="", label=NAMES[loss]) for loss in losses]
    handles += [plt.Line2D([], [], color="black", marker=marker, linestyle="", label=name) for name, marker in MARKERS.items()]
    axes[0].legend(handles=handles, fontsize=7, ncol=2, loc="lower right")
    axes[0].set(title="means by workload, loss and temperature", xlabel="1 − p(argmax q)", ylabel="d_TV(p, q)")
    grid = np.sum([numbers["boundary"]["grid"][workload] for workload in numbers["boundary"]["grid"]], axis=0)
    image = axes[1].imshow(np.log10(1 + grid), origin="lower", extent=(0, 1, 0, 1), cmap="viridis")
    axes[1].plot([0, 1], [0, 1], color="white", linewidth=0.8)
    axes[1].set(title="single drafts (position 1, temperature 1), log10(1 + count)", xlabel="1 − p(argmax q)", ylabel="d_TV(p, q)")
    figure.colorbar(image, ax=axes[1])
    return figure


def draw_top_k(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """Gain of truncated over full TV after training, and the gradients on the way."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8))
    norms = numbers["top_k"]["gradient_norms"]
    for number, name in enumerate(norms):
        color = plt.get_cmap("viridis")(number / max(1, len(norms) - 1))
        gains = [numbers["top_k"][f"{name}/{workload}"]["gain"] for workload in workloads.WORKLOADS]
        if name != "all":
            axes[0].errorbar(np.arange(len(gains)) + 0.1 * number, [gain["mean"] for gain in gains], yerr=np.array([_bounds(gain) for gain in gains]).T,
                             fmt="o", color=color, capsize=2, label=f"K = {name}")
        shortest = min(len(curve) for curve in norms[name])
        axes[1].plot(np.arange(1, shortest + 1), np.mean([curve[:shortest] for curve in norms[name]], axis=0), color=color, label=f"K = {name}", linewidth=0.8)
    axes[0].axhline(0, color="black", linewidth=0.6)
    axes[0].set_xticks(range(len(workloads.WORKLOADS)), workloads.WORKLOADS)
    axes[0].set(title="acceptance against full-vocabulary TV, points")
    axes[0].legend(fontsize=8)
    axes[1].set(title="norm of the gradient, mean over seeds", xlabel="step", ylim=(0, None))
    axes[1].legend(fontsize=8)
    return figure


def draw_throughput(numbers: Mapping[str, Any], losses: Sequence[str]) -> Any:
    """Throughput against accept length, both relative to CE's head in the same round."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharex=True)
    points = [point for point in numbers["throughput"]["points"] if point["mode"] == "rejection"]
    for axis, key, title in ((axes[0], "wall_ratio", "tokens a second"), (axes[1], "processor_ratio", "tokens per processor second of the server")):
        for point in points:
            axis.errorbar(point["length_ratio"]["mean"], point[key]["mean"], yerr=np.array([_bounds(point[key])]).T, fmt=MARKERS[point["workload"]],
                          color=COLORS[point["loss"]], markersize=5, elinewidth=0.5, markerfacecolor="none" if point["top_k"] else None)
        ends = [min(point["length_ratio"]["mean"] for point in points), max(point["length_ratio"]["mean"] for point in points)]
        axis.plot(ends, ends, color="black", linewidth=0.6)
        r = numbers["throughput"].get(f"r_{key}")
        axis.set(title=f"{title}, against CE" + (f": r = {r['mean']:.2f}" if r else ""), xlabel="tokens a target pass, against CE")
    return figure
