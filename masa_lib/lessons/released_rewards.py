"""What each departure of the released code from the published formulas costs, on rollouts that were recorded.

The same predictions are paid twice, once by the published rewards and once with a departure, and the two payments are
compared group by group. The solutions keep their recorded grades: the authors' way of grading is not among the
departures. Deliberately no training: whom a reward pays is a fact about a reward, what a model learns from it is
another matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib.config import RewardConfig
from masa_lib.lessons.reward_table import RewardTable, reward_table, score_table
from masa_lib.method.prompts import meta_messages
from masa_lib.method.rewards import PARTS
from masa_lib.runs.folder import Run

PUBLISHED, RELEASED = RewardConfig(), RewardConfig(mode="released")


def read(folders: Iterable[Path]) -> tuple[pd.DataFrame, RewardTable]:
    """The recorded rollouts of runs with the same prompts, counted once for both parsers and ways of matching.

    Returns:
        All rollouts in one table, numbered anew in `group` (one of its run and step), and what `payments` wants.
    """
    runs = [Run.open(folder) for folder in folders]
    settings = runs[0].config

    def prompt(problem: str) -> str:
        messages = meta_messages(problem, settings.prompt, settings.sampling.solution_tokens)
        return "\n".join(message["content"] for message in messages)

    rollouts = pd.concat([run.rollouts().assign(run=number) for number, run in enumerate(runs)], ignore_index=True)
    rollouts["group"] = rollouts.groupby(["run", "step", "group"]).ngroup()
    return rollouts, reward_table(rollouts, prompt)


def payments(table: RewardTable) -> dict[str, pd.DataFrame]:
    """The published rewards of a table of rollouts, each departure alone, and all of them as released.

    Returns:
        Frames as of `score_table`, by name. `parser`: parts that the released parser cannot read earn 0. `open window`:
        the ends of the length window do not count. `matching`: notions are matched as released, where they are read.
    """
    published, released = score_table(table, PUBLISHED), score_table(table, RELEASED)
    read = table.counts["released"]
    unread = {"reward_difficulty": np.isnan(read.pass_rate_N), "reward_length": np.isnan(read.length_N),
              "reward_notion": ~read.parsed_N}
    parser = published.assign(**{part: published[part].mask(gone, 0.0) for part, gone in unread.items()})
    notion = released["reward_notion"].where(read.parsed_N, published["reward_notion"])
    matching = published.assign(reward_notion=notion)
    for frame in (parser, matching):
        frame["reward"] = frame[list(PARTS)].mean(axis=1)
    return {"published": published, "parser": parser,
            "open window": score_table(table, RewardConfig(strict_length=True)), "matching": matching,
            "released": released}


def compare(before: pd.Series, after: pd.Series, groups: pd.Series) -> dict[str, float]:
    """Two payments of the same predictions.

    Args:
        before: rewards, one a prediction.
        after: the others.
        groups: which group each belongs to.

    Returns:
        `mean_reward` of `after`; the shares of predictions whose reward `changed` and of those that were `turned`
        (above their group's mean in one payment and not in the other: the update pushes them the other way); the
        shares of groups with an `other_winner` and with `no_signal` in `after`.
    """
    def above(rewards: pd.Series) -> pd.Series:
        return rewards > rewards.groupby(groups).transform("mean") + 1e-9

    def best(rewards: pd.Series) -> pd.Series:
        return rewards >= rewards.groupby(groups).transform("max") - 1e-9

    spread = after.groupby(groups).agg(np.ptp)
    return {"mean_reward": after.mean(), "changed": ((before - after).abs() > 1e-9).mean(),
            "turned": (above(before) != above(after)).mean(),
            "other_winner": (best(before) != best(after)).groupby(groups).any().mean(),
            "no_signal": (spread < 1e-9).mean()}
