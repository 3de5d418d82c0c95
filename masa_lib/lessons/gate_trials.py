"""What a gate is worth: break-even of asking, how well it foresees, and what whole trainings cost at equal accuracy.

Pure functions on recorded groups, evaluations and comparisons; nothing here samples or needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from masa_lib.analysis import sentences
from masa_lib.analysis.compare import Comparison, pass_at_k
from masa_lib.analysis.costs import COSTS
from masa_lib.analysis.intervals import ratio_of_logs
from masa_lib.config import Config
from masa_lib.gates.masa import rule_scores
from masa_lib.lessons import replay
from masa_lib.lessons.replay import PHASES, Groups
from masa_lib.method import beliefs
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: the costs that are told apart, and what a figure calls them
DENOMINATORS = {cost: COSTS[cost] for cost in ("tokens", "read", "tokens_update", "seconds")}

#: share of candidates left out without having been rejected, from which on a gate's signal is not known from its lots
SURPLUS = 0.02


@dataclass(frozen=True)
class BreakEven:
    """What asking about a candidate costs, and what it may cost at most.

    `price`: tokens that asking about one candidate takes. `dropped`: share of the candidates that the gate leaves out.
    `precision`: share of these whose group would have had no signal. `signal`: share of all candidates whose group has
    one. `group`, `left_out`: tokens of a group, mean over all candidates and over those left out.
    """

    price: float
    dropped: float
    precision: float
    signal: float
    group: float
    left_out: float

    @property
    def worth(self) -> float:
        """The highest price that pays, tokens: what leaving out saves, less what lost signal costs elsewhere."""
        return self.dropped * (self.left_out - (1 - self.precision) * self.group / self.signal)

    @property
    def gain(self) -> float:
        """Groups with a signal a token, relative to asking nothing and rolling out everything."""
        kept = self.signal - self.dropped * (1 - self.precision)
        return kept / (self.price + self.group - self.dropped * self.left_out) * self.group / self.signal


def replayed(groups: Groups, rule: str, threshold: float, phase: str = PHASES[2], predictions: int = 0) -> BreakEven:
    """The account of a gate by sampled predictions, from recorded groups; tokens written.

    Args:
        groups: of one run, or `pooled` of several.
        rule: of the gate, as for `replay.gate_curve`.
        threshold: of the rule.
        phase: of PHASES.
        predictions: M; 0 takes all that were recorded.
    """
    here = groups.phases_FP[PHASES.index(phase)] > 0
    members = predictions or groups.rates_PM.shape[1]
    row = replay.gate_curve(groups, rule, [threshold], members, recheck=0.0).set_index("phase").loc[phase]
    price = groups.meta_tokens(members)[here].mean()
    group = groups.lengths_PG.sum(axis=1)[here].mean()
    saved = row["tokens_saved"] * group + price  # of a candidate, before predictions are paid
    return BreakEven(price, row["dropped"], row["precision"], groups.signal_P[here].mean(), group,
                     saved / row["dropped"])


def trained(steps: pd.DataFrame, prompt: float, solutions: int) -> BreakEven:
    """The account of a gate as it went in whole trainings, from what its lots measured; tokens written and read.

    Args:
        steps: of one arm of a comparison, whose gate chooses among candidates that compete (`masa_lib.gates.priors`).
        prompt: tokens of a problem's prompt, which is read for its solutions in any case.
        solutions: G.

    Returns:
        The account. Its signal, and so worth and gain, are NaN where the gate also left out some that it would have
        taken (`masa-efficient`, whose places were full): how many of those had a signal, no lot measured.
    """
    steps = steps[steps["gate_on"] > 0]
    total = steps.reindex(columns=["candidates", "rechecked", "tokens_solution", "tokens_recheck", "tokens_meta",
                                   "tokens_prefill", "tokens_read"]).fillna(0.0).sum()
    precision, recall = steps[["gate_precision", "gate_recall"]].mean()
    groups = rolled_out(steps, solutions)["groups"].sum()
    chosen = groups - total["rechecked"]
    dropped = 1 - chosen / total["candidates"]
    price = (total[["tokens_meta", "tokens_prefill", "tokens_read"]].sum() - groups * prompt) / total["candidates"]
    kept, left_out = (prompt + spent / count for spent, count in (
        (total["tokens_solution"], chosen), (total["tokens_recheck"], total["rechecked"])))
    rejected = (steps["dropped"] * steps["candidates"]).sum() / total["candidates"]
    signal = 1 - precision * dropped / recall if abs(dropped - rejected) < SURPLUS else np.nan
    return BreakEven(max(price, 0.0), dropped, precision, signal, (1 - dropped) * kept + dropped * left_out, left_out)


def worths(steps: pd.DataFrame, prompt: float, solutions: int) -> pd.Series:
    """What asking may cost in each run of one arm, as a share of a group: `trained` by seed; arguments are its."""
    found = {seed: trained(part, prompt, solutions) for seed, part in steps.groupby("seed")}
    return pd.Series({seed: one.worth / one.group for seed, one in found.items()}, dtype=float)


def break_even_table(found: Mapping[str, BreakEven]) -> pd.DataFrame:
    """A row a gate: its numbers, in tokens and shares, what it is worth, and the gain."""
    return pd.DataFrame({name: {
        "price c": one.price, "left out d": one.dropped, "precision q": one.precision, "signal s": one.signal,
        "group g": one.group, "left-out group": one.left_out, "worth": one.worth, "gain": one.gain}
        for name, one in found.items()}).T


def equal_costs(found: Comparison, arms: Iterable[str], timed: Comparison | None = None) -> pd.DataFrame:
    """What the arms cost at equal accuracy, relative to their reference: a row an arm and denominator.

    Args:
        found: the comparison.
        arms: to show, in order; one that is not there is left out.
        timed: of runs that had the machine to themselves, for the seconds; None takes them from `found`.

    Returns:
        Columns arm, cost (of DENOMINATORS), mean, low, high (the reference's cost over the arm's; NaN: not recorded),
        bound (`<=`: at most), seeds, and what the ratio shows, `verdict`.
    """
    rows = []
    for cost in DENOMINATORS:
        methods = (timed if timed is not None and cost == "seconds" else found).summary["methods"]
        for arm in arms:
            ratio = methods[arm][f"{cost}_equal_ratio"] if arm in methods else {}
            there = ratio.get("mean") is not None
            if arm in found.summary["methods"]:
                rows.append({"arm": arm, "cost": cost, **{end: ratio.get(end) for end in ("mean", "low", "high")},
                             "bound": methods[arm]["equal_bound"] if there else "",
                             "seeds": methods[arm]["seeds"] if there else 0,
                             "verdict": sentences.verdict(ratio, methods[arm]["equal_missed"]) if there else ""})
    return pd.DataFrame(rows).astype(dict.fromkeys(("mean", "low", "high"), float))


def equal_table(costs: pd.DataFrame) -> pd.DataFrame:
    """`equal_costs` to be read: a row an arm, a column a denominator, each ratio with its interval."""
    ends = costs[["mean", "low", "high"]].astype(object).where(costs[["mean", "low", "high"]].notna(), None)
    text = ["not recorded" if ratio["mean"] is None else f"{bound} {sentences.show(ratio, '.2f')}".strip()
            for bound, ratio in zip(costs["bound"].str.replace("<=", "≤"), ends.to_dict("records"), strict=True)]
    wide = costs.assign(text=text).pivot(index="arm", columns="cost", values="text")
    return wide.loc[list(dict.fromkeys(costs["arm"])), list(DENOMINATORS)].rename(columns=DENOMINATORS).rename_axis(
        index=None, columns=None)


def unbroken(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts and names of rows no page breaks: with spaces and hyphens that hold together."""
    def hold(text: object) -> object:
        return text.replace(" ", "\u00a0").replace("-", "\u2011") if isinstance(text, str) else text

    return table.map(hold).rename(index=hold)


