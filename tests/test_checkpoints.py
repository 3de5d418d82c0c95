"""What a run's files may go through between two lives: gaps, edits, checkpoints of no use, another machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import LIVES, MODEL, assert_same_run, small

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.crash_safe_folders import seal
from masa_lib.models import loading, tensors, tiers
from masa_lib.runs.checkpoints import CheckpointError
from masa_lib.runs.folder import Run
from masa_lib.training.checkpoint import read_moments, read_state
from masa_lib.training.drive import resume, train
from masa_lib.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
CONFIG = small(LIVES)
TINY = configs.replace(CONFIG, {"steps": 5, "evaluation.every": 0, "evaluation.final_samples": 1})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbed."""
    return train(CONFIG, tmp_path_factory.mktemp("reference") / "run", "masa train")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A shorter one."""
    return train(TINY, tmp_path_factory.mktemp("undisturbed") / "run", "masa train")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return stopped(tmp_path_factory.mktemp("killed") / "run", TINY, 4)


@pytest.fixture
def halfway(killed: Run, tmp_path: Path) -> Run:
    """The shorter one, killed after its fourth step."""
    return Run.open(shutil.copytree(killed.path, tmp_path / "run"))


def stopped(out: Path, config: Config, step: int) -> Run:
    """A run as a process that was killed after a step leaves it."""
    run = Run.create(out, config, "masa train")
    next(result for result in Trainer(config, run) if result.step == step)
    return run


# What happens to a run's files between two lives.

def test_nuls_and_an_empty_status_left_by_a_power_cut_are_no_matter(halfway: Run, undisturbed: Run) -> None:
    run = halfway
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(b"\0" * 64 + metrics.read_bytes() + b"\0" * 512)
    (run.path / "status.json").write_bytes(b"")
    assert run.status["state"] == "stopped" and run.status["step"] == 4
    assert_same_run(resume(run.path), undisturbed)


def test_a_run_goes_on_from_the_checkpoint_before_a_gap_in_its_metrics(
        halfway: Run, undisturbed: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = halfway
    rows = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_bytes(b"".join([*rows[:2], b"\0" * len(rows[2]), b"\n", rows[3]]))
    resumed = resume(run.path)
    assert "lacks step 3: it goes on from the checkpoint of step 2" in caplog.text
    assert_same_run(resumed, undisturbed)


def test_a_gap_before_every_checkpoint_is_one_sentence_and_changes_nothing(halfway: Run) -> None:
    run = halfway
    rows = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_bytes(b"".join(rows[1:]))
    with pytest.raises(RunError, match=r"metrics.jsonl of the run .* lacks step 1, and no checkpoint is older"):
        resume(run.path)
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(rows[1:])


def test_a_problems_file_that_was_edited_is_one_sentence_until_it_is_put_back(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n} + 1", "answer": n + 1}) + "\n" for n in range(60)))
    config = configs.replace(TINY, {"problems.source": str(file), "problems.levels": ""})
    run, before = stopped(tmp_path / "run", config, 4), file.read_text()
    file.write_text(before.replace('"answer": 60', '"answer": 61'))
    with pytest.raises(RunError, match=r"problems.source of the run .* was edited since the run began: .*SHA-256"):
        resume(run.path)
    assert "lives" not in run.environment
    file.write_text(before)
    resumed = resume(run.path)
    assert_same_run(resumed, train(config, tmp_path / "undisturbed", "masa train"))
    (life,) = resumed.environment["lives"]
    assert life["step"] == 4 and life["versions"] == resumed.environment["versions"] and life["command"]


def test_overlong_problems_are_left_out_at_the_start_and_at_resume(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sums.jsonl"
    long = {"problem": "Left to right: 1" + " + 1" * 600, "answer": 601}
    file.write_text("".join(json.dumps({"problem": f"{n} + 1", "answer": n + 1}) + "\n" for n in range(60)))
    with file.open("a") as more:
        more.write("".join(json.dumps(long | {"problem": f"{long['problem']} + {n}"}) + "\n" for n in range(8)))
    config = configs.replace(TINY, {"problems.source": str(file), "problems.levels": "", "problems.pool": 0})
    run = stopped(tmp_path / "run", config, 4)
    said = [record.message for record in caplog.records if "are left out: with sampling.solution" in record.message]
    assert said and all("problems of" in sentence for sentence in said)
    assert_same_run(resume(run.path), train(config, tmp_path / "undisturbed", "masa train"))


def test_the_date_in_a_prompt_is_that_of_the_runs_start(tmp_path: Path) -> None:
    from masa_lib.recipes import pocket

    model, tokenizer = loading.load(CONFIG.model)
    tokenizer.chat_template = "{{ strftime_now('%Y %m %d') }}" + pocket.CHAT_TEMPLATE
    tensors.save(model, tokenizer, tmp_path / "dated")
    config = configs.replace(TINY, {"model.name": str(tmp_path / "dated")})
    run = Run.create(tmp_path / "run", config, "masa train")
    told = run.environment | {"time": "2024-02-03T23:59:00+00:00"}
    (run.path / "environment.json").write_text(json.dumps(told))
    first = next(Trainer(config, run)).rollouts
    ids = first["prompt_ids"].iloc[0]
    assert tokenizer.decode(ids).startswith("2024 02 03")
    again = next(Trainer(run.config, Run.open(run.path))).rollouts
    assert again["prompt_ids"].tolist() == first["prompt_ids"].tolist()


# Checkpoints that are whole and of no use.

def foreign_optimiser(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    parameter.sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), folder / "optimizer.pt")


def executing_optimiser(folder: Path) -> None:
    torch.save({"state": {}, "param_groups": [], "run": Touch(folder.parent / "executed")}, folder / "optimizer.pt")


def ruined_optimiser(folder: Path) -> None:
    held = torch.load(folder / "optimizer.pt", weights_only=True)
    held["state"][1]["exp_avg"].view(-1)[-1] = float("nan")
    torch.save(held, folder / "optimizer.pt")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


SPOILT: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: (folder / "state.json").write_text("{"),
    "nested JSON": lambda folder: (folder / "state.json").write_text("[" * 10**5),
    "a list": lambda folder: (folder / "state.json").write_text("[1]"),
    "no cursor": lambda folder: (folder / "state.json").write_text('{"step": 7}'),
    "wrong gates": lambda folder: (folder / "state.json").write_text('{"step": 7, "cursor": 28, "gates": [1]}'),
    "another optimiser": foreign_optimiser, "moments of NaN": ruined_optimiser,
    "a program": executing_optimiser,
    "no optimiser": lambda folder: (folder / "optimizer.pt").write_bytes(b"garbage"),
    "an empty optimiser": lambda folder: torch.save({}, folder / "optimizer.pt")}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_is_no_checkpoint_of_this_training_is_refused_and_nothing_in_it_is_executed(
        reference: Run, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = shutil.copytree(reference.latest_checkpoint()[1], tmp_path / "checkpoint")
    shapes = [parameter.shape for parameter in loading.load(CONFIG.model)[0].parameters()]
    assert read_state(folder)["step"] == 7 and len(read_moments(folder, shapes, "cpu")) == len(shapes)
    spoil(folder)
    with pytest.raises(CheckpointError, match=r"its (state\.json|optimizer\.pt) "):
        read_state(folder), read_moments(folder, shapes, "cpu")
    assert not (tmp_path / "executed").exists()


def test_a_whole_checkpoint_that_cannot_be_taken_up_gives_way_to_the_one_before(
        reference: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.open(shutil.copytree(reference.path, tmp_path / "run"))
    newest = run.latest_checkpoint()[1]
    (newest / "manifest.json").unlink()
    foreign_optimiser(newest)
    seal(newest)  # as by a stranger, whose manifest fits
    run.set_status("running")
    assert_same_run(resume(run.path), reference)
    assert "step-000007 is broken and left out: its optimizer.pt is of another optimiser" in caplog.text


# Another machine.

def test_a_run_goes_on_in_another_folder_without_the_folder_its_model_came_from(
        reference: Run, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiers.resolve(MODEL), here / "base")
    config = configs.replace(CONFIG, {"model.name": str(here / "base")})
    run = Run.create(here / "run", config, f"masa train --model {here / 'base'}")
    trainer = Trainer(config, run)
    next(trainer), next(trainer), next(trainer)
    there.mkdir()
    shutil.move(run.path, there / "run")
    shutil.rmtree(here)
    assert_same_run(resume(there / "run"), reference)


def test_no_file_of_a_run_holds_an_absolute_path(reference: Run) -> None:
    holding = [file for file in reference.path.rglob("*") if file.is_file()
               and any(str(place).encode() in file.read_bytes() for place in (reference.path.parent, ROOT))]
    assert holding == []


def test_a_checkpoint_holds_step_and_cursor(reference: Run) -> None:
    step, folder = reference.latest_checkpoint()
    assert json.loads((folder / "state.json").read_text()) == {"step": step, "cursor": step * 4, "gates": {},
                                                               "token_budget": None, "solution_norm": 0.0}
