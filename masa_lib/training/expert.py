"""Expert predictions and behaviour cloning: what the model should have predicted, taught by cross-entropy.

Of a scored problem's meta rollouts the one with the best notions is kept, and its two numbers are replaced by the true
ones; all else stays as the model wrote it, so that what is cloned is close to the model's own. When enough have been
collected they are cloned in a few updates and forgotten. The first version of the paper (2510.03259v1) does this
beside reinforcement. When to do it is the trainer's business, and engines play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib.config import CloningConfig, Config, UpdateConfig
from masa_lib.engines import logprobs
from masa_lib.method import rollouts
from masa_lib.models import loading
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.read_prediction import parse_prediction
from masa_lib.training import safeguards
from masa_lib.training.safeguards import TokenBudget

#: least notion reward of an expert prediction
LEAST_NOTION = 0.2
#: gradient updates on a full store, as published, and their learning rate
UPDATES, LEARNING_RATE = 5, 1e-5


def expert_text(text: str, pass_rate: int, length: int) -> str:
    """A prediction with other numbers in it, every other character as the model wrote it.

    Args:
        text: a meta rollout that parses.
        pass_rate: true one, eighths.
        length: true one, tokens.

    Raises:
        ValueError: the text does not parse.
    """
    numbers = zip(parse_prediction(text).spans, (pass_rate, length), strict=True)
    for (start, end), number in sorted(numbers, reverse=True):  # from the back, as the front's places then hold
        text = f"{text[:start]}{number}{text[end:]}"
    return text


def expert_sample(group: pd.DataFrame, tokenizer: Any) -> logprobs.Sample | None:
    """The expert prediction of a problem, ready for a cross-entropy update.

    Args:
        group: the scored rollouts of one problem, both streams.
        tokenizer: of the model.

    Returns:
        None without a right solution, whose length would be the true one, or without a meta rollout that parses, ended
        by itself (what was cut off must not be taught as an end) and names notions that are good enough.
    """
    solved, meta = (group[group["stream"] == stream] for stream in rollouts.STREAMS)
    right = solved[solved["correct"].eq(True)]
    parses = np.array([bool(parse_prediction(text).spans) for text in meta["text"]], dtype=bool)
    good = meta[parses & (meta["finish"] == "stop") & (meta["reward_notion"] >= LEAST_NOTION)]
    if right.empty or good.empty:
        return None
    best = good.loc[good["reward_notion"].idxmax()]
    text = expert_text(best["text"], round(PASS_RATE_STEPS * len(right) / len(solved)), round(right["length"].mean()))
    completion = (*tokenizer(text, add_special_tokens=False)["input_ids"], loading.answer_end(tokenizer))
    prompt = best["prompt_ids"][:len(best["prompt_ids"]) - int(best["beginning"])]
    return logprobs.Sample(tuple(prompt), completion, (), 0.0, 0.0, "meta")


class Store:
    """Expert predictions collected for the next cloning, at most `cloning.store`."""

    def __init__(self) -> None:
        self._samples: list[logprobs.Sample] = []

    def add(self, group: pd.DataFrame, tokenizer: Any, config: CloningConfig) -> None:
        """Take the expert prediction of one problem's scored rollouts, if it has one and there is room."""
        if len(self._samples) < config.store and (sample := expert_sample(group, tokenizer)):
            self._samples.append(sample)

    def full(self, config: CloningConfig) -> bool:
        """Whether it is time to clone; never where `cloning.store` is 0."""
        return 0 < config.store <= len(self._samples)

    def samples(self) -> list[logprobs.Sample]:
        """What was collected, oldest first."""
        return list(self._samples)

    def clear(self) -> None:
        """Forget what was collected."""
        self._samples = []

    def state(self) -> list[list[list[int]]]:
        """Token ids of prompt and completion of each sample, for a checkpoint."""
        return [[list(sample.prompt), list(sample.completion)] for sample in self._samples]

    def restore(self, state: list[list[list[int]]]) -> None:
        """Take up what `state` gave."""
        self._samples = [logprobs.Sample(tuple(prompt), tuple(completion), (), 0.0, 0.0, "meta")
                         for prompt, completion in state]


def clone(model: Any, samples: Sequence[logprobs.Sample], config: Config, budget: TokenBudget) -> dict[str, float]:
    """Behaviour cloning: UPDATES gradient updates, each on all samples.

    Their AdamW is a new one each time: the moments of reinforcement belong to another loss and must not be mixed with
    these, and those of the last cloning are from many steps ago; so a checkpoint needs no second optimiser either.

    Args:
        model: is trained in place; its engine has to be told of the new weights.
        samples: at least one.
        config: of the run.
        budget: of its micro-batches.

    Returns:
        `loss_cloning`: before the first update, nats a token; `tokens_cloning`: tokens through all updates.
    """
    optimizer = torch.optim.AdamW(loading.trainable(model), lr=LEARNING_RATE, weight_decay=0.0)
    done = [imitate(model, optimizer, samples, config.update, budget) for _ in range(UPDATES)]
    return {"loss_cloning": done[0][0], "tokens_cloning": sum(tokens for _, tokens in done)}


def imitate(model: Any, optimizer: torch.optim.Optimizer, samples: Sequence[logprobs.Sample], config: UpdateConfig,
            budget: TokenBudget) -> tuple[float, int]:
    """One optimiser update on the cross-entropy of the samples' completions, a mean over their tokens.

    Args:
        model: in evaluation mode.
        optimizer: of its trained parameters.
        samples: at least one; advantages and weights play no part.
        config: token budget, log-prob chunk, gradient clip.
        budget: of the micro-batches, halved where memory runs out.

    Returns:
        The loss before the update, nats a token, and the tokens that went through the model.

    Raises:
        UpdateError: loss or gradient is not finite, or one sequence is too much for the memory.
    """
    total = sum(len(sample.completion) for sample in samples)

    def passes(tokens: int) -> tuple[float, int]:
        """Loss and tokens of all samples at a budget, their gradient in the parameters."""
        optimizer.zero_grad()
        losses, computed = 0.0, 0
        for batch in logprobs.micro_batches(samples, tokens):
            loss = -logprobs.completion_logps(model, batch, 1.0, config.logprob_chunk)[0].sum() / total
            loss.backward()
            losses += loss.item()
            computed += logprobs.computed_tokens(model, batch)
        return losses, computed

    losses, computed = budget.spend(passes, samples, config.token_budget)
    safeguards.clip_gradients(loading.trainable(model), config.gradient_clip, losses)
    safeguards.move(optimizer)
    torch.clear_autocast_cache()  # it holds the old weights in bfloat16 until the context ends
    return losses, computed
