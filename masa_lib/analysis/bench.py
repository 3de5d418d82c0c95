"""Gates side by side, as `masa bench gates` trains and shows them: a judged comparison that a new gate can join.

All meet the same problems, which come back, the same seeds and as many updates. Costs are those of `grpo`, which rolls
out everything, over theirs; the ends are `random`, which chooses nothing, and `oracle`, which knows. What the studies
have recorded with the same settings is not trained again. Training is the business of `study`, costs of `compare`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masa_lib import DATA, ROOT
from masa_lib import crash_safe_files as files
from masa_lib.analysis import report, study, text_tables
from masa_lib.analysis.compare import compare_runs
from masa_lib.analysis.records import REFERENCE
from masa_lib.config import METHODS, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.gates import registry
from masa_lib.runs.folder import is_run

#: studies of one set of problems, whose arms and records are taken
STUDIES = ("efficiency", "beliefs")
#: the ends of every table: what chooses nothing, and what knows
LOW, HIGH = "random", "oracle"
#: of `report.TABLE`, what is shown, and what it is called here
COLUMNS = {"seeds": "seeds", "optimiser updates": "updates", "accuracy, final": "accuracy",
           "accuracy above grpo": "above grpo", "tokens, all streams": "tokens written",
           "prompts read, tokens": "prompts read", "tokens through the update": "update", "seconds": "seconds",
           "tokens at equal accuracy, ratio": "written, ratio", "prompts read at equal accuracy, ratio": "read, ratio",
           "update at equal accuracy, ratio": "update, ratio", "seconds at equal accuracy, ratio": "seconds, ratio",
           "all computed at equal accuracy, ratio": "all computed, ratio", "precision of the gate": "precision"}
TABLE = "gates.md"


def plan(names: Sequence[str], seeds: str, jobs: int, out: Path, changes: Mapping[str, Any]) -> study.Study:
    """The study of these gates, the reference and both ends.

    Args:
        names: of gates; none: all that there are.
        seeds: a count or a span, as in a study file.
        jobs: runs at a time.
        out: where they are trained.
        changes: dotted settings of the gates that no study has an arm of.

    Raises:
        ConfigError: there is no such gate, seed or setting.
    """
    if unknown := [name for name in names if name not in registry.GATES]:
        raise ConfigError(f"There is no gate {unknown[0]!r}; there are {', '.join(registry.GATES)}, and those of "
                          "a file that --with names.")
    known = [study.load(ROOT / "studies" / f"{name}.toml") for name in STUDIES]
    arms = {arm.name: arm for one in known for arm in one.arms}
    wanted = dict.fromkeys((REFERENCE, LOW, *(names or registry.GATES), HIGH))
    chosen = [dataclasses.replace(arms.get(name) or _new(name, arms[REFERENCE], changes),
                                  seeds=study.span("--seeds", int(seeds) if seeds.isdigit() else seeds))
              for name in wanted]
    hours = known[0].hours * known[0].jobs / len(known[0].runs())
    return study.Study("Gates on the pocket model", out, jobs, hours * sum(len(arm.seeds) for arm in chosen) / jobs,
                       tuple(chosen))


def _new(name: str, reference: study.Arm, changes: Mapping[str, Any]) -> study.Arm:
    """An arm of a gate that no study has: everything as of the reference, but the method and these settings."""
    changes = {**reference.changes, "record.final_model": "none", **changes, "method": name}
    return dataclasses.replace(reference, name=name, about=METHODS[name], changes=changes)


def recorded(planned: study.Planned) -> Path | None:
    """Where a study has recorded a run with these very settings, to its end; None where none has."""
    for name in STUDIES:
        place = DATA / "runs" / name / planned.path.name
        with contextlib.suppress(RunError):
            if is_run(place) and study.progress(dataclasses.replace(planned, path=place))["state"] == "finished":
                return place
    return None


def lacking(whole: study.Study) -> study.Study:
    """What of a study no other one has recorded, and is to be trained."""
    arms = [dataclasses.replace(arm, seeds=[seed for seed in arm.seeds if not recorded(study.Planned(
        whole.out / f"{arm.name}-s{seed}", {**arm.changes, "seed": seed}))]) for arm in whole.arms]
    left = dataclasses.replace(whole, arms=tuple(arm for arm in arms if arm.seeds))
    return dataclasses.replace(left, hours=whole.hours * len(left.runs()) / len(whole.runs()))


def judge(whole: study.Study) -> str:
    """Train what is lacking, write the table into the study's folder, and give it as text."""
    if left := lacking(whole).arms:
        study.train(dataclasses.replace(whole, arms=left))
    summary = compare_runs([recorded(planned) or planned.path for planned in whole.runs()]).summary
    with files.writing(whole.out, "choose another folder with --out"):
        whole.out.mkdir(parents=True, exist_ok=True)
        (whole.out / TABLE).write_text(f"{markdown(summary)}\n\n{report.NOTES}\n", encoding="utf8")
    return f"{text(summary)}\n\nWritten: {whole.out / TABLE}."


def smoke(whole: study.Study, changes: Mapping[str, Any]) -> str:
    """The table of a few tiny steps of every gate, which shows that all run and nothing else."""
    def told(small: study.Study) -> str:
        return text(compare_runs([planned.path for planned in small.runs()]).summary)

    return study.smoke(whole, changes, told)


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Measures (rows) by gates (columns), between the two ends; what no gate has is left out."""
    methods = summary["methods"]
    between = [name for name in methods if name in registry.GATES and name not in (LOW, HIGH)]
    order = (REFERENCE, LOW, *between, HIGH)
    head, *found = report.table_rows({**summary, "methods": {name: methods[name] for name in order if name in methods}})
    known = {label.strip(): cells for label, *cells in found}
    return [["gate", *head[1:]], *([shown, *known[label]] for label, shown in COLUMNS.items() if label in known)]


def text(summary: Mapping[str, Any]) -> str:
    """The table for a terminal, and what is unfair in it."""
    return "\n".join([report.blocks(rows(summary)), *(f"Warning: {said}" for said in summary["warnings"])])


def markdown(summary: Mapping[str, Any]) -> str:
    """The table in Markdown, a gate a row."""
    return text_tables.markdown(list(zip(*rows(summary), strict=True)))
