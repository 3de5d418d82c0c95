"""The rollouts of a step or an evaluation as one table: ask, sample, grade, score.

One call of the engine serves both streams of all problems (a step that gates makes several calls, see `gather`; one
with shared beginnings two). The table has one row a rollout and whole groups only; COLUMNS says what stands in it.
Which problems are asked, and how far, is decided elsewhere.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.config import Config
from masa_lib.engines import Completion, Engine, Request, Watch
from masa_lib.method import beliefs, prompts, rewards
from masa_lib.method.advantages import stream_advantages
from masa_lib.method.beliefs import Belief
from masa_lib.method.rewards import PARTS
from masa_lib.method.streams import STREAMS, predictions_of, rewarded, solutions_of
from masa_lib.tasks import grading
from masa_lib.tasks.predictions import MetaPrediction
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.read_prediction import parse_prediction

#: the table's columns; those of a recorded one, but for TOKEN_COLUMNS, which the update alone needs
COLUMNS = {
    "stream": "solution or meta", "group": "number of the problem in its step", "member": "number in its group",
    "problem_id": "", "problem": "its text", "answer": "the right one", "level": "how hard it was made",
    "prompt_ids": "token ids of what was asked", "beginning": "how many of them the model wrote: a beginning that "
    "predictions share and that earns nothing", "admitted": "False: rolled out by lot, though the gate left it out",
    "weight": "one over the chance to be rolled out", "cap": "tokens allowed",
    "capped": "whether that is less than a solution's full cap", "text": "what was written", "length": "tokens sampled "
    "for it, the end token too", "finish": "stop or length (it was truncated)", "tokens": "ids of what was sampled",
    "logps": "their log-probs as the engine has them, nats", "correct": "of a solution",
    "predicted_pass_rate": "eighths, of a prediction that parsed", "predicted_length": "tokens, of such a one",
    "notions": "of such a one", "parse_error": "why another one did not",
    "reward": "NaN: takes no part in the update", **{part: "a part of a prediction's reward" for part in PARTS},
    "advantage": "0: has no gradient"}
TOKEN_COLUMNS = ["prompt_ids", "beginning", "tokens", "logps"]


@dataclass(frozen=True)
class Ask:
    """One group to sample.

    `group`: number of the problem in its step. `caps`: tokens that each rollout is allowed. `hint`: predicted notions.
    """

    stream: str
    group: int
    problem: Problem
    caps: tuple[int, ...]
    hint: tuple[str, ...] = ()


def whole_groups(problems: Sequence[Problem], config: Config, *, solutions: int, predictions: int) -> list[Ask]:
    """G solutions and M predictions (0: none) of each problem under the full caps."""
    caps = ((config.sampling.solution_tokens,) * solutions, (config.sampling.meta_tokens,) * predictions)
    return [Ask(stream, group, problem, limits) for stream, limits in zip(STREAMS, caps, strict=True) if limits
            for group, problem in enumerate(problems)]


def collect(problems: Sequence[Problem], engine: Engine, tokenizer: Any, config: Config, *, solutions: int,
            predictions: int, seed: Sequence[int], temperature: float,
            progress: Watch | None = None) -> pd.DataFrame:
    """Sample and grade G solutions and M predictions (0: none) of each problem; see `sample`."""
    asks = whole_groups(problems, config, solutions=solutions, predictions=predictions)
    return sample(asks, engine, tokenizer, config, seed=seed, temperature=temperature, progress=progress)


def count_right(problems: Sequence[Problem], samples: int, engine: Engine, tokenizer: Any, config: Config,
                seed: Sequence[int]) -> tuple[list[int], int]:
    """How many of so many solutions are right, for each problem, and the tokens sampled to find out; for an oracle."""
    table = collect(problems, engine, tokenizer, config, solutions=samples, predictions=0, seed=seed,
                    temperature=config.sampling.temperature)
    return table.groupby("group")["correct"].sum().astype(int).tolist(), int(table["length"].sum())


def sample(asks: Sequence[Ask], engine: Engine, tokenizer: Any, config: Config, *, seed: Sequence[int],
           temperature: float, progress: Watch | None = None) -> pd.DataFrame:
    """Sample groups in one call of the engine (two where beginnings are shared), grade solutions, parse predictions.

    Args:
        asks: at least one; the groups of a stream have equally many rollouts.
        engine: who samples.
        tokenizer: of the model.
        config: wording and parser.
        seed: numbers that identify the step; with the run's seed among them, they decide every rollout of a group,
            whatever other groups are asked for and in how many calls.
        temperature: of both streams.
        progress: is told of newly finished rollouts and of newly sampled tokens.

    Returns:
        One row a rollout in the order of `asks`, without rewards; `cap` is what it was allowed, and `capped` whether
        that is less than a solution's full cap. `length` is what was sampled for it, so that a shared beginning counts
        for the first prediction alone. `admitted` is True and `weight` 1 throughout.
    """
    groups, sizes = max(ask.group for ask in asks) + 1, {ask.stream: len(ask.caps) for ask in asks}
    drawn = {stream: seeds([*seed, STREAMS.index(stream)], groups * size) for stream, size in sizes.items()}
    rows = [row for ask in asks for row in _rows(ask, tokenizer, config)]
    requests = [Request(row["prompt_ids"], row["cap"], drawn[row["stream"]][row.pop("number")], temperature)
                for row in rows]
    if config.sampling.shared_beginning and sizes.get("meta", 0) > 1:
        return read(rows, _branch(rows, requests, engine, tokenizer, progress), tokenizer, config)
    return read(rows, engine.generate(requests, progress), tokenizer, config)


def _branch(rows: Sequence[dict[str, Any]], requests: Sequence[Request], engine: Engine, tokenizer: Any,
            progress: Watch | None) -> list[Completion]:
    """Completions where a group's predictions branch off its first one at the pass rate, the first one's own too.

    Two calls of the engine. What they share is moved to the rows' prompts.
    """
    first = [number for number, row in enumerate(rows) if row["stream"] == "meta" and row["member"] == 0]
    done = dict(zip(first, engine.generate([requests[number] for number in first], progress), strict=True))
    shared = {rows[number]["group"]: _beginning(completion.tokens, completion.finish, tokenizer)
              for number, completion in done.items()}
    asked = {}
    for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
        tokens = shared[row["group"]] if row["stream"] == "meta" else ()
        row |= {"prompt_ids": row["prompt_ids"] + tokens, "beginning": len(tokens)}
        if number in done:
            whole = done[number]
            done[number] = Completion(whole.tokens[len(tokens):], whole.logps[len(tokens):], whole.finish)
        else:
            asked[number] = Request(row["prompt_ids"], request.max_tokens - len(tokens), request.seed,
                                    request.temperature)
    done |= dict(zip(asked, engine.generate(list(asked.values()), progress), strict=True))
    return [done[number] for number in range(len(rows))]


def _beginning(tokens: tuple[int, ...], finish: str, tokenizer: Any) -> tuple[int, ...]:
    """A prediction's tokens in front of its pass rate; none where it does not parse."""
    tokens = tokens[:-1] if finish == "stop" else tokens
    spans = parse_prediction(tokenizer.decode(tokens)).spans
    if not spans:
        return ()
    length = partial(_decoded, tokens, tokenizer)
    return tokens[:bisect.bisect_right(range(len(tokens)), spans[0][0], key=length) - 1]


