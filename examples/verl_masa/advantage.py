"""File two: the advantage estimator `masa`, which sees all rollouts of a batch and scores predictions by solutions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from verl.trainer.ppo.core_algos import register_adv_est

from masa_lib import config as configs
from masa_lib.method import rollouts
from verl_masa.rows import STEP, UNREAD

#: the file of the settings; their defaults otherwise. Notions are not in a score, so they are not paid.
CONFIG = configs.replace(configs.load(os.environ["MASA_CONFIG"]) if "MASA_CONFIG" in os.environ else configs.Config(),
                         {"reward.notion_weight": 0.0})
#: by verl's uid of a row, the problem and the stream; `sampler` keeps it, in the same process
ROWS: dict[str, Mapping[str, str]] = {}


@register_adv_est("masa")
def masa(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None,
         **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The advantages of a batch, by token; verl wants returns beside them, and for a critic alone.

    Args:
        token_level_rewards: of `compute_score`, on one token of each rollout, BT.
        response_mask: 1 where the model wrote, BT.
        index: verl's uid of each rollout's row.
        config: of verl's algorithm; not looked at.
        others: whatever else verl has to give.
    """
    rows = [ROWS[uid] for uid in index]
    scores, lengths = token_level_rewards.sum(dim=-1).tolist(), response_mask.sum(dim=-1).tolist()
    table = pd.DataFrame([_rollout(row, score, int(length)) for row, score, length in
                          zip(rows, scores, lengths, strict=True)])
    table["group"] = pd.factorize(table["problem_id"])[0]
    table = table.sort_values(["stream", "group"], kind="stable")  # whole groups, one after the other
    rollouts.score(table, CONFIG)
    found = torch.tensor(table["advantage"].sort_index().to_numpy(), dtype=torch.float32, device=response_mask.device)
    advantages_BT = found[:, None] * response_mask
    return advantages_BT, advantages_BT


def _rollout(row: Mapping[str, str], score: float, length: int) -> dict[str, Any]:
    """A rollout as `rollouts.score` wants it."""
    known = {"stream": row["stream"], "problem_id": row["problem_id"], "problem": row["problem"], "text": "",
             "length": length, "correct": None, "notions": None, "predicted_pass_rate": None, "predicted_length": None}
    if row["stream"] == "solution":
        return known | {"correct": score > 0}
    if score == UNREAD:
        return known
    return known | {"notions": (), "predicted_pass_rate": int(score) % STEP, "predicted_length": int(score) // STEP}
