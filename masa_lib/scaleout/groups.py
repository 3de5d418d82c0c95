"""A step of MASA as TRL sees one: places of equal number, laid out as neighbouring groups, and one reward function.

TRL repeats every row of a data set `num_generations` times and shares the rows of a step out to its processes. Here a
problem's solution rows and meta rows lie side by side; `num_generations` is a common divisor of G and M, so a group may
be several of TRL's. A step that needs fewer rollouts than it has places fills the rest with blanks. What a rollout
earns is said in `rollouts` and `rewards`, not here. The data set and the reward function also work with TRL's own
trainer and its own sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from accelerate.utils import gather_object

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.engines import Completion
from masa_lib.method import prompts, rollouts
from masa_lib.method.rollouts import Ask
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool

#: what the reward function has to know of a rollout; columns of the data set, or extra fields of a rollout function
COLUMNS = ("stream", "group", "member", "problem_id", "problem", "answer", "level", "admitted", "weight", "cap",
           "capped")
#: of a place that holds no rollout
BLANK = dict.fromkeys(COLUMNS) | {"stream": "blank", "group": -1}
#: the methods without a gate: how many rollouts a step has is known before it
UNGATED = ("grpo", "masa")


@dataclass(frozen=True)
class Layout:
    """How the places of a step lie.

    `places`: of a step, over all processes. `generations`: TRL's `num_generations`. `pieces`: micro-batches of a
    process a step.
    """

    places: int
    generations: int
    pieces: int


def layout(config: Config, processes: int, longest_prompt: int) -> Layout:
    """The layout for so many processes; `longest_prompt` in tokens bounds a micro-batch by `update.token_budget`.

    Raises:
        ConfigError: G and M have no common divisor above 1.
    """
    sampling = config.sampling
    meta = sampling.predictions if configs.samples_predictions(config) else 0
    generations = math.gcd(sampling.solutions, meta)
    if generations < 2:
        raise ConfigError(f"sampling.solutions is {sampling.solutions} and sampling.predictions {meta}; on TRL both "
                          "need a common divisor above 1, as 8 and 4 have. Set one of them.")
    most = sampling.problems * (sampling.solutions + meta)
    if config.method not in UNGATED:
        meta = max(meta, config.gate.predictions if meta else 0)
        most = int(config.gate.candidates * sampling.problems) * (sampling.solutions + meta)
    width = longest_prompt + max(sampling.solution_tokens, sampling.meta_tokens)
    pieces = math.ceil(most / processes / max(config.update.token_budget // width, 1))
    unit = math.lcm(processes * pieces, generations)
    return Layout(math.ceil(most / unit) * unit, generations, pieces)


def data_set(config: Config, pool: ProblemPool, plan: Layout, *, first: int, cursor: int) -> Any:
    """The steps from `first` (counted from 1) to the last as a data set: one row for `memory.generations` places.

    Without a gate a step's rows are its problems in the pool's order from `cursor` on, each with its solution rows,
    then its meta rows. With a gate the problems are chosen while the step runs, and rows are blank places.
    """
    from datasets import Dataset

    def rows() -> Iterator[dict[str, Any]]:
        """Step after step, each filled up with blank places."""
        for step in range(config.steps - first + 1):
            problems = (pool.take(cursor + step * config.sampling.problems, config.sampling.problems)
                        if config.method in UNGATED else [])
            found = [row for row in _rows(problems, config) if row["member"] % plan.generations == 0]
            yield from found
            yield from [_blank_row()] * (plan.places // plan.generations - len(found))

    return Dataset.from_list(list(rows()))


def _rows(problems: Sequence[Problem], config: Config) -> Iterator[dict[str, Any]]:
    predictions = config.sampling.predictions if configs.samples_predictions(config) else 0
    asks = rollouts.whole_groups(problems, config, solutions=config.sampling.solutions, predictions=predictions)
    for ask in sorted(asks, key=lambda ask: ask.group):  # stable: solutions before predictions
        for member in range(len(ask.caps)):
            yield {"prompt": _messages(ask, config), **_known(ask, member)}


def _messages(ask: Ask, config: Config) -> prompts.Messages:
    if ask.stream == "meta":
        return prompts.meta_messages(ask.problem.text, config.prompt, config.sampling.solution_tokens)
    return prompts.solution_messages(ask.problem.text, config.prompt, ask.hint)


def _known(ask: Ask, member: int) -> dict[str, Any]:
    problem = ask.problem
    values = (ask.stream, ask.group, member, problem.id, problem.text, problem.answer, problem.level, True, 1.0,
              ask.caps[member], False)
    return dict(zip(COLUMNS, values, strict=True))


def _blank_row() -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": ""}], **BLANK}


class GroupReward:
    """The reward function: predictions are scored against the solutions of their problem, wherever those were sampled.

    A process sees only its slice of a step, and a group may be split between two; so the slices, decoded and graded,
    are gathered before anything is scored. Rows are taken in the order of the processes, hence whole groups.

    Attributes:
        table: all rollouts of the last step, scored; the same on every process.
        place: for each of this process's places, its row in `table`; -1 for a blank one.
    """

    __name__ = "masa"  # what TRL calls its metrics

    def __init__(self, config: Config, tokenizer: Any, end_tokens: frozenset[int]) -> None:
        self.config, self.end_tokens, self._tokenizer = config, end_tokens, tokenizer
        self.table, self.place = pd.DataFrame(), []

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]],
                 **columns: Any) -> list[float | None]:
        """One reward a place: 0 for a blank one, None for what takes no part in the update."""
        real = [row for row, stream in enumerate(columns["stream"]) if stream != "blank"]
        known = [{name: columns[name][row] for name in COLUMNS} for row in real]
        own = (rollouts.read(known, [self._completion(completion_ids[row]) for row in real], self._tokenizer,
                             self.config) if real else None)
        parts = gather_object([own])
        self.table = pd.concat([part for part in parts if part is not None], ignore_index=True)
        # A row of the data set is repeated for `generations` members, which only their order tells apart.
        self.table["member"] = self.table.groupby(["stream", "group"]).cumcount()
        rollouts.score(self.table, self.config)
        return self._rewards(len(completion_ids), real, parts)

    def _completion(self, ids: Sequence[int]) -> Completion:
        return Completion(tuple(ids), (), "stop" if ids[-1] in self.end_tokens else "length")

    def _rewards(self, places: int, real: Sequence[int], parts: Sequence[pd.DataFrame | None]) -> list[float | None]:
        from accelerate import PartialState

        before = sum(len(part) for part in parts[:PartialState().process_index] if part is not None)
        self.place, found = [-1] * places, [0.0] * places
        for number, row in enumerate(real, before):
            reward = self.table["reward"].iloc[number]
            self.place[row], found[row] = number, None if math.isnan(reward) else float(reward)
        return found
