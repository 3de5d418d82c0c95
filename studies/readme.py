"""Write what the records say into the texts: `python studies/readme.py`; `--picture` draws the README's figure anew.

A table stands between `<!-- records: NAME -->` and `<!-- end of records -->`, a number within a sentence between
`<!--GROUP.NAME-->` and `<!--/-->`. The words around a number are the text's own. What has not been recorded yet leaves
its place empty, or says that it is not recorded yet. A test runs this and finds no difference.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from masa_lib import DATA, ROOT, config
from masa_lib.analysis import bench, compare, intervals, report, sentences
from masa_lib.analysis import study as plans
from masa_lib.analysis.sentences import show
from masa_lib.lessons import gate_trials
from masa_lib.models import memory
from masa_lib.runs.folder import runs_in

TEXTS = ("README.md", "docs/results.md", "docs/reference.md", "docs/gates.md")
EQUAL = [f"{label} at equal accuracy, ratio" for label in ("tokens", "prompts read", "update", "seconds",
                                                           "all computed", "update thrice")]
COSTS = ["tokens, all streams", "prompts read, tokens", "tokens through the update", "seconds", *EQUAL,
         "tokens to target, ratio"]
KNOWING = ["r of the pass rate", "within levels"]
GATING = ["seeds", "accuracy, final", "accuracy above grpo", *COSTS, "seeds that never reach it", *KNOWING[:1],
          "precision of the gate", "recall of the gate"]
BEFORE = ["seeds", "optimiser updates", "accuracy, base", "accuracy, final", *KNOWING, *COSTS]


class Column(NamedTuple):
    """Studies that are compared with each other; which of their arms are shown (none: all); what precedes a name."""

    studies: tuple[str, ...]
    arms: tuple[str, ...] = ()
    prefix: str = ""


#: studies of one set of problems
BELIEFS = bench.STUDIES
#: the costs that are said in words
COUNTED = {"tokens": "tokens written", "read": "prompts read", "tokens_update": "the update",
           "computed": "all computed"}
#: by marker: what stands side by side, and the measures of it
TABLES = {
    "baseline": ((Column(("baseline",), prefix="pocket, "), Column(("smollm2",), prefix="SmolLM2, ")), BEFORE),
    "efficiency": ((Column(("efficiency",)),), GATING),
    "knowing": ((Column(("baseline", "knowing")),), BEFORE),
    "beliefs": ((Column(BELIEFS, ("grpo", "mopps", "oracle (privileged)", "masa-read", "history", "random", "probe",
                                  "anchor")),), GATING),
    "beliefs-fresh": ((Column(BELIEFS, ("grpo-fresh", "masa-read-fresh", "probe-fresh", "random-fresh")),), GATING),
    "beliefs-learned": ((Column(BELIEFS, ("masa-read", "masa-read-fewer", "history-fewer", "masa-read-brier",
                                          "masa-read-think", "masa-read-blind", "masa-read-half",
                                          "masa-read-double")),),
                        [*GATING, KNOWING[1]])}


@functools.cache
def recorded(*studies: str) -> compare.Comparison | None:
    """The comparison of recorded studies; none where one of them is not there."""
    folders = [DATA / "runs" / name for name in studies]
    return compare.compare_runs(folders) if all(folder.exists() for folder in folders) else None


def table(columns: Sequence[Column], labels: Sequence[str]) -> str:
    """Measures (rows) by arms (columns) in Markdown, those that there are; of a single comparison, arms by measures."""
    cells = [["", *labels]]
    for studies, arms, prefix in columns:
        found = recorded(*studies)
        if found is None:
            return ""
        head, *rows = report.table_rows(found.summary)
        known = {row[0].strip(): row[1:] for row in rows}
        cells += [[prefix + arm, *(known[label][place] if label in known else "-" for label in labels)]
                  for place, arm in enumerate(head[1:]) if not arms or arm in arms]
    shown = [row for row in zip(*cells, strict=True) if set(row[1:]) != {"-"}]
    rows = shown if len(columns) > 1 else list(zip(*shown, strict=True))
    lines = ["| " + " | ".join(row).lstrip() + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def baseline() -> dict[str, str]:
    """What training does to self-knowledge and to solving."""
    methods = recorded("baseline").summary["methods"]
    found = {"tokens": f"{methods['masa']['tokens'] / methods['grpo']['tokens']:.1f}",
             "above": show(methods["masa"]["accuracy_above_grpo"], "+.3f")}
    for name in ("grpo", "masa"):
        before, after = show(methods[name]["r_pass_rate"], ".2f").split(" -> ")
        found |= {f"{name}_before": before, f"{name}_after": after, f"{name}_within": show(
            methods[name]["r_pass_rate_within"]["after"], ".2f"), f"{name}_accuracy": show(
            methods[name]["accuracy_final"]["mean"], ".2f")}
    return found


def smollm2() -> dict[str, str]:
    """The same of the pretrained model."""
    methods = recorded("smollm2").summary["methods"]
    return {"base": show(methods["grpo"]["accuracy_base"], ".2f"), **{
        f"{name}_accuracy": show(methods[name]["accuracy_final"], ".2f") for name in ("grpo", "masa")},
        **dict(zip(("before", "after"), show(methods["masa"]["r_pass_rate"], ".2f").split(" -> "), strict=True))}


def gate() -> dict[str, str]:
    """What masa-efficient saves and what it pays, in `efficiency`."""
    methods = recorded("efficiency").summary["methods"]
    ours, grpo, mopps = (methods[arm] for arm in ("masa-efficient", "grpo", "mopps"))
    shares = {f"{key}_share": f"{ours[key] / grpo[key]:.{digits}f}" for key, digits in (
        ("tokens", 2), ("read", 1), ("tokens_update", 1), ("computed", 2), ("computed_thrice", 2))}
    return shares | {
        "seeds": str(ours["seeds"]), "dropped_right": f"{100 * ours['gate_precision']['mean']:.0f}",
        "masa_share": f"{methods['masa']['tokens'] / grpo['tokens']:.2f}",
        "fresh_share": f"{methods['masa-efficient-fresh']['tokens'] / methods['grpo-fresh']['tokens']:.2f}",
        "mopps_below": show(mopps["tokens_below_efficient"], ".2f"),
        **{f"{name}_{key}": show(arm[f"{key}_equal_ratio"], ".2f")
           for name, arm in (("ours", ours), ("mopps", mopps)) for key in ("tokens", "computed")}}


def seconds() -> dict[str, str]:
    """The runs that had the machine to themselves, and the tokens at equal accuracy with them among all seeds."""
    timed, pooled = recorded("seconds"), recorded("efficiency", "seconds")
    steps = timed.steps.groupby("arm").mean(numeric_only=True)
    said = {"seeds": str(pooled.summary["methods"]["mopps"]["seeds"])}
    for arm, name in (("masa-efficient", "ours"), ("mopps", "mopps")):
        said |= {f"{name}_equal": show(timed.summary["methods"][arm]["seconds_equal_ratio"], ".2f"),
                 f"{name}_tokens": show(pooled.summary["methods"][arm]["tokens_equal_ratio"], ".2f")}
        for cost in ("seconds", "computed_thrice"):
            costs = timed.runs.pivot(index="seed", columns="arm", values=cost)
            said[f"{name}_{cost}"] = show(intervals.paired_ratio(costs["grpo"], costs[arm]), ".2f")
    for arm, name in (("masa-efficient", "ours"), ("grpo", "grpo")):
        row = steps.loc[arm]
        said |= {f"{name}_{phase}": f"{row[f'seconds_{phase}']:.2f}" for phase in ("total", "generate", "update")}
        said |= {f"{name}_updated": f"{row['tokens_update']:,.0f}",
                 f"{name}_signal": f"{1 - row['zero_variance_solution']:.2f}"}
    return said


def choices() -> dict[str, str]:
    """Two studies that share the seeds of `baseline`: the peaked score, and less weight of the predictions."""
    runs, above = {}, {}
    for study in ("score", "weight"):
        found = recorded("baseline", study)
        runs |= {arm: rows.set_index("seed") for arm, rows in found.runs.groupby("arm")}
        above |= {arm: show(row["accuracy_above_grpo"], "+.3f") for arm, row in found.summary["methods"].items()}
    peaked, masa = runs["kernel"], runs["masa"]
    within, accuracy = (masa["pass_rate_r_within_after"] - peaked["pass_rate_r_within_after"],
                        peaked["accuracy_after"] - masa["accuracy_after"])
    return {"within": shown(peaked["pass_rate_r_within_after"]), "lower": shown(within),
            "accuracy": shown(accuracy, "+.2f"), "half_accuracy": above["masa-half"],
            "shared_accuracy": above["masa-shared"], "r": f"{masa['pass_rate_r_after'].mean():.2f}",
            "half_r": f"{runs['masa-half']['pass_rate_r_after'].mean():.2f}",
            "shared_r": f"{runs['masa-shared']['pass_rate_r_after'].mean():.2f}",
            "shared_tokens": f"{100 * (runs['masa-shared']['tokens'].mean() / runs['grpo']['tokens'].mean() - 1):.0f}"}


def shown(values: pd.Series, form: str = ".2f") -> str:
    """Mean and interval over seeds."""
    return show(dict(zip(("mean", "low", "high"), intervals.mean_interval(values.dropna()), strict=True)), form)


def engines() -> dict[str, str]:
    """How fast the engines sample, as recorded."""
    speed = json.loads((DATA / "benchmarks" / "engines" / "smollm2.json").read_text(encoding="utf8"))
    return {"transformers": f"{speed['vllm_to_transformers']:.1f}", "paged": f"{speed['vllm_to_paged']:.0f}",
            "generate": f"{speed['vllm_to_generate']:.1f}", "bare": f"{speed['vllm_to_bare']:.2f}",
            "sync": f"{100 * speed['sync_share']:.0f}"}


def trl() -> dict[str, str]:
    """How many times TRL's samples a second, as recorded."""
    return {path.stem: f"{json.loads(path.read_text(encoding='utf8'))['ratios']['samples_s']:.1f}"
            for path in (DATA / "benchmarks" / "vs_trl").glob("*.json")}


