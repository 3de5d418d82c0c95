#!/usr/bin/env bash
# MASA with verl 0.9.1: bash examples/verl_masa/train.sh my.toml my-model, with more settings of verl behind. See docs/verl.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
MASA_CONFIG=$(realpath "$1")
export MASA_CONFIG PYTHONPATH="examples${PYTHONPATH:+:$PYTHONPATH}"
python - <<'PY'
import os

from masa_lib import config
from masa_lib.tasks.problems import ProblemPool
from verl_masa import rows

settings = config.load(os.environ["MASA_CONFIG"])
rows.table(ProblemPool(settings.problems, settings.seed).take(0, 512), settings).to_parquet("masa-rows.parquet")
PY
# Rows are neither shuffled nor filtered, so that a problem's two rows are in one batch; train_batch_size counts rows.
exec python -m verl.trainer.main_ppo \
    data.train_files=masa-rows.parquet data.val_files=masa-rows.parquet data.shuffle=False \
    data.filter_overlong_prompts=False data.train_batch_size=64 \
    actor_rollout_ref.model.path="$2" actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    algorithm.adv_estimator=masa critic.enable=False trainer.v1.trainer_mode=sync \
    reward.custom_reward_function.path=pkg://verl_masa.rows \
    trainer.v1.sampler.custom_sampler.path=pkg://verl_masa.sampler \
    trainer.v1.sampler.custom_sampler.name=PairedRows \
    "${@:3}"
