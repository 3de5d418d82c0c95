"""The rollouts of a step or an evaluation as one table: ask, sample, grade, score.

Both streams of all problems go through one call of the engine. The table has one row a rollout and whole groups only;
its columns are those of the recorded shards, plus the token ids and log-probs that the update needs (`TOKEN_COLUMNS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib import grading, grpo, prompts, rewards
from masa_lib.config import Config
from masa_lib.engine import Engine, Request
from masa_lib.predictions import MetaPrediction, parse_prediction
from masa_lib.problems import Problem

TOKEN_COLUMNS = ["prompt_ids", "tokens", "logps"]
STREAMS = ("solution", "meta")


def collect(problems: Sequence[Problem], engine: Engine, tokenizer: Any, config: Config, *, solutions: int,
            predictions: int, seed: Sequence[int], temperature: float,
            progress: Callable[[int], Any] | None = None) -> pd.DataFrame:
    """Sample and grade G solutions and M predictions of each problem.

    Args:
        problems: what to ask.
        engine: who samples.
        tokenizer: of the model.
        config: wording, caps and parser.
        solutions: G.
        predictions: M; 0 for none.
        seed: numbers that identify this call; with the run's seed among them, they decide every rollout.
        temperature: of both streams.
        progress: called with the number of newly finished rollouts.

    Returns:
        One row a rollout, solutions first, without rewards.
    """
    rows: list[dict[str, Any]] = []
    for stream, size in zip(STREAMS, (solutions, predictions), strict=True):
        rows += _ask(problems, tokenizer, config, stream, size, seed, temperature)
    requests = [row.pop("request") for row in rows]
    for row, completion in zip(rows, engine.generate(requests, progress), strict=True):
        ids = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
        row |= {"text": tokenizer.decode(ids), "length": len(completion.tokens), "finish": completion.finish,
                "tokens": completion.tokens, "logps": completion.logps}
    table = pd.DataFrame(rows)
    _grade(table, config)
    _parse(table, config)
    return table


def score(table: pd.DataFrame, config: Config) -> None:
    """Add rewards and advantages to a table in place; each stream's groups are normalised by themselves."""
    is_meta = (table["stream"] == "meta").to_numpy()
    table["reward"] = np.where(is_meta, 0.0, table["correct"].eq(True).astype(float))
    parts = np.full((len(table), 3), np.nan)
    if is_meta.any():
        total = np.concatenate([_score_group(group, config, parts) for _, group in table.groupby("group")])
        table.loc[is_meta, "reward"] = total
    table[["reward_difficulty", "reward_length", "reward_notion"]] = parts
    for stream in table["stream"].unique():
        table.loc[table["stream"] == stream, "advantage"] = _advantages(table[table["stream"] == stream], config)


def _advantages(stream: pd.DataFrame, config: Config) -> np.ndarray:
    """The advantages of one stream's whole groups."""
    def of(column: str, normalise: bool) -> np.ndarray:
        rewards_PG = torch.tensor(stream[column].to_numpy()).view(stream["group"].nunique(), -1)
        return grpo.advantages(rewards_PG, normalise and config.update.normalise_std).flatten().numpy()

    mode = config.update.normalise_meta if stream["stream"].iloc[0] == "meta" else "reward"
    if mode != "parts":
        return of("reward", mode == "reward")
    parts = {"reward_difficulty": config.reward.pass_rate_weight, "reward_length": config.reward.length_weight,
             "reward_notion": config.reward.notion_weight}
    return sum(weight * of(part, True) for part, weight in parts.items()) / sum(parts.values())


def seeds(numbers: Sequence[int], count: int) -> list[int]:
    """As many request seeds as wanted, from numbers that identify the call."""
    return np.random.SeedSequence(list(numbers)).generate_state(count, np.uint64).tolist()


def _ask(problems: Sequence[Problem], tokenizer: Any, config: Config, stream: str, size: int, seed: Sequence[int],
         temperature: float) -> list[dict[str, Any]]:
    meta, limits = stream == "meta", config.sampling
    request_seeds = iter(seeds([*seed, int(meta)], len(problems) * size))
    rows = []
    for group, problem in enumerate(problems if size else ()):
        messages = (prompts.meta_messages(problem.text, config.prompt, limits.solution_tokens) if meta
                    else prompts.solution_messages(problem.text, config.prompt))
        prompt = tuple(prompts.encode(tokenizer, messages))
        cap = limits.meta_tokens if meta else limits.solution_tokens
        rows += [{"stream": stream, "group": group, "member": member, "problem_id": problem.id, "problem": problem.text,
                  "answer": problem.answer, "level": problem.level, "prompt_ids": prompt,
                  "request": Request(prompt, cap, next(request_seeds), temperature)} for member in range(size)]
    return rows


def _grade(table: pd.DataFrame, config: Config) -> None:
    rows = table["stream"] == "solution"
    correct = pd.Series(pd.NA, index=table.index, dtype="boolean")
    correct[rows] = grading.grade_many(table.loc[rows, "text"].tolist(), table.loc[rows, "answer"].tolist(),
                                       percentage_slack=config.reward.mode == "released")
    table["correct"] = correct


def _parse(table: pd.DataFrame, config: Config) -> None:
    released = config.reward.mode == "released"
    results = [parse_prediction(text, released=released) if stream == "meta" else None
               for text, stream in zip(table["text"], table["stream"], strict=True)]
    found = [result.prediction if result else None for result in results]
    table["predicted_pass_rate"] = pd.array([p.pass_rate if p else None for p in found], dtype="Int64")
    table["predicted_length"] = pd.array([p.solution_length if p else None for p in found], dtype="Int64")
    table["notions"] = [list(p.notions) if p else None for p in found]
    table["parse_error"] = [result.error if result else None for result in results]


def _score_group(group: pd.DataFrame, config: Config, parts: np.ndarray) -> list[float]:
    """The meta rewards of one problem's group; the three parts go into the rows of `parts`."""
    solved, meta = group[group["stream"] == "solution"], group[group["stream"] == "meta"]
    solutions = [rewards.Solution(text, length, bool(correct))
                 for text, length, correct in zip(solved["text"], solved["length"], solved["correct"], strict=True)]
    problem, columns = meta["problem"].iloc[0], meta[["notions", "predicted_pass_rate", "predicted_length"]]
    found = [None if notions is None else MetaPrediction(tuple(notions), _number(rate), _number(length))
             for notions, rate, length in columns.itertuples(index=False)]
    messages = prompts.meta_messages(problem, config.prompt, config.sampling.solution_tokens)
    scored = rewards.meta_rewards(solutions, found, problem, config.reward,
                                  meta_prompt="\n".join(message["content"] for message in messages))
    parts[meta.index] = [[reward.difficulty, reward.length, reward.notion] for reward in scored]
    return [reward.total for reward in scored]


def _number(value: Any) -> int | None:
    """An entry of a nullable column; released mode pays predictions that lack one."""
    return None if pd.isna(value) else int(value)