def alignment() -> dict[str, str]:
    """From which step on the beliefs of notebook 04's training follow the truth, and after how much computing."""
    record = json.loads((DATA / "benchmarks" / "alignment" / "pocket.json").read_text(encoding="utf8"))
    seeds = record["seeds"].values()
    return {"level": str(record["r"]), "seeds": str(len(seeds)), **{
        key: f"{min(one[key] for one in seeds):.0f} to {max(one[key] for one in seeds):.0f}"
        for key in ("step", "processor", "seconds")}}


def runs_of() -> dict[str, str]:
    """How many runs of each study are recorded, of those that it asks for."""
    said = {}
    for place in (ROOT / "studies").glob("*.toml"):
        asked, folder = len(plans.load(place).runs()), DATA / "runs" / place.stem
        there = len(runs_in(folder)) if folder.exists() else 0
        said[place.stem] = ("not recorded yet" if not there else f"{there} of {asked} runs" if there < asked else
                            f"{asked} run{'s' * (asked > 1)}")
    return said


def in_words(arm: Mapping[str, Any], costs: Sequence[str] = ("tokens", "computed")) -> str:
    """What grpo's costs over those of an arm are at equal accuracy, each with what it shows."""
    return sentences.listed([f"{sentences.shown(f'{cost}_equal_ratio', arm)} in {COUNTED[cost]} "
                             f"({sentences.verdict(arm[f'{cost}_equal_ratio'], arm['equal_missed'])})"
                             for cost in costs])


