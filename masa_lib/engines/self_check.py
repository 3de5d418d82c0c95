"""Whether what is sampled, and what is learned from, is the model's own probability.

Engine and update compute log-probs in ways of their own: with caches that are shared, padding, chunks of logits, layers
computed twice. Before a run's first step both are held against a plain forward pass; a model that one of them gets
wrong is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from masa_lib.config import Config
from masa_lib.engines import Engine, Request, context_of, logprobs
from masa_lib.errors import MasaError, brief, is_out_of_memory
from masa_lib.models import architecture, loading
from masa_lib.models.tensors import ModelError

#: mean gap of a sequence's log-probs that rounding may cause, nats a token, by `model.precision`
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
#: tokens that are sampled, and of the longer prompt where no window asks for more
_SAMPLED, _PROMPT = 8, 24
_TEXT = "What is 17 + 25? Add the tens, then the ones: 10 + 20 = 30 and 7 + 5 = 12, so 30 + 12 = 42. "
#: what a model that the library cannot handle may raise; the library's own errors are sentences already
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
           RuntimeError)


def check(model: Any, tokenizer: Any, engine: Engine, config: Config) -> None:
    """Compare engine and update with the model's plain forward pass on two prompts of unequal length.

    Args:
        model: the policy.
        tokenizer: of the model.
        engine: that samples for it, in step with its weights.
        config: of the run.

    Raises:
        ModelError: one of them differs from the model itself by more than rounding, or fails; it names model and gap.
        EngineError: the engine cannot serve the prompts.
    """
    sampler, who = f"sampling.engine={config.sampling.engine}", f"{config.model.name!r} ({architecture.kind(model)})"
    requests = _requests(model, tokenizer, engine, config)
    with loading.precision(config.model, model.device):
        with _refusal(who, sampler):
            answers = engine.generate(requests)
        samples = [logprobs.Sample(request.prompt, answer.tokens, answer.logps, 1.0, 1.0)
                   for request, answer in zip(requests, answers, strict=True)]
        with _refusal(who, "the update"):
            learned = _update_logps(model, samples)
        own = [plain_logps(model, sample) for sample in samples]
    for way, found in ((sampler, [torch.tensor(answer.logps) for answer in answers]), ("the update", learned)):
        gaps = [(logps - right).abs().mean() for logps, right in zip(found, own, strict=True)]
        gap = float(torch.stack(gaps).max())  # Python's own `max` passes over NaN
        if not gap <= TOLERANCE[config.model.precision]:
            raise ModelError(
                f"The model {who} cannot be trained: its log-probs by {way} are {gap:.2g} nats a token from those of "
                f"its own forward pass, and rounding explains {TOLERANCE[config.model.precision]:g}; choose another "
                "model.name" + (" or sampling.engine." if way == sampler else "."))


@torch.no_grad()
def plain_logps(model: Any, sample: logprobs.Sample) -> torch.Tensor:
    """Log-probs of a sample's completion at temperature 1, by `model(...).logits` of this sequence alone."""
    ids_1T = torch.tensor([sample.prompt + sample.completion], device=model.device)
    count = len(sample.completion)
    keep = {"logits_to_keep": count + 1} if architecture.takes(model, "logits_to_keep") else {}
    logits_1TV = model(input_ids=ids_1T, use_cache=False, **keep).logits
    logps_NV = logits_1TV[0, -count - 1:-1].float().log_softmax(dim=-1)
    return logps_NV.gather(1, ids_1T[0, -count:, None])[:, 0].cpu()


def _requests(model: Any, tokenizer: Any, engine: Engine, config: Config) -> list[Request]:
    """A long prompt, a short one and the long one again, with answers of unequal length.

    The long one is longer than the model's windows, if the context has room and a run's answers get that far.
    """
    sampling, room = config.sampling, context_of(engine, model) - _SAMPLED
    window, reach = max(architecture.windows(model), default=0), max(sampling.solution_tokens, sampling.meta_tokens)
    length = min(max(_PROMPT, min(window + 1, _PROMPT + reach)), room)
    ids = tokenizer(_TEXT)["input_ids"]
    prompt = tuple((ids * (length // len(ids) + 1))[:length])
    prompts = (prompt, prompt[:max(length // 4, 1)], prompt)
    return [Request(prompt, _SAMPLED - seed, seed) for seed, prompt in enumerate(prompts)]


def _update_logps(model: Any, samples: Sequence[logprobs.Sample]) -> list[torch.Tensor]:
    """The samples' log-probs as an update computes them: with the graph of a gradient."""
    with torch.enable_grad():
        logps_N, _ = logprobs.completion_logps(model, samples, 1.0, _SAMPLED)
    return list(logps_N.detach().cpu().split([len(sample.completion) for sample in samples]))


@contextmanager
def _refusal(who: str, way: str) -> Iterator[None]:
    """Say which model what cannot handle, where it fails in the middle of it."""
    try:
        yield
    except MasaError:
        raise
    except _FAULTS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"The model {who} cannot be trained: {way} fails on it ({type(error).__name__}: "
                         f"{brief(str(error))}); choose another model.name or sampling.engine.") from error
