"""What sampling and reading cost in a step, whichever engine does it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from masa_lib.engines.base import Completion, Engine, Reading, Request, Watch


class CountingEngine:
    """An engine that adds up its calls.

    `prefill`: tokens of prompts computed to sample. `decode`: tokens sampled. `read_tokens`, `read_seconds`: computed
    to read, and how long that took.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.prefill, self.decode, self.read_tokens, self.read_seconds = engine, 0, 0, 0, 0.0

    def generate(self, requests: Sequence[Request], progress: Watch | None = None) -> list[Completion]:
        """See `Engine.generate`."""
        completions = self.engine.generate(requests, progress)
        self.prefill += self.engine.prefill_tokens
        self.decode += sum(len(completion.tokens) for completion in completions)
        return completions

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """See `Engine.read`."""
        start = time.perf_counter()
        reading = self.engine.read(prompts, suffix, choices)
        self.read_seconds += time.perf_counter() - start
        self.read_tokens += self.engine.prefill_tokens
        return reading