def beside_history() -> str:
    """What the choice by history alone costs at equal accuracy over what masa-read does, over the seeds of both."""
    found = {cost: gate_trials.against(recorded(*BELIEFS), "masa-read", "history", cost)
             for cost in ("tokens", "computed")}
    each = [f"{show(ratio, '.2f')} in {COUNTED[cost]} ({ratio['verdict']})" for cost, ratio in found.items()]
    return f"{sentences.listed(each)}, by {found['tokens']['seeds']} seeds"


def reading() -> str:
    """What predictions that are read came to, for the README; the verdicts are computed, too."""
    found = recorded(*BELIEFS)
    if found is None:
        return ""
    read, written = (found.summary["methods"][arm] for arm in ("masa-read", "masa"))
    r = {arm["method"]: show(arm["r_pass_rate"], ".2f").replace("->", "to") for arm in (read, written)}
    return textwrap.fill(
        f"* **Read instead of written**, as `masa-read` does, a prediction needs no token. On harder problems (levels "
        f"1 to 18, {read['seeds']} seeds) r goes from {r['masa-read']}, with written ones from {r['masa']}. At equal "
        f"accuracy GRPO's cost over its own is {in_words(read, [*COUNTED])}; that of the same choice of problems by "
        f"their history alone is {beside_history()}.", 118, subsequent_indent="  ", break_on_hyphens=False)


