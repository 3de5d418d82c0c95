"""Sampling engines: token ids in, token ids and log-probs out."""

from masa_lib.engines.base import Completion, Engine, EngineError, Reading, Request, context_of, engine_of, make_engine

__all__ = ["Completion", "Engine", "EngineError", "Reading", "Request", "context_of", "engine_of", "make_engine"]