def _decoded(tokens: Sequence[int], tokenizer: Any, count: int) -> int:
    return len(tokenizer.decode(tokens[:count]))


def believe(problems: Sequence[Problem], first: int = 0, *, engine: Engine, tokenizer: Any, config: Config,
            sample: Callable[[Sequence[Ask]], pd.DataFrame]) -> tuple[list[Belief], list[pd.DataFrame]]:
    """Read the belief about each problem's pass rate.

    At once, it is read behind the forced beginning of a prediction, which stands behind the prompt of the problem's
    solutions, so that these find their prompt computed. Where the model thinks first (`prediction.think`), it writes a
    prediction up to its pass rate, behind the prompt for predictions; one that never gets there is read at once.

    Args:
        problems: not empty.
        first: number of the first one's group.
        engine: who reads.
        tokenizer: of the model.
        config: the wording.
        sample: `sample` with all but the groups to ask for; for what is thought.

    Returns:
        The beliefs, and the rows of what was thought: a table, or none.
    """
    asked = beliefs.question(tokenizer, config.prompt)
    if not config.prediction.think:
        places = [(tuple(prompts.encode(tokenizer, prompts.solution_messages(problem.text, config.prompt))),
                   asked.suffix) for problem in problems]
        reading = engine.read([prompt for prompt, _ in places], asked.suffix, asked.choices)
        thoughts = []
    else:
        thoughts = [sample([Ask("meta", group, problem, (config.sampling.meta_tokens,))
                            for group, problem in enumerate(problems, first)])]
        places = [(row.prompt_ids + (_beginning(row.tokens, row.finish, tokenizer) or asked.suffix), ())
                  for row in thoughts[0].itertuples()]
        reading = engine.read([prompt for prompt, _ in places], (), asked.choices)
    found_PV = beliefs.normalised(reading.logps)
    return [Belief(*place, tuple(row), float(outside))
            for place, row, outside in zip(places, found_PV.tolist(), reading.outside, strict=True)], thoughts


def read(rows: Sequence[dict[str, Any]], completions: Sequence[Completion], tokenizer: Any,
         config: Config) -> pd.DataFrame:
    """Completions as a table: decoded, graded and parsed, without rewards.

    Args:
        rows: at least one; what is known of each rollout before it is sampled.
        completions: of these rollouts.
        tokenizer: of the model.
        config: of grading and parser.
    """
    found = []
    for row, completion in zip(rows, completions, strict=True):
        shared = row.get("beginning", 0)
        ids = [*row["prompt_ids"][-shared:], *completion.tokens] if shared else completion.tokens
        own = len(ids) if shared and row["member"] == 0 else len(completion.tokens)
        found.append(row | {"text": tokenizer.decode(ids[:-1] if completion.finish == "stop" else ids), "length": own,
                            "finish": completion.finish, "tokens": completion.tokens, "logps": completion.logps})
    table = pd.DataFrame(found)
    counted = table["text"].mask(table["finish"].eq("length") & (config.sampling.cut == "wrong"), "")
    _grade(table, counted, config)
    _parse(table, counted, config)
    return table


