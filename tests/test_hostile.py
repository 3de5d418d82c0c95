"""What strangers, other programs and accidents leave in a run's folder: it is read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small
from synthetic import rollout_table, write_run

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib.analysis import compare, doctor, report, study
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import MasaError, brief
from masa_lib.lessons import replay
from masa_lib.lessons.widgets import training_records
from masa_lib.lessons.widgets import training_view as view
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run, last_step
from masa_lib.runs.provenance import shared_command, shared_name
from masa_lib.runs.stopping import Stop
from masa_lib.training.export import card

MARKUP = "<img src=x onerror=alert(1)>"
DEEP = "[" * 100_000
#: deep enough to be refused, shallow enough for Python to read
NESTED = "[" * 300 + "]" * 300
LINES = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "changes.jsonl")
TABLES = ("rollouts/step-000002.parquet", "evaluations/step-000003.parquet")
CHECKPOINT = "checkpoints/step-000003"
#: all settings of the record
RECORDED = {key: field.default for key, field in configs.settings().items()} | {"method": "masa", "steps": 20}


def write_record(folder: Path) -> Run:
    """Three steps of a run with everything that a run can hold, but no weights."""
    run = write_run(folder, "masa", 0, {0: 0.2, 3: 0.5}, steps=3)
    for step in (1, 2, 3):
        table = rollout_table(step, groups=3, solutions=2, predictions=2)
        run.write_rollouts(step, table.assign(text="\\boxed{4}", problem="Is 3 < 7?", problem_id="p",
                                              answer="4", level=1, finish="stop", parse_error=None,
                                              reward=table["correct"].astype(float)))
    run.append_change(2, {"update.learning_rate": 1e-5}, request=1)
    for step in (2, 3):
        run.save_checkpoint(step, lambda folder, step=step: (folder / "state.json").write_text(
            json.dumps({"step": step, "cursor": 0})) and None)
    run.set_status("stopped", "Stopped after step 3.")
    (run.path / "control.json").write_text(json.dumps({"process": 1, "request": 1, "settings": {}}))
    return run


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_record(tmp_path_factory.mktemp("record") / "masa-s0").path


@pytest.fixture
def run(record: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(record, tmp_path / "masa-s0"))


def read_everything(path: Path, name: str) -> Iterator[Callable[[], Any]]:
    """What commands, panel and notebooks read of a run, one by one; all of it, if no file of it is named."""
    yield lambda: Run.open(path)
    yield lambda: Run.open(path).status
    yield lambda: Run.open(path).config_at(3)
    yield lambda: Run.open(path).latest_checkpoint()
    yield lambda: Run.open(path).weights("best")
    if not name or name.endswith((".jsonl", ".parquet")):
        yield lambda: compare.compare_runs(path)
        yield lambda: replay.read_groups(path)
        yield lambda: doctor.text(Run.open(path))
        yield lambda: shown(path)
    yield lambda: live_control.read(path)
    yield lambda: live_control.state(path)
    yield lambda: live_control.last_words(path)
    yield lambda: live_control.change(path, {"gate.threshold": 0.5})
    yield lambda: card(Run.open(path), 3, Config(), "float32")
    yield lambda: study.progress(study.Planned(path, RECORDED))


def shown(path: Path) -> str:
    """What the training panel draws of a run."""
    records = training_records.read(path)
    drawn = view.figure(records).to_json()
    return drawn + view.changes_html(records.changes) + view.sample_html(records.rollouts)


def complaints(path: Path, name: str = "") -> list[str]:
    """The sentences with which readers refuse a run, one of whose files is odd; what else they raise goes on."""
    said = []
    for read in read_everything(path, name):
        try:
            read()
        except MasaError as error:
            said.append(str(error))
    return said


def test_the_record_is_read_by_all(record: Path) -> None:
    assert complaints(record) == []


HOSTILE = {
    "config.toml": ("steps = " + "[" * 5000, "seed = " + "a." * 5000 + "b = 1", "seed." + "a." * 3000 + "b = 1",
                    f"method = '{MARKUP}'", "seed = 0x" + "f" * 5000, "steps = [[[1]]]", "\0", "[model]\nname = 3"),
    "status.json": (DEEP, "", "[]", json.dumps({"state": MARKUP, "step": 1, "message": ""}), '{"state": "running"}',
                    '{"state": ["running"], "step": 1, "message": ""}',
                    '{"state": "running", "step": 1e400, "message": ""}',
                    '{"state": "running", "step": -1, "message": {}}'),
    "environment.json": (DEEP, "[]", "{}", '{"hardware": 1, "git": 2, "versions": 3, "command": 4}'),
    "control.json": (DEEP, NESTED, "[]", '{"pause": {}}', '{"process": 1e999}', '{"request": 9' + "9" * 5000 + "}",
                     '{"request": 99999999999999999999999999999999, "settings": {"gate.threshold": ' + NESTED + "}}"),
    ".lock": ("9" * 5000, "9" * 19, "-1", "\udc80", ""),
    "metrics.jsonl": (DEEP + "\n" + '{"step": 1}\n', '{"step": 1, "x": ' + NESTED + '}\n{"step": 2}\n', "3\n{}\n",
                      '{"loss": 1.0}\n', '{"step": "1"}\n', '{"step": true}\n', '{"step": 2}\n{"step": 1}\n',
                      '{"step": 1, "accuracy": "x"}\n{"step": 2, "accuracy": 0.5}\n',
                      '{"step": 1, "accuracy": "' + MARKUP + '"}\n', '{"step": 1, "tokens_solution": "many"}\n',
                      '{"step": 99999999999999999999}\n', '{"step": 1, "accuracy": 1e999}\n'),
    "evaluations.jsonl": ('{"step": 0}\n', '{"step": 3, "accuracy": "x"}\n', '{"accuracy": 1}\n',
                          '{"step": 0, "accuracy": NaN}\n'),
    "rollouts.jsonl": ('{"step": 77}\n', '{"step": []}\n', "{}\n"),
    "changes.jsonl": ('{"step": 1}\n', '{"step": 1, "changes": []}\n', '{"step": 1, "changes": {"steps": -1}}\n',
                      '{"step": 1, "changes": {"x": ' + NESTED + "}}\n",
                      '{"step": 1, "changes": {}, "request": "9"}\n', '{"step": 1, "changes": {}, "refused": [1]}\n'),
    ".places.json": (DEEP, "[]", '{"steps": 3}', '{"model.name": 3}'),
    f"{CHECKPOINT}/manifest.json": (DEEP, "[]", "{}", '{"state.json": 3}', '{"../../status.json": [1, "x"]}',
                                    '{"\\u0000": [1, "x"]}'),
    **dict.fromkeys(TABLES, ("", "PAR1", "PAR1PAR1"))}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, contents in HOSTILE.items()
                                               for content in contents], ids=lambda value: brief(value)[:40])
def test_what_a_file_of_a_run_may_hold_ends_in_one_sentence(name: str, content: str, run: Run) -> None:
    (run.path / name).write_bytes(content.encode("utf8", "surrogateescape"))
    for said in complaints(run.path, name):
        assert "\n" not in said and len(said) < 1500 + len(str(run.path)), said


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([MARKUP, "grpo", "\ud800"]))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["step", "accuracy", "changes", "state", "settings", "request", "method", MARKUP]), inner,
    max_size=4), max_leaves=8)
CONTENT = st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode() + b"\n"),
                    st.sampled_from([DEEP.encode(), NESTED.encode()]))


@settings(max_examples=25)
@given(name=st.sampled_from([*HOSTILE]), content=CONTENT, more=CONTENT)
def test_no_content_of_any_file_of_a_run_ends_in_a_traceback(record: Path, name: str, content: bytes,
                                                             more: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(record, Path(folder) / "masa-s0"))
        (path / name).write_bytes(content + more)
        complaints(path, name)


@pytest.mark.parametrize(("kind", "column", "value"), [
    ("rollouts", "text", 3), ("rollouts", "stream", None), ("rollouts", "reward", "x"), ("rollouts", "group", "x"),
    ("rollouts", "step", [1]), ("evaluations", "n", 0), ("evaluations", "c", 99), ("evaluations", "level", MARKUP),
    ("evaluations", "predictions", "12"), ("evaluations", "predictions", [["x"]]), ("evaluations", "problem", 1.5)])
def test_a_table_with_another_kind_of_value_ends_in_one_sentence(kind: str, column: str, value: Any, run: Run) -> None:
    file = run.path / kind / "step-000003.parquet"
    table = pd.read_parquet(file)
    table[column] = pd.Series([value] * len(table), dtype=object if value is None or isinstance(value, list) else None)
    table.to_parquet(file)
    assert [said for said in complaints(run.path) if column in said or "do not fit" in said or "solutions" in said]
    table.drop(columns=column).to_parquet(file)
    complaints(run.path)


@pytest.mark.parametrize("name", [*LINES, "status.json", "config.toml", "control.json", ".lock", *TABLES, CHECKPOINT])
def test_a_folder_in_the_place_of_a_file_and_the_reverse_end_in_a_sentence(name: str, run: Run) -> None:
    place = run.path / name
    if place.is_dir():
        shutil.rmtree(place)
        place.write_text("no folder")
    else:
        place.unlink(missing_ok=True)
        place.mkdir()
    complaints(run.path, name)


def test_settings_files_that_nest_deep_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000)
    for load in (configs.load, study.load):
        with pytest.raises(ConfigError, match=r"deep.toml cannot be read: it nests too deep"):
            load(tmp_path / "deep.toml")
    (tmp_path / "long.toml").write_text("seed = " + "9" * 5000)
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(tmp_path / "long.toml")
    with pytest.raises(ConfigError, match="seed is <an integer of 20000 bits>"):
        configs.replace(Config(), {"seed": int("f" * 5000, 16)})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("key", ["update.learning_rate", "gate.threshold"])
def test_whole_numbers_that_no_float_holds_are_one_sentence(sign: int, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is .*; it takes a number") as caught:
        configs.replace(Config(), {key: sign * 10**400})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ['{"request": 1000000000, "settings": {"gate.threshold": 0.5}}',
                                     '{"request": 5, "settings": {"gate.threshold": 1' + "0" * 400 + "}}",
                                     '{"request": -1, "settings": {"gate.threshold": 0.5}}'])
def test_no_control_file_ends_the_next_lives_of_a_run(content: str, run: Run) -> None:
    (run.path / live_control.CONTROL).write_text(content)
    for _ in range(2):
        assert live_control.obey(Run.open(run.path), 3, Stop()).gate.threshold == run.config.gate.threshold
    assert complaints(run.path) == []


# What may not be read, and what is gone.

@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """A folder that a user without rights over others' files can enter; the process is that user meanwhile."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.mark.parametrize("closed", ["checkpoints", CHECKPOINT, f"{CHECKPOINT}/manifest.json",
                                    f"{CHECKPOINT}/state.json"])
