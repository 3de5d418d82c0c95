"""Expert predictions say the truth in the model's own words, and cloning makes them more likely."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from small import small

from masa_lib.engines import logprobs, make_engine
from masa_lib.method import rollouts
from masa_lib.models import loading
from masa_lib.tasks.predictions import MetaPrediction
from masa_lib.tasks.problems import ProblemPool
from masa_lib.tasks.read_prediction import MAX_SOLUTION_LENGTH, parse_prediction
from masa_lib.training import expert
from masa_lib.training.safeguards import TokenBudget

CONFIG = small({"problems.levels": "1-3", "sampling.solutions": 8, "sampling.predictions": 8, "cloning.store": 4})
PLAIN = '{"math_notion": ["carry"], "pass_rate": 5, "solution_length": 40}'


@pytest.fixture(scope="module")
def scored() -> tuple[Any, Any, pd.DataFrame]:
    """The pocket model, its tokenizer, and the scored rollouts of 12 problems."""
    loading.prepare(CONFIG)
    model, tokenizer = loading.load(CONFIG.model)
    engine = make_engine("transformers", model, tokenizer, batch=256)
    table = rollouts.collect(ProblemPool(CONFIG.problems, 0).take(0, 12), engine, tokenizer, CONFIG, solutions=8,
                             predictions=8, seed=[5], temperature=1.0)
    rollouts.score(table, CONFIG)
    return model, tokenizer, table


@st.composite
def objects(draw: st.DrawFn) -> str:
    """A prediction as models write them: any order of keys, styles of numbers, quotes, spaces; perhaps keys twice."""
    notions = draw(st.lists(st.text(max_size=12), max_size=3))
    rate, length = draw(st.integers(0, 8)), draw(st.integers(0, MAX_SOLUTION_LENGTH))
    number = draw(st.sampled_from(["{}", "{}.0", '"{}"', "' {} '", "{} ", "+{}"]))
    notion = json.dumps(notions, ensure_ascii=draw(st.booleans()))
    pairs = [("math_notion", notion), ("pass_rate", number.format(rate)), ("solution_length", number.format(length))]
    pairs += draw(st.lists(st.sampled_from([*pairs, ("why", '{"pass_rate": 1}'), ("pass_rate", "2")]), max_size=2))
    quote, space = draw(st.sampled_from(['"', "'", ""])), draw(st.sampled_from([" ", "", "\n  "]))
    members = f",{space}".join(f"{quote}{key}{quote}:{space}{value}" for key, value in draw(st.permutations(pairs)))
    return f"{{{space}{members}{space}}}"


@given(st.text(max_size=30), objects(), st.one_of(st.text(max_size=30), objects()), st.integers(0, 8),
       st.integers(0, MAX_SOLUTION_LENGTH))
@example("<meta>5 of 8</meta>", PLAIN, "", 0, 7)
@example("```json\n", PLAIN, "\n``` {5, 40}", 8, 1_000_000)
def test_an_expert_text_parses_to_the_true_values_and_keeps_all_else(before: str, middle: str, after: str, rate: int,
                                                                     length: int) -> None:
    text = before + middle + after
    found = parse_prediction(text)
    assume(found.prediction)
    made = expert.expert_text(text, rate, length)
    again = parse_prediction(made)
    assert again.prediction == MetaPrediction(found.prediction.notions, rate, length)
    assert without_numbers(made) == without_numbers(text)


def without_numbers(text: str) -> list[str]:
    """The three pieces of a prediction's text around its two numbers."""
    (first, end), (second, last) = sorted(parse_prediction(text).spans)
    return [text[:first], text[end:second], text[last:]]


def test_only_the_numbers_change() -> None:
    assert expert.expert_text(f"<meta>a</meta>{PLAIN} ", 2, 133) == (
        '<meta>a</meta>{"math_notion": ["carry"], "pass_rate": 2, "solution_length": 133} ')
    with pytest.raises(ValueError):
        expert.expert_text("no prediction", 2, 133)


def group(meta: list[Mapping[str, Any]], right: list[int], wrong: int) -> pd.DataFrame:
    """The rollouts of one problem: right solutions of these lengths, wrong ones, and meta rollouts."""
    solved = [{"stream": "solution", "correct": number < len(right), "length": length}
              for number, length in enumerate([*right, *[99] * wrong])]
    rows = [{"stream": "meta", "finish": "stop", "prompt_ids": (1, 2), "beginning": 0, "text": PLAIN,
             "reward_notion": 1.0} | row for row in meta]
    return pd.DataFrame(solved + rows).astype({"correct": "boolean"})


