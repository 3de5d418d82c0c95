"""Beliefs: what is read, what the scores pay, what they are as a prior, and what a training makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from masa_lib import config
from masa_lib.engines import logprobs
from masa_lib.method import beliefs, objective, prompts
from masa_lib.method.beliefs import ANSWERS, RATES_V, Trust
from masa_lib.models import loading, tiers

logits = st.lists(st.floats(-4, 4), min_size=9, max_size=9)


@pytest.fixture(scope="module")
def pocket() -> tuple[object, object]:
    return loading.load(tiers.config().model)


class Words:
    """A tokenizer of whole words, whose digits carry the space in front of them; longer texts letter by letter."""

    def __init__(self, whole: tuple[str, ...]) -> None:
        self.whole = sorted(whole, key=len, reverse=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = []
        while text:
            word = next((word for word in self.whole if text.startswith(word)), text[0])
            ids.append(self.whole.index(word) + 1000 if word in self.whole else ord(word))
            text = text[len(word):]
        return ids


@pytest.mark.parametrize("wording", ["compact", "paper"])
def test_the_pocket_tokenizer_has_the_nine_answers_as_tokens_behind_the_forced_beginning(pocket, wording: str) -> None:
    _, tokenizer = pocket
    asked = beliefs.question(tokenizer, tiers.config({"prompt.wording": wording}).prompt)
    assert [tokenizer.decode([choice]) for choice in asked.choices] == list(ANSWERS)
    begun = tokenizer.decode(list(asked.suffix)).replace(" ", "")
    assert begun.endswith('{"math_notion":[],"pass_rate":')
    assert begun.startswith("<meta>") == (wording == "paper")


def test_a_digit_that_carries_its_space_is_read_where_its_token_stands() -> None:
    words = Words(tuple(f" {digit}" for digit in range(9)))
    asked = beliefs.question(words, config.PromptConfig())
    assert len(set(asked.choices)) == 9
    assert "".join(map(chr, asked.suffix)) == '{"math_notion": [], "pass_rate":'


@pytest.mark.parametrize("words", [(": 5",), ("e\": 7", "e\": 8"), ('": 0', '": 1')])
def test_answers_that_are_not_one_token_each_are_refused_in_a_sentence(words: tuple[str, ...]) -> None:
    with pytest.raises(beliefs.BeliefError, match="is not one token of its own") as refused:
        beliefs.question(Words(words), config.PromptConfig())
    assert "\n" not in str(refused.value)


@given(logits, st.integers(0, 8), st.sampled_from(["log", "brier"]))
def test_the_gradient_of_a_score_is_that_by_enumeration(values: list[float], right: int, mode: str) -> None:
    logits_PV = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    likely_PV = torch.tensor(beliefs.log_binomial(right, 8))[None]
    beliefs.score(logits_PV, likely_PV, torch.tensor([right / 8], dtype=torch.float64), mode).sum().backward()
    shares_V = torch.softmax(torch.tensor(values, dtype=torch.float64), 0).numpy()
    if mode == "log":
        pays_V = stats.binom.pmf(right, 8, RATES_V) / np.dot(shares_V, stats.binom.pmf(right, 8, RATES_V))
    else:
        pays_V = 1 - (np.arange(9) / 8 - right / 8) ** 2
    by_hand_V = [sum(shares_V[answer] * pays_V[answer] * ((answer == moved) - shares_V[moved]) for answer in range(9))
                 for moved in range(9)]
    np.testing.assert_allclose(logits_PV.grad[0].numpy(), by_hand_V, atol=1e-9)


def optimum(mode: str, truth_V: np.ndarray, solutions: int = 8) -> np.ndarray:
    """The belief that a score pays best in expectation, where the pass rate has a known distribution."""
    logits_PV = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits_PV], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)
    counts = range(solutions + 1)
    chances = np.array([np.dot(truth_V, stats.binom.pmf(k, solutions, RATES_V)) for k in counts])
    likely = torch.tensor(np.stack([beliefs.log_binomial(k, solutions) for k in counts]))

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        paid = beliefs.score(logits_PV.expand(len(chances), 9), likely, torch.tensor(counts) / solutions, mode)
        (-(torch.tensor(chances) * paid).sum()).backward()
        return -(torch.tensor(chances) * paid.detach()).sum()

    optimiser.step(loss)
    return torch.softmax(logits_PV[0].detach(), 0).numpy()


def test_the_log_score_recovers_a_known_distribution_of_pass_rates() -> None:
    truth_V = np.array([0.3, 0, 0, 0.2, 0, 0, 0, 0.1, 0.4])
    found_V = optimum("log", truth_V, solutions=64)
    np.testing.assert_allclose(found_V, truth_V, atol=0.02)
    shares = optimum("log", np.full(9, 1 / 9))
    np.testing.assert_allclose(shares @ RATES_V, 0.5, atol=1e-3)
    assert shares.max() < 0.5  # honest doubt is paid


def test_the_expected_brier_score_kills_doubt() -> None:
    truth_V = np.array([0.5, 0, 0, 0, 0, 0, 0, 0, 0.5])
    found_V = optimum("brier", truth_V)
    assert found_V[4] > 0.99  # one answer, the mean, though the pass rate is never there
    log_V = optimum("log", truth_V)
    assert log_V[0] + log_V[8] > 0.99


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_a_posterior_is_bayes_rule_and_the_mixed_chance_its_mean(history: list[int]) -> None:
    prior_V = np.arange(1.0, 10.0) / 45
    counts = [[sum(history), sum(8 - k for k in history)]]
    expected_V = prior_V * np.prod([stats.binom.pmf(k, 8, RATES_V) for k in history], axis=0)
    expected_V /= expected_V.sum()
    found_PV = beliefs.posterior(prior_V[None], counts)
    np.testing.assert_allclose(found_PV[0], expected_V, atol=1e-9)
    mixed = np.dot(expected_V, [1 - stats.binom.pmf(0, 8, rate) - stats.binom.pmf(8, 8, rate) for rate in RATES_V])
    np.testing.assert_allclose(beliefs.mixed_chance(found_PV, 8), [mixed], atol=1e-9)


def test_trust_is_earned_by_foretelling_better_than_a_constant_and_lost_again() -> None:
    rng, trust = np.random.default_rng(0), Trust()
    assert trust.share < 0.01
    rates = rng.choice([0.1, 0.9], 60)
    knows_PV = np.where(rates[:, None] > 0.5, np.eye(9)[7] * 0.9 + 0.1 / 9, np.eye(9)[1] * 0.9 + 0.1 / 9)
    for row in range(0, 60, 10):
        right = rng.binomial(8, rates[row:row + 10])
        trust.learn(knows_PV[row:row + 10], right, [8] * 10)
    assert trust.share > 0.9
    np.testing.assert_allclose(trust.mix(knows_PV).sum(axis=1), 1)
    for row in range(0, 60, 10):
        trust.learn(knows_PV[::-1][row:row + 10], rng.binomial(8, rates[row:row + 10]), [8] * 10)
    assert trust.share < 0.5


@pytest.mark.parametrize("budget", [10_000, 60])
def test_belief_gradients_are_those_of_the_whole_model_in_micro_batches_too(pocket, budget: int) -> None:
    model, tokenizer = pocket
    settings = tiers.config()
    asked = beliefs.question(tokenizer, settings.prompt)
    texts = ["2 + 3", "17 * 4 + 1", "9 - 8"]
    samples = [logprobs.BeliefSample(tuple(prompts.encode(tokenizer, prompts.solution_messages(text, settings.prompt)))
                                 + asked.suffix, right, 8) for text, right in zip(texts, (8, 0, 3), strict=True)]
    gradients, loss = objective.belief_gradients(model, samples, asked.choices, "log", budget)
    model.zero_grad()
    scores = []
    for sample in samples:
        logits_V = model(torch.tensor([sample.prompt])).logits[0, -1, list(asked.choices)]
        chance = torch.softmax(logits_V, 0) @ torch.tensor(stats.binom.pmf(sample.right, 8, RATES_V)).float()
        scores.append(chance.log())
    plain = -torch.stack(scores).mean()
    plain.backward()
    assert loss == pytest.approx(plain.item(), abs=1e-5)
    for parameter, found in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=2e-5, rtol=1e-3)
    model.zero_grad()


def test_a_belief_says_its_mean() -> None:
    assert beliefs.Belief((1,), (), (0.5, 0, 0, 0, 0, 0, 0, 0, 0.5)).mean == pytest.approx(0.5)
