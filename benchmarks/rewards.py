"""How long a table of meta rollouts takes to re-score, and how much the vectorised scoring saves over the plain one.

The rollouts are made up but have the shapes of a real run: groups of 8 solutions and 8 predictions with 3 notions each.
Prints the fastest of several repeats in milliseconds; `--json` prints one JSON object instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.config import RewardConfig
from masa_lib.lessons.reward_table import reward_table, score_table
from masa_lib.method.rewards import Solution, meta_rewards
from masa_lib.tasks.read_prediction import parse_prediction

NOTIONS = ["carry", "borrow", "long division", "parity", "place value", "modular arithmetic", "factorisation", "zero"]
CONFIGS = {"published": RewardConfig(), "released": RewardConfig(mode="released"),
           "all changed": RewardConfig(difficulty_mode="brier", length_slack=0.2, notion_mode="rate",
                                       exclude_problem_notions=False, notion_weight=0.5)}


def make_rollouts(meta_rollouts: int, seed: int) -> pd.DataFrame:
    """A rollouts table with about as many meta rollouts as asked for (whole groups of 8)."""
    rng = np.random.default_rng(seed)
    groups, rows = -(-meta_rollouts // 8), []
    for group, rate in enumerate(rng.random(groups)):
        for _ in range(8):
            words = " then ".join(rng.choice(NOTIONS, 4))
            rows.append((group // 16, "solution", group % 16, f"Problem {group}", f"We use {words}.",
                         int(rng.integers(10, 128)), rng.random() < rate))
        for _ in range(8):
            notions = json.dumps(list(rng.choice(NOTIONS, 3)))
            text = (f'{{"math_notion":{notions}, "pass_rate": {rng.integers(9)}, '
                    f'"solution_length": {rng.integers(10, 128)}}}')
            rows.append((group // 16, "meta", group % 16, f"Problem {group}", text, 40, None))
    return pd.DataFrame(rows, columns=["step", "stream", "group", "problem", "text", "length", "correct"])


def fastest_ms(function: Callable[[], Any], repeats: int) -> float:
    """The fastest of several calls, in milliseconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1000


def score_plainly(rollouts: pd.DataFrame, config: RewardConfig) -> Callable[[], None]:
    """Scoring group by group with the plain function; reading and parsing are left out, as they are of the other."""
    groups = []
    for _, rows in rollouts.groupby(["step", "group"]):
        solutions = rows[rows["stream"] == "solution"]
        predictions = [parse_prediction(text).prediction for text in rows.loc[rows["stream"] == "meta", "text"]]
        columns = zip(solutions["text"], solutions["length"], solutions["correct"], strict=True)
        groups.append(([Solution(*row) for row in columns], predictions, rows["problem"].iloc[0]))

    def score() -> None:
        for solutions, predictions, problem in groups:
            meta_rewards(solutions, predictions, problem, config)

    return score


def measure(meta_rollouts: int, plain_rollouts: int, repeats: int, seed: int) -> dict[str, Any]:
    """All numbers of this benchmark."""
    rollouts = make_rollouts(meta_rollouts, seed)
    start = time.perf_counter()
    table = reward_table(rollouts)
    result: dict[str, Any] = {"meta_rollouts": len(table.index), "count_once_seconds": time.perf_counter() - start}
    result["score_ms"] = {name: fastest_ms(lambda config=config: score_table(table, config), repeats)
                          for name, config in CONFIGS.items()}
    small = make_rollouts(plain_rollouts, seed)
    small_table = reward_table(small)
    plain = fastest_ms(score_plainly(small, RewardConfig()), 3)
    vectorised = fastest_ms(lambda: score_table(small_table, RewardConfig()), repeats)
    return result | {"plain_rollouts": len(small_table.index), "plain_ms": plain, "vectorised_ms": vectorised,
                     "plain_over_vectorised": plain / vectorised}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=100_000, help="meta rollouts of the large table")
    parser.add_argument("--plain-rollouts", type=int, default=4_000, help="meta rollouts that are scored both ways")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.rollouts, arguments.plain_rollouts, arguments.repeats, arguments.seed)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['meta_rollouts']} meta rollouts: counted in {result['count_once_seconds']:.1f} s, re-scored in")
    for name, milliseconds in result["score_ms"].items():
        print(f"  {milliseconds:7.1f} ms  {name}")
    print(f"{result['plain_rollouts']} meta rollouts: plain {result['plain_ms']:.1f} ms, vectorised "
          f"{result['vectorised_ms']:.2f} ms, ratio {result['plain_over_vectorised']:.0f}")


if __name__ == "__main__":
    main()
