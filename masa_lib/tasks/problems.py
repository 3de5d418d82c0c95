"""What to solve: problems from a generator, from reasoning-gym, from Hugging Face data sets and from local files.

Everything is a pure function of the source, the seed and a number, so that a run resumes from a cursor alone. Training
and evaluation problems never meet: a source has splits of its own, or its texts are divided by a digest (one in eight
is held out). Nothing here knows a model, a prompt or how an answer is graded; every answer is a text that is compared
by value, so of a reasoning-gym task with many right answers only the stored one counts.
"""

from __future__ import annotations

import difflib
import logging
import os
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from masa_lib.config import ProblemsConfig
from masa_lib.tasks import arithmetic, grading
from masa_lib.tasks.data_sets import DATA_SETS
from masa_lib.tasks.gym import GYM, gym_stream
from masa_lib.tasks.problem_rows import Problem, ProblemError, read_file, read_hub
from masa_lib.tasks.streams import Stream

Split = Literal["train", "evaluation"]
FILES = (".jsonl", ".csv", ".parquet")
#: draws of one problem before its generator counts as exhausted: for a set without duplicates, for a fresh stream
TRIES, FRESH_TRIES = 1000, 20
#: whether a model has room for a problem of this text
Fits = Callable[[str], bool]


class ProblemPool:
    """The training problems in their order: `take` is a pure function of config, seed and cursor.

    With `pool` above 0 a fixed set of so many problems comes back, in a new order each pass; with 0 a generated source
    never repeats itself on purpose, and a finite one is used whole (`note` says so, and what was left out). `problems`
    is the fixed set, empty for a fresh stream.

    Args:
        config: the sources; a text that stands in `evaluation_source` is never trained on.
        seed: of the order (the problems of the fixed set depend on `config.seed` alone).

    Raises:
        ProblemError: the source cannot be used.
    """

    def __init__(self, config: ProblemsConfig, seed: int) -> None:
        self.note = ""
        self.problems: list[Problem] = []
        self._source, self._seed, self._fits = config.source, seed, None
        other = _other_evaluation_source(config)
        self._excluded = {_key(problem.text) for problem in _finite(other, "evaluation", config.seed, undivided=True)[0]
                          } if other and not _is_generated(other) else set()
        if not config.pool and _is_generated(config.source):
            self._stream = _stream(config.source, f"{config.seed}/{seed}", config.levels)
        else:
            self.problems, notes = _load(config.source, "train", config.pool or None, config.seed, config.levels,
                                         undivided=bool(other), excluded=self._excluded)
            self.note = " ".join(filter(None, [*notes, self._shortage(config.pool)]))

    def keep(self, fits: Fits) -> str:
        """Leave out the problems that do not fit, now or when a stream draws them; says how many, see `keep`."""
        self._fits = fits
        if self.problems:
            self.problems, note = keep(self.problems, fits)
            return note
        return ""

    def take(self, cursor: int, count: int) -> list[Problem]:
        """The problems number `cursor` to `cursor + count - 1` of the training order."""
        if not self.problems:
            return [self._fresh(number) for number in range(cursor, cursor + count)]
        size = len(self.problems)
        return [self.problems[_permutation(size, f"{self._seed}/{number // size}")[number % size]]
                for number in range(cursor, cursor + count)]

    def _fresh(self, number: int) -> Problem:
        slot = self._stream.slots[number % len(self._stream.slots)]
        first = number // len(self._stream.slots) * FRESH_TRIES
        for index in range(first, first + FRESH_TRIES):
            problem = self._stream.problem(slot, index, self._source)
            if (not arithmetic.is_held_out(problem.text) and _key(problem.text) not in self._excluded
                    and (self._fits is None or self._fits(problem.text))):
                return problem
        raise _exhausted(self._source, slot, FRESH_TRIES)

    def _shortage(self, wanted: int) -> str:
        if not wanted:
            return (f"{self._source} has {len(self.problems)} training problems and is no endless stream "
                    "(problems.pool = 0): they come back, in a new order each pass.")
        if len(self.problems) < wanted:
            return f"{self._source} has {len(self.problems)} training problems, not the {wanted} of problems.pool."
        return ""


def load_problems(source: str, split: Split, count: int | None = None, seed: int = 0, levels: str = "",
                  undivided: bool = False) -> list[Problem]:
    """The problems of one split of a source, in a fixed order; a smaller `count` gives the first of a larger one.

    Args:
        source: pocket, reasoning-gym:<task,task>, a data set's short name, or a JSONL, CSV or Parquet file.
        split: train or evaluation; the two have no text in common.
        count: how many at most; a generated source needs it, None takes all of a finite one.
        seed: of the generator, of the choice of `count` problems, and of shuffled options.
        levels: first and last level, as 2-9; empty: all, of pocket those that its model can reach.
        undivided: take the whole of a source that has no splits of its own (a file, deepscaler).

    Raises:
        ProblemError: unknown source, unreadable file, missing column, bad row, duplicate id, nothing left.
    """
    return _load(source, split, count, seed, levels, undivided, set())[0]


