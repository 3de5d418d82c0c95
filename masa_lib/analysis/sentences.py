"""What is said of a comparison, in sentences computed from its numbers: in short, and of each measure of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib.analysis import figures
from masa_lib.analysis.compare import EFFICIENT, FRESH, Comparison
from masa_lib.analysis.costs import COST
from masa_lib.config import PREDICTING

#: the three tokens that cost, and their words
PAID = {"tokens": "tokens written", "read": "read", "tokens_update": "through the update"}
#: what stands before a ratio that is a bound, and the words for it
BOUNDS = {"": "", "<= ": "at most ", ">= ": "at least ", "~ ": "about "}
CAVEATS = {"kernel": "A peaked kernel paid for its predictions: under doubt its best answer lies near the mode, and an "
                     "update that divides by a std seeks the median; neither is the mean, so a part of this error is "
                     "what was asked for.",
           "brier": "A quadratic score paid for its predictions: its best answer is the mean, but an update that "
                    "divides by a std seeks the median."}
READ = "Its predictions are read, not written: the score that trains them is a part of the loss, not of the reward."


def in_short(comparison: Comparison) -> list[str]:
    """Three plain sentences: what was trained, what the predictions learned, what it cost."""
    arms, runs, name = comparison.summary["methods"], comparison.runs, subject(comparison)
    steps, seeds = sorted(set(runs["steps"])), sorted(set(runs["seed"]))
    many = listed(list(arms)) if len(arms) < 4 else f"{len(arms)} arms"
    counts = sorted({arm["seeds"] for arm in arms.values()})
    of = f"the seed {seeds[0]}" if len(seeds) == 1 else f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} seeds"
    models = listed(list(dict.fromkeys(Path(model).name for model in runs["model"])))
    trained = (f"{many} {'was' if len(arms) == 1 else 'were'} trained from the model {models}, "
               f"{' or '.join(map(str, steps))} steps {'each ' * (len(runs) > 1)}with "
               f"{of}.")
    return [trained, _learned(comparison, name), _paid(comparison, name)]


def subject(comparison: Comparison) -> str:
    """The arm that is spoken of first: masa-read or else the first that learns predictions; else the last."""
    runs = comparison.runs
    learned = list(dict.fromkeys(runs["arm"][runs["method"].isin(PREDICTING)]))
    return next((arm for arm in ("masa-read", *learned) if arm in learned), runs["arm"].iloc[-1])


def beside(comparison: Comparison, name: str) -> str | None:
    """The arm that another is measured against, where it is there and another one."""
    other = comparison.summary["methods"][name]["reference"]
    return other if other != name and other in comparison.summary["methods"] else None


def _learned(comparison: Comparison, name: str) -> str:
    """How the predictions of an arm and what came true go together, before and after."""
    arms, other = comparison.summary["methods"], beside(comparison, name)
    found, within = arms[name]["r_pass_rate"], arms[name]["r_pass_rate_within"]
    if found["before"] is None and found["after"] is None:
        return f"Whether {name} knows how often it is right was not measured, or it says the same of every problem."
    count = comparison.problems["problem_id"].nunique()
    said = (f"On {count} problems that it never trained on, the pass rates that {name} predicts and those that come "
            f"true correlate with r = {_ends(found)} training ({_ends(within)} it among problems of one level)")
    if other is None or arms[other]["r_pass_rate"]["after"] is None:
        return f"{said}."
    return f"{said}; those of {other} end at {show(arms[other]['r_pass_rate']['after'], '.2f')}."


def _ends(ends: dict[str, Any]) -> str:
    before, after = ("undefined" if ends[when] is None else show(ends[when], ".2f") for when in ("before", "after"))
    return f"{before} before and {after} after"


def _paid(comparison: Comparison, name: str) -> str:
    """What an arm cost in each denominator, and how often it is right; beside it the same of its reference."""
    other = beside(comparison, name)
    accuracies = {arm: show(comparison.summary["methods"][arm]["accuracy_final"]["mean"], ".2f")
                  for arm in (name, other) if arm}
    base = show(comparison.summary["methods"][name]["accuracy_base"], ".2f")
    said = f"{name} cost {_costs(comparison, name)}, and its accuracy went from {base} to {accuracies[name]}"
    if other is not None:
        said += f"; {other} cost {_costs(comparison, other)}, and ends at {accuracies[other]}"
    alone = comparison.runs["alone"][comparison.runs["arm"].isin(accuracies)].all()
    return f"{said}{'' if alone else ' (other work ran beside, so seconds do not compare)'}."


def _costs(comparison: Comparison, name: str) -> str:
    """The mean costs of a run of an arm, in words."""
    runs = comparison.runs[comparison.runs["arm"] == name]
    return listed([*(f"{amount(runs[cost].mean())} {words}" for cost, words in PAID.items()),
                   f"{runs['seconds'].mean():,.0f} seconds"])


def amount(count: float) -> str:
    """A number of tokens: 1.30 million, 130 thousand, 1,300."""
    return (f"{count / 1e6:.2f} million" if count >= 1e6 else f"{count / 1e3:.0f} thousand" if count >= 1e4 else
            f"{count:,.0f}")


def show(value: Any, form: str = ".3f") -> str:
    """A number, `{"mean", "low", "high"}`, `{"before", "after"}` or `{"shown", "measured"}` as text; a dash is none."""
    if isinstance(value, dict) and "before" in value:
        return f"{show(value['before'], form)} -> {show(value['after'], form)}"
    if isinstance(value, dict) and "shown" in value:
        return f"{value['shown']} of {value['measured']}" if value["measured"] else "-"
    if isinstance(value, dict):
        ends = "" if value["low"] is None else f" [{show(value['low'], form)}, {show(value['high'], form)}]"
        return show(value["mean"], form) + ends
    return "-" if value is None else format(value, form)


def bound(key: str, arm: dict[str, Any]) -> str:
    """What stands before a ratio that is a bound."""
    kind = "equal" if key.endswith("_equal_ratio") else "target" if key.endswith("_to_target_ratio") else ""
    return f"{arm[f'{kind}_bound']} ".lstrip() if kind and arm[key]["mean"] is not None else ""


def title(name: str, arm: dict[str, Any]) -> str:
    """The name of an arm, and whether it is privileged."""
    return name + " (privileged)" * arm["privileged"]


def settings(summary: dict[str, Any]) -> list[str]:
    """The settings in which the arms differ, in one sentence; not the method where the arms' names say it."""
    said = []
    for key, values in summary["settings"].items():
        most, *rest = sorted(dict.fromkeys(values.values()), key=list(values.values()).count, reverse=True)
        if key == "method" and all(arm.startswith(value) for arm, value in values.items()):
            continue
        told = [f"{value or 'empty'} in {' and '.join(arm for arm in values if values[arm] == value)}"
                for value in rest]
        others = "the others" if len(values) > 2 else next(arm for arm in values if values[arm] == most)
        said.append(f"{key} is {', '.join(told)}, {most or 'empty'} in {others}")
    return [f"Settings that differ: {'; '.join(said)}."] if said else []


