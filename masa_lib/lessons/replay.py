"""What a gate, a cap or fewer predictions would have done in a recorded run, without training again.

A run that recorded both streams of whole groups (best: method masa, M = 16, `record.rollouts_every = 10`) holds what
was predicted of each problem and what came true. Every function here is arithmetic on those groups. It cannot say what
a model becomes whose training was gated: the groups are those of the run as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.config import Config
from masa_lib.errors import MasaError
from masa_lib.gates.masa import rule_scores
from masa_lib.method.beliefs import signal_chance
from masa_lib.method.gating import aggregate_lengths, caps
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run
from masa_lib.tasks.predictions import PASS_RATE_STEPS

PHASES = ("first third", "second third", "last third", "all")
THRESHOLDS = {"signal": np.linspace(0.05, 0.95, 19).round(2), "v1": np.linspace(0.025, 0.4, 16).round(3),
              "v2": np.linspace(0.025, 0.4, 16).round(3)}
AGGREGATES = ("max", "mean", "median")
MULTIPLIERS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
PRECISION, RECALL = 0.9, 0.5
#: random subsets of the M predictions that a smaller M is averaged over
DRAWS = 10
#: groups that a recommended gate must have dropped: of fewer, precision is luck
LEAST = 20


class ReplayError(MasaError, ValueError):
    """A run cannot be replayed as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Groups:
    """P recorded groups with their M predictions and G solutions; what did not parse is NaN."""

    config: Config
    steps_P: np.ndarray
    rates_PM: np.ndarray  # predicted pass rates, 0 to 1
    predicted_PM: np.ndarray  # predicted lengths, tokens
    meta_PM: np.ndarray  # tokens sampled for each meta rollout
    right_PG: np.ndarray  # bool
    lengths_PG: np.ndarray  # tokens of each solution

    @property
    def signal_P(self) -> np.ndarray:
        """Whether a group has right and wrong solutions."""
        return self.right_PG.any(axis=1) & ~self.right_PG.all(axis=1)

    def meta_tokens(self, predictions: int) -> np.ndarray:
        """Tokens that so many predictions of each problem take; shape (P,)."""
        first, rest = self.meta_PM[:, 0], self.meta_PM[:, 1:]
        if not self.config.sampling.shared_beginning or not rest.size:
            return self.meta_PM.mean(axis=1) * predictions
        return first + rest.mean(axis=1) * (predictions - 1)

    @property
    def phases_FP(self) -> np.ndarray:
        """Which groups belong to each of PHASES, as numbers 0 and 1."""
        steps = np.unique(self.steps_P)
        parts = [*np.array_split(steps, 3), steps]
        return np.stack([np.isin(self.steps_P, part) for part in parts]).astype(float)


def read_groups(path: str | Path) -> Groups:
    """The groups of the recorded steps that a gate or cap left whole.

    Raises:
        RunError: the run cannot be read.
        ReplayError: fewer than three such steps were recorded.
    """
    run = Run.open(path)
    table = run.rollouts()
    if len(table):
        parquet.check_columns(table, f"A table of rollouts of the run {path}", texts=("stream",), numbers=(
            "step", "group", "member", "length", "correct", "predicted_pass_rate", "predicted_length"))
        place = table[["step", "stream", "group", "member"]]
        if place.isna().any(axis=None) or place.duplicated().any():
            raise ReplayError(f"The tables of rollouts of the run {path} do not say of each which step, group and "
                              "member it is. Restore them, or replay another run.")
    if len(table) and "capped" in table:
        table["length"] = table["length"].where(~(table["capped"].eq(True) & (table["stream"] == "solution")))
    streams = dict(iter(table.set_index(["step", "group", "member"]).groupby("stream"))) if len(table) else {}
    advice = "Train with --method masa --set sampling.predictions=16 record.rollouts_every=10, and replay that run."
    if len(streams) < 2:
        raise ReplayError(f"The run {path} recorded no step with solutions and predictions. {advice}")
    solved, meta = streams["solution"], streams["meta"]
    wide = {name: stream[name].astype(float).unstack() for stream, names in
            ((solved, ("length", "correct")), (meta, ("predicted_pass_rate", "predicted_length"))) for name in names}
    tokens = meta["length"].astype(float).unstack()
    both = pd.concat([wide["length"], tokens], axis=1)  # a dropped problem has no solutions
    whole = both.notna().all(axis=1).groupby(level="step").all()
    index = both.index[both.index.get_level_values("step").isin(whole.index[whole])]
    if index.get_level_values("step").nunique() < 3:
        raise ReplayError(f"The run {path} recorded fewer than three steps in which neither gate nor cap had acted. "
                          f"{advice}")
    wide = {name: frame.reindex(index).to_numpy() for name, frame in (wide | {"tokens": tokens}).items()}
    return Groups(run.config, index.get_level_values("step").to_numpy(),
                  (wide["predicted_pass_rate"] / PASS_RATE_STEPS).clip(0, 1), wide["predicted_length"], wide["tokens"],
                  wide["correct"] > 0, wide["length"])