def held_out(config: ProblemsConfig, count: int) -> list[Problem]:
    """At most `count` problems to evaluate on: of `evaluation_source`, or of the source's evaluation split.

    `levels` are the source's and do not restrict another `evaluation_source`; a file named there is used whole.
    """
    other = _other_evaluation_source(config)
    return load_problems(other or config.source, "evaluation", count, config.seed, "" if other else config.levels,
                         undivided=bool(other))


def keep(problems: Sequence[Problem], fits: Fits) -> tuple[list[Problem], str]:
    """The problems for which a model has room (see `prompts.room`), and what is to be said of the others.

    Raises:
        ProblemError: there is room for none.
    """
    kept = [problem for problem in problems if fits(problem.text)]
    if problems and not kept:
        raise ProblemError(f"None of the {len(problems)} problems of {problems[0].source} fits into the model's "
                           "context beside sampling.solution_tokens and sampling.meta_tokens; lower these, or take "
                           "other problems (problems.source).")
    left = len(problems) - len(kept)
    return kept, (f"{left} of {len(problems)} problems of {problems[0].source} are left out: with "
                  "sampling.solution_tokens or sampling.meta_tokens they are longer than the model's context."
                  if left else "")


def make_room(pool: ProblemPool | None, held: Sequence[Problem], fits: Fits) -> list[Problem]:
    """Leave out the problems that do not fit, of a training pool and of held-out ones, and log what was left out.

    Returns:
        The held-out problems that fit.

    Raises:
        ProblemError: there is room for none.
    """
    told = [pool.note, pool.keep(fits)] if pool else []
    held, note = keep(held, fits)
    for said in filter(None, [*told, note]):
        logging.getLogger("masa").warning(said)
    return held


def sources() -> list[dict[str, Any]]:
    """One row for each kind of source: name, what it is, split sizes, columns it is read from, whether ever fetched."""
    levels = (f"levels 1 to {arithmetic.LEVELS[-1]}, by name up to {max(arithmetic.LEVEL_SPECS)}, which are beyond its "
              "model's reach")
    rows = [("pocket", f"generated chained arithmetic, {levels}", None, None, (), "built in"),
            (GYM + "<task,task>", "generated, also task:setting=number:...; only the stored answer counts", None, None,
             (), "built in")]
    rows += [(name, f"{entry.what} [{entry.hub}]", entry.train_size, entry.evaluation_size, entry.columns,
              entry.fetched) for name, entry in DATA_SETS.items() if entry.hub]
    files = ", ".join(f"<file>{ending}" for ending in FILES)
    rows += [(files, "one row a problem; one in eight is held out", None, None, ("problem", "answer"), "local"),
             (files, "the verl layout", None, None, ("prompt", "reward_model.ground_truth"), "local")]
    keys = ("name", "what", "train", "evaluation", "columns", "fetched")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _load(source: str, split: Split, count: int | None, seed: int, levels: str, undivided: bool,
          excluded: set[str]) -> tuple[list[Problem], list[str]]:
    """The problems of a split, and what is to be said of those left out."""
    if _is_generated(source):
        if count is None:
            raise ProblemError(f"{source} is generated without end; say how many problems are wanted.")
        return _generate(source, split, count, seed, levels, excluded), []
    source = os.path.normpath(source) if _is_file(source) else source
    everything, notes = _finite(source, split, seed, undivided)
    notes = [*notes, grading.unmatchable_sentence(source, [problem.answer for problem in everything])]
    problems = _of_levels(everything, source, split, levels, excluded)
    if count is None:
        return problems, notes
    return [problems[n] for n in _permutation(len(problems), f"{source}/{split}/{seed}")[:count]], notes


def _of_levels(everything: Sequence[Problem], source: str, split: Split, levels: str,
               excluded: set[str]) -> list[Problem]:
    wanted = _level_range(levels)
    problems = [problem for problem in everything
                if (wanted is None or problem.level in wanted) and _key(problem.text) not in excluded]
    if not problems:
        have = sorted({problem.level for problem in everything})
        raise ProblemError(f"No {split} problem of {source} is left: problems.levels is {levels!r} (its levels are "
                           f"{', '.join(map(str, have))}), and what stands in problems.evaluation_source is left out.")
    return problems


def _generate(source: str, split: Split, count: int, seed: int, levels: str, excluded: set[str]) -> list[Problem]:
    """Different problems of a generated source; the slots take turns, so that levels and tasks are balanced."""
    stream = _stream(source, f"{seed}/{split}", levels)
    seen, problems = set(), []
    position = dict.fromkeys(stream.slots, 0)
    for number in range(count):
        slot = stream.slots[number % len(stream.slots)]
        for index in range(position[slot], position[slot] + TRIES):
            problem = stream.problem(slot, index, source)
            if (arithmetic.is_held_out(problem.text) == (split == "evaluation") and problem.text not in seen
                    and _key(problem.text) not in excluded):
                break
        else:
            raise _exhausted(source, slot, TRIES)
        position[slot] = index + 1
        seen.add(problem.text)
        problems.append(problem)
    return problems


