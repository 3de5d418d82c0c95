"""MASA for TRL's own trainers, of which nothing is overridden: `worker` (AsyncGRPOTrainer), `grpo` (GRPOTrainer)."""
