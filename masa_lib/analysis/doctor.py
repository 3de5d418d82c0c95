"""Why is my reward flat? What a run's records say of it, each with what to do: `masa doctor RUN`.

It reads records only, loads no model, and knows the usual ways in which a training learns nothing: problems out of
reach, or long solved; solutions cut off; answers in no box, or answers that nothing can match; few problems, again and
again; a policy without entropy; steps too small to move a weight; samples that are not the policy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pandas as pd

from masa_lib.analysis import health, intervals
from masa_lib.errors import brief
from masa_lib.method.streams import predictions_of, rewarded
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run
from masa_lib.tasks import grading

#: shares above (or, of groups that teach, below) which something is worth a look
TRUNCATED, UNBOXED, UNPARSED, UNMATCHABLE, OUTSIDE, TEACHING = 0.2, 0.2, 0.2, 0.01, 0.5, 0.1
#: columns of the metrics that are looked at, where they are there
METRICS = ("step", "loss", "entropy", "accuracy", "logp_gap", "updates", "learning_rate", "gradient_norm",
           "belief_outside")
#: problems below which a training comes back to each too often
MANY = 48
#: by how much a weight must be able to move for a model to change at all
MOVED = 1e-5


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    `what` was measured, as `measured`; `advice` is a sentence where it explains a flat reward, else empty.
    """

    what: str
    measured: str
    advice: str = ""


def examine(run: Run) -> list[Finding]:
    """All findings of a run: first those that explain why it does not learn, then what is in order.

    Raises:
        RunError: the folder's files are not those of a run.
    """
    metrics, steps = run.metrics(), run.rollout_steps()
    parquet.check_columns(metrics, f"The metrics of {run.path}", numbers=[name for name in METRICS if name in metrics])
    found = [check(run, metrics) for check in BY_METRICS] if len(metrics) else [
        Finding("steps", "none finished", "Nothing is trained yet; train.log and `masa train` say why.")]
    if steps and len(metrics):
        table = run.rollouts(steps)
        parquet.check_columns(table, f"A table in {run.path}", numbers=("group", "correct", "reward"),
                              texts=("stream", "problem_id", "answer", "text", "finish"))
        found += [check(run, table) for check in BY_ROLLOUTS]
    elif len(metrics):
        found.append(Finding("rollouts", "none recorded", "What was written cannot be looked at: set "
                             "record.rollouts_every, for instance to 10."))
    known = [finding for finding in found if finding.measured]
    return sorted(known, key=lambda finding: not finding.advice)


def text(run: Run) -> str:
    """The findings of a run as lines, and a last sentence that says how many of them want something done."""
    found = examine(run)
    width = max(len(finding.what) for finding in found)
    lines = [f"{'!' if finding.advice else ' '} {finding.what.ljust(width)}  {finding.measured}"
             + (f"\n  {' ' * width}  {finding.advice}" if finding.advice else "") for finding in found]
    ill = sum(bool(finding.advice) for finding in found)
    return "\n".join([*lines, "", f"{ill} of {len(found)} want something done (marked !)." if ill else
                      "Nothing here explains a flat reward."])


def rows(run: Run) -> list[dict[str, str]]:
    """The findings of a run for a program."""
    return [asdict(finding) for finding in examine(run)]


def _health(run: Run, metrics: pd.DataFrame) -> Finding:
    said = health.collapse(metrics)
    flat = metrics["loss"].eq(0).mean() if "loss" in metrics else math.nan
    return Finding("steps without a gradient", f"{flat:.0%} of {len(metrics)}", said)


def _drift(run: Run, metrics: pd.DataFrame) -> Finding:
    gap = metrics["logp_gap"].mean() if "logp_gap" in metrics else math.nan
    return Finding("engine against trainer", "" if math.isnan(gap) else f"log-probs {gap:.2g} nats a token apart",
                   health.drift(metrics, run.config.model.precision))


def _entropy(run: Run, metrics: pd.DataFrame) -> Finding:
    known = metrics["entropy"].dropna() if "entropy" in metrics else pd.Series(dtype=float)
    if known.empty:
        return Finding("entropy", "")
    first, last = known.iloc[:5].mean(), known.iloc[-5:].mean()
    return Finding("entropy", f"{first:.3f} at first, {last:.3f} at the end (nats a token)", "" if last > health.ENTROPY
                   else "Solutions no longer differ: lower update.learning_rate, or raise sampling.temperature.")


def _movement(run: Run, metrics: pd.DataFrame) -> Finding:
    """Adam moves a weight by about the learning rate a step, whatever the gradient's length."""
    rates = metrics["learning_rate"].where(metrics["gradient_norm"].gt(0), 0) if {
        "learning_rate", "gradient_norm"} <= set(metrics) else pd.Series(dtype=float)
    moved = rates.sum()
    return Finding("a weight can have moved by", "" if rates.empty else f"{moved:.2g} at most", "" if moved > MOVED else
                   "That is next to nothing: raise update.learning_rate, or train for more steps.")


