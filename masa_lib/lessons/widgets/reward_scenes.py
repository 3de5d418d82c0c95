"""What a setting of the rewards makes of recorded rollouts: the tables that the reward lab draws.

Pure functions over data frames. Rewards come from `rewards`, advantages from `advantages`, so that the lab shows what a
training would do; nothing here draws, and nothing here is trained. Beside the recorded predictions stand *probes*:
made-up predictions, the same for every problem, which show what a setting pays to a model that never reads the problem.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.config import Config, RewardConfig
from masa_lib.lessons import reward_table
from masa_lib.lessons.reward_table import RewardTable
from masa_lib.method import prompts, rewards
from masa_lib.method.advantages import stream_advantages
from masa_lib.method.rewards import Solution
from masa_lib.method.streams import STREAMS, solutions_of
from masa_lib.runs.folder import Run
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction

#: what the lab sets: every setting of the rewards, and how advantages are made of them
KEYS = (*(key for key in configs.settings() if key.startswith("reward.")), "update.normalise_meta")
#: the parts of the meta reward that the lab draws, and the part of an answer that each pays
ANSWERED = {"reward_difficulty": "pass_rate", "reward_length": "length", "reward_notion": "notion"}
#: answers that the probes try
LENGTHS, NOTIONS, WORDS = 24, 8, 4


@dataclass(frozen=True, eq=False)
class Recorded:
    """Whole recorded groups, read once (`record`).

    Attributes:
        config: of the run they come from (of the first one).
        rollouts: both streams; `group` numbers the groups of all steps and runs, by rising pass rate.
        groups: a row a group: seed, step, problem, level, pass_rate, solutions (G).
        table: the recorded predictions, ready to be scored.
        probes: made-up predictions, equally many a group: `answer` numbers them, the last one knows the solutions;
            columns group, answer, pass_rate, length, notion.
        probe_table: the probes, ready to be scored.
    """

    config: Config
    rollouts: pd.DataFrame
    groups: pd.DataFrame
    table: RewardTable
    probes: pd.DataFrame
    probe_table: RewardTable

    def members(self, group: int) -> pd.DataFrame:
        """The rollouts of one group; they stand side by side."""
        return self.rollouts.iloc[slice(*self.rollouts["group"].searchsorted([group, group + 1]))]

    def meta_prompt(self, problem: str) -> str:
        """The whole meta prompt of a problem's text, as released mode wants it."""
        return _meta_prompt(problem, self.config)


@dataclass(frozen=True)
class Scene:
    """What one setting makes of the recorded groups.

    Attributes:
        predictions: a row a recorded prediction: group, pass_rate (true), predicted_pass_rate (eighths; NaN if unread),
            reward, PARTS, advantage, gain (places won in its group against the other setting; below 0: lost).
        flat: share of groups whose predictions all have advantage 0, by the true pass rate in eighths, with their
            number: columns share, groups.
        payments: the mean reward of a `random` constant answer, of the `best constant` (one answer for all problems),
            of the `recorded` ones and of the `best answer` (the best one for each problem), by part, weighted, so that
            a row adds up to the mean reward.
        drives: share of the advantages that each part accounts for; adds up to 1, and all are 0 without a signal.
        constant: the best constant answer: pass_rate (eighths), length (tokens), notion; without parts of weight 0.
    """

    predictions: pd.DataFrame
    flat: pd.DataFrame
    payments: pd.DataFrame
    drives: pd.Series
    constant: dict[str, Any]

    @property
    def no_signal(self) -> float:
        """Share of all groups whose predictions all have advantage 0."""
        return float((self.flat["share"] * self.flat["groups"]).sum() / self.flat["groups"].sum())

    @property
    def hacked(self) -> float:
        """How far the best constant answer comes from a random one to the best for each problem, a share.

        From a random one, because some scores pay much for anything: a quadratic one has a high floor.
        """
        totals = self.payments.sum(axis=1)
        reach = totals["best answer"] - totals["random"]
        return float((totals["best constant"] - totals["random"]) / reach) if reach > 1e-9 else 0.0

    @property
    def answer(self) -> str:
        """The best constant answer in words."""
        words = {"pass_rate": "{} of 8", "length": "{} tokens", "notion": "{!r}"}
        return ", ".join(words[name].format(value) for name, value in self.constant.items())


def presets(config: Config) -> dict[str, dict[str, Any]]:
    """The lab's presets, by dotted key: published, released, those of a run (ours), and one that is easily fooled."""
    paper = settings_of(Config())
    easy = {"reward.pass_rate_weight": 0.0, "reward.length_slack": 1.0, "reward.exclude_problem_notions": False}
    return {"paper": paper, "released": paper | {"reward.mode": "released"}, "ours": settings_of(config),
            "hackable": paper | easy}


