"""Problems of reasoning-gym as an endless source: a task with a curriculum has levels, any other one is level 1."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from masa_lib.tasks.problem_rows import ProblemError
from masa_lib.tasks.streams import Stream

GYM = "reasoning-gym:"
GYM_LEVELS = range(1, 5)
#: reasoning-gym builds its problems in blocks of this many
GYM_BLOCK = 1000
#: tasks whose problems follow the hashing of strings or a global generator: no other process could draw them again
GYM_UNSTEADY = frozenset({"codeio", "intermediate_integration", "isomorphic_strings", "list_functions",
                          "polynomial_multiplication", "ransom_note", "word_ladder"})


def gym_stream(source: str, seed: str, wanted: range | None) -> Stream:
    """Tasks of reasoning-gym; with a curriculum a task has `GYM_LEVELS` (its settings 1, 2, ...), else level 1.

    Args:
        source: reasoning-gym:<task,task>, each perhaps with settings of its own.
        seed: of the stream.
        wanted: levels; None: all.

    Raises:
        ProblemError: an unknown task, or none with such levels.
    """
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

    fixed = _gym_slots(source, DATASETS, CURRICULA)

    @lru_cache(maxsize=16)
    def block(task: str, level: int, number: int) -> Any:
        """GYM_BLOCK problems in a row: reasoning-gym makes data sets, not single problems."""
        settings = {"size": GYM_BLOCK, "seed": random.Random(f"{seed}/{task}/{level}/{number}").getrandbits(31)}
        generator, config = DATASETS[task]
        if fixed[task, level] or task not in CURRICULA:
            return generator(config=config(**fixed[task, level], **settings))
        curriculum = create_curriculum(task)
        curriculum.set_global_level(level - 1)
        return generator(config=curriculum.generate_configuration(settings))

    def draw(slot: tuple[str, int], index: int) -> tuple[str, str]:
        """Problem and answer of this number, of a task and level."""
        try:
            item = block(*slot, index // GYM_BLOCK)[index % GYM_BLOCK]
        except Exception as error:  # tasks raise what they like where their own settings do not fit
            raise ProblemError(f"reasoning-gym cannot make a problem of {slot[0]}, level {slot[1]}: {error}. Leave "
                               "the task out of problems.source or the level out of problems.levels.") from error
        if not isinstance(item["answer"], str) or not item["answer"].strip():
            raise ProblemError(f"reasoning-gym stores no answer for {slot[0]} (only a program can check it), and "
                               "answers are compared by value here; leave the task out of problems.source.")
        return item["question"].strip(), item["answer"].strip()

    slots = [slot for slot in sorted(fixed, key=lambda slot: slot[1]) if wanted is None or slot[1] in wanted]
    if not slots:
        raise ProblemError(f"{source} has no problem of the levels in problems.levels; reasoning-gym's levels are "
                           f"{GYM_LEVELS[0]} to {GYM_LEVELS[-1]}, a task without a curriculum has level 1.")
    return Stream(slots, draw)


def _gym_slots(source: str, known: Collection[str], curricula: Collection[str]) -> dict[tuple[str, int], dict]:
    """Settings by task and level; none: the curriculum's. `task:name=value:...` is one level, in order of mention."""
    slots: dict[tuple[str, int], dict] = {}
    for entry in [entry for entry in source.removeprefix(GYM).split(",") if entry.strip()] or [""]:
        task, *settings = (part.strip() for part in entry.split(":"))
        if task in GYM_UNSTEADY:
            raise ProblemError(f"reasoning-gym draws other problems of {task} in every process, so that no run could "
                               "be resumed; leave the task out of problems.source.")
        if task not in known or task == "composite":
            close = difflib.get_close_matches(task, known) or ["chain_sum", "gcd"]
            raise ProblemError(f"reasoning-gym has no task {task!r} that can be used here. Did you mean "
                               f"{' or '.join(close)}? problems.source takes {GYM}<task,task>.")
        if not all(re.fullmatch(r"\w+=-?\d+", setting) for setting in settings):
            raise ProblemError(f"problems.source takes a task's settings as {task}:name=number:name=number, not "
                               f"{entry.strip()!r}.")
        if settings:
            level = 1 + sum(slot[0] == task for slot in slots)
            slots[task, level] = {name: int(value) for name, _, value in (text.partition("=") for text in settings)}
        else:
            slots |= {(task, level): {} for level in (GYM_LEVELS if task in curricula else (1,))}
    return slots
