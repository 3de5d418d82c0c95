"""A packed study reads as the folders that it was made from, and is never written to."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import rollout_table, write_run

from masa_lib import cli
from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.analysis import compare, report, study
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import MasaError
from masa_lib.lessons import replay, replay_report
from masa_lib.lessons.widgets import training_records
from masa_lib.lessons.widgets import training_view as view
from masa_lib.runs import live_control, packed, packing, parquet
from masa_lib.runs.folder import PackedRun, Run, is_run, last_step, runs_in

CURVE = {0: 0.2, 3: 0.5, 6: 0.6}
ARMS = {"grpo-s0": ("grpo", 0), "masa-s0": ("masa", 0), "masa-s1": ("masa", 1)}


def fill(folder: Path, name: str) -> Run:
    """A finished run with all that a run records; the metrics of grpo lack columns of masa's and have other types."""
    method, seed = ARMS[name]
    more = (lambda step: {"gate_on": bool(step % 2), "count": step}) if method == "masa" else (
        lambda step: {"count": step / 2, "unknown": None})
    run = write_run(folder / name, method, seed, CURVE, steps=6, more=more)
    run.append_change(2, {"update.learning_rate": 1e-5}, request=1)
    for step in (1, 3, 6) if method == "masa" else ():
        table = rollout_table(step, groups=3, solutions=2, predictions=2)
        notions = [["carry", "é"] if stream == "meta" else None for stream in table["stream"]]
        run.write_rollouts(step, table.assign(text="\\boxed{4}", problem="Is 3 < 7?", answer="4", level=1,
                                              notions=notions, reward=table["correct"].astype(float)))
    if method == "masa":
        run.append_beliefs({"step": 1, "problems": ["a", "b"], "beliefs": [[100] * 9, [0] * 8 + [900]],
                            "right": [1, None], "solutions": [2, 0], "weight": [1, 0.5]})
        run.pack_beliefs()
        for step in (2, 4):
            run.append_reading({"step": step, "problems": ["c", "d"], "beliefs": [[100] * 9, [step] * 9]})
        run.save_model(lambda target: (target / "weights.bin").write_bytes(bytes([seed])) and None)
    run.set_status("finished")
    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three finished runs, as folders."""
    place = tmp_path_factory.mktemp("folders") / "study"
    for name in ARMS:
        fill(place, name)
    return place


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study packed beside its folders."""
    place = tmp_path_factory.mktemp("packed") / "study"
    packing.pack(folders, place)
    return place


@pytest.fixture
def place(folders: Path, tmp_path: Path) -> Path:
    """Folders of the study to do anything with."""
    return Path(shutil.copytree(folders, tmp_path / "study"))


