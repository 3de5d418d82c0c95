"""MASA in TRL's own trainers, none of whose methods is overridden.

On two processes of a CPU, in about a minute:

    torchrun --standalone --nproc_per_node 2 examples/trl_masa.py --out runs/on-trl

`--trainer async` (AsyncGRPOTrainer) takes every method: caps, gates, predictions that are sampled or read.
`--trainer grpo` (GRPOTrainer) samples by itself; it takes sampled predictions, and the gates that remember.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.models import loading, tiers

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
#: of the pocket model's settings, what makes this a training of three short steps
SMALL = {"method": "masa", "steps": 3, "model.threads": 1, "sampling.problems": 4, "sampling.solutions": 8,
         "sampling.predictions": 8, "update.warmup_steps": 0, "update.meta_entropy": 0.0, "evaluation.every": 0,
         "evaluation.problems": 8, "evaluation.final_problems": 8, "evaluation.final_samples": 2}


def asynchronous(config: Config, out: Path) -> Any:
    """AsyncGRPOTrainer with MASA's worker, which records a run folder in `out/masa`."""
    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    from masa_lib.scaleout import without_gpu, worker

    start = out / "start"  # this trainer loads its model from a folder
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if not start.exists():
            for part in loading.load(config.model):
                part.save_pretrained(start)
    args = worker.arguments(config, out / "trl")
    rollouts = worker.MasaRolloutWorker(config, args, out / "masa")
    with without_gpu.trainer():
        return AsyncGRPOTrainer(
            str(start), args=args, train_dataset=Dataset.from_dict({"prompt": ["the worker asks what it likes"]}),
            rollout_worker=rollouts, weight_transfer=rollouts)


def synchronous(config: Config, out: Path) -> Any:
    """GRPOTrainer with MASA's reward function, and its gate as the data set."""
    from trl import GRPOTrainer

    from masa_lib.scaleout import grpo

    model, tokenizer = loading.load(config.model)
    groups = grpo.MasaGroups(config, tokenizer, loading.end_tokens(model, tokenizer, config.sampling.end_tokens))
    return GRPOTrainer(model, groups, grpo.arguments(config, out / "trl", logging_steps=1), groups.data_set(),
                       processing_class=tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("async", "grpo"), default="async")
    parser.add_argument("--config", type=Path, help="settings of masa_lib, as TOML; default: SMALL")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    small = configs.replace(tiers.config({"model.name": "pocket"}), SMALL)
    settings = configs.load(options.config) if options.config else small
    made = (asynchronous if options.trainer == "async" else synchronous)(settings, options.out)
    made.train()
    made.save_model(str(options.out / "model"))
