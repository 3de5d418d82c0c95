"""The meta rewards of a whole table of recorded rollouts at once, so that a reader can turn the knobs and watch.

The formulas are those of `masa_lib.method.rewards`, which says them for one group, to be read beside the paper; a
property test keeps the two equal. Suffixes: `_R` rollout, `_P` group, `_N` meta rollout, `_K` notion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from masa_lib.config import RewardConfig
from masa_lib.method.rewards import MATCHING, effective, weighted
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.read_prediction import parse_prediction


@dataclasses.dataclass(frozen=True)
class _Counts:
    """The predictions of a table as one parser reads them: N meta rollouts, with K notions in all.

    Attributes:
        parsed_N: whether there is a prediction.
        pass_rate_N: eighths, NaN where absent.
        length_N: tokens, NaN where absent.
        owner_K: the meta rollout that a notion belongs to.
        correct_K: correct solutions of its group that contain it.
        wrong_K: wrong solutions that do.
        excluded_K: whether it stands in the problem.
    """

    parsed_N: np.ndarray
    pass_rate_N: np.ndarray
    length_N: np.ndarray
    owner_K: np.ndarray
    correct_K: np.ndarray
    wrong_K: np.ndarray
    excluded_K: np.ndarray


@dataclasses.dataclass(frozen=True)
class RewardTable:
    """Everything about a table of rollouts that scoring needs, counted once (`reward_table`).

    Attributes:
        index: of the meta rollouts in the table they come from.
        pass_rate_N: share of correct solutions in the meta rollout's group; NaN in a group without solutions.
        correct_N: number of correct solutions.
        wrong_N: number of wrong ones.
        shortest_N: length of the shortest correct solution, tokens; NaN without one.
        longest_N: of the longest.
        counts: the predictions by mode, `ours` and `released`.
    """

    index: pd.Index
    pass_rate_N: np.ndarray
    correct_N: np.ndarray
    wrong_N: np.ndarray
    shortest_N: np.ndarray
    longest_N: np.ndarray
    counts: dict[str, _Counts]


def reward_table(rollouts: pd.DataFrame, meta_prompt: Callable[[str], str] = str) -> RewardTable:
    """Parse and count once what every scoring of these rollouts needs; slow beside `score_table`.

    Predictions are read again from `text`, by our parser and by the released one, so both modes can be compared on the
    same rollouts, whichever was used when they were sampled. Correctness is taken as recorded.

    Args:
        rollouts: both streams; columns step, stream, group, problem, text, length, correct.
        meta_prompt: the whole meta prompt of a problem's text, for released mode.
    """
    number_R = rollouts.groupby(["step", "group"], sort=False).ngroup().to_numpy()
    groups = int(number_R.max()) + 1 if len(rollouts) else 0
    is_meta_R = (rollouts["stream"] == "meta").to_numpy()
    solutions, meta = rollouts[~is_meta_R], rollouts[is_meta_R]
    solution_group, meta_group = number_R[~is_meta_R], number_R[is_meta_R]
    right = solutions["correct"].to_numpy().astype(bool)
    lengths = solutions["length"].to_numpy(dtype=float)
    correct_P = np.bincount(solution_group, right, minlength=groups)
    total_P = np.bincount(solution_group, minlength=groups)
    shortest_P, longest_P = np.full(groups, np.nan), np.full(groups, np.nan)
    np.fmin.at(shortest_P, solution_group[right], lengths[right])
    np.fmax.at(longest_P, solution_group[right], lengths[right])
    pass_rate_P = np.divide(correct_P, total_P, out=np.full(groups, np.nan), where=total_P > 0)
    texts = [([], []) for _ in range(groups)]
    for group, correct, text in zip(solution_group, right, solutions["text"], strict=True):
        texts[group][0 if correct else 1].append(text)
    counts = {mode: _count(meta, meta_group, texts, mode, meta_prompt) for mode in MATCHING}
    return RewardTable(meta.index, pass_rate_P[meta_group], correct_P[meta_group], (total_P - correct_P)[meta_group],
                       shortest_P[meta_group], longest_P[meta_group], counts)


def _count(meta: pd.DataFrame, meta_group: np.ndarray, texts: Sequence[tuple[list[str], list[str]]], mode: str,
           meta_prompt: Callable[[str], str]) -> _Counts:
    """Read every meta rollout in one mode, and look each of its notions up in its group's solutions."""
    find, released = MATCHING[mode], mode == "released"
    predictions = [parse_prediction(text, released=released).prediction for text in meta["text"]]
    prepared: dict[int, tuple[str, list[str], list[str]]] = {}
    found: dict[tuple[int, str], tuple[int, int, bool]] = {}
    owner_K, rows_K = [], []
    for row, (prediction, group, problem) in enumerate(zip(predictions, meta_group, meta["problem"], strict=True)):
        if group not in prepared:
            prepared[group] = (find.text(meta_prompt(problem) if released else problem),
                               [find.text(text) for text in texts[group][0]],
                               [find.text(text) for text in texts[group][1]])
        for notion in {find.notion(notion) for notion in prediction.notions} if prediction else ():
            if (group, notion) not in found:
                problem_text, correct, wrong = prepared[group]
                found[group, notion] = (sum(notion in text for text in correct), sum(notion in text for text in wrong),
                                        notion in problem_text)
            owner_K.append(row)
            rows_K.append(found[group, notion])
    correct_K, wrong_K, excluded_K = np.array(rows_K, dtype=np.int64).reshape(-1, 3).T
    return _Counts(
        parsed_N=np.array([prediction is not None for prediction in predictions], dtype=bool),
        pass_rate_N=np.array([prediction and prediction.pass_rate for prediction in predictions], dtype=float),
        length_N=np.array([prediction and prediction.solution_length for prediction in predictions], dtype=float),
        owner_K=np.array(owner_K, dtype=np.int64), correct_K=correct_K, wrong_K=wrong_K,
        excluded_K=excluded_K.astype(bool))


