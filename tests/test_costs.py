"""What is counted as cost, and costs at equal accuracy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from masa_lib.analysis import costs, intervals
from masa_lib.analysis.costs import Curve

EVERY = np.arange(0, 181, 15)


def curve(accuracy: np.ndarray, per_step: float = 1.0) -> Curve:
    return Curve(EVERY, accuracy, {"tokens": EVERY * per_step}, {"tokens": EVERY[-1] * per_step})


def test_each_cost_adds_up_what_it_says_and_lacking_columns_are_0() -> None:
    metrics = pd.DataFrame({"step": [1, 2], "tokens_solution": 10, "tokens_meta": [3, None], "tokens_prefill": 5,
                            "tokens_read": 2, "tokens_update": 7, "seconds_total": 1.5, "tokens_oracle": 999})
    last = costs.totals(metrics).iloc[-1]
    assert last[[*costs.COSTS]].tolist() == [23, 14, 14, 3.0, 51, 79]
    old = costs.totals(metrics.drop(columns=["tokens_read", "tokens_meta"])).iloc[-1]
    assert (old["read"], old["tokens"]) == (10, 20)


def test_a_curve_that_is_twice_as_fast_for_the_same_cost_a_step_is_half_as_dear() -> None:
    rising = np.linspace(0.2, 0.8, 13)
    ratio, missed = costs.equal_accuracy(curve(rising), curve(np.minimum(0.2 + 2 * (rising - 0.2), 0.8)), "tokens")
    assert (math.exp(ratio), missed) == (pytest.approx(2.0), 0)
    ratio, _ = costs.equal_accuracy(curve(rising), curve(rising, per_step=1.5), "tokens")
    assert math.exp(ratio) == pytest.approx(1 / 1.5)


def test_the_ratio_is_the_mean_over_the_stated_accuracies() -> None:
    reference, arm = curve(np.linspace(0, 1, 13)), curve(np.sqrt(np.linspace(0, 1, 13)))
    wanted = [np.log(reference.to_reach(share, "tokens") / arm.to_reach(share, "tokens"))
              for share in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
    assert costs.equal_accuracy(reference, arm, "tokens")[0] == pytest.approx(np.mean(wanted))


def test_accuracies_never_reached_count_with_all_that_was_spent() -> None:
    rising = np.linspace(0, 1, 13)
    ratio, missed = costs.equal_accuracy(curve(rising), curve(0.7 * rising), "tokens")
    assert missed == pytest.approx(0.5)  # 0.75 to 0.95
    reached = [math.log(0.7)] * 5
    assert ratio == pytest.approx(np.mean(reached + [math.log(share) for share in (0.75, 0.8, 0.85, 0.9, 0.95)]))


def test_without_a_gain_or_with_the_accuracy_at_no_cost_there_is_no_ratio() -> None:
    rising = np.linspace(0, 1, 13)
    assert math.isnan(costs.equal_accuracy(curve(1 - rising), curve(rising), "tokens")[0])
    assert math.isnan(costs.equal_accuracy(curve(rising), curve(np.full(13, 0.8)), "tokens")[0])


@pytest.mark.parametrize(("right", "problems"), [((12, 24, 30, 36), 60), ((7, 14, 16, 19), 30), ((1, 4, 7, 11), 120)])
def test_an_accuracy_that_equals_a_target_reaches_it_whatever_the_last_bit_says(right: tuple, problems: int) -> None:
    rates = np.array(right) / problems
    for share in (0.5, 0.75, 0.95):
        first, last = rates[0], rates[0] + (rates[2] - rates[0]) / share
        flat = [rates[0], rates[1], rates[2], rates[2], rates[2]]
        for target in (first + share * (last - first), np.nextafter(rates[2], 1), rates[2]):
            assert costs.time_to_target(range(5), flat, range(5), target) == pytest.approx(2)


def draw(rng: np.random.Generator, speed: float) -> Curve:
    """A saturating curve whose speed has luck of its seed, measured on 120 problems; the ends with more samples."""
    true = 0.2 + 0.4 * (1 - np.exp(-EVERY * speed * rng.lognormal(0, 0.15) / 40))
    samples = 120 * np.where((EVERY == 0) | (EVERY == 180), 32, 4)
    return curve(rng.binomial(samples, true) / samples)


def test_the_interval_over_seeds_covers_the_true_ratio_and_is_narrower_than_one_crossing() -> None:
    rng, true, covered, widths = np.random.default_rng(0), 1.3, [], []
    for _ in range(150):
        pairs = [(draw(rng, 1.0), draw(rng, true)) for _ in range(5)]
        _, low, high = intervals.mean_interval([costs.equal_accuracy(*pair, "tokens")[0] for pair in pairs])
        target = np.mean([one.accuracy[0] + 0.9 * (one.accuracy[-1] - one.accuracy[0]) for one, _ in pairs])
        reached = np.array([[one.to_reach(target, "tokens") for one in pair] for pair in pairs]).clip(1, 180)
        crossing = intervals.mean_interval(np.log(reached[:, 0] / reached[:, 1]))
        covered.append(low <= math.log(true) <= high)
        widths.append((high - low) / (crossing[2] - crossing[1]))
    assert np.mean(covered) >= 0.93
    assert np.median(widths) < 0.8
