"""One setting of gate, cap and M tried out: on recorded groups, or with a model that stands still.

`replay` draws curves over many settings, one device at a time; here all devices of one setting act together, and every
token has its place in one account. `rehearse` lets any gate choose problems for a few steps without an update, so that
gates that need no predictions can be compared as well. Neither says what a model becomes whose training was gated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.analysis.compare import pass_at_k
from masa_lib.config import Config
from masa_lib.engines import Engine
from masa_lib.gates import registry
from masa_lib.lessons import replay
from masa_lib.lessons.replay import PHASES, Groups, ReplayError, ceiling
from masa_lib.method import gather, gating, rollouts
from masa_lib.method.streams import solutions_of
from masa_lib.runs.folder import Run
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problems import Problem, ProblemPool
from masa_lib.training import metrics

#: keeps the seeds of the oracle's own solutions apart from those of the rehearsed steps
ORACLE_TAG = 4241
#: the settings that a trial obeys
KEYS = ("gate.rule", "gate.threshold", "gate.std", "gate.predictions", "gate.recheck", "cap.aggregate",
        "cap.multiplier")


def pooled(runs: Sequence[Groups]) -> Groups:
    """The groups of several runs of one study as if they were one run's; the first run's config speaks for all."""
    arrays = [field.name for field in dataclasses.fields(Groups) if field.name != "config"]
    return dataclasses.replace(runs[0], **{name: np.concatenate([getattr(run, name) for run in runs])
                                           for name in arrays})


def threshold(config: Config) -> float:
    """What the config's rule compares its scores with: gate.threshold for the rule signal, else gate.std.

    Raises:
        ReplayError: for the rule posterior.
    """
    if config.gate.rule == "posterior":
        raise ReplayError("The rule posterior learns while a model trains and cannot be replayed; take the rule "
                          "signal, v1 or v2.")
    return config.gate.threshold if config.gate.rule == "signal" else config.gate.std


def scores(groups: Groups, config: Config, draws: int = replay.DRAWS) -> np.ndarray:
    """Of each group what the config's rule compares with its threshold, over random subsets of M; shape (draws, P)."""
    threshold(config)
    return gating.rule_scores(replay.draw(groups, groups.rates_PM, _members(groups, config), draws), config.gate.rule,
                              groups.right_PG.shape[1])


def account(groups: Groups, config: Config, draws: int = replay.DRAWS) -> pd.DataFrame:
    """What gate and cap of a config would have done together, and where the tokens would have gone, by phase.

    Args:
        groups: recorded.
        config: those of its settings that KEYS names; `gate.predictions` = 0 takes all recorded predictions.
        draws: random subsets that a smaller M is averaged over.

    Returns:
        Index phase, columns `groups` (how many), `flat` (share without a signal), `dropped`, `precision`, `recall` (of
        the gate), `right_cut` and `stopped` (shares of the right and of all solutions, by the cap), `signal_lost`
        (share of the groups with a signal that are dropped and not re-checked, or have none left under the cap), and as
        shares of all recorded solution tokens `solutions`, `rechecks` and `predictions` (spent), `dropped_tokens` and
        `cap_tokens` (not spent) and `tokens_saved` (net: 1 less what is spent). `gain` is the number of groups with a
        signal per token, relative to rolling out everything without predictions. That a share of the solutions is left
        uncapped (`UNCAPPED`) is not played.
    """
    members, recheck = _members(groups, config), config.gate.recheck
    dropped_DP = scores(groups, config, draws) < threshold(config)
    rolled_DP = np.where(dropped_DP, recheck, 1.0)
    over_DPG = groups.lengths_PG > caps(groups, config, draws)[..., None]
    spent_DP = np.minimum(groups.lengths_PG, caps(groups, config, draws)[..., None]).sum(axis=-1)
    still_DPG = groups.right_PG & ~over_DPG
    kept_DP = rolled_DP * (groups.signal_P & still_DPG.any(axis=-1) & ~still_DPG.all(axis=-1))
    phases, tokens_P, flat_P = groups.phases_FP, groups.lengths_PG.sum(axis=1), ~groups.signal_P

    def total(values: np.ndarray) -> np.ndarray:
        """Sums of (draws, P) or (P,) by phase, the mean over draws."""
        return phases @ np.atleast_2d(values).mean(axis=0)

    drops, full, signal = total(dropped_DP), total(tokens_P), total(groups.signal_P)
    hits, dropped_tokens = total(dropped_DP & flat_P), total((1 - rolled_DP) * tokens_P)
    solutions, rechecks = total(~dropped_DP * spent_DP), total(dropped_DP * recheck * spent_DP)
    predictions = total(groups.meta_tokens(members))
    spent = solutions + rechecks + predictions
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = 1 - total(kept_DP) / signal
        found = {"groups": phases.sum(axis=1).astype(int), "flat": total(flat_P) / phases.sum(axis=1),
                 "dropped": drops / phases.sum(axis=1), "precision": hits / drops, "recall": hits / total(flat_P),
                 "right_cut": total((over_DPG & groups.right_PG).sum(axis=-1)) / total(groups.right_PG.sum(axis=-1)),
                 "stopped": total(over_DPG.mean(axis=-1)) / phases.sum(axis=1), "signal_lost": lost,
                 "solutions": solutions / full, "rechecks": rechecks / full, "predictions": predictions / full,
                 "dropped_tokens": dropped_tokens / full,
                 "cap_tokens": (full - dropped_tokens - solutions - rechecks) / full,
                 "tokens_saved": 1 - spent / full, "gain": (1 - lost) / (spent / full)}
    return pd.DataFrame(found, index=pd.Index(PHASES, name="phase"))


