"""MASA for TRL's own trainers, of which nothing is overridden: `worker` (AsyncGRPOTrainer), `grpo` (GRPOTrainer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError


def check(config: Config, only: Mapping[str, Any], trainer: str) -> None:
    """Refuse what a trainer of TRL has no place for.

    Args:
        config: of the run.
        only: settings, and the one value of each that is taken.
        trainer: its name, for the sentence.

    Raises:
        ConfigError: names the setting.
    """
    for key, value in only.items():
        if key == "update.meta_entropy" and not configs.samples_predictions(config):
            continue  # there are no tokens on which it would act
        if configs.get(config, key) != value:
            raise ConfigError(f"{key} is {configs.get(config, key)}; TRL's {trainer} takes {value} only. Set it, or "
                              "train with `masa train`.")
