"""What the page of a comparison shows beside its figures: four numbers, settings, sample rollouts, notebooks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from masa_lib import ROOT
from masa_lib import config as configs
from masa_lib.analysis import pages
from masa_lib.analysis.compare import Comparison
from masa_lib.analysis.sentences import amount, beside, show, subject
from masa_lib.crash_safe_files import RunError
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: notebooks that explain the page, and what each says
NOTEBOOKS = {"01_do_models_know_themselves": "how to read predicted against true",
             "02_the_reward_lab": "what a prediction is paid, and what that asks for",
             "04_train_masa": "the same training, live, with knobs",
             "06_doing_less": "which cost counts, and what choosing problems must save",
             "07_did_it_help": "intervals, and your own run beside the recorded ones"}
#: solutions that are shown of one problem
SOLUTIONS = 3


def numbers(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Four numbers of the arm that is spoken of: what each is, the number, and what to hold it against."""
    name = subject(comparison)
    other, arm = beside(comparison, name), comparison.summary["methods"][name]
    runs = {key: comparison.runs[comparison.runs["arm"] == key] for key in (name, other) if key}
    mean = {key: {cost: rows[cost].mean() for cost in ("tokens", "seconds")} for key, rows in runs.items()}
    final = {key: show(comparison.summary["methods"][key]["accuracy_final"]["mean"], ".2f") for key in runs}

    def note(*parts: str) -> str:
        return "; ".join(filter(None, parts))

    busy = "" if all(rows["alone"].all() for rows in runs.values()) else "other work ran beside"
    return [("held-out accuracy", final[name], note(f"before {show(arm['accuracy_base'], '.2f')}",
                                                    f"{other} {final[other]}" if other else "")),
            ("r of predicted and true pass rate", show(arm["r_pass_rate"]["after"], ".2f"), note(
                f"before {show(arm['r_pass_rate']['before'], '.2f')}",
                f"among problems of one level {show(arm['r_pass_rate_within']['after'], '.2f')}")),
            ("tokens written", amount(mean[name]["tokens"]), note(
                f"{other} {amount(mean[other]['tokens'])}" if other else "the other costs are above")),
            ("seconds of training", f"{mean[name]['seconds']:,.0f}", note(
                f"{other} {mean[other]['seconds']:,.0f}" if other else "", busy))]


def settings(comparison: Comparison) -> str:
    """All settings of each arm, those that differ first."""
    first = comparison.runs.drop_duplicates("arm")
    arms = {row.arm: Run.open(row.folder).config for row in first.itertuples()}
    rows = [[key, *(str(configs.get(config, key)) for config in arms.values())] for key in configs.settings()]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return (pages.paragraphs([f"Of the first seed of each arm, as it began: {first['seed'].iloc[0]}."])
            + pages.table([["setting", *arms], *rows], "Settings"))


def samples(comparison: Comparison) -> str:
    """What was written last, of one problem each: by the arm that is spoken of and the one it is measured against."""
    name, parts = subject(comparison), []
    for arm in filter(None, (name, beside(comparison, name))):
        run = Run.open(comparison.runs.loc[comparison.runs["arm"] == arm, "folder"].iloc[0])
        with contextlib.suppress(RunError):  # a page does without what was not recorded
            parts += _sample(arm, run)
    return "".join(parts)


def _sample(arm: str, run: Run) -> Iterator[str]:
    """One problem of the last recorded step: a group with right and wrong solutions, where there is one."""
    steps = run.rollout_steps()
    if not steps:
        return
    table = run.rollouts(steps[-1:])
    parquet.check_columns(table, f"A table in {run.path}", texts=("stream", "problem", "answer", "text"),
                          numbers=("group", "length", "correct", "reward", "advantage", "predicted_pass_rate"))
    solved = table[(table["stream"] == "solution") & table["correct"].notna()]
    if solved.empty:
        return
    rates = solved.groupby("group")["correct"].mean().astype(float)
    group = solved[solved["group"] == (rates - 0.5).abs().idxmin()]
    head = group.iloc[0]
    right = group["correct"].astype(bool)
    yield pages.paragraphs([f"{arm}, step {steps[-1]}. Problem: {head['problem']} Answer: {head['answer']}. "
                            f"{_predicted(run, table, head, steps[-1])}Right: {right.sum()} of {len(group)}."])
    for row in pd.concat([group[right].head(SOLUTIONS - 1), group[~right]]).head(SOLUTIONS).itertuples():
        yield pages.paragraphs([f"{'Right' if row.correct else 'Wrong'}, {row.length} tokens, reward {row.reward:.2f}, "
                                f"advantage {row.advantage:+.2f}:"])
        yield f"<blockquote>{pages.escaped(row.text)}</blockquote>"


def _predicted(run: Run, table: pd.DataFrame, head: pd.Series, step: int) -> str:
    """What was predicted of a problem before it was solved, read or written; nothing where nothing was."""
    rows = run.beliefs()
    if len(rows):
        rows = rows[(rows["step"] == step) & (rows["problems"] == head.get("problem_id"))]
    if len(rows):
        belief = rows["beliefs"].iloc[0]
        mean = sum(number * share for number, share in enumerate(belief)) / (sum(belief) * PASS_RATE_STEPS)
        return f"Predicted pass rate: {mean:.2f}. "
    asked = (table["stream"] == "meta") & (table["group"] == head["group"])
    said = table[asked]["predicted_pass_rate"].dropna()
    return f"Predicted pass rates: {', '.join(f'{rate / PASS_RATE_STEPS:.2g}' for rate in said)}. " if len(said) else ""


def notebooks(page: Path) -> str:
    """Where to read on; links where the notebooks are beside the library."""
    entries = []
    for name, about in NOTEBOOKS.items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        where = Path(os.path.relpath(path, page.resolve().parent)).as_posix()
        link = f'<a href="{pages.escaped(where)}">{name}</a>' if path.exists() else name
        entries.append(f"<li>{link}: {about}</li>")
    return f"<h2>Read on</h2><p><code>make lab</code> opens the notebooks.</p><ul>{''.join(entries)}</ul>"