def why_not_computed(grpo: dict[str, Any], read: dict[str, Any]) -> str:
    """Where a lead in tokens written goes when all computed ones count: the arithmetic of three costs."""
    kinds = {"tokens": "written", "read": "read as prompts", "tokens_update": "through the update"}
    shares = {kind: grpo[kind] / grpo["computed"] for kind in kinds}
    ratios = {kind: read[f"{kind}_equal_ratio"]["mean"] for kind in kinds}
    parts = [f"{shares[kind]:.0%} are {about}, of which masa-read takes {1 / ratios[kind]:.2f} times as many"
             for kind, about in kinds.items()]
    free = {kind: 1.0 if kind == "read" else ratios[kind] for kind in kinds}
    with_free, least = (1 / sum(shares[kind] / found[kind] for kind in kinds)
                        for found in (free, free | {"tokens_update": 1.0}))
    return textwrap.fill(
        f"**Why all computed tokens are another matter.** Of the tokens that grpo computes to an accuracy, "
        f"{sentences.listed(parts)}: more of its groups have a signal, so that each of its steps learns from more "
        f"tokens. Dearer prompts are a part of it: read as cheaply as grpo's, they would leave a ratio of "
        f"{with_free:.2f}; with an update as small as grpo's besides it would be {least:.2f}. (By the means above, "
        "whose ratios are each over its own seeds.)", 118, break_on_hyphens=False)


def surer_than_right(runs: pd.DataFrame) -> str:
    """What the beliefs say of held-out problems above what is right, where problems come back and where none does."""
    over = {arm: runs[runs["arm"] == arm].eval("predicted_pass_rate_after - accuracy_after")
            for arm in ("masa-read", "masa-read-fresh")}
    said = {arm: f"{show(intervals.over_seeds(values), '+.2f')} ({len(values)} seeds)" for arm, values in over.items()}
    return textwrap.fill(
        f"At the end the belief of `masa-read` says {said['masa-read']} more of held-out problems than is right. On "
        f"a stream of problems none of which comes back it is {said['masa-read-fresh']}. That would fit what a pool "
        "does: its problems are solved better for having been met, and what is learned of them says too much of "
        "others. What the belief said of the pool's own problems was not looked at here.", 118, break_on_hyphens=False)


def beliefs() -> str:
    """The section of what is read in place of being written: tables, and what they show of each cost."""
    tables = {name: table(*TABLES[name]) for name in ("beliefs", "beliefs-fresh", "beliefs-learned")}
    if not all(tables.values()):
        return ""
    methods = recorded(*BELIEFS).summary["methods"]
    r = {arm: show(methods[arm]["r_pass_rate"], ".2f") for arm in ("masa-read", "masa")}
    arms = [arm for arm in ("masa-read", "history", "probe", "anchor", "random") if arm in methods]
    return "\n\n".join([
        "## Predictions that are read",
        "`masa compare data/runs/efficiency data/runs/beliefs`. The arms from `masa-read` on have one rule of choice,\n"
        "and as few problems a step: only where the prior about a problem comes from differs. grpo's costs over\n"
        "theirs at equal accuracy:",
        "\n".join(f"* `{arm}`: {in_words(methods[arm])}." for arm in arms),
        f"The cost of `history` over that of `masa-read`, paired by seed, is\n{beside_history()}. Whether it is the "
        "belief\nthat saves can be read from this, not from the list, whose arms have different seeds.",
        why_not_computed(methods["grpo"], methods["masa-read"]),
        f"In these problems r of `masa-read` goes {r['masa-read']}, that of `masa`, which writes its predictions,\n"
        f"{r['masa']}. All begin with one model, but are measured differently before training: a written prediction "
        "has\nvalues drawn blindly, as it was taught; a belief is read behind the solution's prompt and an empty list "
        "of\nnotions, where the model was taught nothing, and its nine probabilities are what they happen to be.",
        surer_than_right(recorded(*BELIEFS).runs),
        tables["beliefs"],
        "On a stream of problems none of which comes back:", tables["beliefs-fresh"],
        "Other ways to learn and to read the belief (`studies/beliefs.toml` says what each arm changes):",
        tables["beliefs-learned"]])


