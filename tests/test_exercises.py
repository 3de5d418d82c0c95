"""The environment check of the notebooks: what is missing is said, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from masa_lib.lessons import environment, exercises


def test_every_line_is_a_sentence_without_a_path_or_a_name() -> None:
    for line in environment.environment_check():
        assert line.endswith(".")
        assert str(Path.home()) not in line


def test_missing_data_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "DATA", tmp_path)
    said = "\n".join(environment.environment_check())
    assert "The pocket model is missing (data/pocket): `masa pocket build --out data/pocket` makes it." in said
    assert "The recorded study is missing (data/runs/baseline)" in said
    for place in ("pocket/config.json", "runs/baseline/masa-s0/config.toml"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    said = "\n".join(environment.environment_check())
    assert "The pocket model is there" in said
    assert "The recorded study is there" in said


@pytest.mark.parametrize(("gigabytes", "advice"), [(1, "close other programs"), (8, "enough")])
def test_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, gigabytes: int, advice: str) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gigabytes * 2**30))
    assert any(advice in line for line in environment.environment_check())


def requires(lines: list[str]) -> Callable[[str], list[str]]:
    return lambda name: lines


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", requires(["torch<1", "pandas>=1", "pytest<1; extra == 'dev'"]))
    assert environment.wrong_packages() == [f"torch is {metadata.version('torch')}, wanted <1"]
    assert "`make install` gives the right ones." in environment.environment_check()[0]


def test_a_library_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # no repository either
    assert environment.wrong_packages() == ["masa-lib is not installed"]


@pytest.mark.parametrize("exercise", exercises.EXERCISES)
def test_an_exercise_is_right_wrong_or_open(exercise: str) -> None:
    wanted = exercises.EXERCISES[exercise]
    assert exercises.check(exercise, None).startswith(f"{exercise}: no answer yet. Put yours")
    assert exercises.check(exercise, list(wanted.numbers())) == f"{exercise}: right."
    beside = [number + 3 * wanted.tolerance for number in wanted.numbers()]
    assert exercises.check(exercise, beside) == f"{exercise}: not yet. {wanted.hint}"


@pytest.mark.parametrize(("sign", "place"), [("COLAB_RELEASE_TAG", "Colab"), ("KAGGLE_KERNEL_RUN_TYPE", "Kaggle")])
def test_hosted_notebooks_get_advice(monkeypatch: pytest.MonkeyPatch, sign: str, place: str) -> None:
    assert environment.hosted_advice() == []
    monkeypatch.setenv(sign, "yes")
    assert environment.environment_check()[-2].startswith(f"This is {place}: ")


@pytest.mark.parametrize(("settings", "says"), [
    ({"reward.length_weight": 0, "reward.notion_weight": 0.0}, "Right: "),
    ({"reward.notion_weight": 0.0}, "Not yet: something else"), ({}, "Not yet: something else"),
    ({"sampling.problems": 4}, "Not yet: a running training would refuse sampling.problems"),
    ({"reward.bass": 4}, "Not yet: There is no setting"), ({"reward.pass_rate_weight": -1}, "Not yet: reward.pass_")])
def test_the_exercises_of_04_are_checked_by_what_the_library_does(settings: dict, says: str) -> None:
    assert exercises.pays_pass_rate_alone(settings).startswith(says)


def test_the_share_of_the_predictions_is_checked_against_the_recorded_run() -> None:
    assert exercises.prediction_share(0.5).startswith("Not yet: 0.500") and exercises.prediction_share(
        float("nan")).startswith("Not yet")


@pytest.mark.parametrize(("answer", "said"), [
    (0.0, "right"), ([0.0] * 8, "right"), ([0.5] * 8, "not yet"), ([0.0, 1.0], "one number is wanted, not 2")])
def test_one_number_may_be_said_of_each_member_of_a_group(answer: float | list[float], said: str) -> None:
    assert said in exercises.check("never solved", answer)