def each(summary: dict[str, Any], *tellers: Any) -> list[str]:
    """What the tellers say of each arm; an arm of which there is nothing to say is passed over."""
    said = [tell(name, arm) for name, arm in summary["methods"].items() for tell in tellers]
    return [sentence for sentence in said if sentence]


def accuracy(name: str, arm: dict[str, Any]) -> str:
    """Held-out accuracy before and after, and whether it is above the reference's."""
    base, final, above = arm["accuracy_base"], arm["accuracy_final"]["mean"], arm["accuracy_above_grpo"]
    said = f"{name}: held-out accuracy goes from {show(base)} to {show(final)} ({final - base:+.3f}). {arm['note']}"
    if name == arm["reference"] or above["mean"] is None:
        return said.strip()
    verdict = "not above" if above["mean"] <= 0 else "above" if (above["low"] or 0) > 0 else "not shown to be above"
    basis = "one seed alone" if above["low"] is None else "paired by seed"
    return (f"{said.strip()} Its accuracy is {verdict} that of {arm['reference']}: difference "
            f"{show(above, '+.3f')}, {basis}.")


def cost(name: str, arm: dict[str, Any]) -> str:
    """The headline, cost at equal accuracy by each denominator, and beside it the crossing of one target."""
    tokens, target = arm["tokens_equal_ratio"], arm["tokens_to_target_ratio"]
    if name == arm["reference"] or tokens["mean"] is None:
        return ""
    others = {"read": "the prompts", "tokens_update": "the tokens through the update", "seconds": "the seconds"}
    each = [f"{shown(f'{cost}_equal_ratio', arm)} times {what}" for cost, what in others.items()
            if arm[f"{cost}_equal_ratio"]["mean"] is not None]
    crossing = "" if target["mean"] is None else (
        f" To the target alone it is {shown('tokens_to_target_ratio', arm)} times the tokens"
        + ("." if arm["seconds_to_target_ratio"]["mean"] is None else
           f" and {shown('seconds_to_target_ratio', arm)} times the seconds."))
    return (f"{title(name, arm)}: at equal accuracy {arm['reference']} writes {shown('tokens_equal_ratio', arm)} "
            f"times the tokens of {name}, and has {listed(each)}; in tokens written {name} is "
            f"{verdict(tokens, arm['equal_missed'])}.{crossing}")


