"""What a notebook asks of its reader, and in sentences whether an answer is right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from masa_lib import DATA
from masa_lib.models import tiers

if TYPE_CHECKING:
    from masa_lib.analysis import compare
    from masa_lib.lessons.widgets.reward_scenes import Recorded

#: of every exercise, before its reader has tried it
UNANSWERED = "No answer yet. Put yours in place of None and run the cell again."


@dataclasses.dataclass(frozen=True)
class Exercise:
    """The right answer (numbers, or what computes one), the sentences that known mistakes earn, and one for others."""

    right: tuple[float, ...] | Callable[[], float]
    mistakes: tuple[tuple[tuple[float, ...], str], ...] = ()
    tolerance: float = 2e-3
    hint: str = "Look at the formula again, one token at a time."

    def numbers(self) -> tuple[float, ...]:
        """The right answer's numbers; computed anew where they are not written down."""
        return (self.right(),) if callable(self.right) else self.right


def check(exercise: str, answer: Any) -> str:
    """Whether an answer is right, in a sentence; of a known mistake, what it is.

    Args:
        exercise: a key of EXERCISES.
        answer: a number, a list or a tensor; None where the reader has not answered yet.
    """
    wanted = EXERCISES[exercise]
    if answer is None or answer is Ellipsis:
        return f"{exercise}: {UNANSWERED.replace('No', 'no', 1)}"
    right = wanted.numbers()
    try:
        given = tuple(_numbers(answer))
    except (TypeError, ValueError, RuntimeError):
        return f"{exercise}: numbers are wanted, not {type(answer).__name__}."
    if len(right) == 1 and len(set(given)) == 1:  # one number, said of each member of a group
        given = given[:1]
    if len(given) != len(right):
        wants = "one number is" if len(right) == 1 else f"{len(right)} numbers are"
        return f"{exercise}: {wants} wanted, not {len(given)}."
    if _near(given, right, wanted.tolerance):
        return f"{exercise}: right."
    known = [said for numbers, said in wanted.mistakes if _near(given, numbers, wanted.tolerance)]
    return f"{exercise}: not yet. " + [*known, wanted.hint][0]


