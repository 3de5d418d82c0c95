"""Held-out evaluation: how often a model is right, and how well it knows. Its tokens are no training cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib import engines
from masa_lib.analysis import awareness, intervals
from masa_lib.config import Config
from masa_lib.engines import Engine
from masa_lib.method import beliefs, gather, prompts, rollouts
from masa_lib.method.gather import Sample
from masa_lib.method.rollouts import Ask
from masa_lib.method.streams import STREAMS, predictions_of, solutions_of
from masa_lib.models import loading
from masa_lib.runs.folder import Run
from masa_lib.tasks import problems
from masa_lib.tasks.problem_rows import Problem
from masa_lib.training.rollout_bar import RolloutBar

#: keeps the seeds of evaluations apart from those of training steps
SEED_TAG = 7919


def evaluate(held_out: Sequence[Problem], sampler: Engine, tokenizer: Any, config: Config, *, samples: int,
             predictions: int, step: int = 0, folder: Path | None = None) -> tuple[dict[str, Any], pd.DataFrame]:
    """Solve held-out problems several times each, and predict them.

    Args:
        held_out: the problems.
        sampler: who samples.
        tokenizer: of the model.
        config: wording, caps, temperature.
        samples: solutions a problem.
        predictions: meta rollouts a problem; 0 for none (where `cap.hint` wants hints, `sampling.predictions`). Each
            has a beginning of its own. None are sampled where the method reads: the belief is in the table instead.
        step: of the run; it only decides the seeds.
        folder: of a run that trains, where its progress is written for who watches.

    Returns:
        The summary (a line of `evaluations.jsonl`) and the table with one row a problem.
    """
    start = time.perf_counter()
    config = configs.replace(config, {"sampling.shared_beginning": False})
    hinted = config.cap.hint in ("evaluation", "both")
    predictions = 0 if configs.reads(config) else predictions
    predictions = predictions or (config.sampling.predictions if hinted else 0)
    asks = rollouts.whole_groups(held_out, config, solutions=samples, predictions=predictions)
    with RolloutBar(len(held_out) * (samples + predictions), "evaluate", 0, folder, step, evaluates=True) as bar:
        sample = partial(rollouts.sample, engine=sampler, tokenizer=tokenizer, config=config, progress=bar,
                         seed=[config.seed, SEED_TAG, step], temperature=config.evaluation.temperature)
        read, thoughts = (rollouts.believe(held_out, engine=sampler, tokenizer=tokenizer, config=config, sample=sample)
                          if configs.reads(config) else ([], []))
        table = _sample_hinted(asks, sample, held_out) if hinted else sample(asks)
    by_problem = per_problem(table)
    solved = solutions_of(table)
    mean, low, high = intervals.share_interval(by_problem["c"] / by_problem["n"])
    summary = {"step": step, "problems": len(held_out), "samples": samples, "accuracy": mean, "accuracy_low": low,
               "accuracy_high": high, "mean_length": float(solved["length"].mean()),
               "truncated": float((solved["finish"] == "length").mean()),
               "seconds": time.perf_counter() - start,
               "tokens": int(sum(rows["length"].sum() for rows in [table, *thoughts]))}
    if read:
        by_problem["belief"] = [beliefs.thousandths(belief.probabilities) for belief in read]
        summary |= awareness.belief_measures(np.array([belief.probabilities for belief in read]),
                                             by_problem["c"].tolist(), by_problem["n"].tolist())
    if predictions or read:
        summary |= awareness.meta_awareness(by_problem)
    return summary, by_problem


def due(config: Config, step: int) -> bool:
    """Whether a training evaluates after a step: the first (0), the last, and every `evaluation.every`."""
    every = config.evaluation.every
    return step in (0, config.steps) or bool(every and step % every == 0)


def evaluate_step(held_out: Sequence[Problem], sampler: Engine, tokenizer: Any, config: Config,
                  step: int, run: Run | None = None) -> tuple[dict[str, Any], pd.DataFrame]:
    """`evaluate` as the config wants it at a step of a training: the first and the last are the thorough ones."""
    wanted = config.evaluation
    count, samples, predictions = ((wanted.final_problems, wanted.final_samples, wanted.predictions)
                                   if step in (0, config.steps) else (wanted.problems, wanted.samples, 0))
    return evaluate(held_out[:count], sampler, tokenizer, config, samples=samples, predictions=predictions, step=step,
                    folder=run.path if run else None)


def read(held_out: Sequence[Problem], reader: Engine, tokenizer: Any, config: Config, step: int) -> dict[str, Any]:
    """What is believed of the learning curve's problems after a step, thousandths: nothing is solved or written."""
    asked = held_out[:config.evaluation.problems]
    found, _ = rollouts.believe(asked, engine=reader, tokenizer=tokenizer, sample=_never,
                                config=configs.replace(config, {"prediction.think": False}))
    return {"step": step, "problems": [problem.id for problem in asked],
            "beliefs": [beliefs.thousandths(belief.probabilities) for belief in found]}


def _never(asks: Sequence[Ask]) -> pd.DataFrame:
    raise AssertionError("a belief that is read at once needs no sample")


def _sample_hinted(asks: Sequence[Ask], sample: Sample, held_out: Sequence[Problem]) -> pd.DataFrame:
    """First the predictions, then the solutions with the predicted notions behind the problem."""
    solutions, predictions = ([ask for ask in asks if ask.stream == stream] for stream in STREAMS)
    meta = sample(predictions)
    said = gather.read_candidates(held_out, meta)
    solved = sample([dataclasses.replace(ask, hint=said[ask.group].notions) for ask in solutions])
    return pd.concat([solved, meta], ignore_index=True)


def per_problem(table: pd.DataFrame) -> pd.DataFrame:
    """One row a problem from a table of rollouts: how many were right, how long they were, what was predicted."""
    rows = []
    for _, group in table.groupby("group"):
        solved, meta = solutions_of(group), predictions_of(group)
        correct = solved["correct"].to_numpy(dtype=bool)
        lengths = solved["length"].to_numpy()
        parsed = meta.dropna(subset=["predicted_pass_rate"])
        first = group.iloc[0]
        rows.append({"problem_id": first["problem_id"], "level": int(first["level"]), "problem": first["problem"],
                     "prompt_length": len(first["problem"]), "n": len(solved), "c": int(correct.sum()),
                     "mean_length": float(lengths.mean()),
                     "correct_length": float(lengths[correct].mean()) if correct.any() else np.nan,
                     "predictions": parsed["predicted_pass_rate"].astype(int).tolist(),
                     "predicted_lengths": parsed["predicted_length"].dropna().astype(int).tolist(),
                     "parsed": len(parsed) / len(meta) if len(meta) else np.nan, "meta_samples": len(meta)})
    return pd.DataFrame(rows)


def evaluate_model(config: Config, weights: Any = None, run: Run | None = None) -> tuple[dict[str, Any], pd.DataFrame]:
    """Load a model and evaluate it as a run's last evaluation does.

    Args:
        config: model, problems and evaluation settings.
        weights: a folder to take the weights from, such as a run's checkpoint.
        run: whose weights these are; it decides the date that a chat template may write.
    """
    held_out = problems.held_out(config.problems, config.evaluation.final_problems)
    model, tokenizer, sampler = engines.load_policy(config, weights)
    held_out = problems.make_room(None, held_out, prompts.room(tokenizer, engines.context_of(sampler, model), config))
    if run:
        prompts.fix_date(tokenizer, run.started)
    with loading.precision(config.model, model.device):
        return evaluate(held_out, sampler, tokenizer, config, samples=config.evaluation.final_samples,
                        predictions=config.evaluation.predictions)
