r"""Do models know themselves? What a model that never saw our format believes of its own solutions, read off untrained.

The meta answer's JSON is forced up to a value, and the model's own probabilities decide between the values; its sampled
solutions tell what is true. Nothing is trained and no value is sampled, so the format costs the model nothing. Answers
without a box are read off as the last number stated, for the same reason. Deliberately no threshold for "knows": the
table, the correlations and the calibration are the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib import engines
from masa_lib.analysis import awareness, figures
from masa_lib.config import Config
from masa_lib.engines import logprobs
from masa_lib.errors import MasaError
from masa_lib.method import prompts, rollouts
from masa_lib.models import loading
from masa_lib.recipes.warmup import in_form
from masa_lib.runs import parquet
from masa_lib.runs.provenance import environment, shared
from masa_lib.tasks import grading
from masa_lib.tasks import problems as sources
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem
from masa_lib.training import evaluation
from masa_lib.training.rollout_bar import RolloutBar

#: keeps the seeds of a probe apart from those of training steps and evaluations
SEED_TAG = 32452843
LENGTH_BINS = 8
#: the answer up to each value, and what follows it: a number is whole only with the mark behind it
FORMS = {"pass_rate": ('{"math_notion": [], "pass_rate": ', ","),
         "length": ('{"math_notion": [], "solution_length": ', "}")}


class ProbeError(MasaError, RuntimeError):
    """A probe cannot be made; the message says what to change."""


def build(config: Config, count: int, out: Path, command: str) -> dict[str, Any]:
    """Probe a model on held-out problems; write `problems.parquet`, `summary.json` and `probe.html`.

    Args:
        config: model, problems, wording and seed; `sampling.solutions` of each problem are sampled at
            `evaluation.temperature`.
        count: problems.
        out: folder for the three files.
        command: recorded.

    Returns:
        The summary.

    Raises:
        ProbeError: count is below 1.
        ModelError, ProblemError: model or problems cannot be loaded.
    """
    if count < 1:
        raise ProbeError(f"A probe needs problems to ask; --count is {count} and must be at least 1.")
    held_out = sources.held_out(config.problems, count)
    model, tokenizer, sampler = engines.load_policy(config)
    held_out = sources.make_room(None, held_out, prompts.room(tokenizer, engines.context_of(sampler, model), config))
    with loading.precision(config.model, model.device):
        table, answers = solve(held_out, sampler, tokenizer, config)
        for kind, values in asked_values(config).items():
            believe(table, kind, values, held_out, model, tokenizer, config)
    told = shared(config)
    summary = {**environment(config, command), "model": Path(told.model.name).name,
               "problems": {"count": len(held_out), "source": told.problems.source, "levels": config.problems.levels},
               "samples": config.sampling.solutions, "temperature": config.evaluation.temperature, **answers,
               **summarise(table)}

    def write(folder: Path) -> None:
        parquet.write(folder / "problems.parquet", table)
        (folder / "summary.json").write_bytes(json.dumps(json.loads(files.line(summary)), indent=2).encode() + b"\n")
        figures.probe(awareness.problem_measures(table), summary["calibration"]).write_html(folder / "probe.html")

    with files.writing(out, "probe again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folders.replace_folder(out, write)
    return summary


def asked_values(config: Config) -> dict[str, list[int]]:
    """The values between which the model decides: pass rates in eighths, lengths on a logarithmic scale in tokens."""
    low, high = config.prompt.min_length, config.prompt.max_length or config.sampling.solution_tokens
    return {"pass_rate": list(range(PASS_RATE_STEPS + 1)),
            "length": sorted(set(np.geomspace(low, high, LENGTH_BINS).round().astype(int).tolist()))}


def solve(held_out: Sequence[Problem], sampler: engines.Engine, tokenizer: Any,
          config: Config) -> tuple[pd.DataFrame, dict[str, float]]:
    """What is true: one row a problem, as in an evaluation, and how the answers were read off."""
    size = config.sampling.solutions
    with RolloutBar(len(held_out) * size, "probe") as bar:
        rows = rollouts.collect(held_out, sampler, tokenizer, config, solutions=size, predictions=0,
                                seed=[config.seed, SEED_TAG], temperature=config.evaluation.temperature,
                                progress=bar)
    answers = read_answers(rows)
    return evaluation.per_problem(rows), answers


def read_answers(rows: pd.DataFrame) -> dict[str, float]:
    """Grade solutions again in place, those without a box by the last number that they state; how many there are."""
    boxed = rows["text"].map(lambda text: bool(grading.extract_answer(text)))
    accuracy = float(rows["correct"].astype(float).mean())
    forms = [in_form(text) or "" for text in rows["text"]]
    rows["correct"] = pd.array(grading.grade_many(forms, rows["answer"].tolist(), problems=rows["problem"].tolist()),
                               dtype="boolean")
    return {"boxed": float(boxed.mean()), "accuracy_boxed": accuracy, "no_answer": forms.count("") / len(forms),
            "truncated": float(rows["finish"].eq("length").mean())}


def believe(table: pd.DataFrame, kind: str, values: Sequence[int], held_out: Sequence[Problem], model: Any,
            tokenizer: Any, config: Config) -> None:
    """Add the model's probabilities of the values, their total before normalising, and their mean to a table in place.

    The mean is entered as the problem's one prediction, so that `awareness.meta_awareness` measures it.
    """
    asked = [prompts.encode(tokenizer, prompts.meta_messages(problem.text, config.prompt,
                                                             config.sampling.solution_tokens)) for problem in held_out]
    logps_PV = value_logps(model, tokenizer, asked, kind, values, config)
    probabilities_PV = logps_PV.softmax(dim=1)
    means = (probabilities_PV * torch.tensor(values, dtype=torch.float64)).sum(dim=1).tolist()
    table[f"{kind}_probabilities"] = probabilities_PV.tolist()
    table[f"{kind}_mass"] = logps_PV.exp().sum(dim=1).tolist()
    table["predictions" if kind == "pass_rate" else "predicted_lengths"] = [[mean] for mean in means]


def value_logps(model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], kind: str, values: Sequence[int],
                config: Config) -> torch.Tensor:
    """Log-probability that the model goes on with each value after the meta prompt and the forced start of its answer.

    Args:
        model: a causal language model.
        tokenizer: its own.
        asked: token ids of the meta prompts.
        kind: pass_rate or length.
        values: whole numbers.
        config: token budget and log-prob chunk.

    Returns:
        One row a prompt, one column a value, float64, nats; a number of several tokens counts with their sum.
    """
    start, end = FORMS[kind]
    written = [tokenizer(f"{start}{value}{end}", add_special_tokens=False)["input_ids"] for value in values]
    places = enumerate(zip(*written, strict=False))
    shared = next((place for place, tokens in places if len(set(tokens)) > 1), len(written[0]) - 1)
    samples = [logprobs.Sample((*prompt, *written[0][:shared]), tuple(tokens[shared:]), (), 0.0, 0.0)
               for prompt in asked for tokens in written]
    logps = logprobs.reference_logps(model, samples, config.update, temperature=1.0)
    return torch.stack([logps[id(sample)].double().sum() for sample in samples]).view(len(asked), len(values)).cpu()


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """How far belief and truth agree over all problems."""
    frame = awareness.problem_measures(table)
    return {"accuracy": float(frame["pass_rate"].mean()), "pass_rate_std": float(frame["pass_rate"].std()),
            "predicted_pass_rate_std": float(frame["predicted_pass_rate"].std()),
            **{name: value for name, value in awareness.meta_awareness(table).items() if name != "parse_rate"},
            **{f"{kind}_mass": float(table[f"{kind}_mass"].mean()) for kind in FORMS},
            "calibration": awareness.calibration(frame["predicted_pass_rate"], frame["pass_rate"])}
