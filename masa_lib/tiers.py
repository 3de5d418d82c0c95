"""The model tiers: a name for where a model comes from, with the settings that suit it. No code branches on a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masa_lib import config as configs
from masa_lib.config import Config

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Tier:
    """A named model.

    `where` is a folder or a hub id; `about` one line for the table of tiers; `settings` the defaults of a run with this
    model, as dotted keys; all others are those of `Config`.
    """

    name: str
    where: str
    about: str
    hardware: str
    settings: Mapping[str, Any] = field(default_factory=dict)


#: Departures from the published settings, each against a collapse that unrecorded trials showed: a proper score instead
#: of the peaked kernel, each part of the reward normalised by itself, an entropy bonus; and a length window with slack,
#: because the right solutions of a problem come to have one length.
_POCKET = {"steps": 180, "reward.difficulty_mode": "brier", "reward.notion_weight": 0.25, "reward.length_slack": 0.25,
           "update.normalise_meta": "parts", "update.meta_entropy": 0.03, "update.meta_weight": 2.0,
           "update.learning_rate": 2e-4, "update.schedule": "linear", "evaluation.every": 15,
           "evaluation.problems": 120, "evaluation.final_problems": 300,
           "record.checkpoint_every": 30, "record.rollouts_every": 25}

TIERS = {tier.name: tier for tier in (
    Tier("pocket", str(DATA / "pocket"), "Qwen3 architecture, 0.9 million parameters, made by `masa pocket build`",
         "any laptop", _POCKET),
    Tier("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Llama architecture, 135 million parameters",
         "CPU for hours, one GPU for minutes"),
    *(Tier(f"qwen3-{size}", f"Qwen/Qwen3-{size.upper()}-Base", f"Qwen3 base model, {size.upper()} parameters",
           "one GPU" if size in ("0.6b", "1.7b") else "one or more large GPUs")
      for size in ("0.6b", "1.7b", "4b", "8b", "14b")),
)}


def table() -> list[dict[str, str]]:
    """The table of tiers: name, where it comes from, what it is, what it runs on."""
    return [{"name": tier.name, "where": "data/pocket" if tier.name == "pocket" else tier.where,
             "about": tier.about, "hardware": tier.hardware} for tier in TIERS.values()]


def resolve(name: str) -> str:
    """The folder or hub id behind a tier's name; anything else is taken as it is."""
    return TIERS[name].where if name in TIERS else name


def config(changes: Mapping[str, Any] | None = None) -> Config:
    """The config of a run: the defaults of the model's tier, then the changes, by dotted key.

    What a tier says about problems holds for its own source of problems alone.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
    """
    changes = dict(changes or {})
    name = changes.get("model.name", Config().model.name)
    settings = next((dict(tier.settings) for tier in TIERS.values() if name in (tier.name, tier.where)), {})
    source = settings.get("problems.source", Config().problems.source)
    if changes.get("problems.source", source) != source:
        settings = {key: value for key, value in settings.items() if not key.startswith("problems.")}
    return configs.replace(configs.replace(Config(), settings), changes)