def score(table: pd.DataFrame, config: Config) -> None:
    """Add rewards and advantages to a table in place; each stream's groups are normalised by themselves.

    What takes no part in the update has reward NaN and advantage 0: predictions of a problem without solutions. A
    solution that a predicted cap stopped is graded as one cut at its end is (`sampling.cut`). The length reward's
    window is that of all right solutions. A cap hides only longer ones, so the window never moves away from a
    prediction below the cap: at most one above every right solution seen goes unpaid.
    """
    is_meta = table["stream"] == "meta"
    table["reward"] = np.where(is_meta, np.nan, table["correct"].eq(True).astype(float))
    table[list(PARTS)] = np.nan
    for _, group in table[is_meta | table["reward"].notna()].groupby("group"):
        if group["stream"].nunique() == len(STREAMS):
            meta = group.index[group["stream"] == "meta"]
            table.loc[meta, ["reward", *PARTS]] = _score_group(group, config)
    table["advantage"] = 0.0
    for _, stream in table[table["reward"].notna()].groupby("stream"):
        table.loc[stream.index, "advantage"] = stream_advantages(stream, config)


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """How each rolled-out group went, by group: `right` of `solutions`."""
    solved = rewarded(table)
    return solved.groupby("group").agg(right=("reward", "sum"), solutions=("reward", "size")).astype(int)


def seeds(numbers: Sequence[int], count: int) -> list[int]:
    """As many request seeds as wanted, from numbers that identify the call; more of them begin with the same ones."""
    return np.random.SeedSequence(list(numbers)).generate_state(count, np.uint64).tolist()


def _rows(ask: Ask, tokenizer: Any, config: Config) -> list[dict[str, Any]]:
    problem, limits = ask.problem, config.sampling
    messages = (prompts.meta_messages(problem.text, config.prompt, limits.solution_tokens) if ask.stream == "meta"
                else prompts.solution_messages(problem.text, config.prompt, ask.hint))
    prompt = tuple(prompts.encode(tokenizer, messages))
    return [{"stream": ask.stream, "group": ask.group, "member": member, "problem_id": problem.id,
             "problem": problem.text, "answer": problem.answer, "level": problem.level, "prompt_ids": prompt,
             "beginning": 0, "admitted": True, "weight": 1.0, "cap": cap,
             "capped": ask.stream == "solution" and cap < limits.solution_tokens,
             "number": ask.group * len(ask.caps) + member} for member, cap in enumerate(ask.caps)]


def _grade(table: pd.DataFrame, texts: pd.Series, config: Config) -> None:
    rows = table["stream"] == "solution"
    correct = pd.Series(pd.NA, index=table.index, dtype="boolean")
    correct[rows] = grading.grade_many(texts[rows].tolist(), table.loc[rows, "answer"].tolist(),
                                       problems=table.loc[rows, "problem"].tolist(),
                                       percentage_slack=config.reward.mode == "released")
    table["correct"] = correct


def _parse(table: pd.DataFrame, texts: pd.Series, config: Config) -> None:
    results = [parse_prediction(text, released=config.reward.mode == "released") if stream == "meta" else None
               for text, stream in zip(texts, table["stream"], strict=True)]
    found = [result.prediction if result else None for result in results]
    table["predicted_pass_rate"] = pd.array([p.pass_rate if p else None for p in found], dtype="Int64")
    table["predicted_length"] = pd.array([p.solution_length if p else None for p in found], dtype="Int64")
    table["notions"] = [list(p.notions) if p else None for p in found]
    table["parse_error"] = [result.error if result else None for result in results]


def _score_group(group: pd.DataFrame, config: Config) -> list[list[float]]:
    """The meta rewards of one problem's group, one row a prediction: the total and PARTS."""
    solved, meta = solutions_of(group), predictions_of(group)
    solutions = [rewards.Solution(text, length, bool(correct))
                 for text, length, correct in zip(solved["text"], solved["length"], solved["correct"], strict=True)]
    problem, columns = meta["problem"].iloc[0], meta[["notions", "predicted_pass_rate", "predicted_length"]]
    found = [None if notions is None else MetaPrediction(tuple(notions), _number(rate), _number(length))
             for notions, rate, length in columns.itertuples(index=False)]
    messages = prompts.meta_messages(problem, config.prompt, config.sampling.solution_tokens)
    scored = rewards.meta_rewards(solutions, found, problem, config.reward,
                                  meta_prompt="\n".join(message["content"] for message in messages))
    return [[reward.total, *reward.parts.values()] for reward in scored]


def _number(value: Any) -> int | None:
    """An entry of a nullable column; released mode pays predictions that lack one."""
    return None if pd.isna(value) else int(value)