def draw(groups: Groups, values_PM: np.ndarray, predictions: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Random subsets of a group's predictions, the same ones at every call; shape (draws, P, predictions).

    Raises:
        ReplayError: the run has fewer predictions.
    """
    count = values_PM.shape[1]
    if not 1 <= predictions <= count:
        raise ReplayError(f"The run has {count} predictions a problem; ask for 1 to {count}, not {predictions}.")
    if predictions == count:
        return values_PM[None]
    order = np.random.default_rng(seed).random((draws, *values_PM.shape)).argsort(axis=-1)
    return np.take_along_axis(values_PM[None], order[..., :predictions], axis=-1)


def gate_curve(groups: Groups, rule: str = "signal", thresholds: Sequence[float] | None = None, predictions: int = 0,
               recheck: float | None = None, draws: int = DRAWS) -> pd.DataFrame:
    """What a gate rule would have dropped, by phase and threshold.

    Args:
        groups: of the recorded run.
        rule: signal, v1 or v2.
        thresholds: of the rule; None takes THRESHOLDS.
        predictions: M; 0 takes all that the run has. A smaller one is averaged over random subsets.
        recheck: share of the dropped groups that is rolled out all the same; None takes the run's `gate.recheck`.
        draws: how many subsets.

    Returns:
        A row a phase and threshold: dropped (share of groups), groups_dropped, precision and recall and f1 of
        "dropped groups have no signal", signal_lost (share of the groups with a signal), tokens_saved (share of all
        solution tokens, less the meta tokens), meta_share (meta over solution tokens) and gain (groups with a signal
        per token, relative to rolling out everything without predictions).
    """
    thresholds = np.asarray(THRESHOLDS[rule] if thresholds is None else thresholds, dtype=float)
    predictions = predictions or groups.rates_PM.shape[1]
    rolled = 1 - (groups.config.gate.recheck if recheck is None else recheck)
    scores_DP = rule_scores(draw(groups, groups.rates_PM, predictions, draws), rule, groups.right_PG.shape[1])
    chance_PT = (scores_DP[..., None] < thresholds).mean(axis=0)
    tokens_P, flat_P = groups.lengths_PG.sum(axis=1), ~groups.signal_P
    phases = groups.phases_FP
    dropped, true, tokens = ((phases * weight) @ chance_PT for weight in (1.0, flat_P, tokens_P))
    count, flat, spent, meta = ((phases @ values)[:, None] for values in (
        np.ones(len(flat_P)), flat_P, tokens_P, groups.meta_tokens(predictions)))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = true / dropped, true / flat
        lost, saved = rolled * (dropped - true) / (count - flat), (rolled * tokens - meta) / spent
        columns = {"dropped": dropped / count, "groups_dropped": dropped, "precision": precision, "recall": recall,
                   "f1": 2 * true / (dropped + flat), "signal_lost": lost, "tokens_saved": saved,
                   "meta_share": meta / spent, "gain": (1 - lost) / (1 - saved)}
    return _frame({"rule": rule, "predictions": predictions}, "threshold", thresholds, columns)


def cap_curve(groups: Groups, aggregate: str = "max", multipliers: Sequence[float] = MULTIPLIERS, predictions: int = 0,
              draws: int = DRAWS) -> pd.DataFrame:
    """What a cap at a multiple of the predicted length would have stopped, by phase and multiplier.

    Args:
        groups: of the recorded run.
        aggregate: how M predicted lengths become one: max, mean or median. Without one there is no cap.
        multipliers: of that length.
        predictions: M; 0 takes all that the run has.
        draws: random subsets that a smaller M is averaged over.

    Returns:
        A row a phase and multiplier: right_cut (share of the right solutions), stopped (share of all), tokens_saved
        (share of all solution tokens; meta tokens are the gate's) and signal_lost (share of the groups with a signal
        that have none once their stopped solutions are wrong).
    """
    predictions = predictions or groups.predicted_PM.shape[1]
    lengths_DP = aggregate_lengths(draw(groups, groups.predicted_PM, predictions, draws), aggregate)
    right_PG, phases, full = groups.right_PG, groups.phases_FP, groups.config.sampling.solution_tokens
    wholes = {"right_cut": right_PG, "stopped": np.ones_like(right_PG), "tokens_saved": groups.lengths_PG,
              "signal_lost": groups.signal_P[:, None]}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in wholes}
    for multiplier in multipliers:
        caps_DP = caps(lengths_DP, multiplier, full)
        beyond_DPG = np.maximum(groups.lengths_PG - caps_DP[..., None], 0)
        still_DPG = right_PG & (beyond_DPG == 0)
        flat_DP = ~still_DPG.any(axis=-1) | still_DPG.all(axis=-1)
        found = (right_PG & ~still_DPG, beyond_DPG > 0, beyond_DPG, (flat_DP & groups.signal_P)[..., None])
        for (name, whole), part in zip(wholes.items(), found, strict=True):
            with np.errstate(invalid="ignore"):
                columns[name].append(phases @ part.sum(axis=-1).mean(axis=0) / (phases @ whole.sum(axis=-1)))
    return _frame({"aggregate": aggregate, "predictions": predictions}, "multiplier", np.asarray(multipliers),
                  {name: np.stack(values, axis=1) for name, values in columns.items()})


def recheck_curve(groups: Groups, rule: str, threshold: float, predictions: int = 0,
                  shares: Sequence[float] = SHARES, phase: str = "last third", draws: int = 400) -> pd.DataFrame:
    """How sure precision and recall are when a share of the dropped problems is re-checked over one window.

    Windows of `gate.window` steps are drawn from the recorded groups of a phase, with one subset of M each.

    Returns:
        A row a share: precision and recall (mean), each with `_low` and `_high` (2.5 and 97.5 % of the windows),
        unmeasured (share of windows without a re-check), tokens_saved and signal_lost as in `gate_curve`.
    """
    predictions, rng = predictions or groups.rates_PM.shape[1], np.random.default_rng(0)
    scores_DP = rule_scores(draw(groups, groups.rates_PM, predictions), rule, groups.right_PG.shape[1])
    pool = np.flatnonzero(groups.phases_FP[PHASES.index(phase)])
    size = groups.config.gate.window * groups.config.sampling.problems
    picks = rng.choice(pool, (draws, size))
    dropped = scores_DP[rng.integers(len(scores_DP), size=picks.shape), picks] < threshold
    flat, lots, rows = ~groups.signal_P[picks], rng.random(picks.shape), []
    for share in shares:
        checked = dropped & (lots < share)
        true = (checked & flat).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {"precision": true / checked.sum(axis=1),
                     "recall": (true / share) / (true / share + (~dropped & flat).sum(axis=1))}
        row = gate_curve(groups, rule, [threshold], predictions, share).set_index("phase").loc[phase]
        rows.append({"recheck": share, "unmeasured": float((checked.sum(axis=1) == 0).mean()),
                     **{name + end: value for name, values in found.items() for end, value in zip(
                         ("", "_low", "_high"), _spread(values), strict=True)},
                     "tokens_saved": row["tokens_saved"], "signal_lost": row["signal_lost"]})
    return pd.DataFrame(rows)


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    known = values[np.isfinite(values)]
    return (known.mean(), *np.quantile(known, [0.025, 0.975])) if known.size else (np.nan,) * 3


def _frame(constant: dict[str, Any], name: str, grid: np.ndarray, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """Arrays (phase, grid) as rows."""
    return pd.DataFrame({"phase": np.repeat(PHASES, len(grid)), **constant, name: np.tile(grid, len(PHASES)),
                         **{key: np.broadcast_to(values, (len(PHASES), len(grid))).ravel()
                            for key, values in columns.items()}})


def ceiling(table: pd.DataFrame, solutions: int, draws: int = 100) -> pd.DataFrame:
    """What an oracle reaches that knows all solutions of a problem but one group's, over thresholds of rule signal.

    A group of few solutions is often all right or all wrong by luck; no gate can foresee that.

    Args:
        table: an evaluation, with the columns n and c, n above `solutions`.
        solutions: G.
        draws: groups drawn of each problem.

    Returns:
        Columns threshold, precision and recall.
    """
    n, c = table["n"].to_numpy(), table["c"].to_numpy()
    right = np.random.default_rng(0).hypergeometric(c, n - c, solutions, (draws, len(table)))
    chance, flat = signal_chance((c - right) / (n - solutions), solutions), (right == 0) | (right == solutions)
    dropped = chance[..., None] < THRESHOLDS["signal"]
    true = (dropped & flat[..., None]).sum(axis=(0, 1))
    with np.errstate(invalid="ignore"):
        return pd.DataFrame({"threshold": THRESHOLDS["signal"], "precision": true / dropped.sum(axis=(0, 1)),
                             "recall": true / flat.sum()})


def every_gate(groups: Groups) -> pd.DataFrame:
    """`gate_curve` of all rules, thresholds and M."""
    return pd.concat([gate_curve(groups, rule, predictions=count) for rule in THRESHOLDS
                      for count in range(1, groups.rates_PM.shape[1] + 1)], ignore_index=True)


def every_cap(groups: Groups) -> pd.DataFrame:
    """`cap_curve` of all aggregations, multipliers and M."""
    return pd.concat([cap_curve(groups, aggregate, predictions=count) for aggregate in AGGREGATES
                      for count in range(1, groups.rates_PM.shape[1] + 1)], ignore_index=True)


def best_gates(gates: pd.DataFrame, phase: str) -> pd.DataFrame:
    """Of each M the setting to take, the least M first; `good` says whether it has precision 0.9 at recall 0.5.

    Among good settings that dropped at least LEAST groups it is the one with the most gain; where there is none, the
    one of highest precision at recall 0.5. An M without recall 0.5 has no row.
    """
    table = gates[(gates["phase"] == phase) & (gates["recall"] >= RECALL)]
    good = (table["precision"] >= PRECISION) & (table["groups_dropped"] >= LEAST)
    table = table.assign(good=good, worth=table["gain"].where(good, table["precision"]))
    return table.sort_values(["predictions", "good", "worth"]).groupby("predictions").tail(1).drop(columns="worth")


def recommend(gates: pd.DataFrame, phase: str) -> pd.Series | None:
    """The least M that is good, or the setting nearest to it (`good` is False); None where nothing reaches recall."""
    best = best_gates(gates, phase)
    good = best[best["good"]]
    return good.iloc[0] if len(good) else best.loc[best["precision"].idxmax()] if len(best) else None


def best_caps(table: pd.DataFrame, phase: str, predictions: int, cut: float) -> pd.DataFrame:
    """Of each aggregation the multiplier that saves the most tokens and cuts at most `cut` of the right solutions."""
    good = table[(table["phase"] == phase) & (table["predictions"] == predictions) & (table["right_cut"] <= cut)]
    return good.loc[good.groupby("aggregate")["tokens_saved"].idxmax()]
