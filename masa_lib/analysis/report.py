"""The comparison as a reader sees it: a table for the terminal, one JSON object, and one page of figures.

Every sentence is computed from the numbers of the figure beside it (`sentences`). The page opens without a network
(`pages`). Deliberately no statistics of its own: those come from `compare`.
"""

from __future__ import annotations

import functools
import html
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from masa_lib.analysis import figures, gate_figures, page_parts, pages, sentences, text_tables
from masa_lib.analysis.compare import Comparison, calibration_curve, compare_runs
from masa_lib.analysis.records import AnalysisError
from masa_lib.analysis.sentences import show

TABLE = (  # label, key of an arm's summary, number format
    ("seeds", "seeds", "d"), ("optimiser updates", "updates", ",.0f"), ("accuracy, base", "accuracy_base", ".3f"),
    ("accuracy, final", "accuracy_final", ".3f"), ("accuracy above grpo", "accuracy_above_grpo", "+.3f"),
    ("pass@32, base", "pass_at_32_base", ".3f"), ("pass@32, final", "pass_at_32_final", ".3f"),
    ("tokens of solutions", "tokens_solution", ",.0f"), ("tokens of re-checks", "tokens_recheck", ",.0f"),
    ("tokens of predictions", "tokens_meta", ",.0f"),
    ("tokens, all streams", "tokens", ",.0f"), ("prompts read, tokens", "read", ",.0f"),
    ("tokens through the update", "tokens_update", ",.0f"), ("seconds", "seconds", ",.0f"),
    ("all computed tokens", "computed", ",.0f"), ("all, the update thrice", "computed_thrice", ",.0f"),
    ("tokens of the oracle, no cost", "tokens_oracle", ",.0f"),
    *((f"{label} at equal accuracy, ratio", f"{cost}_equal_ratio", ".2f") for cost, label in (
        ("tokens", "tokens"), ("read", "prompts read"), ("tokens_update", "update"), ("seconds", "seconds"),
        ("computed", "all computed"), ("computed_thrice", "update thrice"))),
    ("accuracies never reached", "equal_missed", ".0%"), ("steps to target, ratio", "steps_to_target_ratio", ".2f"),
    ("tokens to target, ratio", "tokens_to_target_ratio", ".2f"),
    ("seconds to target, ratio", "seconds_to_target_ratio", ".2f"), ("seeds that never reach it", "never_crossed", "d"),
    ("r of the pass rate", "r_pass_rate", ".2f"), ("  within levels", "r_pass_rate_within", ".2f"),
    ("  R of prompt length alone", "r_prompt_length", ".2f"), ("  that within levels", "r_prompt_length_within", ".2f"),
    ("mean error of the pass rate", "mae_pass_rate", ".3f"), ("calibration error of it", "calibration_error", ".3f"),
    ("  that of a perfect predictor", "calibration_floor", ".3f"),
    ("falls, then aligns, seeds", "drop_then_align", "d"), ("r of the length", "r_length", ".2f"),
    ("mean error of the length, tokens", "mae_length", ".1f"), ("predictions that parse", "parse_rate", ".2f"),
    ("candidates dropped", "dropped", ".2f"), ("precision of the gate", "gate_precision", ".2f"),
    ("recall of the gate", "gate_recall", ".2f"), ("signal lost by the gate", "signal_lost", ".2f"),
    ("right solutions cut", "right_cut", ".3f"), ("solutions stopped", "stopped", ".2f"))
CONSTANT = ("A prediction that is the same for all problems has no calibration error if it is their mean; r says "
            "whether problems are told apart.")
ON_PAPER = ("Before the gate acts, precision, recall and lost signal are those of what it would have dropped; then "
            "those that re-checks measure.")
#: arms side by side in the terminal
WIDTH = 4
NOTES = ("Brackets are 95 % intervals: t over seeds, for pass@32 over problems. r and errors are means over seeds, "
         "before -> after training. A ratio is grpo's cost divided by the arm's (above 1 the arm is cheaper): seeds "
         "paired, geometric mean, costs read off monotone fits of the held-out curves on the same problems; arms on "
         "a fresh stream are measured against grpo on a fresh stream. At equal accuracy: mean over ten accuracies "
         "between 50 % and 95 % of grpo's gain. To the target: at one of them, 90 % of its mean gain; several times "
         "noisier. An accuracy that is never reached counts with all that was spent: the true ratio is at most (<=) "
         "the one given, or at least (>=) where grpo never reaches it. Cost has four denominators: tokens written "
         "(solutions, re-checks and predictions), prompts and readings computed, tokens through the "
         "update, and seconds, which count only from runs that had the machine to themselves; no one of them is the "
         "cost. Computed tokens are the sum of the first three, once each or with the update three times (forward "
         "and backward). Evaluation is not cost, nor is what an oracle measures. Privileged arms know what a "
         "training does not.")
