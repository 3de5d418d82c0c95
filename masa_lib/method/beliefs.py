"""Predictions that are read instead of sampled: the nine probabilities that a model gives to its pass rate.

Put the model in front of the pass rate, behind a forced beginning of its prediction, and its next-token distribution
over `0` to `8` is a belief about how many eighths of its solutions will be right. One forward pass, no token written.
A group's outcome has a likelihood, k of G right under the rate v is Bin(k; G, v), so the belief is learned by the log
score of what happened: strictly proper, exact, without sampling, advantages or groups without a signal. The same nine
numbers are a prior: multiplied by the likelihood of a problem's earlier groups they say how likely its next one is to
have right and wrong solutions. Which problems a gate then chooses stands in `masa_lib.gates`; nothing here samples.

The suffix legend: P problem, V the nine rates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from masa_lib.config import PromptConfig
from masa_lib.errors import MasaError
from masa_lib.tasks.predictions import PASS_RATE_STEPS

if TYPE_CHECKING:
    import torch

#: the answers that are read, in this order: eighths
ANSWERS = tuple(str(eighths) for eighths in range(PASS_RATE_STEPS + 1))
#: no problem is believed hopeless or sure beyond this: a rate of 0 or 1 would forbid what then happens
EDGE = 0.005
RATES_V = np.clip(np.arange(PASS_RATE_STEPS + 1) / PASS_RATE_STEPS, EDGE, 1 - EDGE)
UNIFORM_V = np.full(len(RATES_V), 1 / len(RATES_V))
#: how a prediction begins in each wording, up to where the pass rate stands; its keys are in the order of the prompt's
_BEGINNING = {"compact": '{"math_notion": [], "pass_rate": ',
              "paper": '<meta>\n</meta>\n{"math_notion": [], "pass_rate": '}
#: what is kept of the trust from step to step, where it starts (the untrained belief is worse than a constant), and
#: what a step's mean outcome renews of the constant that the belief has to beat
_KEPT, _START, _RENEWED = 0.8, -5.0, 0.05


class BeliefError(MasaError, ValueError):
    """A tokenizer in whose words a belief cannot be read; the message says which word is not one token."""


@dataclass(frozen=True)
class Belief:
    """What a model believes of one problem.

    `prompt`, `suffix`: the token ids behind which it was read; the prompt is that of the problem's solutions, unless
    the model thought first. `probabilities`: of the nine pass rates, their sum is 1. `outside`: the probability mass
    that lay on other words.
    """

    prompt: tuple[int, ...]
    suffix: tuple[int, ...]
    probabilities: tuple[float, ...]
    outside: float = 0.0

    @property
    def mean(self) -> float:
        """The expected pass rate, 0 to 1."""
        return float(np.dot(self.probabilities, np.arange(len(self.probabilities))) / PASS_RATE_STEPS)


def thousandths(probabilities: Sequence[float]) -> list[int]:
    """Probabilities as a record keeps them, rounded."""
    return [round(1000 * share) for share in probabilities]


@dataclass(frozen=True)
class Question:
    """Where a belief is read: `suffix`, the ids of the forced beginning, and `choices`, the ids of the nine answers."""

    suffix: tuple[int, ...]
    choices: tuple[int, ...]


def question(tokenizer: Any, config: PromptConfig) -> Question:
    """The forced beginning and the nine answers in a tokenizer's words.

    The beginning is encoded together with each answer, so that a tokenizer that writes the space in front of a digit
    into the digit's token is read where that token stands.

    Args:
        tokenizer: of the model.
        config: the wording.

    Raises:
        BeliefError: behind the beginning an answer is not one token, or two answers have the same one.
    """
    text = _BEGINNING[config.wording]
    encoded = [tuple(tokenizer.encode(text + answer, add_special_tokens=False)) for answer in ANSWERS]
    shared = min(map(len, encoded)) - 1
    suffixes = {ids[:shared] for ids in encoded}
    wrong = [answer for answer, ids in zip(ANSWERS, encoded, strict=True) if len(ids) != shared + 1]
    if wrong or len(suffixes) > 1 or len({ids[-1] for ids in encoded}) < len(ANSWERS):
        raise BeliefError(f"A belief cannot be read in this model's words: behind {text!r} the pass rate "
                          f"{wrong[0] if wrong else ANSWERS[-1]} is not one token of its own. Train with "
                          "--method masa, whose predictions are sampled (prediction.mode=sampled).")
    return Question(encoded[0][:shared], tuple(ids[-1] for ids in encoded))


def normalised(logps_PV: np.ndarray) -> np.ndarray:
    """Log-probs of the nine answers as probabilities among themselves, PV."""
    return special.softmax(np.asarray(logps_PV, dtype=float), axis=-1)


@functools.cache
def log_binomial(right: int, solutions: int) -> np.ndarray:
    """Log Bin(k; G, v): how likely so many right ones of so many solutions are under each of the nine rates, V."""
    choose = special.gammaln(solutions + 1) - special.gammaln(right + 1) - special.gammaln(solutions - right + 1)
    return choose + right * np.log(RATES_V) + (solutions - right) * np.log1p(-RATES_V)


def log_binomials(right: Sequence[int], solutions: Sequence[int]) -> np.ndarray:
    """`log_binomial` of each problem, PV."""
    return np.stack([log_binomial(int(k), int(n)) for k, n in zip(right, solutions, strict=True)])


def log_score(beliefs_PV: np.ndarray, right: Sequence[int], solutions: Sequence[int]) -> np.ndarray:
    """The log of the chance that each belief gave to what happened, nats, P."""
    return special.logsumexp(log_binomials(right, solutions), axis=1, b=np.asarray(beliefs_PV, dtype=float))


def score(logits_PV: torch.Tensor, likelihoods_PV: torch.Tensor, rates_P: torch.Tensor, mode: str) -> torch.Tensor:
    """What each belief earns, with its exact gradient, P.

    `log` is strictly proper for the belief: it pays for honest doubt. `brier` is the expected quadratic score of an
    answer drawn from the belief; it is linear in the belief, so its optimum is one answer without a doubt.

    Args:
        logits_PV: of the nine answers.
        likelihoods_PV: `log_binomial` of what happened.
        rates_P: share of right solutions.
        mode: `log` or `brier` (`prediction.score`).
    """
    import torch  # here alone: recorded beliefs are read where there is no torch

    logps_PV = torch.log_softmax(logits_PV, dim=-1)
    if mode == "log":
        return torch.logsumexp(logps_PV + likelihoods_PV, dim=-1)
    answers_V = torch.arange(logits_PV.shape[1], device=logits_PV.device) / PASS_RATE_STEPS
    return (logps_PV.exp() * (1 - (answers_V - rates_P[:, None]) ** 2)).sum(dim=-1)


def posterior(prior_PV: np.ndarray, counts_P2: np.ndarray) -> np.ndarray:
    """The prior times the likelihood of what is remembered of each problem, PV.

    Args:
        prior_PV: of the nine rates.
        counts_P2: right and wrong solutions, which need not be whole numbers: old ones have faded.
    """
    counts_P2 = np.asarray(counts_P2, dtype=float).reshape(-1, 2)
    with np.errstate(divide="ignore"):
        logs_PV = np.log(prior_PV) + counts_P2 @ np.stack([np.log(RATES_V), np.log1p(-RATES_V)])
    return normalised(logs_PV)


def signal_chance(pass_rate: Any, solutions: int) -> Any:
    """Chance that a group of so many solutions has right and wrong ones: 1 - p^G - (1 - p)^G, element by element."""
    rate = np.asarray(pass_rate, dtype=float)
    return 1 - rate**solutions - (1 - rate)**solutions


def mixed_chance(beliefs_PV: np.ndarray, solutions: int) -> np.ndarray:
    """The chance that a group of so many solutions has right and wrong ones: the mean over the belief, P."""
    return np.asarray(beliefs_PV) @ signal_chance(RATES_V, solutions)


class Trust:
    """How far a belief may decide: as far as it has lately foretold outcomes better than a constant has.

    The constant is the running distribution of pass rates, the same for every problem. `total`: nats by which the
    belief was better, summed over each step's groups, older steps fading. `constant_V`: the nine probabilities.
    """

    def __init__(self, total: float = _START, constant_V: Sequence[float] = tuple(UNIFORM_V)) -> None:
        self.total, self.constant_V = float(total), np.asarray(constant_V, dtype=float)

    @property
    def share(self) -> float:
        """Weight of the belief beside the constant, 0 to 1."""
        return float(special.expit(self.total))

    def mix(self, beliefs_PV: np.ndarray) -> np.ndarray:
        """The prior that a gate goes by, PV."""
        return self.share * np.asarray(beliefs_PV) + (1 - self.share) * self.constant_V

    def learn(self, beliefs_PV: np.ndarray, right: Sequence[int], solutions: Sequence[int]) -> None:
        """Compare a step's beliefs with what happened to their problems, then let the constant follow."""
        if not len(right):
            return
        constant_PV = np.broadcast_to(self.constant_V, (len(right), len(RATES_V)))
        gain_P = log_score(beliefs_PV, right, solutions) - log_score(constant_PV, right, solutions)
        self.total = _KEPT * self.total + float(gain_P.sum())
        seen_V = normalised(np.log(self.constant_V) + log_binomials(right, solutions)).mean(axis=0)
        self.constant_V = (1 - _RENEWED) * self.constant_V + _RENEWED * seen_V
