"""Three guided tasks of the reward lab: a goal, what to turn, and a check that sees when the goal is reached.

All three show the same thing from another side: what a reward pays is not what training follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from masa_lib.lessons.widgets.reward_scenes import Scene

#: a part that drives less than this is drowned; a constant answer that comes so far hacks the reward
DROWNED, HACKED = 0.25, 0.9


@dataclass(frozen=True)
class Task:
    """One task; it begins with the published setting.

    `goal`: what to reach. `turn`: where to look. `check`: of a scene, its settings and the published ones, whether the
    goal is reached, and where it stands.
    """

    goal: str
    turn: str
    check: Callable[[Scene, Mapping[str, Any], Mapping[str, Any]], tuple[bool, str]]

    def verdict(self, scene: Scene, settings: Mapping[str, Any], published: Mapping[str, Any]) -> str:
        """Whether the goal is reached, in a sentence."""
        reached, stands = self.check(scene, settings, published)
        return f"Reached: {stands}." if reached else f"Not yet: {stands}."


def _no_lesson(scene: Scene, settings: Mapping[str, Any], published: Mapping[str, Any]) -> tuple[bool, str]:
    mean = float(scene.payments.loc["recorded"].sum())
    return (mean >= 0.9 and scene.no_signal >= 0.9,
            f"the mean reward is {mean:.2f}, and {scene.no_signal:.0%} of the groups teach nothing")


def _drowned(scene: Scene, settings: Mapping[str, Any], published: Mapping[str, Any]) -> tuple[bool, str]:
    changed = [key for key, value in settings.items()
               if key.startswith("reward.") and value != published[key]]
    share = scene.drives["reward_difficulty"]
    if changed:
        return False, f"the reward was changed ({changed[0].removeprefix('reward.')}); leave it as published"
    return share < DROWNED, f"the pass rate makes {share:.0%} of what training follows, and the reward is as published"


def _hacked(scene: Scene, settings: Mapping[str, Any], published: Mapping[str, Any]) -> tuple[bool, str]:
    signal = 1 - scene.no_signal
    return (scene.hacked >= HACKED and signal >= 0.5,
            f"a constant answer comes {scene.hacked:.0%} of the way, and {signal:.0%} of the groups have a signal")


TASKS = {
    "1: a high reward that teaches nothing": Task(
        "A mean reward of 0.90 or more, while 90 % of the groups or more have no signal.",
        "The weights of length and notions to 0, then the base b of the kernel: what does it pay at b = 1?",
        _no_lesson),
    "2: the same reward, another update": Task(
        f"Leave the published reward alone, and yet let the pass rate make less than {DROWNED:.0%} of what training "
        "follows.", "Only the menu of the advantages. Which part has the smallest differences in a group?", _drowned),
    "3: pay an answer that reads nothing": Task(
        f"A constant answer that comes {HACKED:.0%} of the way from a random one to the best for each problem, while "
        "half of the groups or more have a signal.",
        "Take the weight off the pass rate. What does a wide length window pay, and what a word in every solution?",
        _hacked)}