#: figures that are not folded, from the top of FIGURES
SHOWN = 2


def compare(paths: Iterable[str | Path], page: Path | None = None, as_json: bool = False) -> str:
    """Compare runs; write the page if `page` names one, and give what the terminal shows.

    Args:
        paths: runs, or folders that hold them.
        page: where the page of figures is written; None: nowhere.
        as_json: give the JSON object instead of table and sentences.

    Raises:
        AnalysisError, RunError: the runs cannot be compared, one cannot be read, or the page has another ending.
    """
    check_page(page)
    comparison = compare_runs(paths)
    if page is not None:
        write_page(comparison, page)
    if as_json:
        return json.dumps(comparison.summary, indent=2, allow_nan=False)
    return "\n".join([told(comparison), *([f"Open {page}."] if page else [])])


def told(comparison: Comparison) -> str:
    """What the terminal shows of a comparison: everything of its summary, and at the end all in short."""
    short = [textwrap.fill(part, 110) for part in sentences.in_short(comparison)]
    return "\n".join([text(comparison.summary), "", "In short:", *short])


def text(summary: dict[str, Any]) -> str:
    """The table of a comparison, warnings, settings that differ, and sentences."""
    said = [*(f"Warning: {warning}" for warning in summary["warnings"]), *sentences.settings(summary),
            *sentences.each(summary, sentences.accuracy, sentences.cost, sentences.awareness, sentences.gate),
            *sentences.beaten(summary), "", NOTES]
    return "\n".join([table_text(summary), "", *(textwrap.fill(part, 110) for part in said)])


def check_page(page: Path | None) -> None:
    """Refuse a page whose name promises another kind of file, before anything is computed."""
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise AnalysisError(f"The page of figures is HTML and cannot be {page}; --out takes a name that ends in .html.")


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table of measures (rows) by arms (columns); its first row is the header. What no arm has is left out."""
    arms = summary["methods"]
    rows = {key: [label, *(sentences.bound(key, arm) + show(arm[key], form) for arm in arms.values())]
            for label, key, form in TABLE}
    return [["", *(sentences.title(name, arm) for name, arm in arms.items())],
            *(row for key, row in rows.items() if key == "never_crossed" or not set(row[1:]) <= {"-", "0", "0%"})]


def table_text(summary: dict[str, Any]) -> str:
    """The table in aligned plain text."""
    return blocks(table_rows(summary))


def blocks(rows: Sequence[Sequence[str]]) -> str:
    """A table of measures by arms in aligned plain text, WIDTH arms side by side."""
    parts = [[[row[0], *row[first:first + WIDTH]] for row in rows] for first in range(1, len(rows[0]), WIDTH)]
    return "\n\n".join(map(text_tables.aligned, parts))


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison: in short, then figures; tables, settings and sample rollouts are folded."""
    summary = comparison.summary
    open_, folded = (sections(comparison, part) for part in (FIGURES[:SHOWN], FIGURES[SHOWN:]))
    pages.write(path, f"{', '.join(summary['methods'])}: accuracy, cost, self-knowledge", [
        pages.paragraphs(sentences.in_short(comparison), "lead"), pages.paragraphs(summary["warnings"], "warning"),
        pages.numbers(page_parts.numbers(comparison)), pages.shown(open_),
        pages.paragraphs(sentences.settings(summary)), "<h2>In detail</h2>", *pages.folded(folded),
        pages.fold("Every measure of every arm", pages.table(table_rows(summary)) + pages.paragraphs([NOTES])),
        pages.fold("Settings", page_parts.settings(comparison)),
        pages.fold("Sample rollouts", page_parts.samples(comparison)), page_parts.notebooks(path)])


@dataclass(frozen=True)
class Drawn:
    """What the page's figures are drawn from: tables of a `Comparison`, whose arms' names are no tags for plotly."""

    comparison: Comparison
    summary: dict[str, Any]
    steps: pd.DataFrame
    curves: pd.DataFrame
    problems: pd.DataFrame

    @functools.cached_property
    def calibrated(self) -> pd.DataFrame:
        """The calibration of the arms that predict, after training; empty where none does."""
        return calibration_curve(self.problems[self.problems["when"] == "after"])