def shown(key: str, arm: dict[str, Any]) -> str:
    """A ratio with its interval, and whether it is a bound, in words."""
    return BOUNDS[bound(key, arm)] + show(arm[key], ".2f")


def verdict(ratio: dict[str, Any], missed: float | None) -> str:
    """What a ratio at equal accuracy shows, with its interval and the share of the accuracies that were never reached.

    An arm is called cheaper only if it would be even if each of those cost twice all that was spent.
    """
    if ratio["low"] is None or (ratio["low"] <= 2 ** (missed or 0) and ratio["high"] >= 1):
        return "not shown to differ"
    return "cheaper" if ratio["mean"] > 1 else "dearer"


def listed(parts: Sequence[str]) -> str:
    """Parts as an enumeration."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def beaten(summary: dict[str, Any]) -> list[str]:
    """Which arms need fewer tokens at equal accuracy than masa-efficient, or reach the target in more of the seeds."""
    said = []
    for efficient in (EFFICIENT, EFFICIENT + FRESH):
        ours = summary["methods"].get(efficient)
        others = {name: arm for name, arm in summary["methods"].items()
                  if ours and name != efficient and arm["reference"] == ours["reference"] and arm["target"] is not None}
        lines: dict[str, bool] = {}  # what is said, and whether it is sure
        for name, arm in others.items():
            ratio, missed = arm["tokens_below_efficient"], arm["never_crossed"] / arm["seeds"]
            if (ratio["mean"] or 0) > 2 ** (arm["equal_missed"] or 0):  # see verdict
                sure = verdict(ratio, arm["equal_missed"]) == "cheaper"
                lines[f"{title(name, arm)} needs fewer tokens at equal accuracy: {efficient} spends "
                      f"{show(ratio, '.2f')} times as many{'' if sure else ', which can be chance'}"] = sure
            if missed < ours["never_crossed"] / ours["seeds"]:
                lines[f"{title(name, arm)} reaches the target in more of its seeds"] = True
        if lines:
            said.append(f"{efficient} {'is' if any(lines.values()) else 'may be'} beaten. " + ". ".join(lines) + ".")
        elif others:
            said.append(f"No arm needs fewer tokens at equal accuracy than {efficient}.")
    return said


def arithmetic(name: str, arm: dict[str, Any]) -> str:
    """Where the tokens to the target went."""
    parts = arm["tokens_of_reference"]
    if name == arm["reference"] or parts["tokens"] is None:
        return ""
    streams = " and ".join(f"{100 * parts[key]:.1f} for {figures.STREAMS[key][0]}" for key in COST if parts[key])
    return (f"{title(name, arm)}: where {arm['reference']} spends 100 tokens to the target it spends {streams}, "
            f"{100 * parts['tokens']:.1f} in all; {arm['reference']} takes {shown('steps_to_target_ratio', arm)} "
            "times its steps.")


def calibration(name: str, arm: dict[str, Any]) -> str:
    """How far off predictions are, and what paid for them."""
    error = arm["calibration_error"]
    if error["after"]["mean"] is None:
        return ""
    caveat = (CAVEATS.get(arm["difficulty"], "") if arm["tokens_meta"] else
              READ if arm["method"] in PREDICTING else
              "Nothing paid for its predictions.")
    floor = {when: value for when, value in arm["calibration_floor"].items() if value is not None}
    least = f" (a perfect predictor: {show(arm['calibration_floor'])}, by the luck of the samples)" if floor else ""
    return f"{name}: expected calibration error {show(error)}{least}. {caveat}".strip()


def alignment(name: str, arm: dict[str, Any]) -> str:
    """Whether predictions fall first and then rise."""
    found = arm["drop_then_align"]
    return (f"{name}: the mean predicted pass rate first falls and then rises towards the true one in {show(found)} "
            f"seeds (fall {show(found['fall'])}, rise {show(found['rise'])}; the bottom is chosen on every other step "
            "and measured on the steps between, each change tested at 5 % against noise as much alike from step to "
            "step).") if found["measured"] else ""


def gate(name: str, arm: dict[str, Any]) -> str:
    """What gate and cap did."""
    means = {key: show(arm[key]["mean"], form) for key, form in (
        ("gate_steps", ".0%"), ("gate_start", ".0f"), ("gate_switches", ".1f"), ("cap_steps", ".0%"),
        ("collapsed", ".0%"))}
    if means["collapsed"] == "-":  # only masa-efficient measures it
        return ""
    said = f"{name}: the gate never acts"
    if arm["gate_steps"]["mean"]:
        said = (f"{name}: the gate acts in {means['gate_steps']} of the steps, first in step {means['gate_start']}, "
                f"goes off again {means['gate_switches']} times, and drops {show(arm['dropped'], '.2f')} of the "
                "candidates")
    if arm["gate_precision"]["mean"] is not None:
        said += (f"; by re-checks, precision {show(arm['gate_precision'], '.2f')}, recall "
                 f"{show(arm['gate_recall'], '.2f')}, signal lost {show(arm['signal_lost'], '.2f')}")
    if arm["cap_steps"]["mean"]:
        said += (f"; the cap acts in {means['cap_steps']} of the steps, stops {show(arm['stopped'], '.2f')} of the "
                 f"solutions and cuts {show(arm['right_cut'])} of the right ones")
    return f"{said}; predictions are collapsed in {means['collapsed']} of the steps."


def awareness(name: str, arm: dict[str, Any]) -> str:
    """How predictions and what came true go together."""
    if arm["parse_rate"]["after"] is None and arm["r_pass_rate"]["after"] is None:
        return ""
    moves = {key: f"{show(arm[key]['before'], '.2f')} -> {show(arm['final'][key], '.2f')}"
             for key in ("r_pass_rate", "r_pass_rate_within", "r_length")}
    length = "" if arm["parse_rate"]["after"] is None else f"; r of the length {moves['r_length']}"
    return (f"{name}: r of predicted and true pass rate {moves['r_pass_rate']}, within levels "
            f"{moves['r_pass_rate_within']} (prompt length alone {show(arm['r_prompt_length'], '.2f')}){length}.")


def levels(name: str, arm: dict[str, Any]) -> str:
    """The levels of the least and of the largest gain."""
    gains = {level: gain for level, gain in arm["gain_by_level"].items() if gain is not None}
    most, least = max(gains, key=gains.get), min(gains, key=gains.get)
    return f"{name}: gains from {gains[least]:+.3f} (level {least}) to {gains[most]:+.3f} (level {most})."


def pass_at_32(name: str, arm: dict[str, Any]) -> str:
    """pass@32 before and after."""
    base, final = arm["pass_at_32_base"], arm["pass_at_32_final"]
    return f"{name}: pass@32 goes from {show(base)} to {show(final)}." if base else ""


def lengths(name: str, arm: dict[str, Any]) -> str:
    """Predicted against actual lengths."""
    if arm["parse_rate"]["after"] is None:
        return ""
    return (f"{name}: r of predicted and actual length {show(arm['r_length'], '.2f')}, mean error "
            f"{show(arm['mae_length'], '.1f')} tokens.")


def streams(name: str, arm: dict[str, Any]) -> str:
    """Where the tokens of a run went."""
    shares = [f"{arm[key] / max(arm['tokens'], 1):.0%} {figures.STREAMS[key][0]}" for key in COST if arm[key]]
    return f"{name}: {arm['tokens']:,.0f} tokens in a run, {', '.join(shares)}."


def phases(steps: pd.DataFrame) -> list[str]:
    """The share of each arm's seconds that is sampling."""
    totals = steps.groupby("arm", sort=False)[["seconds_generate", "seconds_total"]].sum()
    return [f"{arm}: {spent / total:.0%} of the time is sampling." for arm, (spent, total) in totals.iterrows()]


def trends(steps: pd.DataFrame, names: dict[str, str]) -> list[str]:
    """An arm's means over the first and the last tenth of the steps, of the columns that it has."""
    tenth, said = max(1, int(steps["step"].max()) // 10), []
    for arm, part in steps.groupby("arm", sort=False):
        first, last = part[part["step"] <= tenth], part[part["step"] > steps["step"].max() - tenth]
        moves = [f"{label} {first[name].mean():.2f} -> {last[name].mean():.2f}" for name, label in names.items()
                 if name in part and last[name].notna().any()]
        said += [f"{arm}, first and last tenth of the steps: {', '.join(moves)}."] if moves else []
    return said