def _exhausted(source: str, slot: tuple[str, int], tries: int) -> ProblemError:
    return ProblemError(f"{source} gave no further problem of {slot[0]}, level {slot[1]}, in {tries} draws; ask for "
                        "fewer (problems.pool, evaluation.final_problems) or for more levels (problems.levels).")


@lru_cache(maxsize=4)
def _permutation(size: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(size), size)


def _is_generated(source: str) -> bool:
    return _generator(source) in GENERATORS


def _generator(source: str) -> str:
    return "".join(source.partition(":")[:2])


def _is_file(source: str) -> bool:
    return source.lower().endswith(FILES)


def _other_evaluation_source(config: ProblemsConfig) -> str:
    """`evaluation_source`, empty where it is the source itself; a file is the same by whatever path it is named."""
    source, other = ((os.path.realpath(name) if _is_file(name) else name)
                     for name in (config.source, config.evaluation_source))
    return config.evaluation_source if other != source else ""


def _key(text: str) -> str:
    """What two copies of one problem have in common: all but white space."""
    return " ".join(text.split())


def _level_range(levels: str) -> range | None:
    if not levels.strip():
        return None
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", levels)
    if not found or int(found.group(2) or found.group(1)) < int(found.group(1)):
        raise ProblemError(f"problems.levels is {levels!r}; it takes a level or a first and a last one, as 2-9.")
    return range(int(found.group(1)), int(found.group(2) or found.group(1)) + 1)


def _pocket_stream(source: str, seed: str, wanted: range | None) -> Stream:
    chosen = [level for level in arithmetic.LEVEL_SPECS if level in (arithmetic.LEVELS if wanted is None else wanted)]
    if not chosen:
        raise ProblemError(f"problems.levels is {wanted.start}-{wanted.stop - 1}; pocket has the levels 1 to "
                           f"{max(arithmetic.LEVEL_SPECS)}.")
    return Stream([("pocket", level) for level in chosen],
                  lambda slot, index: arithmetic.make_problem(random.Random(f"{seed}/{slot[1]}/{index}"), slot[1]))


#: generated sources by name, or by what it begins with up to a colon: what makes the stream of a source from its whole
#: name, a seed and the levels that are wanted (None: all)
GENERATORS: dict[str, Callable[[str, str, range | None], Stream]] = {
    "pocket": _pocket_stream, GYM: gym_stream}


@lru_cache(maxsize=8)
def _stream(source: str, seed: str, levels: str) -> Stream:
    return GENERATORS[_generator(source)](source, seed, _level_range(levels))


def _finite(source: str, split: Split, seed: int, undivided: bool) -> tuple[list[Problem], list[str]]:
    """All problems of a split of a data set or a file, each once, in its order, and how many rows were copies.

    Without splits of its own a source is divided by digest.
    """
    problems, divided = _read(source, split, seed)
    if not problems:
        raise ProblemError(f"{source} is empty: it holds no problem.")
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(_key(problem.text), problem)
    notes = [f"{len(problems) - len(first)} of {len(problems)} rows of {source} repeat a problem and are left out."
             ] if len(first) < len(problems) else []
    problems = list(first.values())
    if divided and not undivided:
        problems = [p for p in problems if arithmetic.is_held_out(p.text) == (split == "evaluation")]
        if not problems:
            raise ProblemError(f"The {split} split of {source} is empty (one text in eight is held out); it is too "
                               "small to divide: name the held-out problems in problems.evaluation_source.")
    return problems, notes


def _read(source: str, split: Split, seed: int) -> tuple[list[Problem], bool]:
    """The rows of a data set or a file as problems, and whether both splits are in them."""
    if source in DATA_SETS:
        entry = DATA_SETS[source]
        if not entry.hub:
            raise ProblemError(f"{source} is no source of problems here: `masa eval --harness` measures what "
                               "lm-evaluation-harness has of it.")
        if split == "train" and not entry.train:
            raise ProblemError(f"{source} is only there to evaluate on: name it in problems.evaluation_source.")
        name = entry.train if split == "train" else entry.evaluation or entry.train
        return read_hub(source, name, seed), not entry.evaluation
    if _is_file(source):
        return list(read_file(os.path.normpath(source))), True
    names = [*(name + ("<task,task>" if name == GYM else "") for name in GENERATORS),
             *(name for name, entry in DATA_SETS.items() if entry.hub)]
    close = difflib.get_close_matches(source, names, n=1)
    raise ProblemError(f"There is no source of problems {source!r}.{f' Did you mean {close[0]}?' if close else ''} "
                       f"problems.source takes {', '.join(names)}, or a file that ends in {', '.join(FILES[:-1])} or "
                       f"{FILES[-1]}.")
