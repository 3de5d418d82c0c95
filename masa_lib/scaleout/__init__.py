"""MASA on TRL's GRPOTrainer and accelerate: the same method, prompts, rewards and records on several processes."""
