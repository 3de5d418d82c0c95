"""The comparison as a reader sees it: a table for the terminal, one JSON object, and one page of figures.

Every sentence is computed from the numbers of the figure beside it. The page holds plotly once and opens without a
network. Deliberately no statistics of its own: those come from `compare`.
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
from plotly.offline import get_plotlyjs

from masa_lib import crash_safe_files as files
from masa_lib.analysis import figures, gate_figures
from masa_lib.analysis.compare import EFFICIENT, FRESH, AnalysisError, Comparison, calibration_curve, compare_runs
from masa_lib.analysis.costs import COST

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
#: what stands before a ratio that is a bound, and the words for it
BOUNDS = {"": "", "<= ": "at most ", ">= ": "at least ", "~ ": "about "}
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
CAVEATS = {"kernel": "A peaked kernel paid for its predictions: under doubt its best answer lies near the mode, and an "
                     "update that divides by a std seeks the median; neither is the mean, so a part of this error is "
                     "what was asked for.",
           "brier": "A quadratic score paid for its predictions: its best answer is the mean, but an update that "
                    "divides by a std seeks the median."}
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>:root { color-scheme: light dark; } section { margin: 2.5rem 0; } p { max-width: 46rem; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2rem 1.5rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; white-space: pre; }
.warning { border-left: 4px solid #D55E00; padding-left: .8rem; }
</style>"""


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
    return "\n".join([text(comparison.summary), *([f"Figures: {page}"] if page else [])])


def text(summary: dict[str, Any]) -> str:
    """What the terminal shows of a comparison: the table, warnings, settings that differ, and sentences."""
    said = [*(f"Warning: {warning}" for warning in summary["warnings"]), *_settings(summary),
            *_each(summary, _accuracy, _cost, _awareness, _gate), *_beaten(summary), "", NOTES]
    return "\n".join([table_text(summary), "", *(textwrap.fill(part, 110) for part in said)])


def check_page(page: Path | None) -> None:
    """Refuse a page whose name promises another kind of file, before anything is computed."""
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise AnalysisError(f"The page of figures is HTML and cannot be {page}; --out takes a name that ends in .html.")


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table of measures (rows) by arms (columns); its first row is the header. What no arm has is left out."""
    arms = summary["methods"]
    rows = {key: [label, *(_bound(key, arm) + show(arm[key], form) for arm in arms.values())]
            for label, key, form in TABLE}
    return [["", *(_title(name, arm) for name, arm in arms.items())],
            *(row for key, row in rows.items() if key == "never_crossed" or not set(row[1:]) <= {"-", "0", "0%"})]


def _bound(key: str, arm: dict[str, Any]) -> str:
    """What stands before a ratio that is a bound."""
    kind = "equal" if key.endswith("_equal_ratio") else "target" if key.endswith("_to_target_ratio") else ""
    return f"{arm[f'{kind}_bound']} ".lstrip() if kind and arm[key]["mean"] is not None else ""


def table_text(summary: dict[str, Any]) -> str:
    """The table in aligned plain text, WIDTH arms side by side."""
    rows = table_rows(summary)
    blocks = [[[row[0], *row[first:first + WIDTH]] for row in rows] for first in range(1, len(rows[0]), WIDTH)]
    return "\n\n".join(map(aligned, blocks))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show(value: Any, form: str = ".3f") -> str:
    """A number, `{"mean", "low", "high"}`, `{"before", "after"}` or `{"shown", "measured"}` as text; a dash is none."""
    if isinstance(value, dict) and "before" in value:
        return f"{show(value['before'], form)} -> {show(value['after'], form)}"
    if isinstance(value, dict) and "shown" in value:
        return f"{value['shown']} of {value['measured']}" if value["measured"] else "-"
    if isinstance(value, dict):
        ends = "" if value["low"] is None else f" [{show(value['low'], form)}, {show(value['high'], form)}]"
        return show(value["mean"], form) + ends
    return "-" if value is None else format(value, form)


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison: table, figures and sentences."""
    head, *rows = table_rows(comparison.summary)
    table = "".join("<tr>" + "".join(f"<{tag}>{_html(cell)}</{tag}>" for cell in row) + "</tr>"
                    for tag, row in [("th", head), *(("td", row) for row in rows)])
    write_html(path, f"{', '.join(comparison.summary['methods'])}: accuracy, cost, meta-awareness",
               [*(f'<p class="warning">{_html(warning)}</p>' for warning in comparison.summary["warnings"]),
                *(f"<p>{_html(said)}</p>" for said in _settings(comparison.summary)),
                f"<table>{table}</table><p>{_html(NOTES)}</p>"], sections(comparison))


