"""Settings: what is ours beside pydantic. Messages, dotted keys, texts, files, and the settings of earlier versions."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError, RewardConfig, Setting, UpdateConfig, replace
from masa_lib.runs.folder import Run

TABLE = configs.settings()
ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted(path for path in (ROOT / "data" / "runs").iterdir() if path.is_dir())


def beyond(setting: Setting) -> list[Any]:
    """A value just beyond each limit of a setting."""
    step = 1 if setting.kind is int else 0.001
    values = [limit + side for limit, side in ((setting.ge, -step), (setting.le, step), (setting.gt, 0))
              if limit is not None]
    return values + (["something else"] if setting.choices else [])


def another(setting: Setting) -> Any:
    """A value that is allowed and not the default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if setting.kind in (bool, str):
        return not setting.default if setting.kind is bool else 'é "x" \\ #\n'
    if setting.kind is int:
        return setting.default + 1
    return setting.default / 2 or 0.25


def test_every_setting_is_documented_and_its_default_is_allowed() -> None:
    assert len(TABLE) > 50
    assert [key for key, setting in TABLE.items() if len(setting.doc) <= 5] == []
    assert replace(Config(), {key: setting.default for key, setting in TABLE.items()}) == Config()
    sections = {key.rpartition(".")[0] for key in TABLE} - {""}
    assert sections == {field.name for field in dataclasses.fields(Config)} - set(TABLE)


def test_a_value_beyond_any_limit_is_refused_in_a_sentence_with_what_is_allowed_and_where_to_set_it() -> None:
    for key, value in ((key, value) for key, setting in TABLE.items() for value in beyond(setting)):
        with pytest.raises(ConfigError, match=r"at least|at most|above|one of") as caught:
            replace(Config(), {key: value})
        message = str(caught.value)
        assert message.startswith(f"{key} is {value!r}; it takes ")
        assert TABLE[key].doc in message and f"--set {key}=" in message and "\n" not in message


@pytest.mark.parametrize(("key", "value", "takes"), [
    ("steps", 1.5, "a whole number at least 1"), ("steps", True, "a whole"), ("steps", None, "a whole"),
    ("steps", "3.0", "a whole"), ("steps", "9" * 5000, "a whole"),
    ("seed", 10**400, "a whole number at least 0 and at most 4.29497e+09"), ("model.name", 5, "a text"),
    ("update.normalise_std", 1, "true or false"), ("update.normalise_std", "yes", "true or false"),
    ("update.learning_rate", "small", "a number above 0 and at most 1"), ("update.learning_rate", "nan", "a number"),
    ("update.learning_rate", "inf", "a number"), ("update.gradient_clip", float("inf"), "a number above 0"),
    ("update.learning_rate", True, "a number"), ("sampling.problems", [4], "a whole"), ("method", "ppo", "one of grpo"),
    ("sampling.engine", "abacus", "one of transformers, paged, vllm")])
def test_a_value_of_another_type_is_refused(key: str, value: Any, takes: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} is .*; it takes {re.escape(takes)}"):
        replace(Config(), {key: value})


def test_texts_are_read_as_the_type_of_the_setting() -> None:
    read = replace(Config(), {"steps": "12", "update.learning_rate": "2e-4", "update.normalise_std": "False",
                              "reward.strict_length": "1", "model.name": "12", "update.weight_decay": 1})
    assert (read.steps, read.update.learning_rate, read.model.name) == (12, 2e-4, "12")
    assert read.update.normalise_std is False and read.reward.strict_length is True
    assert isinstance(read.update.weight_decay, float)


@pytest.mark.parametrize(("key", "near"), [
    ("reward.dificulty_base", "reward.difficulty_base"), ("learning_rate", "update.learning_rate"),
    ("modell.name", "model.name"), ("update.lr", "update."), ("model", "model."), ("zzz", "The keys are: method")])
def test_an_unknown_key_is_refused_with_the_nearest_ones(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^There is no setting '{key}'\. .*{re.escape(near)}"):
        replace(Config(), {key: 1})


def test_replace_changes_only_what_it_names_and_not_its_argument() -> None:
    before = Config()
    after = replace(before, {"seed": 4, "update.clip_low": 0.5, "update.clip_high": 0.75})
    assert before == Config()
    changed = [key for key in TABLE if configs.get(after, key) != configs.get(before, key)]
    assert changed == ["seed", "update.clip_low", "update.clip_high"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"reward.pass_rate_weight": 0, "reward.length_weight": 0, "reward.notion_weight": 0}, "reward weights are 0"),
    ({"update.dual_clip": 0.5}, "dual_clip is 0.5"), ({"update.dual_clip": 1}, "above 1"),
    ({"prompt.min_length": 50, "prompt.max_length": 20}, "below prompt.min_length")])
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(Config(), changes)


def test_grpo_needs_no_meta_reward() -> None:
    nothing = RewardConfig(pass_rate_weight=0.0, length_weight=0.0, notion_weight=0.0)
    assert Config(method="grpo", reward=nothing).reward == nothing