def assert_reads_the_same(found: Run, expected: Run) -> None:
    def equal(one: pd.DataFrame, other: pd.DataFrame) -> None:
        pd.testing.assert_frame_equal(one, other, check_exact=True)

    for name in ("config", "status", "environment", "started"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.settings() == expected.settings() and found.changes() == expected.changes() != []
    assert found.config_at(3).update.learning_rate == 1e-5
    equal(found.metrics(), expected.metrics())
    equal(found.evaluations(), expected.evaluations())
    equal(found.rollouts(), expected.rollouts())
    equal(found.beliefs(), expected.beliefs())
    equal(found.readings(), expected.readings())
    assert found.rollout_steps() == expected.rollout_steps() and found.best_step() == expected.best_step() == 6
    for step in expected.evaluations()["step"]:
        equal(found.evaluation_table(step), expected.evaluation_table(step))
    for steps in ([3], [6, 1]) if expected.rollout_steps() else ():
        equal(found.rollouts(steps), expected.rollouts(steps))
    assert last_step(found.path) == last_step(expected.path) == live_control.steps(found.path) == 6
    assert found.model.is_dir() == expected.model.is_dir()


def test_a_packed_run_reads_as_its_folder_did_with_every_type_and_missing_column(folders: Path, whole: Path) -> None:
    assert [path.name for path in runs_in(whole)] == list(ARMS) and not any(whole.glob("*-s*"))
    for path in runs_in(folders):
        found = Run.open(whole / path.name)
        assert found.is_packed and is_run(found.path)
        assert_reads_the_same(found, Run.open(path))
    assert "gate_on" not in Run.open(whole / "grpo-s0").metrics() and Run.open(whole / "grpo-s0").beliefs().empty
    assert Run.open(whole / "masa-s0").metrics()["count"].dtype == np.int64
    assert Run.open(whole / "masa-s1").weights() == (6, whole / "models" / "masa-s1")
    assert (whole / "models" / "masa-s1" / "weights.bin").read_bytes() == b"\1"


def test_compare_replay_and_panel_say_the_same_of_both_forms(folders: Path, whole: Path) -> None:
    assert report.compare([whole], as_json=True) == report.compare([folders], as_json=True)
    one, other = ([compare.compare_runs(path / name).summary for name in ARMS] for path in (folders, whole))
    assert one == other
    assert replay_report.replay(whole / "masa-s0") == replay_report.replay(folders / "masa-s0")
    read = [training_records.read(path / "masa-s1") for path in (whole, folders)]
    assert read[0].readings == read[1].readings and [row["step"] for row in read[0].readings] == [2, 4]
    assert len({view.figure(records).to_json() for records in read}) == 1
    assert Run.open(whole / "masa-s1").beliefs().equals(Run.open(folders / "masa-s1").beliefs())


def test_runs_are_listed_by_a_pattern_of_their_names(whole: Path, folders: Path, tmp_path: Path) -> None:
    for path in (whole, folders):
        assert runs_in(path, "masa-s*") == [path / "masa-s0", path / "masa-s1"]
    assert runs_in(tmp_path) == runs_in(tmp_path / "nowhere") == []
    assert not is_run(whole) and not is_run(whole / "masa-s2") and not is_run(whole / "models" / "masa-s0")
    with pytest.raises(RunError, match=r"There is no run in .*masa-s2"):
        Run.open(whole / "masa-s2")


WRITES: dict[str, Callable[[Run], Any]] = {
    "status": lambda run: run.set_status("stopped"), "metrics": lambda run: run.append_metrics({"step": 7}),
    "change": lambda run: run.append_change(7, {"gate.threshold": 0.5}), "life": lambda run: run.begin_again(6),
    "rollouts": lambda run: run.write_rollouts(7, pd.DataFrame({"step": [7]})), "rewind": lambda run: run.rewind(0),
    "evaluation": lambda run: run.write_evaluation(7, {}, pd.DataFrame({"n": [1]})),
    "checkpoint": lambda run: run.save_checkpoint(7, lambda folder: None),
    "beliefs": lambda run: run.append_beliefs({}),
    "model": lambda run: run.save_model(lambda folder: None), "lock": lambda run: run.lock().__enter__(),
    "live": lambda run: live_control.change(run.path, {"gate.threshold": 0.5}),
    "resume": lambda run: live_control.resume(run.path)}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_a_packed_run_is_refused_in_one_sentence(write: Callable[[Run], Any], whole: Path) -> None:
    before = sorted(whole.rglob("*"))
    with pytest.raises(RunError, match=r"is a part of the packed study .*, which is read and never written to"):
        write(Run.open(whole / "masa-s0"))
    assert sorted(whole.rglob("*")) == before
    Run.open(whole / "masa-s0").pack_beliefs()  # they are


def test_commands_refuse_to_train_where_a_packed_run_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(whole / "masa-s0")
    for command, said in ((["resume", path], "is read and never written to"),
                          (["train", "--out", path], "holds a run")):
        assert cli.main(command) in (1, 2)
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1, printed
    with pytest.raises(RunError, match=r"There is a run .* already, in the packed study"):
        Run.create(path, Config(), "masa train")


def test_the_page_of_a_packed_run_lies_beside_the_study(whole: Path) -> None:
    assert cli.main(["compare", str(whole / "masa-s0")]) == 0
    assert (whole / "masa-s0-report.html").stat().st_size > 10_000
    (whole / "masa-s0-report.html").unlink()


def test_the_files_of_a_study_are_read_once_for_all_its_runs_and_again_when_they_change(
        whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, opened = Path(shutil.copytree(whole, tmp_path / "study")), []
    read = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path.name) or read(path))
    compare.compare_runs(place)
    assert sorted(opened) == ["evaluations.parquet", "metrics.parquet", "problems.parquet"]
    first = Run.open(place / "masa-s0").metrics()
    first["accuracy"] = 7.0
    assert not Run.open(place / "masa-s0").metrics().equals(first)
    Run.open(place / "masa-s0").environment["versions"].clear()
    assert Run.open(place / "masa-s0").environment["versions"]
    one = tmp_path / "one"
    shutil.copytree(place / "models", one / "models")
    packing.pack(place, one)
    for file in one.glob("metrics.parquet"):
        os.replace(file, place / file.name)
    Run.open(place / "masa-s0").metrics()
    assert opened[-1] == "metrics.parquet" and opened.count("metrics.parquet") > 1


