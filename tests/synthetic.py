"""Small run folders with known curves and costs, written through `Run` as a training writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.config import PREDICTING
from masa_lib.runs.folder import Run

STEPS = 20


def evaluation_table(accuracy: float, aware: float, *, samples: int = 32, problems: int = 24, seed: int = 0,
                     predictions: int = 8) -> pd.DataFrame:
    """One row a problem of four levels; `aware` = 1 predicts what comes true, 0 a number that knows nothing."""
    rng = np.random.default_rng([seed, problems])
    level = np.arange(problems) % 4 + 1
    rate = np.clip(accuracy + 0.1 * (2.5 - level) + rng.normal(0, 0.08, problems), 0, 1)
    correct = np.round(samples * rate).astype(int)
    length = 10.0 + 5 * level + rng.normal(0, 2, problems)
    blind = rng.integers(0, 9, (problems, predictions))
    guessed = np.round(aware * 8 * correct[:, None] / samples + (1 - aware) * blind).astype(int)
    lengths = np.round(aware * length[:, None] + (1 - aware) * rng.integers(1, 99, (problems, predictions))).astype(int)
    return pd.DataFrame({
        "problem_id": [f"p{number}" for number in range(problems)], "level": level,
        "problem": [f"Is {number} < 7?" for number in range(problems)], "prompt_length": 11, "n": samples,
        "c": correct, "mean_length": length + 3, "correct_length": np.where(correct > 0, length, np.nan),
        "predictions": guessed.tolist(), "predicted_lengths": lengths.tolist(),
        "parsed": 1.0 if predictions else np.nan, "meta_samples": predictions})


def write_run(folder: Path, method: str, seed: int, curve: Mapping[int, float], *, tokens: int = 100,
              seconds: float = 2.0, updates: int = 1, steps: int = STEPS, aware: float = 0.9, samples: int = 32,
              evaluation_tokens: int = 1000, more: Callable[[int], Mapping[str, float]] = lambda step: {}) -> Run:
    """A run of `STEPS` planned and `steps` finished steps.

    Args:
        folder: of the new run.
        method: grpo or masa.
        seed: of the run.
        curve: held-out accuracy by step.
        tokens: solution tokens of a step; masa samples half as many meta tokens on top.
        seconds: of a step.
        updates: of a step.
        steps: finished.
        aware: how much the predictions of the last evaluation know.
        samples: solutions a problem of the evaluations.
        evaluation_tokens: of each evaluation.
        more: other metrics of a step.
    """
    config = configs.replace(configs.Config(), {"method": method, "seed": seed, "steps": STEPS})
    run = Run.create(folder, config, "masa train")
    for step in range(steps + 1):
        if step:
            run.append_metrics(_metrics(step, method, tokens, seconds, updates) | dict(more(step)))
        if step in curve:
            table = evaluation_table(curve[step], aware if step == max(curve) else 0.0, samples=samples, seed=seed)
            run.write_evaluation(step, {"problems": len(table), "samples": samples, "accuracy": curve[step],
                                        "seconds": 9.0, "tokens": evaluation_tokens}, table)
    return run


def _metrics(step: int, method: str, tokens: int, seconds: float, updates: int) -> dict[str, object]:
    meta, share = method in PREDICTING, step / STEPS
    row = {"step": step, "method": method, "reward_solution": share, "tokens_solution": tokens,
           "tokens_meta": tokens // 2 if meta else 0, "tokens_prefill": 30, "tokens_update": 80, "updates": updates,
           "seconds_generate": seconds / 2, "seconds_grade": 0.1, "seconds_update": seconds / 4,
           "seconds_total": seconds, "cores_others": 0.0}
    parts = ("reward_difficulty", "reward_length", "reward_notion", "pass_rate_r", "length_r", "pass_rate_mae",
             "length_mae")
    return row | {name: share if meta else float("nan") for name in parts}


def rollout_table(step: int, *, groups: int = 16, solutions: int = 8, predictions: int = 8, aware: float = 1.0,
                  seed: int = 0) -> pd.DataFrame:
    """The rollouts of a step as a run records them; half of the problems are solved always or never.

    `aware` is the chance that a prediction tells the true pass rate and length rather than any.
    """
    rng = np.random.default_rng([seed, step])
    rate = rng.choice([0.0, 0.5, 0.5, 1.0], groups)
    rate[:3] = 0.0, 0.5, 1.0
    lengths = rng.integers(20, 100, (groups, 1)) + rng.integers(-5, 6, (groups, solutions))
    right = rng.random((groups, solutions)) < rate[:, None]
    knows = rng.random((groups, predictions)) < aware
    guessed = np.where(knows, np.round(8 * rate).astype(int)[:, None], rng.integers(0, 9, (groups, predictions)))
    predicted = np.where(knows, lengths.max(axis=1, keepdims=True), rng.integers(1, 128, (groups, predictions)))
    parsed = rng.random((groups, predictions)) < 0.95
    frames = [_stream(step, "solution", lengths, correct=pd.array(right.ravel(), dtype="boolean")),
              _stream(step, "meta", rng.integers(10, 25, (groups, predictions)),
                      predicted_pass_rate=pd.array(np.where(parsed, guessed, None).ravel(), dtype="Int64"),
                      predicted_length=pd.array(np.where(parsed, predicted, None).ravel(), dtype="Int64"))]
    return pd.concat(frames, ignore_index=True)


def _stream(step: int, stream: str, lengths: np.ndarray, **columns: object) -> pd.DataFrame:
    group, member = np.indices(lengths.shape).reshape(2, -1)
    return pd.DataFrame({"step": step, "stream": stream, "group": group, "member": member, "length": lengths.ravel(),
                         **columns})