def _held_out(run: Run, metrics: pd.DataFrame) -> Finding:
    """The difference on the problems that the first and the last evaluation have both: the same ones, so in pairs."""
    steps = run.evaluations()["step"].tolist()
    if len(steps) < 2:
        return Finding("held-out accuracy", "")
    first, last = (_rates(run, int(step)) for step in (steps[0], steps[-1]))
    mean, low, high = intervals.mean_interval(last - first, intervals.SIGNED)
    return Finding("held-out accuracy", f"{first.mean():.2f} before, {last.mean():.2f} after step {steps[-1]:.0f}: "
                   f"{mean:+z.2f} [{low:+z.2f}, {high:+z.2f}] on the same problems "
                   + ("(moved)" if low > 0 or high < 0 else "(not shown to have moved)"))


def _rates(run: Run, step: int) -> pd.Series:
    """The pass rate of each evaluated problem."""
    table = run.evaluation_table(step)
    parquet.check_columns(table, f"A table in {run.path}", texts=("problem_id",), numbers=("n", "c"))
    return (table["c"] / table["n"]).set_axis(table["problem_id"])


def _outside(run: Run, metrics: pd.DataFrame) -> Finding:
    outside = metrics["belief_outside"].tail(10).mean() if "belief_outside" in metrics else math.nan
    return Finding("belief outside the nine pass rates", "" if math.isnan(outside) else f"{outside:.0%} at the end",
                   "" if not outside > OUTSIDE else "The model does not answer in the form that is read: warm it up "
                   "first (`masa warmup`), or train longer.")


def _groups(run: Run, table: pd.DataFrame) -> Finding:
    groups = rewarded(table).groupby(["step", "group"])["correct"].agg(lambda right: right.astype(float).mean())
    if groups.empty:
        return Finding("groups", "")
    right, wrong = (groups == 1).mean(), (groups == 0).mean()
    advice = "" if 1 - right - wrong >= TEACHING else (
        "Most problems are out of reach, and their groups teach nothing: take easier ones (problems.levels), more "
        "solutions a problem (sampling.solutions), or a stronger model." if wrong >= right else
        "Most problems are solved every time, and their groups teach nothing: take harder ones (problems.levels).")
    return Finding("groups all right, all wrong, mixed", f"{right:.0%}, {wrong:.0%}, {1 - right - wrong:.0%} of "
                   f"{len(groups)}", advice)


def _truncated(run: Run, table: pd.DataFrame) -> Finding:
    solved = rewarded(table)
    share = solved["finish"].eq("length").mean()
    return Finding("solutions truncated", _share(share, solved), "" if not share > TRUNCATED else
                   f"They end before their answer: raise sampling.solution_tokens (now "
                   f"{run.config.sampling.solution_tokens}), or ask for shorter solutions.")


def _unboxed(run: Run, table: pd.DataFrame) -> Finding:
    ended = rewarded(table).query("finish != 'length'")
    share = ended["text"].map(grading.extract_answer).isna().mean()
    return Finding("finished solutions without a box", _share(share, ended), "" if not share > UNBOXED else
                   r"What is in no \boxed{} counts as wrong: warm the model up (`masa warmup`), or look whether its "
                   "chat template is the right one.")


def _unparsed(run: Run, table: pd.DataFrame) -> Finding:
    predictions = predictions_of(table)
    if predictions.empty:
        return Finding("predictions unparsed", "")
    wrong = predictions["parse_error"].replace("", None).dropna()
    share = len(wrong) / len(predictions)
    most = "" if wrong.empty else f" (most often: {brief(wrong.mode()[0])})"
    return Finding("predictions unparsed", _share(share, predictions) + most, "" if not share > UNPARSED else
                   "They earn nothing: warm the model up (`masa warmup`), or raise sampling.meta_tokens.")


def _answers(run: Run, table: pd.DataFrame) -> Finding:
    golds = table.drop_duplicates("problem_id")["answer"].tolist()
    found = grading.unmatchable(golds)
    return Finding("answers that nothing can match", f"{len(found)} of {len(golds)}",
                   "" if len(found) <= UNMATCHABLE * len(golds) else
                   grading.unmatchable_sentence(run.config.problems.source, golds))


def _too_few(run: Run, table: pd.DataFrame) -> Finding:
    """The same text twice is left out when problems are loaded; what is left are too few of them."""
    different, groups = table["problem_id"].nunique(), len(table[["step", "group"]].drop_duplicates())
    return Finding("different problems", f"{different} in {groups} groups", "" if different >= MANY
                   or groups < 2 * different else "So few are learned by heart: take more, or train for fewer steps.")


def _share(share: float, of: pd.DataFrame | pd.Series) -> str:
    return f"{share:.0%} of {len(of)}" if len(of) else ""


#: what metrics and evaluations tell, and what recorded rollouts do
BY_METRICS: tuple[Callable[[Run, pd.DataFrame], Finding], ...] = (
    _health, _drift, _entropy, _movement, _held_out, _outside)
BY_ROLLOUTS: tuple[Callable[[Run, pd.DataFrame], Finding], ...] = (
    _groups, _truncated, _unboxed, _unparsed, _answers, _too_few)