def test_a_checkpoint_that_may_not_be_read_is_neither_broken_nor_passed_over(closed: str, record: Path) -> None:
    with nobody() as folder:
        run = write_record(folder / "run")
        rights = (run.path / closed).stat().st_mode
        (run.path / closed).chmod(0)
        with pytest.raises(RunError, match=r"cannot be read \(Permission denied\)\. Nothing was changed"):
            run.latest_checkpoint()
        (run.path / closed).chmod(rights)
        assert run.latest_checkpoint()[0] == 3


@pytest.mark.parametrize("name", ["config.toml", *LINES])
def test_a_file_that_may_not_be_read_is_one_sentence(name: str) -> None:
    with nobody() as folder:
        run = write_record(folder / "run")
        (run.path / name).chmod(0)
        assert any("Permission denied" in said for said in complaints(run.path))
        run.path.chmod(0)
        assert any("Permission denied" in said for said in complaints(run.path))
        run.path.chmod(0o700)


def test_a_run_whose_folder_was_removed_says_so_and_does_not_make_it_again(run: Run) -> None:
    shutil.rmtree(run.path)
    for write in (lambda: run.append_metrics({"step": 4}), lambda: run.set_status("running"),
                  lambda: run.write_rollouts(4, pd.DataFrame({"step": [4]})),
                  lambda: run.save_model(lambda folder: None), lambda: run.save_checkpoint(4, lambda folder: None)):
        with pytest.raises(RunError, match=r"folder of the run .* was removed while the run was written"):
            write()
    assert not run.path.exists()
    assert live_control.state(run.path) == "new" and "removed" in live_control.last_words(run.path)