def _numbers(answer: Any) -> Iterable[float]:
    """The numbers of nested lists or of a tensor, row by row."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, list | tuple):
        return [float(answer)]
    return [number for entry in answer for number in _numbers(entry)]


def _near(given: tuple[float, ...], wanted: tuple[float, ...], tolerance: float) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(given, wanted, strict=True))


def _half_right() -> float:
    from masa_lib import config
    from masa_lib.method import rewards

    return rewards.difficulty_reward(8, 0.5, config.RewardConfig())


def _one_prediction() -> float:
    from masa_lib.analysis import awareness

    return float(_after_masa().apply(lambda table: awareness.correlation(table["predictions"].str[0] / 8,
                                                                        table["pass_rate"])).mean())


def _level_means() -> float:
    from masa_lib.analysis import awareness

    return float(_after_masa().apply(lambda table: awareness.correlation(
        table.groupby("level")["pass_rate"].transform("mean"), table["pass_rate"])).mean())


def _after_masa() -> Any:
    """The last evaluations of the recorded MASA runs, by seed."""
    problems = _recorded().problems
    return problems[(problems["arm"] == "masa") & (problems["when"] == "after")].groupby("seed")


def _two_seeds() -> float:
    from masa_lib.analysis import intervals

    runs = _recorded().runs.query("seed < 2").pivot(index="seed", columns="arm", values="accuracy_after")
    return intervals.mean_interval(runs["masa"] - runs["grpo"])[2]


def _free_predictions() -> float:
    from masa_lib.analysis import intervals

    runs = _recorded().runs.set_index("seed")
    grpo, masa = (runs[runs["arm"] == arm] for arm in ("grpo", "masa"))
    return intervals.paired_ratio(grpo["tokens_to_target"], masa["tokens_solution_to_target"])["mean"]


def _shorter_answers() -> float:
    from masa_lib.models import time_plan

    plain = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo"}, True)
    short = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo", "sampling.solution_tokens": 2048}, True)
    return time_plan.hours(short, "H100")["all"] / time_plan.hours(plain, "H100")["all"]


@functools.cache
def _recorded() -> compare.Comparison:
    """The recorded study, read once: an exercise is tried several times."""
    from masa_lib.analysis import compare

    return compare.compare_runs(DATA / "runs" / "baseline")


#: by name; a developer's test computes those of notebook 03 again with TRL's loss, those of 07 from the printed tables;
#: those of 00, 01 and 06 are computed by the library
EXERCISES: dict[str, Exercise] = {
    "advantages": Exercise((1.5, -0.5, -0.5, -0.5), (
        ((0.75, -0.25, -0.25, -0.25), "These are centred; now divide by the standard deviation."),
        ((1.732, -0.577, -0.577, -0.577), "That standard deviation divides by G; the sample's divides by G - 1."),
        ((2.0, 0.0, 0.0, 0.0), "The mean has to come off first."))),
    "ratios": Exercise((1.5, 0.7, 1.1, 0.6, 12.0), (
        ((0.405, -0.357, 0.095, -0.511, 2.485), "This is the logarithm of the ratio."),
        ((0.667, 1.429, 0.909, 1.667, 0.083), "Upside down: the new probability stands on top."))),
    "token losses": Exercise((-1.92, -1.05, 0.55, 0.4, 6.0), (
        ((-2.25, -1.05, 0.55, 0.3, 6.0), "Nothing is clipped here."),
        ((-1.92, -1.2, 0.55, 0.4, 0.64), "Everything is clipped here; of the two losses, the larger one counts."),
        ((1.92, 1.05, -0.55, -0.4, -6.0), "This is what is to be made large; a loss is made small."),
        ((-2.25, -1.2, 0.55, 0.3, 0.64), "Of the two losses, the larger one counts."))),
    "pulls": Exercise((0.0, -1.05, 0.55, 0.0, 6.0), (
        ((-2.25, -1.05, 0.55, 0.3, 6.0), "Where the clipped loss counts, the log-prob is no longer in it."),
        ((-1.92, -1.05, 0.55, 0.4, 6.0), "This is the loss; for clipped tokens it does not move with the log-prob."))),
    "token mean": Exercise((0.796,), (((1.36625,), "This is the mean over sequences."),
                                      ((3.98,), "This is the sum; divide by the number of tokens."),
                                      ((0.995,), "Divide by the tokens, not by the sequences."))),
    "sequence mean": Exercise((1.36625,), (((0.796,), "This is the mean over tokens."),
                                           ((5.465,), "This is the sum over sequences."))),
    "first update": Exercise((-0.3, -0.3, 0.1, 0.1, 0.1), (
        ((0.0,) * 5, "The ratio is 1, but it still moves with the log-prob: its slope is 1, too."),
        ((-1.5, -1.5, 0.5, 0.5, 0.5), "One more thing: the loss is a mean over five tokens."),
        ((0.3, 0.3, -0.1, -0.1, -0.1), "The loss falls where a good token gets more likely: mind the sign."))),
    "flat group": Exercise((0.398,), (((0.796,), "The tokens of the flat group still count among the tokens."),)),
    "dual clip": Exercise((5.0,), (((6.0,), "This is the loss without a bound."),
                                   ((10.0,), "The bound is c times the size of the advantage."))),
    "gain in points": Exercise((4.28,), (((19.3,), "This is the relative gain, in percent of the old score."),
                                         ((19.2967,), "This is the relative gain, in percent of the old score.")),
                               0.01),
    "mean of gains": Exercise((1.65,), (((1.437,), "This is the gain of the means; take each gain first."),
                                        ((0.93,), "These are points."),), 0.01),
    "average of 4B": Exercise((16.46,), (((13.04,), "This is the printed number."),
                                         ((6.995,), "These are points; relative to the old mean is asked."),), 0.02),
    "never solved": Exercise(
        (0.0,), (), 1e-3, "All rewards are equal: what is a reward minus the mean of such a group?"),
    "half right": Exercise(
        _half_right, (), 1e-3, "The prediction is 8 / 8 = 1, the truth 4 / 8: put |1 - 0.5| into b^|error|."),
    "one prediction": Exercise(_one_prediction, (), 1e-2, "Correlate each MASA seed's first predictions with its true "
                                                          "pass rates; then take the mean over the seeds."),
    "level means": Exercise(
        _level_means, (), 1e-2, "Put the level's mean in place of the prediction, seed by seed, and average."),
    "two seeds": Exercise(_two_seeds, (), 2e-3, "Take the differences of the seeds 0 and 1 alone, and of the three "
                                                "numbers of `intervals.mean_interval` the last one."),
    "free predictions": Exercise(_free_predictions, (), 5e-3, "Divide, seed by seed, GRPO's tokens to the target by "
                                 "MASA's tokens of *solutions* to the target; `paired_ratio` averages them."),
    "by lot": Exercise((0.0,), (((0.6,), "This is the precision of dropping by lot; put it into the formula."),), 1e-3,
                       "By lot, q is the share of groups without a signal, 1 - s, and all groups cost g."),
    "precision that pays": Exercise((0.68,), (((0.32,), "This is 1 - q."), ((0.6,), "That is the lot's precision; the "
                                    "price has to be earned on top of it.")), 5e-3,
                                    "Divide both sides by d times g, and solve for q."),
    "shorter answers": Exercise(
        _shorter_answers, (), 5e-3, "Divide the hours with sampling.solution_tokens at 2048 by those without it."),
    "levels by luck": Exercise(
        (12 * 0.05,), (), 1e-3, "Each of the twelve leaves out 0 in 5 of 100 cases; add that up."),
}

#: of notebook 02's exercise on constant answers: eighths, with mode 0, median 1 and mean 2.7
SEVEN = (0, 0, 0, 1, 2, 8, 8)
#: of the exercise on settings that can be hacked: how far a constant answer comes (`Scene.hacked`); share with a signal
HACKED, SIGNAL = 0.9, 0.5


def difficulty_exercise(answer: Callable[[int, float, float], float | None]) -> str:
    """Whether a reader's b^|error| of predicted eighths, true pass rate (0 to 1) and base is the library's."""
    from masa_lib.config import RewardConfig
    from masa_lib.method import rewards

    for predicted, pass_rate, base in ((8, 1.0, 0.01), (0, 1.0, 0.01), (2, 0.5, 0.3), (6, 0.125, 0.01)):
        given = answer(predicted, pass_rate, base)
        wanted = rewards.difficulty_reward(predicted, pass_rate, RewardConfig(difficulty_base=base))
        if given is None:
            return UNANSWERED
        if abs(given - wanted) > 1e-9:
            return (f"Not yet: for {predicted} of 8, a pass rate of {pass_rate} and b = {base} it gives {given:.4g}; "
                    f"{wanted:.4g} is right. Is the prediction divided by 8, and has the error no sign?")
    return "Right: the same as the library on every example."


def constant_exercise(answers: Mapping[str, int | None]) -> str:
    """Whether the best constant answers (eighths) to problems with the pass rates SEVEN are right, a line a score."""
    from masa_lib.config import RewardConfig
    from masa_lib.method import rewards

    shapes = {"kernel, b = 0.0001": RewardConfig(difficulty_base=1e-4),
              "kernel, b = 0.99": RewardConfig(difficulty_base=0.99), "brier": RewardConfig(difficulty_mode="brier")}
    said = []
    for name, shape in shapes.items():
        earned = [sum(rewards.difficulty_reward(answer, rate / 8, shape) for rate in SEVEN) for answer in range(9)]
        given, best = answers.get(name), earned.index(max(earned))
        verdict = UNANSWERED if given is None else "right." if given == best else "not yet; is it mode, median or mean?"
        said.append(f"{name}: {verdict}")
    return "\n".join(said)


def hack_exercise(recorded: Recorded, settings: Mapping[str, Any] | None) -> str:
    """Whether a setting takes a constant answer HACKED of the way, while SIGNAL of the groups still teach something."""
    from masa_lib.lessons.widgets import reward_scenes

    if settings is None:
        return UNANSWERED
    scene = reward_scenes.scene(recorded, settings, {})
    found = (f"a constant answer comes {scene.hacked:.1%} of the way, and {1 - scene.no_signal:.0%} of the groups "
             "have a signal")
    if scene.no_signal > 1 - SIGNAL:
        return f"Not yet: {found}. What pays everybody the same teaches nothing; let {SIGNAL:.0%} have a signal."
    if scene.hacked < HACKED:
        return f"Not yet: {found}; {HACKED:.0%} of the way is asked."
    return f"Right: {found}. The answer that earns it: {scene.answer}."


def notion_exercise(recorded: Recorded, notion: str | None) -> str:
    """Whether counting pays a notion by the pass rate alone: hardly ever below one half, nearly always above it."""
    from masa_lib.lessons.widgets import reward_scenes

    if notion is None:
        return UNANSWERED
    if notion == "boxed":
        return "Not yet: that one is given; find another."
    pays = reward_scenes.notion_pays(recorded, [notion], "count")[notion]
    rates = recorded.groups["pass_rate"]
    below, above = pays[rates < 0.5].mean(), pays[rates > 0.5].mean()
    found = f"{notion!r} pays in {below:.0%} of the groups below one half and in {above:.0%} of those above"
    good = below < 0.1 and above > 0.9
    return f"Right: {found}." if good else f"Not yet: {found}; less than 10 % and more than 90 % are asked."


def pays_pass_rate_alone(settings: Mapping[str, Any]) -> str:
    """Check an exercise of 04: settings by which a running training pays predictions for the pass rate alone."""
    from masa_lib import config as configs
    from masa_lib.runs import live_control

    fixed = [key for key in settings if not key.startswith(live_control.LIVE)]
    if fixed:
        return f"Not yet: a running training would refuse {fixed[0]}."
    try:
        reward = configs.replace(tiers.config(), settings).reward
    except configs.ConfigError as error:
        return f"Not yet: {error}"
    if reward.length_weight or reward.notion_weight:
        return "Not yet: something else than the pass rate is still paid."
    return "Right: the pass rate alone is paid, and a running training would take these settings."


def prediction_share(share: float) -> str:
    """Check an exercise of 04: the share of its sampled tokens that a recorded run spent on predictions."""
    from masa_lib.runs.folder import Run

    metrics = Run.open(DATA / "runs" / "baseline" / "masa-s0").metrics()
    tokens = metrics[["tokens_meta", "tokens_solution"]].sum()
    right = abs(share - tokens["tokens_meta"] / tokens.sum()) < 0.005
    return f"Right: {share:.3f}." if right else f"Not yet: {share:.3f}. It is tokens_meta over all that is sampled."
