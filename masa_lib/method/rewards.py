"""The rewards: what a solution earns, and what a prediction earns when its problem's solutions are known.

Each formula stands here twice: `meta_rewards` says it for one group, to be read beside the paper, and `score_table`
says it for a whole table of recorded rollouts at once, so that a reader can turn the knobs on 100,000 rollouts and
watch. A property test keeps the two equal. `released` mode is the same formulas with the authors' choices and their
matching of notions; it pays predictions as the authors' code does, not solutions (see `config.RewardConfig`). Parsing,
grading and what advantages do with a reward are elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from masa_lib.config import RewardConfig
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction
from masa_lib.tasks.read_prediction import parse_prediction

#: columns of the parts of the meta reward, 0 to 1
PARTS = ("reward_difficulty", "reward_length", "reward_notion")


@dataclasses.dataclass(frozen=True)
class Solution:
    """One graded solution rollout; `length` in tokens, end token included."""

    text: str
    length: int
    correct: bool


@dataclasses.dataclass(frozen=True)
class MetaReward:
    """What one meta rollout earns: the total, and the three parts before weighting, each 0 to 1."""

    total: float
    difficulty: float
    length: float
    notion: float


def solution_reward(correct: bool) -> float:
    """1 for a right answer, 0 for a wrong one."""
    return float(correct)


def meta_rewards(solutions: Sequence[Solution], predictions: Sequence[MetaPrediction | None], problem_text: str,
                 config: RewardConfig, meta_prompt: str = "") -> list[MetaReward]:
    """Score the M predictions of one problem against its G solutions.

    Args:
        solutions: the group's solution rollouts, at least one.
        predictions: the group's predictions; None, for what did not parse, earns 0.
        problem_text: the problem, whose own notions do not count.
        config: weights and shape of the three parts; `mode="released"` overrides them all.
        meta_prompt: the whole meta prompt; released mode excludes the notions that stand in it.

    Raises:
        ValueError: no solutions, or no weight above 0.

    Source: the meta rewards of arXiv 2510.03259; the settings' departures are listed in `config.RewardConfig`.
    """
    if not solutions:
        raise ValueError("A group without solution rollouts has no pass rate to score predictions against.")
    config = effective(config)
    find = MATCHING[config.mode]
    correct_lengths = [solution.length for solution in solutions if solution.correct]
    pass_rate = len(correct_lengths) / len(solutions)
    correct_texts = [find.text(solution.text) for solution in solutions if solution.correct]
    wrong_texts = [find.text(solution.text) for solution in solutions if not solution.correct]
    problem = find.text(meta_prompt or problem_text if config.mode == "released" else problem_text)

    def score(prediction: MetaPrediction | None) -> MetaReward:
        """One prediction's reward by part; one that did not parse earns nothing."""
        if prediction is None:
            return MetaReward(0.0, 0.0, 0.0, 0.0)
        difficulty = difficulty_reward(prediction.pass_rate, pass_rate, config)
        length = length_reward(prediction.solution_length, correct_lengths, config)
        notion = notion_reward({find.notion(notion) for notion in prediction.notions},
                               correct_texts, wrong_texts, problem, config)
        return MetaReward(_weighted(difficulty, length, notion, config), difficulty, length, notion)

    return [score(prediction) for prediction in predictions]


def difficulty_reward(predicted: int | None, pass_rate: float, config: RewardConfig) -> float:
    """b^|error| or 1 - error^2, where the error is the predicted eighths against the group's pass rate."""
    if predicted is None:
        return 0.0
    error = abs(predicted / PASS_RATE_STEPS - pass_rate)
    return 1 - error**2 if config.difficulty_mode == "brier" else config.difficulty_base**error


def length_reward(predicted: int | None, correct_lengths: Sequence[int], config: RewardConfig) -> float:
    """1 if the predicted length lies between the shortest and the longest correct solution, tokens; 0 without one."""
    if predicted is None or not correct_lengths:
        return 0.0
    low = min(correct_lengths) * (1 - config.length_slack)
    high = max(correct_lengths) * (1 + config.length_slack)
    return float(low < predicted < high if config.strict_length else low <= predicted <= high)


def notion_reward(notions: set[str], correct_texts: Sequence[str], wrong_texts: Sequence[str], problem: str,
                  config: RewardConfig) -> float:
    """Share of the notions that more correct than wrong solutions contain (or a larger share of them: `rate`).

    Notions that stand in the problem are left out of the share. All texts come prepared for matching.
    """
    counted = [notion for notion in notions if not (config.exclude_problem_notions and notion in problem)]
    earned = 0
    for notion in counted:
        correct_with = sum(notion in text for text in correct_texts)
        wrong_with = sum(notion in text for text in wrong_texts)
        if config.notion_mode == "rate":
            earned += correct_with / max(len(correct_texts), 1) > wrong_with / max(len(wrong_texts), 1)
        else:
            earned += correct_with > wrong_with
    return earned / len(counted) if counted else 0.0


def _weighted(difficulty: float, length: float, notion: float, config: RewardConfig) -> float:
    weights = config.pass_rate_weight, config.length_weight, config.notion_weight
    if sum(weights) <= 0:
        raise ValueError("All three meta reward weights are 0; set reward.pass_rate_weight, reward.length_weight or "
                         "reward.notion_weight above 0.")
    # Added in the released order, so that released totals are equal to the last bit.
    return (weights[2] * notion + weights[0] * difficulty + weights[1] * length) / sum(weights)


def effective(config: RewardConfig) -> RewardConfig:
    """The settings that act: the released choices, spelled out, where the mode is released."""
    if config.mode == "ours":
        return config
    return RewardConfig(mode="released", pass_rate_weight=1.0, length_weight=1.0, notion_weight=1.0,
                        difficulty_mode="kernel", difficulty_base=0.01, strict_length=True, length_slack=0.0,
                        notion_mode="count", exclude_problem_notions=True)


@dataclasses.dataclass(frozen=True)
class _Matching:
    """How texts and notions are prepared, so that `notion in text` says whether a text contains a notion."""

    text: Callable[[str], str]
    notion: Callable[[str], str]


def _words(text: str) -> str:
    """Case-folded words and marks between single spaces, also at the ends: a substring is then a run of whole words."""
    return " ".join(["", *re.findall(r"\w+|[^\w\s]", text.casefold()), ""])


def _crude_singular(notion: str) -> str:
    """The released singular, by endings alone: identities to identity, but matrices to matrice."""
    lower = notion.lower()
    if lower.endswith("ies") and lower != "series":
        return notion[:-3] + "y"
    if lower.endswith(("ches", "shes", "xes", "zes", "oes")):
        return notion[:-2]
    return notion[:-1] if lower.endswith("s") and not lower.endswith("ss") and lower != "series" else notion


#: how each mode looks for a notion in a text
MATCHING = {"ours": _Matching(text=_words, notion=_words),
             "released": _Matching(text=str, notion=_crude_singular)}


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
    parts = np.stack([difficulty_N, length_N, notion_N])
    parts[:, ~counts.parsed_N] = 0.0
    parts[:, np.isnan(table.pass_rate_N)] = np.nan
    return pd.DataFrame({"reward": _weighted(*parts, config), "reward_difficulty": parts[0], "reward_length": parts[1],
                         "reward_notion": parts[2]}, index=table.index)


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