def test_a_page_that_cannot_be_written_is_one_sentence(record: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/page.html could not be written.*--out"):
        report.compare([record], tmp_path / "file" / "page.html")


def test_a_folder_is_replaced_whole_or_not_at_all_and_other_files_in_it_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(text: str, fails: bool = False) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            (folder / "weights.bin").write_text(text)
            (folder / folders.MANIFEST).write_text(text)
            if fails:
                raise ZeroDivisionError

        return fill

    with pytest.raises(ZeroDivisionError):
        folders.replace_folder(out, write("half", fails=True))
    assert os.listdir(tmp_path) == []
    folders.replace_folder(out, write("first"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ZeroDivisionError):
        folders.replace_folder(out, write("half", fails=True))
    assert (out / "weights.bin").read_text() == (out / folders.MANIFEST).read_text() == "first"
    folders.replace_folder(out, write("second"))
    assert (out / "weights.bin").read_text() == (out / folders.MANIFEST).read_text() == "second"
    assert (out / "notes.txt").read_text() == "mine" and os.listdir(tmp_path) == ["out"]


# What a record tells of its author.

SECRET = "/srv/first last/secret project"


@pytest.mark.parametrize(("text", "told"), [
    (f"{SECRET}/model", "model"), (f"{SECRET}/model/", "model/"), ("~/secret project/model", "model"),
    ("../secret project/data.jsonl", "data.jsonl"), ("secret/project/model", "model"),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), (r"C:\Users\first last\model", "model"),
    ("reasoning-gym:chain_sum,leg_counting", "reasoning-gym:chain_sum,leg_counting"),
    ("first last/model", "model"), ("secret project, new/model", "model"), ("secret/data.jsonl", "data.jsonl"),
    ("https://first:token@example.org/a/model?key=secret#last", "https://example.org/a/model"),
    (f"file://{SECRET}/data.jsonl", "data.jsonl"), ("pocket", "pocket"), ("", "")])
def test_of_a_path_the_last_part_is_told_and_of_an_address_no_credentials(text: str, told: str) -> None:
    assert shared_name(text) == told
    for name in ("", "model.name=", "--set=model.name="):
        assert shlex.split(shared_command(shlex.join(["masa", name + text]))) == ["masa", name + told]


def test_a_record_names_no_folder_of_its_author_and_the_run_goes_on_here_all_the_same(tmp_path: Path) -> None:
    config = configs.replace(small(), {"model.name": f"{SECRET}/model", "problems.source": f"{SECRET}/first last.jsonl",
                                       "model.weights": "https://first:last@example.org/weights"})
    command = f"masa train --model '{SECRET}/model' --out='{tmp_path}/first last/run' --set 'model.weights={SECRET}/w'"
    run = Run.create(tmp_path / "run", config, command)
    told = "".join((run.path / name).read_text() for name in ("config.toml", "environment.json", "status.json"))
    assert "secret" not in told and "last@" not in told and "first last/" not in told
    assert json.loads((run.path / "environment.json").read_text())["command"] == (
        "masa train --model model --out=run --set model.weights=w")
    assert Run.open(run.path).config == config
    (run.path / ".places.json").unlink()  # as in a record that was published
    assert Run.open(run.path).config.model.name == "model" and Run.open(run.path).config.steps == config.steps


def test_the_places_of_a_run_are_not_committed() -> None:
    assert ".places.json" in (Path(__file__).parents[1] / ".gitignore").read_text(encoding="utf8").splitlines()


def test_the_model_card_quotes_nothing_raw(run: Run) -> None:
    evil = f"x`\n---\n{{{{ 7 * 191 }}}}\n# Owned\n{MARKUP} [click](javascript:alert(1)) | " + "y" * 5000
    told = {"hardware": {"cpu": evil, "gpus": [evil], "torch_threads": evil}, "git": {"commit": evil, "dirty": evil},
            "versions": {evil: evil}, "command": evil}
    (run.path / "environment.json").write_text(json.dumps(told))
    config = configs.replace(run.config, {"model.name": f"a: b\n{evil}", "problems.source": evil})
    text = card(Run(run.path, config), 3, config, "float32")
    plain = re.sub(r"```.*?```|\\.|`[^`\n]*`", "", text, flags=re.DOTALL)  # code shows links as they are
    assert "<img" not in text and "](javascript" not in plain and "\n# Owned" not in text
    assert "1337" not in text  # nor is it taken for a part of the template
    assert yaml.safe_load(text.split("---\n")[1]) == {  # no base_model
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["masa_lib", "masa"]}
    assert max(map(len, text.splitlines())) < 7000


# Twenty thousand steps.

def long_run(path: Path, steps: int) -> Run:
    run = Run.create(path, configs.replace(Config(), {"steps": steps}), "masa train")
    rows = ({"step": step, "method": "masa", "accuracy": 0.5, "seconds_total": 1.0, "tokens_solution": 1000 + step,
             **{f"more_{number}": step / 7 for number in range(40)}} for step in range(1, steps + 1))
    (run.path / "metrics.jsonl").write_bytes(b"".join(map(files.line, rows)))
    return run


def test_at_step_20000_a_new_step_reads_the_end_of_the_metrics_and_the_panel_what_is_new(tmp_path: Path) -> None:
    run = long_run(tmp_path / "run", 20_000)
    size, reader = (run.path / "metrics.jsonl").stat().st_size, training_records.Reader(run.path)
    assert len(reader.read().metrics) == 20_000 and reader.lines.read == size
    for step in range(20_001, 20_004):
        before = bytes_read()
        run.append_metrics({"step": step, "accuracy": 0.25})
        run.set_status("running")
        assert last_step(run.path) == live_control.steps(run.path) == step
        records = reader.read()
        assert bytes_read() - before < size / 100
        assert records.metrics["step"].tolist()[-1] == step and records.metrics["accuracy"].iloc[-1] == 0.25
    assert reader.lines.read < 1.01 * size
    drawn = view.figure(records)
    points = [len(trace.x) for trace in drawn.data]
    assert max(points) == 1000 and len(drawn.to_json()) < 2_000_000
    ends = [trace.y[-1] for trace in drawn.data if trace.legendgroup == "its batches" and trace.name is None]
    assert ends == [0.25]


def bytes_read() -> int:
    """Bytes that this process has asked the system for so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_a_reader_sees_that_a_run_was_rewound_and_what_was_torn(tmp_path: Path) -> None:
    run = long_run(tmp_path / "run", 5)
    reader = training_records.Reader(run.path)
    assert reader.read().metrics["step"].tolist() == [1, 2, 3, 4, 5]
    run.rewind(3)
    run.append_metrics({"step": 4, "accuracy": 0.75})
    assert reader.read().metrics["accuracy"].tolist() == [0.5, 0.5, 0.5, 0.75]
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "acc')
    assert len(reader.read().metrics) == 4 and last_step(run.path) == 4
    run.append_metrics({"step": 5, "accuracy": 1.0})
    assert reader.read().metrics["accuracy"].tolist() == [0.5, 0.5, 0.5, 0.75, 1.0]
    pd.testing.assert_frame_equal(reader.read().metrics, run.metrics())
