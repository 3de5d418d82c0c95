"""Ask a model in the terminal how often it would solve a problem, then let it solve it: `masa chat RUN`.

What a model writes is shown without control characters: a terminal obeys some of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib import config as configs
from masa_lib import engines
from masa_lib.config import Config
from masa_lib.method import prompts
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading
from masa_lib.runs.folder import Run
from masa_lib.tasks import grading
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem

WIDTH = 30
Reader = Callable[[str], str]


def chat(config: Config, weights: Path | None, run: Run | None, solutions: int, read: Reader = input) -> Iterator[str]:
    """Load a model and answer one problem after another; yields what is to be printed.

    Args:
        config: of the run, or of a model alone.
        weights: a folder to take the weights from, such as a run's checkpoint.
        run: whose weights these are; it decides the date that a chat template may write.
        solutions: how often each problem is solved.
        read: asks for a line; an empty one, or its end, ends the talk.
    """
    from masa_lib.lessons.widgets.self_knowledge import ask

    config = configs.replace(config, {"sampling.shared_beginning": False})
    model, tokenizer, engine = engines.load_policy(config, weights)
    if run:
        prompts.fix_date(tokenizer, run.started)
    for number, (problem, answer) in enumerate(_asked(read)):
        with loading.precision(config.model, model.device):
            table = ask(Problem(f"chat-{number}", problem, answer, 0, "chat"), engine, tokenizer, config,
                        solutions=solutions, predictions=config.sampling.predictions)
        yield said(table, answer)


def _asked(read: Reader) -> Iterator[tuple[str, str]]:
    try:
        while problem := read("Problem (empty: end)> ").strip():
            yield problem, read("Its answer, if you know it> ").strip()
    except EOFError:
        return


def said(table: pd.DataFrame, answer: str) -> str:
    """What a model predicted of a problem, and how its solutions went.

    Args:
        table: of `self_knowledge.ask`.
        answer: the right one; empty where nobody knows.
    """
    solved = solutions_of(table)
    given = Counter(solved["text"].map(grading.extract_answer).map(lambda text: "no answer" if text is None else text))
    told = ", ".join(f"{visible(text)[:40]} ({count})" for text, count in given.most_common(5))
    right = f"Right: {solved['correct'].astype(bool).sum()} of {len(solved)}.\n" if answer else ""
    return (f"{_prediction(table)}\nIts first solution ({solved['length'].iloc[0]} tokens):\n"
            f"{visible(solved['text'].iloc[0])}\n\nAnswers: {told}.\n{right}")


def _prediction(table: pd.DataFrame) -> str:
    """The shares of the nine pass rates as bars: what was believed, or what the predictions said."""
    read = table[table["stream"] == "belief"]
    if len(read):
        shares = [float(share) for share in read["belief"].iloc[0]]
    else:
        eighths = predictions_of(table)["predicted_pass_rate"].dropna().astype(int)
        if eighths.empty:
            return "None of its predictions could be read."
        shares = eighths.value_counts(normalize=True).reindex(range(PASS_RATE_STEPS + 1), fill_value=0.0).tolist()
    mean = sum(share * eighth for eighth, share in enumerate(shares)) / PASS_RATE_STEPS
    bars = [f"  {eighth}/{PASS_RATE_STEPS} {'#' * round(WIDTH * share)} {share:.0%}"
            for eighth, share in enumerate(shares)]
    return "\n".join([f"It expects to be right {mean:.0%} of the time:", *bars, ""])


def visible(text: Any) -> str:
    """A text without what a terminal would obey; line breaks stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in str(text))