def against(found: Comparison, arm: str, other: str, cost: str = "tokens") -> dict[str, float | str | None]:
    """What the other arm costs at equal accuracy over what this one does, over the seeds that both have.

    Args:
        found: a comparison with both; the accuracies are those of their reference.
        arm: above 1 it is the cheaper one.
        other: the one that it is measured against.
        cost: of `costs.COSTS`.

    Returns:
        mean, low, high (None for fewer than two seeds), seeds, and what it shows of the arm, `verdict`.
    """
    table = found.runs.pivot(index="seed", columns="arm", values=[f"{cost}_equal", "equal_missed"])
    logs = (table[f"{cost}_equal"][arm] - table[f"{cost}_equal"][other]).dropna()
    ratio = {name: value if np.isfinite(value) else None for name, value in ratio_of_logs(logs).items()}
    missed = float(table["equal_missed"][[arm, other]].loc[logs.index].to_numpy().max(initial=0.0))
    return ratio | {"seeds": len(logs), "verdict": sentences.verdict(ratio, missed) if len(logs) else "not recorded"}


def price_in_predictions(runs: pd.DataFrame, groups: pd.DataFrame, prompt: float) -> pd.DataFrame:
    """What an arm's predictions took, mean over its runs: tokens `written`, and `read` beyond the solutions' prompts.

    Args:
        runs: `Comparison.runs`.
        groups: columns arm, seed and groups: how many groups of solutions each run rolled out.
        prompt: tokens of a problem's prompt.
    """
    table = runs.merge(groups, on=["arm", "seed"])
    asks = (table["tokens_meta"] > 0) | (table["tokens_read"] > 0)
    table["written"] = table["tokens_meta"]
    table["read_for"] = (table["read"] - table["groups"] * prompt).clip(lower=0).where(asks, 0.0)
    found = table.groupby("arm")[["written", "read_for"]].mean().rename(columns={"read_for": "read"})
    return found.reindex(runs["arm"].unique())