#: a figure and the sentences that say what is seen in it
Drawing = tuple[go.Figure, list[str]]
#: None: the runs have nothing to show in it
Section = Drawing | None
Maker = Callable[[Drawn], Section]


def sections(comparison: Comparison, makers: Sequence[Maker] = ()) -> list[Drawing]:
    """The figures of the page, in the order of FIGURES or of those given, each with its sentences."""
    drawn = Drawn(comparison, comparison.summary, *(table.assign(arm=table["arm"].map(html.escape)) for table in (
        comparison.steps, comparison.curves, comparison.problems)))
    return [section for make in makers or FIGURES if (section := make(drawn))]


def _believed(of: Drawn) -> Section:
    """What one arm predicts of itself, before and after; the others are further down."""
    name = sentences.subject(of.comparison)
    rows = of.problems[(of.problems["arm"] == html.escape(name)) & of.problems["predicted_pass_rate"].notna()]
    if rows.empty:
        return None
    title = f"What {html.escape(name)} predicts of itself, and what comes true, before and after training"
    drawn = figures.predictions(rows).update_layout(title_text=title)
    return drawn, ["A dot is a held-out problem; on the dotted diagonal it goes as predicted. "
                   f"{sentences.awareness(name, of.summary['methods'][name])}".strip()]


def _by_cost(of: Drawn) -> Section:
    drawn = figures.accuracy_curve(of.curves, "tokens", of.summary["target"])
    return drawn, [*sentences.each(of.summary, sentences.cost), *sentences.beaten(of.summary)]


def _spent(of: Drawn) -> Section:
    spent = pd.DataFrame({html.escape(name): arm["tokens_of_reference"]
                          for name, arm in of.summary["methods"].items()}, dtype=float).T
    return ((gate_figures.token_shares(spent.dropna()), sentences.each(of.summary, sentences.arithmetic))
            if spent["tokens"].notna().any() else None)


def _predicted(draw: Callable[[pd.DataFrame], go.Figure], of: Drawn, table: pd.DataFrame, said: list[str]) -> Section:
    """A figure of predictions, where an arm predicts."""
    return (draw(table), said) if len(of.calibrated) else None


def _if_said(figure: Callable[[pd.DataFrame], go.Figure], of: Drawn, said: list[str]) -> Section:
    """A figure of the steps where there is something to say of it."""
    return (figure(of.steps), said) if said else None


def _gated(of: Drawn) -> Section:
    said = sentences.each(of.summary, sentences.gate)
    return _if_said(gate_figures.gate_over_steps, of, [*said, ON_PAPER] if said else [])


#: the page, from its top; a new figure is one more function here. All but the first SHOWN are folded
FIGURES: list[Maker] = [
    _believed, _by_cost,
    lambda of: (figures.accuracy_curve(of.curves, "step", of.summary["target"]),
                sentences.each(of.summary, sentences.accuracy)),
    _spent,
    lambda of: (figures.accuracy_by_level(of.problems), sentences.each(of.summary, sentences.levels)),
    lambda of: (figures.pass_at_k_curve(of.problems), sentences.each(of.summary, sentences.pass_at_32)),
    lambda of: (figures.tokens_by_stream(of.steps), sentences.each(of.summary, sentences.streams)),
    lambda of: (figures.seconds_by_phase(of.steps), sentences.phases(of.comparison.steps)),
    lambda of: _predicted(figures.predictions, of, of.problems, sentences.each(of.summary, sentences.awareness)),
    lambda of: _predicted(functools.partial(figures.predictions, measure="length"), of, of.problems,
                          sentences.each(of.summary, sentences.lengths)),
    lambda of: _predicted(gate_figures.calibration_curve, of, of.calibrated,
                          [*sentences.each(of.summary, sentences.calibration), CONSTANT]),
    lambda of: _if_said(gate_figures.predicted_and_true, of, sentences.each(of.summary, sentences.alignment)),
    _gated,
    lambda of: (figures.rewards_by_part(of.steps), sentences.trends(of.comparison.steps, figures.REWARDS)),
    lambda of: _if_said(figures.alignment, of, sentences.trends(of.comparison.steps, figures.ALIGNMENT))]