# Packing.

def test_packing_in_place_removes_the_folders_and_keeps_every_number(place: Path, folders: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (place / "report.txt").write_text("words")
    assert cli.main(["pack", str(place)]) == 0
    assert capsys.readouterr().out == f"Packed: 3 runs, in {place}.\n"
    assert {path.name for path in place.iterdir()} == {
        "configs.toml", "environments.json", "statuses.json", "changes.json", "metrics.parquet", "evaluations.parquet",
        "problems.parquet", "rollouts.parquet", "beliefs.parquet", "readings.parquet", "models", "report.txt"}
    for path in runs_in(folders):
        assert_reads_the_same(Run.open(place / path.name), Run.open(path))
    size = [sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in (place, folders)]
    assert size[0] < size[1]
    assert cli.main(["pack", str(place)]) == 1
    assert "There is no finished run to pack" in capsys.readouterr().err


def test_runs_trained_beside_a_packed_study_are_read_with_it_and_packed_into_it(place: Path, folders: Path) -> None:
    shutil.move(place / "masa-s1", place.parent / "masa-s1")
    packing.pack(place, models=False)
    shutil.move(place.parent / "masa-s1", place / "masa-s1")
    assert [path.name for path in runs_in(place)] == list(ARMS)
    assert [Run.open(path).is_packed for path in runs_in(place)] == [True, True, False]
    both = report.compare([place], as_json=True)
    assert both == report.compare([folders], as_json=True)
    assert packing.pack(place) == (["masa-s1"], [])
    assert report.compare([place], as_json=True) == both
    assert [Run.open(path).model.is_dir() for path in runs_in(place)] == [False, False, True]


def test_a_run_whose_columns_have_another_order_is_packed_with_the_others(place: Path) -> None:
    path = place / "masa-s1" / "evaluations" / "step-000003.parquet"
    table = parquet.read([path])
    parquet.write(path, table[table.columns[::-1]])
    packing.pack(place)
    packed_one = Run.open(place / "masa-s1").evaluation_table(3)
    pd.testing.assert_frame_equal(packed_one[list(table)], table)


def test_an_unfinished_run_is_refused_or_left_and_never_hides_a_packed_one(place: Path, folders: Path) -> None:
    packing.pack(place)
    shutil.copytree(folders / "masa-s0", place / "masa-s0")
    Run.open(place / "masa-s0").set_status("stopped")
    shutil.copytree(folders / "masa-s1", place / "masa-s1")
    with pytest.raises(RunError, match=r"masa-s0 is not finished \(stopped\).*--finished-only"):
        packing.pack(place)
    assert packing.pack(place, finished_only=True) == (["masa-s1"], ["masa-s0"])
    assert Run.open(place / "masa-s0").status["state"] == "stopped"  # where there are both, the folder
    shutil.rmtree(place / "masa-s0")
    assert_reads_the_same(Run.open(place / "masa-s0"), Run.open(folders / "masa-s0"))


def test_a_folder_with_more_than_a_record_is_not_removed(place: Path) -> None:
    for name in ("checkpoints", "notes.txt"):
        (place / "masa-s1" / name).mkdir()
        with pytest.raises(RunError, match=f"masa-s1 holds {name}, which a packed study does not keep"):
            packing.pack(place)
        (place / "masa-s1" / name).rmdir()
    assert not any(place.glob("*.parquet")) and not (place / packed.ARRIVING).exists()


def test_a_run_that_somebody_holds_is_not_packed_away(place: Path) -> None:
    with Run.open(place / "masa-s0").lock(), pytest.raises(RunError, match="in use by this very process"):
        packing.pack(place)
    assert not any(place.glob("*.parquet"))


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_compare", "_settle", "_replace"])
def test_a_packing_that_was_killed_anywhere_loses_nothing_and_is_gone_on_with(
        where: str, place: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing.pack(place)
    shutil.copytree(folders / "masa-s1", place / "masa-s1")
    settle, calls = packing._settle, []
    with monkeypatch.context() as patch:
        patch.setattr(packing, where, killed if where != "_settle" else lambda study: (
            calls.append(study) or killed() if len(calls) > 1 else calls.append(study) or settle(study)))
        with pytest.raises(KeyboardInterrupt):
            packing.pack(place)
    for path in runs_in(folders):
        assert_reads_the_same(Run.open(place / path.name), Run.open(path))
    packing.pack(place)
    assert not (place / packed.ARRIVING).exists() and not any(place.glob("*-s*"))
    for path in runs_in(folders):
        assert_reads_the_same(Run.open(place / path.name), Run.open(path))


@pytest.mark.parametrize("moved", ["metrics.parquet", "configs.toml"])
def test_a_new_packed_form_is_read_whole_while_its_files_take_their_places(moved: str, place: Path,
                                                                          folders: Path) -> None:
    shutil.move(place / "masa-s1", place.parent / "masa-s1")
    packing.pack(place)
    packing.pack(folders, place.parent / "new")
    arriving = place.parent.joinpath("new").rename(place / packed.ARRIVING)
    os.replace(arriving / moved, place / moved)
    for path in runs_in(folders):
        assert_reads_the_same(Run.open(place / path.name), Run.open(path))


def test_settings_that_are_gone_are_kept_as_they_were_recorded(place: Path) -> None:
    gone = next(key for key, value in configs.REMOVED.items() if "." in key and isinstance(value, int | float))
    tree = dataclasses.asdict(Config())
    section, name = gone.split(".")
    tree.setdefault(section, {})[name] = configs.REMOVED[gone]
    (place / "masa-s0" / "config.toml").write_text(tomli_w.dumps(tree))
    before = Run.open(place / "masa-s0").config
    packing.pack(place)
    assert Run.open(place / "masa-s0").recorded_settings() == tree and Run.open(place / "masa-s0").config == before


def test_what_cannot_be_kept_exactly_is_not_packed(place: Path) -> None:
    for name, value in (("grpo-s0", "a text"), ("masa-s0", 5.5)):
        Run.open(place / name).append_metrics({"step": 7, "odd": value})
    with pytest.raises(RunError, match="The runs of the study cannot be packed together"):
        packing.pack(place)
    assert (place / "grpo-s0" / "metrics.jsonl").exists() and not any(place.glob("*.parquet"))


def test_a_study_file_knows_its_packed_runs_as_finished_and_trains_none_of_them(
        place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place.parent)
    Path("study.toml").write_text(f"title = 'S'\nout = '{place.name}'\nseeds = 1\nhours = 1\n[arms.masa]\nabout = ''\n")
    path = place / "masa-s0" / "config.toml"
    planned = study.load("study.toml").runs()[0]
    configs.save(configs.replace(planned.config, {"steps": 6}), path)
    Path("study.toml").write_text(Path("study.toml").read_text().replace("[arms", "[settings]\nsteps = 6\n[arms"))
    packing.pack(place)
    assert cli.main(["study", "study.toml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "masa-s0 finished      6        6" in shown
    assert cli.main(["study", "study.toml"]) == 0
    assert not (place / "masa-s0").exists()


# What a packed file may hold.

@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "study"))


def complaints(place: Path) -> Iterator[str]:
    """What readers say of a packed study, one by one; what is no sentence of ours goes on."""
    run = place / "masa-s0"
    for read in (lambda: compare.compare_runs(run), lambda: Run.open(run).config_at(3), lambda: Run.open(run).status,
                 lambda: Run.open(run).environment, lambda: Run.open(run).metrics(), lambda: Run.open(run).rollouts(),
                 lambda: Run.open(run).evaluation_table(3), lambda: Run.open(run).best_step(),
                 lambda: training_records.read(run), lambda: replay.read_groups(run),
                 lambda: last_step(run), lambda: runs_in(place),
                 lambda: Run.open(run).beliefs(), lambda: live_control.state(run)):
        try:
            read()
        except MasaError as error:
            yield str(error)


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def column(name: str, values: Callable[[int], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values(len(table))))


TABLES = {
    "no run": lambda table: table.drop_columns("run"), "no step": lambda table: table.drop_columns("step"),
    "text steps": column("step", lambda count: ["1"] * count), "low steps": column("step", lambda count: [-1] * count),
    "high steps": column("step", lambda count: [10**12] * count),
    "no steps": column("step", lambda count: [None] * count),
    "numbered runs": column("run", lambda count: [[1]] * count),
    "mixed runs": column("run", lambda count: ["masa-s0" if place % 2 else "grpo-s0" for place in range(count)]),
    "no metadata": lambda table: table.replace_schema_metadata(None),
    "other metadata": lambda table: table.replace_schema_metadata({packed.COLUMNS: b'{"runs": {"masa-s0": 7}}'}),
    "deep metadata": lambda table: table.replace_schema_metadata({packed.COLUMNS: b"[" * 10**5}),
    "lost column": lambda table: table.drop_columns(table.column_names[-1])}


@pytest.mark.parametrize(("kind", "change"), [
    *(("metrics", change) for change in TABLES),
    *((kind, "lost column") for kind in ("problems", "rollouts", "evaluations", "beliefs"))])
def test_a_packed_table_of_another_shape_is_one_sentence(kind: str, change: str, broken: Path) -> None:
    rewrite(broken / f"{kind}.parquet", TABLES[change])
    said = list(complaints(broken))
    assert said and all("\n" not in one and len(one) < 1000 + len(str(broken)) for one in said)
    assert any(kind in one for one in said)


@pytest.mark.parametrize("name", ["metrics.parquet", "problems.parquet", "rollouts.parquet"])
def test_a_torn_packed_table_is_one_sentence(name: str, broken: Path) -> None:
    content = (broken / name).read_bytes()
    for kept in (b"", content[:len(content) // 2], content[:-1], content[:50] + bytes(200) + content[250:]):
        (broken / name).write_bytes(kept)
        said = list(complaints(broken))
        assert said and all("\n" not in one and name in one for one in said)


def test_absurd_sizes_are_refused_before_they_fill_the_memory(broken: Path) -> None:
    group = pa.table({"run": pa.array(["masa-s0"] * 10**6).dictionary_encode(), "step": pa.array([1] * 10**6)})
    with pq.ParquetWriter(broken / "metrics.parquet", group.schema) as writer:
        for _ in range(60):
            writer.write_table(group)
    assert (broken / "metrics.parquet").stat().st_size < 10**6
    with pytest.raises(RunError, match=r"metrics.parquet holds 120000000 values; a table .* at most"):
        Run.open(broken / "masa-s0").metrics()
    with (broken / "statuses.json").open("r+b") as file:
        file.truncate(2**29)
    with pytest.raises(RunError, match=r"statuses.json has 536870912 bytes; a file of a packed study has"):
        _ = Run.open(broken / "masa-s0").status


HOSTILE = {"configs.toml": ("x = [", "['../x']\nseed = 1", "['a/b']\nseed = 1", "['..']\n", "['']\n", "masa-s0 = 1",
                            "[masa-s0]\nsteps = 'x'", "a = " + "[" * 5000, "['a\\nb']\n"),
           "statuses.json": ("", "[]", "[" * 5000, '{"masa-s0": 3}', '{"masa-s0": {"state": "no", "step": 1}}', "{}"),
           "environments.json": ("[", "[]", '{"masa-s0": []}'),
           "changes.json": ("[]", '{"masa-s0": 3}', '{"masa-s0": [3]}', '{"masa-s0": [{"step": "1"}]}',
                            '{"masa-s0": [{"step": 1, "changes": {"steps": -1}}]}')}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in HOSTILE.items() for content in all_])
def test_another_text_in_a_packed_file_is_one_sentence(name: str, content: str, broken: Path) -> None:
    (broken / name).write_text(content)
    said = list(complaints(broken))
    assert (said or name == "environments.json") and all("\n" not in one and len(one) < 900 for one in said), said


@pytest.mark.slow  # those above are its likeliest finds
@settings(max_examples=40)
@given(name=st.sampled_from(["configs.toml", "statuses.json", "changes.json", "metrics.parquet", "problems.parquet"]),
       content=st.binary(max_size=80), start=st.integers(0, 3000))
def test_no_bytes_in_a_packed_file_end_in_a_traceback(name: str, content: bytes, start: int, whole: Path,
                                                      tmp_path_factory: pytest.TempPathFactory) -> None:
    place = Path(shutil.copytree(whole, tmp_path_factory.mktemp("any") / "study"))
    with (place / name).open("r+b") as file:
        file.seek(min(start, (place / name).stat().st_size))
        file.write(content)
    list(complaints(place))
    shutil.rmtree(place.parent)


def test_a_missing_packed_table_is_an_empty_one(broken: Path) -> None:
    run = PackedRun(broken / "masa-s0", Config())
    for name in ("metrics", "evaluations", "rollouts", "beliefs"):
        (broken / f"{name}.parquet").unlink()
    assert run.metrics().empty and run.evaluations().empty and run.rollouts().empty and run.beliefs().empty
    assert run.rollout_steps() == [] and last_step(run.path) == 0
    (broken / "problems.parquet").unlink()
    with pytest.raises(RunError, match="has no evaluations of step 3 of the run masa-s0"):
        run.evaluation_table(3)
    assert files.line(json.loads((broken / "changes.json").read_text())["masa-s0"][0])
