"""The rollouts of a step or an evaluation as one table: ask, sample, grade, score.

One call of the engine serves both streams of all problems (a step that gates makes several calls, see `selection`; one
with shared beginnings two). The table has one row a rollout and whole groups only; its columns are those of the
recorded shards, plus what the update needs (`TOKEN_COLUMNS`): token ids and log-probs, and `beginning`, how many of the
prompt's ids the model wrote (a beginning that predictions share and that earns nothing). Which problems are asked, and
how far, is decided elsewhere.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib.analysis.awareness import correlation
from masa_lib.config import Config, UpdateConfig
from masa_lib.engines import Completion, Engine, Request
from masa_lib.method import beliefs, objective, prompts, rewards
from masa_lib.method.beliefs import Belief
from masa_lib.tasks import grading
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction, parse_prediction
from masa_lib.tasks.problems import Problem

TOKEN_COLUMNS = ["prompt_ids", "beginning", "tokens", "logps"]
STREAMS = ("solution", "meta")
#: columns of the parts of the meta reward, 0 to 1
PARTS = ("reward_difficulty", "reward_length", "reward_notion")
#: turns of taking off averages until neither is left; what is below the second number is rounding
_ROUNDS, _ROUNDING = 20, 1e-9
#: what a predicted pass rate gains by being said seldom, a nat of its surprise
_RARE = 0.2


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
            progress: Callable[[int], Any] | None = None) -> pd.DataFrame:
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
           temperature: float, progress: Callable[[int], Any] | None = None) -> pd.DataFrame:
    """Sample groups in one call of the engine (two where beginnings are shared), grade solutions, parse predictions.

    Args:
        asks: at least one; the groups of a stream have equally many rollouts.
        engine: who samples.
        tokenizer: of the model.
        config: wording and parser.
        seed: numbers that identify the step; with the run's seed among them, they decide every rollout of a group,
            whatever other groups are asked for and in how many calls.
        temperature: of both streams.
        progress: called with the number of newly finished rollouts.

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
            progress: Callable[[int], Any] | None) -> list[Completion]:
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

    What takes no part in the update has reward NaN and advantage 0: predictions of a problem without solutions, and
    solutions that a predicted cap stopped where `cap.stopped` leaves those out, but for one that had answered and is
    read as far as it goes (`sampling.cut`). The length reward's window is that of all right solutions. A cap hides only
    longer ones, so the window never moves away from a prediction below the cap: at most one above every right solution
    seen goes unpaid.
    """
    is_meta = table["stream"] == "meta"
    table["reward"] = np.where(is_meta, np.nan, table["correct"].eq(True).astype(float))
    if config.cap.stopped == "left out":
        stopped = table["capped"] & (table["finish"] == "length")
        answered = table["text"].map(lambda text: bool(grading.extract_answer(text))) & (config.sampling.cut == "read")
        table.loc[stopped & ~answered, "reward"] = np.nan
    table[list(PARTS)] = np.nan
    for _, group in table[is_meta | table["reward"].notna()].groupby("group"):
        if group["stream"].nunique() == len(STREAMS):
            meta = group.index[group["stream"] == "meta"]
            table.loc[meta, ["reward", *PARTS]] = _score_group(group, config)
    table["advantage"] = 0.0
    for _, stream in table[table["reward"].notna()].groupby("stream"):
        table.loc[stream.index, "advantage"] = stream_advantages(stream, config)


def stream_advantages(stream: pd.DataFrame, config: Config) -> pd.Series:
    """The advantages of one stream's groups; a rollout that is alone in its group has none.

    Args:
        stream: columns stream (one value), group and reward; PARTS too where the meta stream's parts are normalised,
            and predicted_pass_rate for a contrast.
        config: the weights of the parts, and how advantages are normalised.
    """
    sizes = stream.groupby("group")["group"].transform("size")

    def of(column: str, normalise: bool) -> pd.Series:
        """Advantages of a column within each group, 0 for one that is alone; groups of a size together."""
        values = pd.Series(0.0, stream.index)
        for size, rows in stream[sizes > 1].groupby(sizes):
            rewards_PG = torch.tensor(rows[column].to_numpy()).view(-1, size)
            found = objective.advantages(rewards_PG, normalise and config.update.normalise_std)
            values[rows.index] = found.flatten().numpy()
        return values

    mode = config.update.normalise_meta if stream["stream"].iloc[0] == "meta" else "reward"
    if mode not in ("parts", "contrast"):
        return of("reward", mode == "reward")
    reward = rewards.effective(config.reward)
    weights = (reward.pass_rate_weight, reward.length_weight, reward.notion_weight)
    parts = {part: of(part, True) for part in PARTS}
    if mode == "contrast":
        parts["reward_difficulty"].update(contrasted(stream[(sizes > 1) & stream["predicted_pass_rate"].notna()]))
    return sum(weight * parts[part] for part, weight in zip(PARTS, weights, strict=True)) / sum(weights)


def contrasted(values: pd.DataFrame) -> pd.Series:
    """Difficulty advantages that teach to tell problems apart, and keep all values in use.

    All problems move the chance of a value together much faster than apart, so predictions collapse to a constant
    before a model learns to tell problems apart. What a group and what a value earn on average are taken off, as in a
    two-way analysis of variance, and a value that is seldom said in the step gains a little, which holds against drift.
    The predictions then rank problems, over the whole scale; nothing trains their mean.

    Args:
        values: predictions that parsed; columns group, predicted_pass_rate and reward_difficulty.

    Returns:
        What remains, over the standard deviation that the step's rewards have within groups, and the gain of rarity.
    """
    groups, rates = values["group"], values["predicted_pass_rate"]
    reward, surprise = values["reward_difficulty"].astype(float), -np.log(rates.map(rates.value_counts(normalize=True)))
    centred = left = reward - reward.groupby(groups).transform("mean")
    for _ in range(_ROUNDS):
        left = left - left.groupby(rates).transform("mean")
        left = left - left.groupby(groups).transform("mean")
    found = left / (centred.std(ddof=0) + 1e-6) + _RARE * (surprise - surprise.groupby(groups).transform("mean"))
    return found.astype(float).where(found.abs() > _ROUNDING, 0.0)


def entropy_bonus(meta: pd.DataFrame, config: UpdateConfig) -> float:
    """`meta_entropy` in a step whose predictions have less entropy than `entropy_floor`, by their log-probs; else 0."""
    entropy, tokens = -meta["logps"].map(sum).sum(), meta["tokens"].map(len).sum()
    return 0.0 if entropy >= config.entropy_floor * tokens else config.meta_entropy


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """How each rolled-out group went, by group: `right` of `solutions`."""
    solved = table[(table["stream"] == "solution") & table["reward"].notna()]
    return solved.groupby("group").agg(right=("reward", "sum"), solutions=("reward", "size")).astype(int)


def belief_metrics(table: pd.DataFrame, found: Sequence[Belief | None]) -> dict[str, float]:
    """What a step's scored rollouts say of the beliefs about its problems, in place of what sampled predictions would.

    Args:
        table: `group` is the problem's place among the candidates.
        found: the belief about each candidate; empty metrics where none was read.
    """
    if not found or found[0] is None:
        return {}
    went = outcomes(table)
    read_PV = np.array([found[group].probabilities for group in went.index]).reshape(len(went), -1)
    means, rates = pd.Series([found[group].mean for group in went.index]), went["right"] / went["solutions"]
    return {"pass_rate_r": correlation(means, rates), "pass_rate_mae": (means.to_numpy() - rates).abs().mean(),
            "predicted_pass_rate": means.mean(), "predicted_pass_rate_std": means.std(),
            "belief_outside": float(np.mean([belief.outside for belief in found])),
            **beliefs.measures(read_PV, went["right"].tolist(), went["solutions"].tolist())}


def batch_metrics(table: pd.DataFrame) -> dict[str, float]:
    """What a step's scored rollouts say: accuracy, rewards, predicted against true, tokens by stream.

    `tokens_solution` leaves out the solutions of problems that were dropped and re-checked: `tokens_recheck`.
    """
    solved, meta = table[table["stream"] == "solution"], table[table["stream"] == "meta"]
    parsed = meta.dropna(subset=["predicted_pass_rate"])
    true = pd.DataFrame({
        "rate": solved.groupby("group")["reward"].mean(),
        "length": solved[solved["reward"] > 0].groupby("group")["length"].mean(),
        "predicted_rate": parsed.groupby("group")["predicted_pass_rate"].mean().astype(float) / PASS_RATE_STEPS,
        "predicted_length": parsed.groupby("group")["predicted_length"].mean().astype(float)})
    scored = table[table["reward"].notna()]
    flat = ~scored["advantage"].ne(0).groupby([scored["stream"], scored["group"]]).any()
    zero_variance = flat.groupby("stream").mean()
    return {
        "accuracy": solved["correct"].mean(), "reward_solution": solved["reward"].mean(),
        "reward_meta": meta["reward"].mean(), "reward_difficulty": meta["reward_difficulty"].mean(),
        "reward_length": meta["reward_length"].mean(), "reward_notion": meta["reward_notion"].mean(),
        "parse_rate": len(parsed) / len(meta) if len(meta) else math.nan,
        "pass_rate_r": correlation(true["predicted_rate"], true["rate"]),
        "pass_rate_mae": (true["predicted_rate"] - true["rate"]).abs().mean(),
        "length_r": correlation(true["predicted_length"], true["length"]),
        "length_mae": (true["predicted_length"] - true["length"]).abs().mean(),
        "predicted_pass_rate": true["predicted_rate"].mean(), "predicted_pass_rate_std": true["predicted_rate"].std(),
        "predicted_length": true["predicted_length"].mean(), "solution_length": solved["length"].mean(),
        "truncated": (solved["finish"] == "length").mean(),
        "stopped": (solved["capped"] & (solved["finish"] == "length")).mean(),
        "zero_variance_solution": zero_variance.get("solution", math.nan),
        "zero_variance_meta": zero_variance.get("meta", math.nan),
        "tokens_solution": int(solved.loc[solved["admitted"], "length"].sum()),
        "tokens_recheck": int(solved.loc[~solved["admitted"], "length"].sum()),
        "tokens_meta": int(meta["length"].sum())}


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
    solved, meta = group[group["stream"] == "solution"], group[group["stream"] == "meta"]
    solutions = [rewards.Solution(text, length, bool(correct))
                 for text, length, correct in zip(solved["text"], solved["length"], solved["correct"], strict=True)]
    problem, columns = meta["problem"].iloc[0], meta[["notions", "predicted_pass_rate", "predicted_length"]]
    found = [None if notions is None else MetaPrediction(tuple(notions), _number(rate), _number(length))
             for notions, rate, length in columns.itertuples(index=False)]
    messages = prompts.meta_messages(problem, config.prompt, config.sampling.solution_tokens)
    scored = rewards.meta_rewards(solutions, found, problem, config.reward,
                                  meta_prompt="\n".join(message["content"] for message in messages))
    return [[reward.total, reward.difficulty, reward.length, reward.notion] for reward in scored]


def _number(value: Any) -> int | None:
    """An entry of a nullable column; released mode pays predictions that lack one."""
    return None if pd.isna(value) else int(value)
