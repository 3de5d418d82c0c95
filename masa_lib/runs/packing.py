"""Packing a study: its finished runs, as folders and packed before, become one packed form (`packed`).

The new form is written whole beside the old one, read back and compared, and put in place by one rename; a process
killed anywhere leaves one of both, and the next call goes on. Only then do the folders go that are packed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import tomli_w

from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.runs import packed
from masa_lib.runs.folder import ENVIRONMENT, LOCK, PLACES, RECORDS, PackedRun, Run, runs_in
from masa_lib.runs.progress import PROGRESS
from masa_lib.runs.records import STATUS

#: what the folder of a run may hold to be packed and removed; the last ones are of no use to a reader
PACKED = {*RECORDS, ENVIRONMENT, STATUS, "beliefs.parquet", "model", LOCK, PLACES, "tensorboard", "control.json",
          "train.log", PROGRESS} - {"checkpoints"}
#: zstd's level: packing takes seconds, and reading is as fast as at any
LEVEL = 19


def pack(study: str | Path, out: str | Path | None = None, *, finished_only: bool = False,
         models: bool = True) -> tuple[list[str], list[str]]:
    """Pack the finished runs of a study, together with what is packed there already.

    Args:
        study: the folder.
        out: another folder for the packed form, which may hold one; without it, it takes the place of the folders.
        finished_only: leave unfinished runs as they are, beside the packed ones.
        models: keep the trained models of the runs that are packed now.

    Returns:
        The names of the runs that were packed now, and of those left as folders.

    Raises:
        RunError: there is nothing to pack, a run is not finished, cannot be read, or holds what would be lost.
    """
    study, target = Path(study), Path(out or study)
    for folder in (study, target):
        _settle(folder)
    runs = {path.name: Run.open(path) for path in runs_in(study)}
    in_place = target.resolve() == study.resolve()
    runs = {name: run for name, run in runs.items() if not (in_place and run.is_packed)}
    left = [name for name, run in runs.items() if run.status["state"] != "finished"]
    if left and not finished_only:
        raise RunError(f"The run {runs[left[0]].path} is not finished ({runs[left[0]].status['state']}); go on with it "
                       "first, or pack the finished ones alone with --finished-only.")
    runs = {name: run for name, run in runs.items() if name not in left}
    if not runs:
        raise RunError(f"There is no finished run to pack in {study}.")
    folders = [run for run in runs.values() if in_place]
    with contextlib.ExitStack() as stack:
        for run in folders:
            _check_contents(run.path)
            stack.enter_context(run.lock())
        before = {name: PackedRun(target / name, Config()) for name in packed.PackedStudy(target).runs}
        _put(target, lambda folder: _write(folder, before | runs, runs, models))
        for run in folders:
            shutil.rmtree(run.path)
    return sorted(runs), left


def _put(study: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill the new packed form of a study, and put it in the place of the old one."""
    with files.writing(study, "pack again"):
        study.mkdir(parents=True, exist_ok=True)
        folders.replace_folder(study / packed.ARRIVING, write)
    _settle(study)


def _settle(study: Path) -> None:
    """Put the files of a new packed form in their places; until then they are read from where they arrived."""
    arriving = study / packed.ARRIVING
    if not arriving.is_dir():
        return
    with files.writing(study, "pack again"):
        for path in sorted(arriving.glob(f"{packed.MODELS}/*")):
            _replace(path, study / packed.MODELS / path.name)
        for path in sorted(arriving.iterdir()):
            if path.name != packed.MODELS:
                path.replace(study / path.name)
        shutil.rmtree(arriving)
        files.sync(study)


def _replace(folder: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _check_contents(path: Path) -> None:
    """Refuse a folder that holds what the packed form does not keep, as it is removed once it is packed."""
    if strange := sorted(entry.name for entry in path.iterdir() if entry.name not in PACKED):
        raise RunError(f"The folder {path} holds {strange[0]}, which a packed study does not keep; move or delete it, "
                       "or pack into another folder with --out.")


def _write(folder: Path, runs: Mapping[str, Run], new: Iterable[str], models: bool) -> None:
    """Write the packed form of runs into a folder, with the models of some, and read it back."""
    runs = dict(sorted(runs.items()))
    if wrong := [name for name in runs if not packed.is_name(name)]:
        raise RunError(f"The run {wrong[0]!r} cannot be packed under this name; rename its folder.")
    (folder / packed.CONFIGS).write_text(tomli_w.dumps({
        name: run.recorded_settings() for name, run in runs.items()}), encoding="utf8")
    _write_json(folder / packed.STATUSES, {name: run.status for name, run in runs.items()})
    _write_json(folder / packed.ENVIRONMENTS, {name: run.environment for name, run in runs.items()})
    _write_json(folder / packed.CHANGES, {name: run.changes() for name, run in runs.items() if run.changes()})
    for kind, read in READ.items():
        frames = {name: frame for name, run in runs.items() if len(frame := read(run))}
        if frames:
            pq.write_table(packed.table_of(frames), folder / f"{kind}.parquet", compression="zstd",
                           compression_level=LEVEL)
        _compare(folder, kind, frames)
    for name in new if models else ():
        if runs[name].model.is_dir():
            shutil.copytree(runs[name].model, folder / packed.MODELS / name)


def _problems(run: Run) -> pd.DataFrame:
    """All evaluated problems of a run; the index is the evaluation's step."""
    tables = {int(step): run.evaluation_table(int(step)) for step in run.evaluations()["step"]}
    steps = [step for step, table in tables.items() for _ in range(len(table))]
    return pd.concat(tables.values()).set_axis(steps) if tables else pd.DataFrame()


READ: dict[str, Callable[[Run], pd.DataFrame]] = {
    packed.METRICS: lambda run: run.metrics(), packed.EVALUATIONS: lambda run: run.evaluations(),
    packed.PROBLEMS: _problems, packed.ROLLOUTS: lambda run: run.rollouts(), packed.BELIEFS: lambda run: run.beliefs(),
    packed.READINGS: lambda run: run.readings()}


def _compare(folder: Path, kind: str, frames: Mapping[str, pd.DataFrame]) -> None:
    """Refuse a packed form that does not read as what it was made from; the order of its columns is the study's."""
    study = packed.PackedStudy(folder)
    for name, frame in frames.items():
        try:
            found, frame = study.table(kind, name), frame.reset_index(drop=True)
            frame = frame[list(found)] if set(found) == set(frame) else frame
            pd.testing.assert_frame_equal(found, frame, check_exact=True, check_index_type=False)
        except AssertionError as error:
            raise RunError(f"The {kind} of the run {name} cannot be packed without a loss "
                           f"({' '.join(str(error).split())[:200]}); nothing was changed.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with a line an entry."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.write_text("{" + f"\n{lines}\n" * bool(lines) + "}\n", encoding="utf8")
