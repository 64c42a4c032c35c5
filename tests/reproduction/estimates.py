# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and tests. All intervals are 95 %."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval; nan bounds where one observation gives none."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of_draws(draws: np.ndarray) -> Estimate:
        """Of a value's resampled values, of which the first is the value itself (see Resampling). Those that are not finite do not count."""
        finite = draws[1:][np.isfinite(draws[1:])]
        low, high = map(float, np.percentile(finite, [2.5, 97.5])) if len(finite) else (math.nan, math.nan)
        return Estimate(float(draws[0]), low, high)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value a seed, with Student's interval."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return Estimate(mean, mean - half, mean + half)


class Resampling:
    """Row 0 is the sample itself, rows 1.. are draws with replacement: of prompts within their strata, of seeds as a whole."""

    def __init__(self, strata: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._rng_seed, self._draws = seed, draws
        self.prompts = np.ones((draws + 1, len(strata)))
        strata = np.asarray(strata)
        for stratum in sorted(set(strata)):
            here = np.flatnonzero(strata == stratum)
            self.prompts[1:, here] = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), size=draws)

    def seeds(self, count: int) -> np.ndarray:
        """Weights [draws + 1, count]; heads of the same number of seeds get the same."""
        weights = np.ones((self._draws + 1, count))
        weights[1:] = np.random.default_rng((self._rng_seed, count)).multinomial(count, np.full(count, 1 / count), size=self._draws)
        return weights

    def sums(self, seeds: Sequence[np.ndarray]) -> np.ndarray:
        """Resampled sums [draws + 1, columns] of one [prompts, columns] array a seed."""
        weights = self.seeds(len(seeds))
        return sum(weights[:, index, None] * (self.prompts @ counts) for index, counts in enumerate(seeds))


def bootstrap_difference(numerators: np.ndarray, denominators: np.ndarray, base_numerators: np.ndarray, base_denominators: np.ndarray) -> Estimate:
    """Difference of two ratios of sums, prompts drawn again jointly for both sides and all seeds.

    Arrays are [seeds, prompts]; each side's value is the mean over seeds of sum(numerators) / sum(denominators). The interval is that of prompts
    alone; seeds stay as they are.
    """
    weights = Resampling([""] * numerators.shape[1]).prompts.T  # one stratum

    def value(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return (top @ weights / (bottom @ weights)).mean(0)

    return Estimate.of_draws(value(numerators, denominators) - value(base_numerators, base_denominators))


def self_normalized(differences: Sequence[float]) -> float:
    """z of the sum of independent differences whose expectation is 0 each, whatever their variances: sum / sqrt(sum of squares)."""
    array = np.asarray(differences, np.float64)
    scale = math.sqrt(float((array**2).sum()))
    return float(array.sum()) / scale if scale > 0 else 0.0


def slope(x: np.ndarray, y: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Least-squares slope of y over x with an intercept a group; `weights` of the points, else all equal."""
    weights = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    x = x.astype(np.float64).copy()
    for group in np.unique(groups):
        here = groups == group
        x[here] -= np.average(x[here], weights=weights[here])
    return float((weights * x * y).sum() / (weights * x * x).sum())


def correlation(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Pearson's r with Fisher's interval."""
    r = float(np.corrcoef(x, y)[0, 1])
    if len(x) < 4:
        return Estimate(r, math.nan, math.nan)
    half = 1.96 / math.sqrt(len(x) - 3)
    return Estimate(r, *(float(np.tanh(np.arctanh(min(max(r, -0.999999), 0.999999)) + sign * half)) for sign in (-1, 1)))