def test_a_config_made_by_hand_is_checked_too_and_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        Config(update=UpdateConfig(learning_rate=-1.0))
    with pytest.raises(ValueError, match="dual_clip"):
        dataclasses.replace(Config().update, dual_clip=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3


def test_a_config_survives_its_file_with_every_value_changed(tmp_path: Path) -> None:
    changed = replace(Config(), {key: another(setting) for key, setting in TABLE.items()} | {
        "update.dual_clip": 3.5, "prompt.max_length": 7, "record.trackers": "wandb", "model.template": "think=true",
        "sampling.vllm": "block_size=16"})
    assert [key for key, setting in TABLE.items() if configs.get(changed, key) == setting.default] == []
    configs.save(changed, tmp_path / "c.toml")
    assert configs.load(tmp_path / "c.toml") == changed
    assert tomllib.loads((tmp_path / "c.toml").read_text(encoding="utf8"))["update"]["loss_mean"] == "sequence"


def test_a_file_names_only_what_it_changes(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("steps = 7\n[gate]\n[update]\nlearning_rate = 1\n", encoding="utf8")
    assert configs.load(tmp_path / "c.toml") == replace(Config(), {"steps": 7, "update.learning_rate": 1.0})


@pytest.mark.parametrize(("text", "says"), [
    ("steps = ", "cannot be read"), ("stepps = 3", "Did you mean steps"), ("[update]\nlr = 1", "update.lr"),
    ("model = 'pocket'", "no setting 'model'"), ("[steps]\nx = 1", "steps.x"), ("[model.name]\nx = 1", "model.name is"),
    ("steps = 0", "at least 1"), ("steps = 2001-01-01", "steps is")])
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.toml").write_text(text, encoding="utf8")
    with pytest.raises(ConfigError, match=re.escape(says)):
        configs.load(tmp_path / "c.toml")


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name in ("b.toml", "none.toml"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            configs.load(tmp_path / name)


def test_what_is_loaded_before_the_first_step_is_refused_between_steps() -> None:
    for key in ("seed", "model.name", "problems.levels", "sampling.batch", "evaluation.final_problems"):
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} cannot change within a run"):
            configs.check_live({"update.learning_rate": 1e-5, key: 1})
    configs.check_live({"steps": 9, "method": "grpo", "update.learning_rate": 1e-5, "sampling.problems": 4})


# Settings of earlier versions.

def test_settings_of_earlier_versions_are_read_at_what_is_built_in_and_refused_by_name_at_another_value(
        tmp_path: Path) -> None:
    assert not set(configs.REMOVED) & set(TABLE)
    assert {key for values in configs.INSTEAD.values() for new in values.values() for key in new} <= set(TABLE)
    assert configs.current(configs.REMOVED | {"steps": 3}) == {"steps": 3}
    for key in configs.REMOVED:
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)} is 'other'; that setting is gone, and "):
            configs.current({key: "other"})
    with pytest.raises(ConfigError, match=r"There is no setting 'gate\.guard'\. It was one of an earlier version"):
        replace(Config(), {"gate.guard": True})
    (tmp_path / "c.toml").write_text("[rivals]\ntarget = 0.5\nthreshold = 0.3\n", encoding="utf8")
    assert configs.read(tmp_path / "c.toml") == {"rivals.threshold": 0.3}


def test_tensorboard_is_a_tracker_where_it_was_asked_for() -> None:
    for value, now in {"on": {"record.trackers": "tensorboard"}, "off": {}, "auto": {}}.items():
        assert configs.current({"record.tensorboard": value}) == now
    with pytest.raises(ConfigError, match=r"record\.tensorboard'\. .* earlier version, and record\.trackers takes"):
        replace(Config(), {"record.tensorboard": "on"})


def test_a_guard_that_was_off_is_one_that_allows_everything() -> None:
    old = {"gate.guard": False, "gate.lost": 0.2, "cap.cut": 0.05, "cap.guard": False, "steps": 3}
    assert configs.current(old) == {"gate.lost": 1.0, "cap.cut": 1.0, "steps": 3}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_record_says_what_it_said_when_it_was_made(study: Path) -> None:
    packed = study / "configs.toml"
    told = tomllib.loads(packed.read_text(encoding="utf8")) if packed.exists() else {}
    told |= {path.parent.name: tomllib.loads(path.read_text(encoding="utf8")) for path in study.glob("*/config.toml")}
    assert told
    for name, tree in told.items():
        config = Run.open(study / name).config
        said = {f"{part}.{key}": value for part, values in tree.items() if isinstance(values, dict)
                for key, value in values.items()} | {key: tree[key] for key in TABLE.keys() & tree.keys()}
        kept = {key: value for key, value in said.items() if key in TABLE}
        assert len(kept) > 60 and {key: configs.get(config, key) for key in kept} == kept
        assert {key: value for key, value in said.items() if key not in TABLE}.items() <= configs.REMOVED.items()


def test_names_with_values_are_read_as_json_or_as_words_and_anything_else_is_refused() -> None:
    assert configs.arguments("a=true  b=2 c=auto d=0.5", "x") == {"a": True, "b": 2, "c": "auto", "d": 0.5}
    for key in ("model.template", "sampling.vllm"):
        for text in ("enable_thinking", "=1", "a-b=1", "a="):
            with pytest.raises(ConfigError, match=rf"{re.escape(key)} holds '{text}'; it takes name=value"):
                configs.replace(Config(), {key: text})
