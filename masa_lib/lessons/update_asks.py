"""What the update asks of a predicted pass rate, which is not what the reward pays.

A reward has a best constant answer; an update has none, it compares. So take groups whose predictions are two
neighbouring answers, k and k + 1 eighths, in equal numbers, and let the library's own advantages say which of them gets
likelier over all problems, and by how much: the *push*. Where pushes change from up to down, answers come to rest.
The groups are recorded ones: their pass rates are true, and the other parts of their predictions' rewards stay as they
were sampled, because a standard deviation of the whole reward counts them. Nothing is trained, nothing needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.lessons import reward_table
from masa_lib.lessons.widgets.reward_scenes import Recorded
from masa_lib.method.advantages import stream_advantages
from masa_lib.method.rewards import difficulty_reward, weighted
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: scores of the pass rate, as settings
SCORES: dict[str, dict[str, Any]] = {
    "kernel, b = 0.0001": {"reward.difficulty_base": 1e-4}, "kernel, b = 0.01 (published)": {},
    "kernel, b = 0.5": {"reward.difficulty_base": 0.5}, "brier": {"reward.difficulty_mode": "brier"}}
#: what becomes of a reward, as settings
NORMALISED: dict[str, dict[str, Any]] = {
    "std of the pass rate's part (parts)": {"update.normalise_meta": "parts"},
    "std of the whole reward (reward, published)": {"update.normalise_meta": "reward"},
    "centred only (none)": {"update.normalise_meta": "none"},
    "contrast": {"update.normalise_meta": "contrast"}}
#: shares of the problems by pass rate, 0 to 8 of 8, that no run has recorded
MADE_UP = {"mostly hopeless": (12, 2, 1, 1, 1, 1, 0, 0, 2), "all or nothing": (6, 1, 0, 0, 0, 0, 0, 1, 4),
           "a hump and a tail": (1, 4, 3, 2, 1, 1, 1, 1, 1)}
#: problems that stand for a distribution
PROBLEMS = 160
#: a push below this share of the largest one is no push: it is left over from rounding, or from the 1e-6 beside a std
_NONE = 1e-3


def drawn(recorded: Recorded, shares: Sequence[float], problems: int = PROBLEMS) -> np.ndarray:
    """Numbers of recorded groups, some several times, whose pass rates are distributed like this.

    Args:
        recorded: the groups (`reward_scenes.read`).
        shares: of the problems with 0, 1, ... 8 of 8 right solutions, in any unit.
        problems: how many in all, about.

    Raises:
        ValueError: no share is above 0, one is below, or no recorded group has a pass rate that is asked for.
    """
    wanted = np.asarray(shares, dtype=float)
    if len(wanted) != PASS_RATE_STEPS + 1 or (wanted < 0).any() or not wanted.any():
        raise ValueError(f"Nine shares of problems are wanted, none below 0 and one above it, not {list(shares)}.")
    eighths, found = eighths_of(recorded), []
    for rate, count in enumerate(np.round(problems * wanted / wanted.sum()).astype(int)):
        there = eighths.index[eighths == rate]
        if count and there.empty:
            raise ValueError(f"No recorded group has {rate} of 8 right solutions.")
        found += [there[round(place)] for place in np.linspace(0, len(there) - 1, count)]
    return np.array(found, dtype=int)


def distributions(recorded: Recorded) -> dict[str, np.ndarray]:
    """Groups by what they stand for: the recorded first step, last third and whole, and what is MADE_UP."""
    steps = recorded.groups["step"]
    kept = {"recorded, first step": steps == steps.min(), "recorded, last third": steps > 2 / 3 * steps.max(),
            "recorded, all steps": steps > 0}
    made = {name: drawn(recorded, shares) for name, shares in MADE_UP.items()}
    return {name: recorded.groups.index[rows].to_numpy() for name, rows in kept.items()} | made


def eighths_of(recorded: Recorded) -> pd.Series:
    """The true pass rate of each group, whole eighths."""
    return (recorded.groups["pass_rate"] * PASS_RATE_STEPS).round().astype(int)


def middles(recorded: Recorded, groups: np.ndarray) -> dict[str, float]:
    """Mode, median and mean of the groups' pass rates, eighths."""
    eighths = eighths_of(recorded)[groups]
    return {"mode": float(eighths.mode()[0]), "median": float(eighths.median()), "mean": float(eighths.mean())}


def pays(recorded: Recorded, groups: np.ndarray, config: Config) -> pd.Series:
    """The mean difficulty reward of each constant answer, 0 to 8 eighths: what the reward pays."""
    rates = recorded.groups["pass_rate"][groups]
    return pd.Series({answer: float(np.mean([difficulty_reward(answer, rate, config.reward) for rate in rates]))
                      for answer in range(PASS_RATE_STEPS + 1)})


