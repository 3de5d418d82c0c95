"""Sampling engines: token ids in, token ids and log-probs out; and the learner's own forward pass (`logprobs`)."""

from masa_lib.engines.base import Completion, Engine, EngineError, Reading, Request, Watch, context_of
from masa_lib.engines.registry import engine_of, load_policy, make_engine

__all__ = ["Completion", "Engine", "EngineError", "Reading", "Request", "Watch", "context_of", "engine_of",
           "load_policy", "make_engine"]
