"""File three: verl's replay buffer, which also tells the estimator which problem and stream each rollout belongs to.

verl gives an estimator nothing but scores and the row's uid, a random one. The buffer knows the rows, and lives in the
same process. Importing it registers the estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transfer_queue
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_masa import advantage


class PairedRows(ReplayBuffer):
    """The buffer of the synchronous trainer, which trains on whole batches: both rows of each problem."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """See `ReplayBuffer.sample`."""
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "train":
            known = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=partition_id,
                                                select_fields=["extra_info"])
            remember(batch.keys, list(known["extra_info"]))
        return batch, metrics


def remember(keys: Sequence[str], known: Sequence[Mapping[str, str]]) -> None:
    """Keep what is known of a batch's rows; a rollout's key is `uid_session_output`."""
    advantage.ROWS.clear()
    advantage.ROWS.update({key.rsplit("_", 2)[0]: row for key, row in zip(keys, known, strict=True)})