def test_the_expert_has_the_best_notions_and_the_true_numbers(scored: tuple) -> None:
    _, tokenizer, _ = scored
    rows = [{"reward_notion": 0.5, "text": "x " + PLAIN, "prompt_ids": (1, 2, 7, 7), "beginning": 2},
            {"reward_notion": 0.9, "finish": "length"}, {"reward_notion": 1.0, "text": "{" + PLAIN[:-1]},
            {"reward_notion": 0.5}]
    sample = expert.expert_sample(group(rows, [10, 21], 4), tokenizer)
    assert sample.prompt == (1, 2) and sample.stream == "meta"
    assert sample.completion[-1] == tokenizer.eos_token_id
    # 2 of 6 are 2.67 eighths; the lengths' mean is 15.5
    assert tokenizer.decode(sample.completion[:-1]) == expert.expert_text("x " + PLAIN, 3, 16)


@pytest.mark.parametrize(("rows", "right"), [
    ([{"reward_notion": 0.19}], [10]), ([{"finish": "length"}], [10]), ([{"text": "no idea"}], [10]), ([], [10]),
    ([{}], []), ([{"reward_notion": float("nan")}], [10])])
def test_a_problem_without_good_notions_or_right_solutions_has_no_expert(rows: list, right: list,
                                                                         scored: tuple) -> None:
    assert expert.expert_sample(group(rows or [{"text": ""}], right, 2), scored[1]) is None


def test_a_store_keeps_what_a_cloning_needs_and_survives_a_checkpoint(scored: tuple) -> None:
    _, tokenizer, table = scored
    store = filled(table, tokenizer)
    assert store.full(CONFIG.cloning) and len(store.samples()) == CONFIG.cloning.store
    again = expert.Store()
    again.restore(json.loads(json.dumps(store.state())))
    assert again.samples() == store.samples()
    assert not again.full(dataclasses.replace(CONFIG.cloning, store=5))
    assert not again.full(dataclasses.replace(CONFIG.cloning, store=0))
    again.clear()
    assert again.samples() == [] and again.state() == [] and not again.full(CONFIG.cloning)


def filled(table: pd.DataFrame, tokenizer: Any) -> expert.Store:
    store = expert.Store()
    for _, rows in table.groupby("group"):
        store.add(rows, tokenizer, CONFIG.cloning)
    return store


def test_experts_of_real_rollouts_say_what_was_true(scored: tuple) -> None:
    _, tokenizer, table = scored
    experts = 0
    for _, rows in table.groupby("group"):
        sample = expert.expert_sample(rows, tokenizer)
        right = rows[rows["correct"].eq(True).fillna(False)]
        if sample:
            found = parse_prediction(tokenizer.decode(sample.completion[:-1])).prediction
            assert (found.pass_rate, found.solution_length) == (len(right), round(right["length"].mean()))
            experts += 1
    assert experts >= CONFIG.cloning.store


def test_cloning_makes_the_expert_texts_more_likely_and_counts_its_tokens(scored: tuple) -> None:
    _, tokenizer, table = scored
    model, _ = loading.load(CONFIG.model)
    samples = filled(table, tokenizer).samples()
    before = logps(model, samples)
    metrics = expert.clone(model, samples, CONFIG, TokenBudget())
    after = logps(model, samples)
    assert (after > before).all()
    tokens = sum(len(sample.completion) for sample in samples)
    assert metrics["loss_cloning"] == pytest.approx(-before.sum().item() / tokens, rel=1e-5)
    prompts = {sample.prompt for sample in samples}  # all fit into one micro-batch, where they go through once
    assert metrics["tokens_cloning"] == expert.UPDATES * (tokens + sum(map(len, prompts)))
    assert not model.training


def logps(model: Any, samples: list[logprobs.Sample]) -> torch.Tensor:
    """The log-prob of each sample's completion, nats."""
    with torch.no_grad():
        return torch.stack([logprobs.completion_logps(model, [sample], 1.0, 512)[0].sum() for sample in samples])