def caps(groups: Groups, config: Config, draws: int = replay.DRAWS) -> np.ndarray:
    """Tokens that a solution of each group is allowed under the config's cap; shape (draws, P)."""
    full = groups.config.sampling.solution_tokens
    drawn = replay.draw(groups, groups.predicted_PM, _members(groups, config), draws)
    if not config.cap.multiplier:
        return np.full(drawn.shape[:2], float(full))
    return gating.caps(gating.aggregate_lengths(drawn, config.cap.aggregate), config.cap.multiplier, full)


def _members(groups: Groups, config: Config) -> int:
    return config.gate.predictions or groups.rates_PM.shape[1]


def sweep(scores_P: np.ndarray, signal_P: np.ndarray) -> pd.DataFrame:
    """Precision and recall of dropping every group whose score is at most a threshold, for all thresholds there are.

    Args:
        scores_P: low where no signal is expected; infinite where nothing is known.
        signal_P: whether a group has a signal, or the chance that it has one.

    Returns:
        Columns threshold, dropped (share), precision, recall; a group without a finite score is never dropped.
    """
    thresholds = np.unique(scores_P[np.isfinite(scores_P)])
    dropped_TP = scores_P <= thresholds[:, None]
    hits, flat = dropped_TP @ (1.0 - signal_P), (1.0 - signal_P).sum()
    return pd.DataFrame({"threshold": thresholds, "dropped": dropped_TP.mean(axis=1),
                         "precision": hits / dropped_TP.sum(axis=1), "recall": hits / flat if flat else np.nan})


def precision_at(curve: pd.DataFrame, recall: float = replay.RECALL) -> float:
    """Precision where a curve first reaches a recall, on the line between two thresholds; NaN where it never does."""
    curve = curve.dropna(subset=["precision"]).sort_values("recall")
    return float(np.interp(recall, curve["recall"], curve["precision"], right=np.nan)) if len(curve) else np.nan


def levels(path: str | Path, groups: Groups) -> np.ndarray:
    """The level of each of a run's recorded groups, in the order of `replay.read_groups`."""
    table = Run.open(path).rollouts(np.unique(groups.steps_P))
    return table.groupby(["step", "group"])["level"].first().to_numpy()


def level_scores(runs: Sequence[Groups], levels_of: Sequence[np.ndarray]) -> np.ndarray:
    """What a table of levels knows: of each group the share with a signal among the others' groups of its level.

    Privileged, as nothing else is told a level. The others are the other runs' groups of the same third of the
    training; a level that none of them met scores 1.

    Args:
        runs: of one study, at least two.
        levels_of: of each run its groups' levels.

    Returns:
        A score a group, in the order of `pooled`.
    """
    frames = [pd.DataFrame({"run": number, "level": level, "phase": run.phases_FP[:3].argmax(axis=0),
                            "signal": run.signal_P.astype(float)})
              for number, (run, level) in enumerate(zip(runs, levels_of, strict=True))]
    return _others_share(pd.concat(frames, ignore_index=True), ["phase", "level"])