def write_html(path: Path, title: str, head: Iterable[str], drawn: Iterable[tuple[go.Figure, list[str]]]) -> None:
    """Write a page that needs no network.

    Args:
        path: of the file.
        title: plain text.
        head: HTML above the figures.
        drawn: the figures, each with its sentences.
    """
    body = [f"<h1>{_html(title)}</h1>", *head]
    for number, (figure, said) in enumerate(drawn):
        plot = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{number}",
                              config={"displaylogo": False, "responsive": True})
        body.append(f"<section>{plot}<p>{'<br>'.join(map(_html, said))}</p></section>")
    text = (f'<!doctype html><html lang="en"><head>{HEAD}<title>{_html(title)}</title><script>{get_plotlyjs()}</script>'
            f"</head><body>{''.join(body)}</body></html>")
    with files.writing(path, "make the page again, or elsewhere with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, lambda temporary: temporary.write_text(text, encoding="utf8", errors="backslashreplace"))


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


#: a figure and the sentences that say what is seen in it; None: the runs have nothing to show in it
Section = tuple[go.Figure, list[str]] | None


def sections(comparison: Comparison) -> list[tuple[go.Figure, list[str]]]:
    """The figures of the page, in the order of FIGURES, each with its sentences."""
    drawn = Drawn(comparison, comparison.summary, *(table.assign(arm=table["arm"].map(html.escape)) for table in (
        comparison.steps, comparison.curves, comparison.problems)))
    return [section for make in FIGURES if (section := make(drawn))]


def _by_cost(of: Drawn) -> Section:
    drawn = figures.accuracy_curve(of.curves, "tokens", of.summary["target"])
    return drawn, [*_each(of.summary, _cost), *_beaten(of.summary)]


def _spent(of: Drawn) -> Section:
    spent = pd.DataFrame({html.escape(name): arm["tokens_of_reference"]
                          for name, arm in of.summary["methods"].items()}, dtype=float).T
    return ((gate_figures.token_shares(spent.dropna()), _each(of.summary, _arithmetic))
            if spent["tokens"].notna().any() else None)


def _predicted(draw: Callable[[pd.DataFrame], go.Figure], of: Drawn, table: pd.DataFrame, said: list[str]) -> Section:
    """A figure of predictions, where an arm predicts."""
    return (draw(table), said) if len(of.calibrated) else None


def _if_said(figure: Callable[[pd.DataFrame], go.Figure], of: Drawn, said: list[str]) -> Section:
    """A figure of the steps where there is something to say of it."""
    return (figure(of.steps), said) if said else None


def _gated(of: Drawn) -> Section:
    said = _each(of.summary, _gate)
    return _if_said(gate_figures.gate_over_steps, of, [*said, ON_PAPER] if said else [])


#: the page, from its top; a new figure is one more function here
FIGURES: list[Callable[[Drawn], Section]] = [
    lambda of: (figures.accuracy_curve(of.curves, "step", of.summary["target"]), _each(of.summary, _accuracy)),
    _by_cost, _spent,
    lambda of: (figures.accuracy_by_level(of.problems), _each(of.summary, _levels)),
    lambda of: (figures.pass_at_k_curve(of.problems), _each(of.summary, _pass_at_32)),
    lambda of: (figures.tokens_by_stream(of.steps), _each(of.summary, _streams)),
    lambda of: (figures.seconds_by_phase(of.steps), _phases(of.comparison.steps)),
    lambda of: _predicted(figures.predictions, of, of.problems, _each(of.summary, _awareness)),
    lambda of: _predicted(functools.partial(figures.predictions, measure="length"), of, of.problems,
                          _each(of.summary, _lengths)),
    lambda of: _predicted(gate_figures.calibration_curve, of, of.calibrated,
                          [*_each(of.summary, _calibration), CONSTANT]),
    lambda of: _if_said(gate_figures.predicted_and_true, of, _each(of.summary, _alignment)),
    _gated,
    lambda of: (figures.rewards_by_part(of.steps), _trends(of.comparison.steps, figures.REWARDS)),
    lambda of: _if_said(figures.alignment, of, _trends(of.comparison.steps, figures.ALIGNMENT))]


def _title(name: str, arm: dict[str, Any]) -> str:
    return name + " (privileged)" * arm["privileged"]


def _html(text: str) -> str:
    return html.escape(text).replace("-&gt;", "&rarr;")


def _settings(summary: dict[str, Any]) -> list[str]:
    """The settings in which the arms differ, in one sentence; not the method where the arms' names say it."""
    said = []
    for key, values in summary["settings"].items():
        most, *rest = sorted(dict.fromkeys(values.values()), key=list(values.values()).count, reverse=True)
        if key == "method" and all(arm.startswith(value) for arm, value in values.items()):
            continue
        told = [f"{value or 'empty'} in {' and '.join(arm for arm in values if values[arm] == value)}"
                for value in rest]
        others = "the others" if len(values) > 2 else next(arm for arm in values if values[arm] == most)
        said.append(f"{key} is {', '.join(told)}, {most or 'empty'} in {others}")
    return [f"Settings that differ: {'; '.join(said)}."] if said else []


def _each(summary: dict[str, Any], *tellers: Any) -> list[str]:
    """What the tellers say of each arm; an arm of which there is nothing to say is passed over."""
    said = [tell(name, arm) for name, arm in summary["methods"].items() for tell in tellers]
    return [sentence for sentence in said if sentence]


def _accuracy(name: str, arm: dict[str, Any]) -> str:
    base, final, above = arm["accuracy_base"], arm["accuracy_final"]["mean"], arm["accuracy_above_grpo"]
    said = f"{name}: held-out accuracy goes from {show(base)} to {show(final)} ({final - base:+.3f}). {arm['note']}"
    if name == arm["reference"] or above["mean"] is None:
        return said.strip()
    verdict = "not above" if above["mean"] <= 0 else "above" if (above["low"] or 0) > 0 else "not shown to be above"
    basis = "one seed alone" if above["low"] is None else "paired by seed"
    return (f"{said.strip()} Its accuracy is {verdict} that of {arm['reference']}: difference "
            f"{show(above, '+.3f')}, {basis}.")


def _cost(name: str, arm: dict[str, Any]) -> str:
    """The headline, cost at equal accuracy by each denominator, and beside it the crossing of one target."""
    tokens, target = arm["tokens_equal_ratio"], arm["tokens_to_target_ratio"]
    if name == arm["reference"] or tokens["mean"] is None:
        return ""
    others = {"read": "the prompts", "tokens_update": "the tokens through the update", "seconds": "the seconds"}
    each = [f"{_shown(f'{cost}_equal_ratio', arm)} times {what}" for cost, what in others.items()
            if arm[f"{cost}_equal_ratio"]["mean"] is not None]
    crossing = "" if target["mean"] is None else (
        f" To the target alone it is {_shown('tokens_to_target_ratio', arm)} times the tokens"
        + ("." if arm["seconds_to_target_ratio"]["mean"] is None else
           f" and {_shown('seconds_to_target_ratio', arm)} times the seconds."))
    return (f"{_title(name, arm)}: at equal accuracy {arm['reference']} writes {_shown('tokens_equal_ratio', arm)} "
            f"times the tokens of {name}, and has {_and(each)}; in tokens written {name} is "
            f"{verdict(tokens, arm['equal_missed'])}.{crossing}")


def _shown(key: str, arm: dict[str, Any]) -> str:
    """A ratio with its interval, and whether it is a bound, in words."""
    return BOUNDS[_bound(key, arm)] + show(arm[key], ".2f")


def verdict(ratio: dict[str, Any], missed: float | None) -> str:
    """What a ratio at equal accuracy shows, with its interval and the share of the accuracies that were never reached.

    An arm is called cheaper only if it would be even if each of those cost twice all that was spent.
    """
    if ratio["low"] is None or (ratio["low"] <= 2 ** (missed or 0) and ratio["high"] >= 1):
        return "not shown to differ"
    return "cheaper" if ratio["mean"] > 1 else "dearer"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _beaten(summary: dict[str, Any]) -> list[str]:
    """Which arms need fewer tokens at equal accuracy than masa-efficient, or reach the target in more of the seeds."""
    said = []
    for efficient in (EFFICIENT, EFFICIENT + FRESH):
        ours = summary["methods"].get(efficient)
        others = {name: arm for name, arm in summary["methods"].items()
                  if ours and name != efficient and arm["reference"] == ours["reference"] and arm["target"] is not None}
        lines: dict[str, bool] = {}  # what is said, and whether it is sure
        for name, arm in others.items():
            ratio, missed = arm["tokens_below_efficient"], arm["never_crossed"] / arm["seeds"]
            if (ratio["mean"] or 0) > 2 ** (arm["equal_missed"] or 0):  # see verdict
                sure = verdict(ratio, arm["equal_missed"]) == "cheaper"
                lines[f"{_title(name, arm)} needs fewer tokens at equal accuracy: {efficient} spends "
                      f"{show(ratio, '.2f')} times as many{'' if sure else ', which can be chance'}"] = sure
            if missed < ours["never_crossed"] / ours["seeds"]:
                lines[f"{_title(name, arm)} reaches the target in more of its seeds"] = True
        if lines:
            said.append(f"{efficient} {'is' if any(lines.values()) else 'may be'} beaten. " + ". ".join(lines) + ".")
        elif others:
            said.append(f"No arm needs fewer tokens at equal accuracy than {efficient}.")
    return said


def _arithmetic(name: str, arm: dict[str, Any]) -> str:
    parts = arm["tokens_of_reference"]
    if name == arm["reference"] or parts["tokens"] is None:
        return ""
    streams = " and ".join(f"{100 * parts[key]:.1f} for {figures.STREAMS[key][0]}" for key in COST if parts[key])
    return (f"{_title(name, arm)}: where {arm['reference']} spends 100 tokens to the target it spends {streams}, "
            f"{100 * parts['tokens']:.1f} in all; {arm['reference']} takes {_shown('steps_to_target_ratio', arm)} "
            "times its steps.")


def _calibration(name: str, arm: dict[str, Any]) -> str:
    error = arm["calibration_error"]
    if error["after"]["mean"] is None:
        return ""
    caveat = CAVEATS.get(arm["difficulty"], "") if arm["tokens_meta"] else "Nothing paid for its predictions."
    floor = {when: value for when, value in arm["calibration_floor"].items() if value is not None}
    least = f" (a perfect predictor: {show(arm['calibration_floor'])}, by the luck of the samples)" if floor else ""
    return f"{name}: expected calibration error {show(error)}{least}. {caveat}".strip()


def _alignment(name: str, arm: dict[str, Any]) -> str:
    found = arm["drop_then_align"]
    return (f"{name}: the mean predicted pass rate first falls and then rises towards the true one in {show(found)} "
            f"seeds (fall {show(found['fall'])}, rise {show(found['rise'])}; the bottom is chosen on every other step "
            "and measured on the steps between, each change tested at 5 % against noise as much alike from step to "
            "step).") if found["measured"] else ""


def _gate(name: str, arm: dict[str, Any]) -> str:
    means = {key: show(arm[key]["mean"], form) for key, form in (
        ("gate_steps", ".0%"), ("gate_start", ".0f"), ("gate_switches", ".1f"), ("cap_steps", ".0%"),
        ("collapsed", ".0%"))}
    if means["collapsed"] == "-":  # only masa-efficient measures it
        return ""
    said = f"{name}: the gate never acts"
    if arm["gate_steps"]["mean"]:
        said = (f"{name}: the gate acts in {means['gate_steps']} of the steps, first in step {means['gate_start']}, "
                f"goes off again {means['gate_switches']} times, and drops {show(arm['dropped'], '.2f')} of the "
                "candidates")
    if arm["gate_precision"]["mean"] is not None:
        said += (f"; by re-checks, precision {show(arm['gate_precision'], '.2f')}, recall "
                 f"{show(arm['gate_recall'], '.2f')}, signal lost {show(arm['signal_lost'], '.2f')}")
    if arm["cap_steps"]["mean"]:
        said += (f"; the cap acts in {means['cap_steps']} of the steps, stops {show(arm['stopped'], '.2f')} of the "
                 f"solutions and cuts {show(arm['right_cut'])} of the right ones")
    return f"{said}; predictions are collapsed in {means['collapsed']} of the steps."


def _awareness(name: str, arm: dict[str, Any]) -> str:
    if arm["parse_rate"]["after"] is None:
        return ""
    moves = {key: f"{show(arm[key]['before'], '.2f')} -> {show(arm['final'][key], '.2f')}"
             for key in ("r_pass_rate", "r_pass_rate_within", "r_length")}
    return (f"{name}: r of predicted and true pass rate {moves['r_pass_rate']}, within levels "
            f"{moves['r_pass_rate_within']} (prompt length alone {show(arm['r_prompt_length'], '.2f')}); r of the "
            f"length {moves['r_length']}.")


def _levels(name: str, arm: dict[str, Any]) -> str:
    gains = {level: gain for level, gain in arm["gain_by_level"].items() if gain is not None}
    most, least = max(gains, key=gains.get), min(gains, key=gains.get)
    return f"{name}: gains from {gains[least]:+.3f} (level {least}) to {gains[most]:+.3f} (level {most})."


def _pass_at_32(name: str, arm: dict[str, Any]) -> str:
    base, final = arm["pass_at_32_base"], arm["pass_at_32_final"]
    return f"{name}: pass@32 goes from {show(base)} to {show(final)}." if base else ""


def _lengths(name: str, arm: dict[str, Any]) -> str:
    return (f"{name}: r of predicted and actual length {show(arm['r_length'], '.2f')}, mean error "
            f"{show(arm['mae_length'], '.1f')} tokens.")


def _streams(name: str, arm: dict[str, Any]) -> str:
    shares = [f"{arm[key] / max(arm['tokens'], 1):.0%} {figures.STREAMS[key][0]}" for key in COST if arm[key]]
    return f"{name}: {arm['tokens']:,.0f} tokens in a run, {', '.join(shares)}."


def _phases(steps: pd.DataFrame) -> list[str]:
    totals = steps.groupby("arm", sort=False)[["seconds_generate", "seconds_total"]].sum()
    return [f"{arm}: {spent / total:.0%} of the time is sampling." for arm, (spent, total) in totals.iterrows()]


def _trends(steps: pd.DataFrame, names: dict[str, str]) -> list[str]:
    """An arm's means over the first and the last tenth of the steps, of the columns that it has."""
    tenth, said = max(1, int(steps["step"].max()) // 10), []
    for arm, part in steps.groupby("arm", sort=False):
        first, last = part[part["step"] <= tenth], part[part["step"] > steps["step"].max() - tenth]
        moves = [f"{label} {first[name].mean():.2f} -> {last[name].mean():.2f}" for name, label in names.items()
                 if name in part and last[name].notna().any()]
        said += [f"{arm}, first and last tenth of the steps: {', '.join(moves)}."] if moves else []
    return said
