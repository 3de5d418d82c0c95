"""The model that notebook 00 chose is the one that the others find."""

from __future__ import annotations

from pathlib import Path

import pytest

from masa_lib import choice
from masa_lib.hub import HubError


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "PLACE", tmp_path / "runs" / "model.txt")
    monkeypatch.setattr(choice, "SMOKE", False)


def test_before_any_choice_it_is_the_pocket_model() -> None:
    assert choice.chosen() == "pocket"


@pytest.mark.parametrize("name", ["smollm2", "Qwen/Qwen3-0.6B-Base"])
def test_a_choice_is_kept(name: str) -> None:
    assert choice.choose(f" {name} ") == choice.chosen() == name


def test_a_folder_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert choice.choose("my-model") == choice.chosen() == str(tmp_path / "my-model")


def test_automatic_checks_neither_follow_nor_change_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.choose("smollm2")
    monkeypatch.setattr(choice, "SMOKE", True)
    assert choice.choose("pocket") == "pocket"
    assert choice.chosen() == "pocket"
    monkeypatch.setattr(choice, "SMOKE", False)
    assert choice.chosen() == "smollm2"


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "qwen3-1.7", "/no/such/folder", "", "a b"])
def test_a_model_that_is_nowhere_is_refused_and_the_choice_before_stands(name: str) -> None:
    choice.choose("smollm2")
    with pytest.raises(HubError, match="is neither a tier") as refused:
        choice.choose(name)
    assert "\n" not in str(refused.value) and choice.chosen() == "smollm2"
