"""The method, in the order in which it is read.

prompts, beliefs, gating, gather, rollouts, rewards, advantages, objective; then `masa_lib.training.trainer`, one step
of it.
"""
