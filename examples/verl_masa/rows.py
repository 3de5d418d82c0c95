"""File one: a problem as two rows of verl's data set, and what the rollouts of each are worth.

verl scores a rollout by itself, without the others of its problem. So a solution's score is whether it is right, and a
prediction's is what it says, written as one number; `advantage` reads it when both groups are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from masa_lib.config import Config
from masa_lib.method import prompts
from masa_lib.method.streams import STREAMS
from masa_lib.tasks import grading
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.read_prediction import parse_prediction

#: the score of a prediction that does not parse
UNREAD = -1.0
#: a prediction is its pass rate plus this many times its length; float32 holds it exactly up to LONGEST tokens
STEP, LONGEST = PASS_RATE_STEPS + 1, 10**6


def table(problems: Sequence[Problem], config: Config) -> pd.DataFrame:
    """Two neighbouring rows a problem; `to_parquet` makes verl's file of them."""
    return pd.DataFrame([_row(problem, stream, config) for problem in problems for stream in STREAMS])


def _row(problem: Problem, stream: str, config: Config) -> dict[str, Any]:
    asked = (prompts.meta_messages(problem.text, config.prompt, config.sampling.solution_tokens)
             if stream == "meta" else prompts.solution_messages(problem.text, config.prompt))
    return {"data_source": f"masa/{stream}", "prompt": asked, "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"problem_id": problem.id, "problem": problem.text, "stream": stream}}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any],
                  **others: Any) -> float:
    """What verl calls its reward: 1 for a right solution, 0 for a wrong one; of a prediction, what it says."""
    if extra_info["stream"] == "solution":
        return float(grading.grade_many([solution_str], [ground_truth], problems=[extra_info["problem"]])[0])
    said = parse_prediction(solution_str).prediction
    return UNREAD if said is None else float(said.pass_rate + STEP * min(said.solution_length, LONGEST))