def settings_of(config: Config) -> dict[str, Any]:
    """What a config says about KEYS."""
    return {key: configs.get(config, key) for key in KEYS}


def read(paths: Iterable[str | Path]) -> Recorded:
    """Read recorded runs that have a meta stream; whole groups of both streams are kept, all others left out.

    Raises:
        RunError: a folder holds no run, or its record is broken.
        ValueError: there is no group with both streams.
    """
    runs = [Run.open(path) for path in paths]
    tables = [run.rollouts().assign(seed=run.config.seed, run=number) for number, run in enumerate(runs)]
    tables = [table for table in tables if "group" in table]
    if not tables:
        raise ValueError("None of these runs recorded rollouts; set record.rollouts_every and train again.")
    return record(pd.concat(tables, ignore_index=True), runs[0].config)


def record(table: pd.DataFrame, config: Config) -> Recorded:
    """Prepare recorded rollouts of one or several runs.

    Args:
        table: both streams, the columns of recorded rollouts; `run` and `seed` tell several runs apart.
        config: of the run: its wording, and what `ours` is.

    Raises:
        ValueError: there is no group with both streams.
    """
    table = table.assign(**{name: 0 for name in ("run", "seed", "step") if name not in table})
    table = table[table.groupby(["run", "step", "group"])["stream"].transform("nunique") == len(STREAMS)]
    if table.empty:
        raise ValueError("No group holds solutions and predictions; the lab needs runs of the method masa.")
    right = table["correct"].astype("Float64").groupby([table[name] for name in ("run", "step", "group")])
    table = table.assign(pass_rate=right.transform("mean").astype(float), solutions=right.transform("count"))
    table = table.sort_values(["pass_rate", "run", "step", "group", "stream", "member"], ignore_index=True)
    table["group"] = table.groupby(["run", "step", "group"], sort=False).ngroup()
    table["step_recorded"], table["step"] = table["step"], 0
    groups = table.groupby("group")[["seed", "step_recorded", "problem", "level", "pass_rate", "solutions"]].first()
    probes = _probes(table)
    solved = solutions_of(table)
    made = pd.concat([solved, probes.assign(stream="meta", step=0)], ignore_index=True)
    ready = [reward_table.reward_table(rows, functools.partial(_meta_prompt, config=config)) for rows in (table, made)]
    return Recorded(config, table, groups.rename(columns={"step_recorded": "step"}), ready[0], probes, ready[1])


def _meta_prompt(problem: str, config: Config) -> str:
    messages = prompts.meta_messages(problem, config.prompt, config.sampling.solution_tokens)
    return "\n".join(message["content"] for message in messages)


def _probes(table: pd.DataFrame) -> pd.DataFrame:
    """Every constant answer that is tried, for every group, and behind them one that knows the group's solutions."""
    solved = solutions_of(table)
    right = solved[solved["correct"].astype(bool)].groupby("group")["length"].agg(["min", "max"])
    every = solved["length"] if right.empty else solved.loc[solved["correct"].astype(bool), "length"]
    lengths = np.unique(every.quantile(np.linspace(0, 1, LENGTHS)).round().astype(int))
    words = Counter(word for text in solved["text"] for word in set(re.findall(r"[^\W\d_]{2,}", text.casefold())))
    said = Counter(notion for notions in table["notions"].dropna() for notion in notions)
    notions = list(dict.fromkeys(name for counted, most in ((said, NOTIONS), (words, WORDS))
                                 for name, _ in counted.most_common(most)))
    count = max(PASS_RATE_STEPS + 1, len(lengths), len(notions))
    problems = table.groupby("group")[["problem", "pass_rate"]].first()
    rows = []
    for group, problem, pass_rate in problems.itertuples():
        middle = int(right.loc[group].sum() // 2) if group in right.index else int(lengths[0])
        for answer in range(count + 1):
            knows = answer == count
            rows.append({"group": group, "answer": answer, "problem": problem,
                         "pass_rate": round(PASS_RATE_STEPS * pass_rate) if knows else min(answer, PASS_RATE_STEPS),
                         "length": middle if knows else int(lengths[min(answer, len(lengths) - 1)]),
                         "notion": notions[min(answer, len(notions) - 1)]})
    probes = pd.DataFrame(rows)
    probes["text"] = [json.dumps({"math_notion": [notion], "pass_rate": pass_rate, "solution_length": length})
                      for pass_rate, length, notion in
                      probes[["pass_rate", "length", "notion"]].itertuples(index=False)]
    return probes


def scene(recorded: Recorded, settings: Mapping[str, Any], against: Mapping[str, Any]) -> Scene:
    """Score the recorded groups under a setting.

    Args:
        recorded: the groups.
        settings: KEYS and values; what is missing has its default.
        against: the setting that ranks are compared with.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
        ValueError: no weight above 0.
    """
    config = configs.replace(Config(), settings)
    table = predictions(recorded, config)
    others = reward_table.score_table(recorded.table, configs.replace(Config(), against).reward)["reward"]
    ranks = [values.round(9).groupby(table["group"]).rank() for values in (table["reward"], others)]
    table["gain"] = ranks[0] - ranks[1]
    silent = table["advantage"].eq(0).groupby(table["group"]).all()
    eighths = (recorded.groups["pass_rate"] * PASS_RATE_STEPS).round().astype(int)
    flat = silent.groupby(eighths.reindex(silent.index)).agg(["mean", "size"]).reindex(range(PASS_RATE_STEPS + 1))
    flat = flat.set_axis(["share", "groups"], axis=1).fillna(0.0)
    payments, constant = _payments(recorded, config, table)
    return Scene(table, flat, payments, _drives(table, config), constant)


def predictions(recorded: Recorded, config: Config) -> pd.DataFrame:
    """Rewards and advantages of the recorded predictions, see `Scene.predictions` (without `gain`)."""
    table = reward_table.score_table(recorded.table, config.reward)
    table["stream"], table["group"] = "meta", recorded.rollouts.loc[table.index, "group"]
    table["pass_rate"] = recorded.table.pass_rate_N
    table["predicted_pass_rate"] = recorded.table.counts["ours"].pass_rate_N
    return table.assign(advantage=stream_advantages(table, config))


def notion_pays(recorded: Recorded, notions: Sequence[str], mode: str) -> pd.DataFrame:
    """Whether each notion, predicted alone, would pay in each group: a row a group, a column a notion.

    Args:
        recorded: the groups.
        notions: any texts.
        mode: `count` or `rate`, as `reward.notion_mode`.
    """
    config = RewardConfig(notion_mode=mode)
    alone = [MetaPrediction((notion,), 0, 0) for notion in notions]
    solved = solutions_of(recorded.rollouts)
    rows = {}
    for group, part in solved.groupby("group"):
        solutions = [Solution(row.text, row.length, bool(row.correct)) for row in part.itertuples()]
        scored = rewards.meta_rewards(solutions, alone, part["problem"].iloc[0], config)
        rows[group] = [reward.parts["reward_notion"] > 0 for reward in scored]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(notions))