def gates() -> str:
    """The table of gates, of all that is recorded on their problems."""
    found = recorded(*bench.STUDIES)
    return found and bench.markdown(found.summary)


def told() -> str:
    """The section of self-knowledge at equal solving."""
    found = table(*TABLES["knowing"])
    return found and ("**Read, and nothing left out** (`masa compare data/runs/baseline data/runs/knowing`): "
                      f"`masa-told`\nis `masa` whose belief is read.\n\n{found}")


def centred() -> str:
    """What leaving out the standard deviation of the predictions' rewards does to their overconfidence."""
    found = recorded("baseline", "normalise")
    if found is None:
        return ""
    runs = {arm: rows.set_index("seed") for arm, rows in found.runs.groupby("arm")}
    over = {arm: runs[arm].eval("predicted_pass_rate_after - accuracy_after") for arm in ("masa", "masa-centred")}
    change = over["masa-centred"] - over["masa"].reindex(over["masa-centred"].index)
    left, by = intervals.over_seeds(over["masa-centred"]), intervals.over_seeds(change)
    verdict = "surer" if by["low"] > 0 else "less sure" if by["high"] < 0 else "not shown to be more or less sure"
    within = {arm: shown(runs[arm]["pass_rate_r_within_after"]) for arm in over}
    return textwrap.fill(
        f"**Without the division** by a standard deviation (`masa compare data/runs/baseline data/runs/normalise`, "
        f"{len(change)} seeds) predictions are {'' if left['low'] > 0 else 'not shown to be '}too high on the whole: "
        f"overconfidence {show(left, '+.2f')}, where `masa` has {shown(over['masa'], '+.2f')}. Paired by seed "
        f"the difference is {show(by, '+.2f')}: {verdict}. r within levels is {within['masa-centred']} rather "
        f"than {within['masa']}. Advantages that are not divided are smaller, too, so the arms also differ in how "
        "strongly predictions are trained.", 120, break_on_hyphens=False)


def entries(kind: str, about: Mapping[str, str]) -> str:
    """A table of the library: name, and one line about it."""
    return "\n".join([f"| {kind} | what |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in about.items())])


#: by group, the numbers that stand within sentences
NUMBERS = {"baseline": baseline, "smollm2": smollm2, "gate": gate, "seconds": seconds, "choices": choices,
           "engines": engines, "trl": trl, "alignment": alignment, "recorded": runs_of}
#: by marker, what stands in a block of its own
BLOCKS: dict[str, Callable[[], str]] = {
    **{name: functools.partial(table, *TABLES[name]) for name in ("baseline", "efficiency")},
    "reading": reading, "beliefs": beliefs, "knowing": told, "centred": centred, "memory": memory.table,
    "gates": gates,
    "methods": functools.partial(entries, "method", config.METHODS),
    "engines": functools.partial(entries, "engine", config.ENGINES)}


def filled(text: str) -> str:
    """A text with its tables and numbers as the records have them.

    Raises:
        KeyError: a marker names what is not here.
    """
    said = functools.cache(lambda group: NUMBERS[group]())
    text = re.sub(r"(<!-- records: (\S+) -->\n).*?(<!-- end of records -->)",
                  lambda at: at[1] + f"{BLOCKS[at[2]]()}\n".lstrip("\n") + at[3], text, flags=re.DOTALL)
    return re.sub(r"<!--(\w+)\.([\w-]+)-->.*?<!--/-->",
                  lambda at: f"<!--{at[1]}.{at[2]}-->{said(at[1])[at[2]]}<!--/-->", text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--picture" in sys.argv:
        import picture  # beside this file

        picture.PLACE.write_text(picture.animation(), encoding="utf8")
    for name in TEXTS:
        place = ROOT / name
        place.write_text(filled(place.read_text(encoding="utf8")), encoding="utf8")