def score_table(table: RewardTable, config: RewardConfig) -> pd.DataFrame:
    """Score every meta rollout of a table at once, as `meta_rewards` does group by group.

    Returns:
        Columns reward, reward_difficulty, reward_length, reward_notion, on the index of the meta rollouts; NaN in
        groups without solutions.

    Raises:
        ValueError: no weight above 0.
    """
    config = effective(config)
    counts = table.counts[config.mode]
    error_N = np.abs(counts.pass_rate_N / PASS_RATE_STEPS - table.pass_rate_N)
    difficulty_N = 1 - error_N**2 if config.difficulty_mode == "brier" else config.difficulty_base**error_N
    difficulty_N[np.isnan(counts.pass_rate_N)] = 0.0
    low_N = table.shortest_N * (1 - config.length_slack)
    high_N = table.longest_N * (1 + config.length_slack)
    after, before = (np.greater, np.less) if config.strict_length else (np.greater_equal, np.less_equal)
    length_N = (after(counts.length_N, low_N) & before(counts.length_N, high_N)).astype(float)
    notion_N = _notion_rewards(table, counts, config)
    parts = {"reward_difficulty": difficulty_N, "reward_length": length_N, "reward_notion": notion_N}
    for part_N in parts.values():
        part_N[~counts.parsed_N] = 0.0
        part_N[np.isnan(table.pass_rate_N)] = np.nan
    return pd.DataFrame({"reward": weighted(parts, config), **parts}, index=table.index)


def _notion_rewards(table: RewardTable, counts: _Counts, config: RewardConfig) -> np.ndarray:
    rows = len(table.index)
    correct_K, wrong_K = counts.correct_K, counts.wrong_K
    if config.notion_mode == "rate":
        correct_K = correct_K / np.maximum(table.correct_N, 1)[counts.owner_K]
        wrong_K = wrong_K / np.maximum(table.wrong_N, 1)[counts.owner_K]
    counted_K = ~counts.excluded_K if config.exclude_problem_notions else np.ones(len(counts.owner_K), dtype=bool)
    earned_N = np.bincount(counts.owner_K, (correct_K > wrong_K) & counted_K, minlength=rows)
    counted_N = np.bincount(counts.owner_K, counted_K, minlength=rows)
    return earned_N / np.maximum(counted_N, 1)