def _others_share(table: pd.DataFrame, cells: list[str]) -> np.ndarray:
    """Of each row the mean `signal` of its cell's rows in other runs; 1 where there are none."""
    cell, own = (table.groupby(names)["signal"] for names in (cells, ["run", *cells]))
    others = cell.transform("size") - own.transform("size")
    share = (cell.transform("sum") - own.transform("sum")) / others.where(others > 0)
    return share.fillna(1.0).to_numpy()


def after_training(tables: Sequence[pd.DataFrame], config: Config) -> pd.DataFrame:
    """How well three gates foresee that a group has no signal, on held-out problems after training.

    A group is G of a problem's n recorded solutions; its chance of a signal stands for whether it has one.

    Args:
        tables: the last evaluation of each run of a study, n above G.
        config: its gate's rule, and G.

    Returns:
        Columns gate, threshold, precision, recall (and dropped, but for the oracle). `predictions`: the rule on each
        problem's predictions; `levels`: the mean chance of its level in the other runs, privileged; `oracle`: knows the
        problem's other n - G solutions (`replay.ceiling`).
    """
    size, frames = config.sampling.solutions, []
    for run, table in enumerate(tables):
        right, wrong = (pass_at_k(table["n"], count, size) for count in (table["c"], table["n"] - table["c"]))
        rates = pd.DataFrame(table["predictions"].tolist()).to_numpy(dtype=float) / PASS_RATE_STEPS
        frames.append(pd.DataFrame({"run": run, "level": table["level"].to_numpy(), "signal": right + wrong - 1,
                                    "predictions": gating.rule_scores(rates, config.gate.rule, size)}))
    rows = pd.concat(frames, ignore_index=True)
    rows["levels"] = _others_share(rows, ["level"])
    curves = {name: sweep(rows[name].to_numpy(), rows["signal"].to_numpy()) for name in ("predictions", "levels")}
    curves["oracle"] = ceiling(pd.concat(tables, ignore_index=True), size)
    return pd.concat([curve.assign(gate=name) for name, curve in curves.items()], ignore_index=True)


def rehearse(config: Config, engine: Engine, tokenizer: Any, steps: int) -> pd.DataFrame:
    """What a method's gate would choose in a few steps with a model that stands still, and what that costs.

    Each step goes the way of a training step (`Trainer.train_step`) up to the update, which is left out.

    Args:
        config: of the method; with `method` grpo everything is admitted.
        engine: who samples.
        tokenizer: of the model.
        steps: how many.

    Returns:
        A row a step: step, candidates, gate_on, groups (admitted), signal (how many of them have one), and the tokens
        of solutions, rechecks, predictions and, counted by nobody in a training, of the oracle.
    """
    step, cursor, oracle, rows = 0, 0, 0, []

    def solve(asked: Sequence[Problem], samples: int) -> list[int]:
        nonlocal oracle
        right, tokens = rollouts.count_right(asked, samples, engine, tokenizer, config, [config.seed, ORACLE_TAG, step])
        oracle += tokens
        return right

    pool = ProblemPool(config.problems, config.seed)
    gate = registry.make_gate(config, pool, solve)
    for step in range(1, steps + 1):
        oracle = 0
        sample = partial(rollouts.sample, engine=engine, tokenizer=tokenizer, config=config, seed=[config.seed, step],
                         temperature=config.sampling.temperature)
        found = gather.collect(gate, pool, cursor, sample, config, step)
        rollouts.score(found.table, config)
        learned = gather.learn(gate, found)
        cursor += len(found.candidates)
        rows.append({"step": step, **_tally(found), "oracle": oracle, "gate_on": learned["gate_on"]})
    return pd.DataFrame(rows)


def _tally(found: gather.Selection) -> dict[str, int]:
    """Groups and tokens of a step's rollouts."""
    solved = solutions_of(found.table)
    share = solved[solved["admitted"]].groupby("group")["correct"].mean()
    counted = metrics.batch_metrics(found.table)
    return {"candidates": len(found.candidates), "groups": len(share), "signal": int(((share > 0) & (share < 1)).sum()),
            "solutions": counted["tokens_solution"], "rechecks": counted["tokens_recheck"],
            "predictions": counted["tokens_meta"]}