def pushes(recorded: Recorded, groups: np.ndarray, config: Config) -> pd.DataFrame:
    """How much more the update wants answer k + 1 than k: the difference of their mean advantages.

    Args:
        recorded: the groups (`reward_scenes.read`).
        groups: numbers of the groups that stand for a step's problems; one may stand there several times.
        config: how predictions are scored and normalised.

    Returns:
        A row a k, 0 to 7: `push` over all problems (above 0: k + 1 gets likelier), `hard` over those with less than
        half of their solutions right, `easy` over the others; NaN where there are none.

    Raises:
        ValueError: no weight above 0.
    """
    table = _members(recorded, groups, config)
    made = [_answered(table, low, upper, config) for low in range(PASS_RATE_STEPS)
            for upper in (table["odd"], ~table["odd"])]
    if config.update.normalise_meta == "contrast":  # a batch by itself, whose averages are taken off
        advantages = [stream_advantages(batch, config) for batch in made]
    else:
        several = [batch.assign(group=batch["group"] + number * len(groups)) for number, batch in enumerate(made)]
        advantages = np.split(stream_advantages(pd.concat(several, ignore_index=True), config), len(made))
    # an advantage with its answer's sign, twice: half the members give each answer, so its mean is the difference
    gaps = [2 * np.asarray(found) * np.where(batch["upper"], 1, -1)
            for found, batch in zip(advantages, made, strict=True)]
    gap_KN = np.mean(np.reshape(gaps, (PASS_RATE_STEPS, 2, -1)), axis=1)
    hard_N = (table["pass_rate"] < 0.5).to_numpy()
    found = {"push": gap_KN, "hard": gap_KN[:, hard_N], "easy": gap_KN[:, ~hard_N]}
    return pd.DataFrame({name: gap.mean(axis=1) if gap.size else np.nan for name, gap in found.items()},
                        pd.RangeIndex(PASS_RATE_STEPS, name="k"))


def _members(recorded: Recorded, groups: np.ndarray, config: Config) -> pd.DataFrame:
    """The predictions of the groups, one after the other, with all parts of their rewards."""
    scored = reward_table.score_table(recorded.table, config.reward)
    places = pd.Series(np.arange(len(scored)), recorded.rollouts.loc[scored.index, "group"]).groupby(level=0).indices
    chosen = [places[group] for group in groups]
    table = scored.iloc[np.concatenate(chosen)].reset_index(drop=True)
    number = np.repeat(np.arange(len(groups)), [len(rows) for rows in chosen])
    odd = table.groupby(number).cumcount() % 2 == 1
    rates = recorded.groups["pass_rate"].to_numpy()[np.asarray(groups)][number]
    return table.assign(stream="meta", group=number, odd=odd, pass_rate=rates)


def _answered(table: pd.DataFrame, low: int, upper: pd.Series, config: Config) -> pd.DataFrame:
    """The predictions with another answer, `low` or, where `upper`, one more, and what they then earn."""
    rates, place = np.unique(table["pass_rate"], return_inverse=True)
    worth = np.array([[difficulty_reward(answer, rate, config.reward) for answer in (low, low + 1)] for rate in rates])
    made = table.assign(reward_difficulty=worth[place, upper.astype(int)], predicted_pass_rate=low + upper.astype(int),
                        upper=upper)
    return made.assign(reward=weighted(made, config.reward))


def signs(pushed: pd.DataFrame) -> str:
    """The pushes as a word: + up, - down, 0 neither, for k = 0 to 7."""
    push = pushed["push"].to_numpy()
    kept = np.where(np.abs(push) > _NONE * np.abs(pushed.to_numpy()[~np.isnan(pushed)]).max(initial=0.0), push, 0.0)
    return "".join("+" if value > 0 else "-" if value < 0 else "0" for value in kept)


def rests(pushed: pd.DataFrame) -> list[int]:
    """The answers, eighths, that pushes lead to from both sides; several, if it depends on where predictions begin."""
    word = signs(pushed)
    if "+" not in word and "-" not in word:
        return []
    return [answer for answer in range(PASS_RATE_STEPS + 1)
            if (answer == 0 or word[answer - 1] != "-") and (answer == PASS_RATE_STEPS or word[answer] != "+")]


def setting(score: str, normalised: str) -> Config:
    """The published settings with one of SCORES and one of NORMALISED."""
    return configs.replace(Config(), SCORES[score] | NORMALISED[normalised])


def compared(recorded: Recorded, groups: np.ndarray, normalised: Sequence[str] = tuple(NORMALISED)) -> pd.DataFrame:
    """Signs of the pushes under all SCORES (rows) and some of NORMALISED (columns)."""
    return pd.DataFrame({name: {score: signs(pushes(recorded, groups, setting(score, name))) for score in SCORES}
                         for name in normalised})