def rolled_out(steps: pd.DataFrame, solutions: int) -> pd.DataFrame:
    """How many groups of so many solutions each run of a comparison rolled out: columns arm, seed, groups."""
    written = steps["tokens_solution"] + steps["tokens_recheck"]
    steps = steps.assign(groups=(written / (steps["solution_length"] * solutions)).round())
    return steps.groupby(["arm", "seed"])["groups"].sum().reset_index()


def pooled(runs: Sequence[Groups]) -> Groups:
    """The groups of several runs of one study as if they were one run's; the first run's config speaks for all."""
    arrays = [field.name for field in dataclasses.fields(Groups) if field.name != "config"]
    return dataclasses.replace(runs[0], **{name: np.concatenate([getattr(run, name) for run in runs])
                                           for name in arrays})


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


def after_training(tables: Mapping[str, Sequence[pd.DataFrame]], config: Config) -> pd.DataFrame:
    """How well gates foresee that a group has no signal, on held-out problems after training.

    A group is G of a problem's n recorded solutions; its chance of a signal stands for whether it has one.

    Args:
        tables: by name the last evaluations of an arm's runs, n above G; a run's beliefs are used where it has them,
            else its predictions, by the config's rule. All arms have the same problems.
        config: its gate's rule, and G.

    Returns:
        Columns gate, threshold, dropped, precision, recall. Beside the arms stands `levels`, the mean chance of a
        problem's level in the other runs of the first arm; privileged, as nothing else is told a level.
    """
    size, curves, levels = config.sampling.solutions, {}, {}
    for name, runs in tables.items():
        rows = pd.concat([pd.DataFrame({"run": run, "level": table["level"].to_numpy(), "signal": _mixed(table, size),
                                        "score": _scores(table, config)}) for run, table in enumerate(runs)])
        signal_P = rows["signal"].to_numpy()
        curves[name] = sweep(rows["score"].to_numpy(), signal_P)
        levels = levels or {"levels": sweep(_others_share(rows, ["level"]), signal_P)}
    return pd.concat([curve.assign(gate=name) for name, curve in (curves | levels).items()], ignore_index=True)


def _mixed(table: pd.DataFrame, size: int) -> np.ndarray:
    """The chance that so many of a problem's solutions are not all alike."""
    right, wrong = (pass_at_k(table["n"], count, size) for count in (table["c"], table["n"] - table["c"]))
    return right + wrong - 1


def _scores(table: pd.DataFrame, config: Config) -> np.ndarray:
    """The chance of a signal by what a model believes, or the rule on what it predicts."""
    if "belief" in table:
        said_PV = np.stack(table["belief"].to_list()).astype(float)
        return beliefs.mixed_chance(said_PV / said_PV.sum(axis=1, keepdims=True), config.sampling.solutions)
    rates = pd.DataFrame(table["predictions"].tolist()).to_numpy(dtype=float) / PASS_RATE_STEPS
    return rule_scores(rates, config.gate.rule, config.sampling.solutions)


def _others_share(table: pd.DataFrame, cells: list[str]) -> np.ndarray:
    """Of each row the mean `signal` of its cell's rows in other runs; 1 where there are none."""
    cell, own = (table.groupby(names)["signal"] for names in (cells, ["run", *cells]))
    others = cell.transform("size") - own.transform("size")
    share = (cell.transform("sum") - own.transform("sum")) / others.where(others > 0)
    return share.fillna(1.0).to_numpy()