def weights(config: Config) -> pd.Series:
    """The weight of each part, adding up to 1."""
    reward = rewards.effective(config.reward)
    found = pd.Series({name: rewards.PARTS[name].weighs(reward) for name in ANSWERED})
    return found / found.sum()


def _payments(recorded: Recorded, config: Config, table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """See `Scene.payments` and `Scene.constant`; the parts are added, so that each has its best answer by itself."""
    parts = list(ANSWERED)
    count = recorded.probes["answer"].max() + 1
    scored = reward_table.score_table(recorded.probe_table, config.reward)[parts].to_numpy()
    scored = scored.reshape(-1, count, len(parts))
    means = scored[:, :-1].mean(axis=0)
    shares = weights(config)
    tried = recorded.probes.iloc[:count - 1]
    random = [means[~tried[name].duplicated().to_numpy(), place].mean() for place, name in enumerate(ANSWERED.values())]
    rows = {"random": random, "best constant": means.max(axis=0), "recorded": table[parts].mean(),
            "best answer": scored.max(axis=1).mean(axis=0)}
    constant = {name: recorded.probes[name].tolist()[answer] for name, answer, share in
                zip(ANSWERED.values(), means.argmax(axis=0), shares, strict=True) if share > 0}
    return pd.DataFrame(rows, index=parts).T * shares, constant


def _drives(table: pd.DataFrame, config: Config) -> pd.Series:
    """See `Scene.drives`: each part's own advantage, weighted; together they are the advantage."""
    mode = config.update.normalise_meta
    separate = mode in ("parts", "contrast")
    alone = configs.replace(config, {"update.normalise_meta": "reward" if separate else "none"})
    shares = weights(config)
    each = [table[["stream", "group"]].assign(reward=table[part], group=table["group"] + number * 10**9)
            for number, part in enumerate(shares.index)]  # all parts in one call, as groups of their own
    found = stream_advantages(pd.concat(each, ignore_index=True), alone).to_numpy()
    found = found.reshape(len(shares), -1) * shares.to_numpy()[:, None]
    advantage = table["advantage"].to_numpy()
    if mode == "contrast":  # the other parts are as in parts
        found[0] = advantage - found[1:].sum(axis=0)
    elif mode == "reward":  # the parts of the unnormalised advantage, over the reward's standard deviation
        whole = found.sum(axis=0)
        found = found * np.divide(advantage, whole, out=np.zeros_like(whole), where=np.abs(whole) > 1e-12)
    power = float((advantage**2).sum())
    return pd.Series((found * advantage).sum(axis=1) / power if power else 0.0, shares.index)
