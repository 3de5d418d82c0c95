"""The rewards: what a solution earns, and what a prediction earns when its problem's solutions are known.

A new part of the meta reward is an entry of PARTS. `released` mode is the same formulas with the authors' choices and
their matching of notions; it pays predictions as the authors' code does, not solutions (see `config.RewardConfig`).
Parsing, grading and what advantages do with a reward are elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from masa_lib.config import RewardConfig
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction


@dataclasses.dataclass(frozen=True)
class Solution:
    """One graded solution rollout; `length` in tokens, end token included."""

    text: str
    length: int
    correct: bool


@dataclasses.dataclass(frozen=True)
class MetaReward:
    """What one meta rollout earns: the total, and the parts before weighting by their names in PARTS, each 0 to 1."""

    total: float
    parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """What became of a problem's solutions, as the parts of the meta reward see it.

    `pass_rate`: share of right solutions. `correct_lengths`: tokens of the right ones. `correct_texts`, `wrong_texts`,
    `problem`: prepared for matching, and so is what `notion` gives of a notion.
    """

    pass_rate: float
    correct_lengths: Sequence[int]
    correct_texts: Sequence[str]
    wrong_texts: Sequence[str]
    problem: str
    notion: Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the meta reward.

    `score`: of a prediction beside its group, 0 to 1. `weight`: the setting of `reward` that holds it, or a number.
    """

    score: Callable[[MetaPrediction, Group, RewardConfig], float]
    weight: str | float

    def weighs(self, config: RewardConfig) -> float:
        """The weight in force."""
        return getattr(config, self.weight) if isinstance(self.weight, str) else self.weight


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
    right, wrong = ([solution for solution in solutions if solution.correct is correct] for correct in (True, False))
    group = Group(len(right) / len(solutions), [solution.length for solution in right],
                  [find.text(solution.text) for solution in right], [find.text(solution.text) for solution in wrong],
                  find.text(meta_prompt or problem_text if config.mode == "released" else problem_text), find.notion)

    def score(prediction: MetaPrediction | None) -> MetaReward:
        """One prediction's reward by part; one that did not parse earns nothing."""
        parts = {name: part.score(prediction, group, config) if prediction else 0.0 for name, part in PARTS.items()}
        return MetaReward(weighted(parts, config), parts)

    return [score(prediction) for prediction in predictions]


def difficulty_reward(predicted: int | None, pass_rate: float, config: RewardConfig) -> float:
    """b^|error| or 1 - error^2, where the error is the predicted eighths against the group's pass rate.

    Under doubt a small b is paid best for the mode, the square for the mean: that is what the reward pays, not what
    the update asks (`advantages`).
    """
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


def _notions(prediction: MetaPrediction, group: Group, config: RewardConfig) -> float:
    return notion_reward({group.notion(notion) for notion in prediction.notions}, group.correct_texts,
                         group.wrong_texts, group.problem, config)


#: by their columns in a table of rollouts; added in this order, the released one, so that totals are equal to the bit
PARTS: dict[str, Part] = {
    "reward_notion": Part(_notions, "notion_weight"),
    "reward_difficulty": Part(lambda prediction, group, config: difficulty_reward(
        prediction.pass_rate, group.pass_rate, config), "pass_rate_weight"),
    "reward_length": Part(lambda prediction, group, config: length_reward(
        prediction.solution_length, group.correct_lengths, config), "length_weight")}


def weighted(parts: Mapping[str, Any], config: RewardConfig) -> Any:
    """The weighted mean of parts, numbers or arrays, by their names in PARTS.

    Raises:
        ValueError: no weight above 0.
    """
    weights = {name: part.weighs(config) for name, part in PARTS.items() if name in parts}
    if sum(weights.values()) <= 0:
        raise ValueError("All three meta reward weights are 0; set reward.pass_rate_weight, reward.length_weight or "
                         "reward.notion_weight above 0.")
    return sum(weight * parts[name] for name, weight in weights.items()) / sum(weights.values())


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
