"""The model that notebook 00 chose is the one that the others find."""

from __future__ import annotations

from pathlib import Path

import pytest

from masa_lib.hub import HubError
from masa_lib.lessons import model_choice


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_choice, "PLACE", tmp_path / "runs" / "model.txt")
    monkeypatch.setattr(model_choice, "SMOKE", False)


def test_before_any_choice_it_is_the_pocket_model() -> None:
    assert model_choice.chosen() == "pocket"


@pytest.mark.parametrize("name", ["smollm2", "Qwen/Qwen3-0.6B-Base"])
def test_a_choice_is_kept(name: str) -> None:
    assert model_choice.choose(f" {name} ") == model_choice.chosen() == name


def test_a_folder_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_choice.choose("my-model") == model_choice.chosen() == str(tmp_path / "my-model")


def test_automatic_checks_neither_follow_nor_change_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model_choice.choose("smollm2")
    monkeypatch.setattr(model_choice, "SMOKE", True)
    assert model_choice.choose("pocket") == "pocket"
    assert model_choice.chosen() == "pocket"
    monkeypatch.setattr(model_choice, "SMOKE", False)
    assert model_choice.chosen() == "smollm2"


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "qwen3-1.7", "/no/such/folder", "", "a b"])
def test_a_model_that_is_nowhere_is_refused_and_the_choice_before_stands(name: str) -> None:
    model_choice.choose("smollm2")
    with pytest.raises(HubError, match="is neither a tier") as refused:
        model_choice.choose(name)
    assert "\n" not in str(refused.value) and model_choice.chosen() == "smollm2"


def test_automatic_checks_train_on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "SMOKE", True)
    assert model_choice.gpu_memory() == 0
