"""The formulas of the rewards, the released variant, and that the vectorised scoring says the same as the plain one."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masa_lib.config import RewardConfig
from masa_lib.lessons.reward_table import reward_table, score_table
from masa_lib.method.rewards import MetaReward, Solution, meta_rewards
from masa_lib.tasks.predictions import MetaPrediction
from masa_lib.tasks.read_prediction import parse_prediction

GROUP = [Solution("First carry, then borrow.", 20, True), Solution("CARRY the one", 40, True),
         Solution("borrow, borrow\n from  zero", 30, False), Solution("guess", 60, False)]


def row(reward: MetaReward) -> list[float]:
    """Total, difficulty, length, notion."""
    return [reward.total, *(reward.parts[f"reward_{name}"] for name in ("difficulty", "length", "notion"))]


def score(prediction, solutions=GROUP, problem="Add.", **settings):
    return meta_rewards(solutions, [prediction], problem, RewardConfig(**settings))[0]


@pytest.mark.parametrize(("pass_rate", "settings", "expected"), [
    (4, {}, 1.0), (8, {}, 0.1), (0, {}, 0.1), (6, {}, 0.01**0.25), (8, {"difficulty_base": 0.25}, 0.5),
    (4, {"difficulty_mode": "brier"}, 1.0), (8, {"difficulty_mode": "brier"}, 0.75)])
def test_the_difficulty_reward_falls_with_the_error_of_the_predicted_pass_rate(pass_rate, settings, expected):
    assert score(MetaPrediction((), pass_rate, 0), **settings).parts["reward_difficulty"] == pytest.approx(expected)


@pytest.mark.parametrize(("length", "settings", "expected"), [
    (20, {}, 1), (40, {}, 1), (30, {}, 1), (19, {}, 0), (41, {}, 0), (60, {}, 0),
    (20, {"strict_length": True}, 0), (40, {"strict_length": True}, 0), (21, {"strict_length": True}, 1),
    (10, {"length_slack": 0.5}, 1), (60, {"length_slack": 0.5}, 1), (9, {"length_slack": 0.5}, 0),
    (10, {"length_slack": 0.5, "strict_length": True}, 0)])
def test_the_length_reward_pays_inside_the_window_of_the_correct_solutions(length, settings, expected):
    assert score(MetaPrediction((), 4, length), **settings).parts["reward_length"] == expected


def test_without_a_correct_solution_length_and_notions_pay_nothing():
    reward = score(MetaPrediction(("borrow",), 0, 30), [dataclasses.replace(one, correct=False) for one in GROUP])
    assert reward.parts == {"reward_difficulty": 1.0, "reward_length": 0.0, "reward_notion": 0.0}


@pytest.mark.parametrize(("notions", "settings", "expected"), [
    (["carry"], {}, 1.0), (["borrow"], {}, 0.0), (["carry", "borrow"], {}, 0.5), ([], {}, 0.0),
    (["Carry", "carry", "CARRY "], {}, 1.0), (["arry"], {}, 0.0), (["carry the"], {}, 1.0),
    (["from zero"], {}, 0.0), (["absent"], {}, 0.0)])
def test_a_notion_pays_when_more_correct_than_wrong_solutions_contain_it_as_words(notions, settings, expected):
    assert score(MetaPrediction(tuple(notions), 4, 0), **settings).parts["reward_notion"] == pytest.approx(expected)


def test_notions_that_stand_in_the_problem_leave_the_share():
    prediction = MetaPrediction(("carry", "borrow"), 4, 0)
    assert score(prediction, problem="Borrow?").parts["reward_notion"] == 1.0
    assert score(prediction, problem="Borrow?", exclude_problem_notions=False).parts["reward_notion"] == 0.5
    assert score(prediction, problem="Carry and borrow.").parts["reward_notion"] == 0.0


def test_rate_compares_shares_where_count_compares_numbers():
    solutions = [Solution("carry", 9, True), *[Solution("carry", 9, False)] * 2, Solution("", 9, False)]
    assert score(MetaPrediction(("carry",), 4, 0), solutions).parts["reward_notion"] == 0.0
    assert score(MetaPrediction(("carry",), 4, 0), solutions, notion_mode="rate").parts["reward_notion"] == 1.0


def test_latex_notions_are_found():
    solutions = [Solution(r"so \frac{1}{2} of it", 9, True)]
    assert score(MetaPrediction((r"\frac{1}{2}",), 8, 9), solutions).parts["reward_notion"] == 1.0
    assert score(MetaPrediction((r"\frac{1}{20}",), 8, 9), solutions).parts["reward_notion"] == 0.0


def test_the_total_is_the_weighted_mean_of_the_three():
    prediction = MetaPrediction(("carry", "borrow"), 8, 30)
    assert score(prediction).total == pytest.approx((0.1 + 1 + 0.5) / 3)
    weights = {"pass_rate_weight": 2.0, "length_weight": 1.0, "notion_weight": 0.0}
    assert score(prediction, **weights).total == pytest.approx((2 * 0.1 + 1) / 3)


def test_a_prediction_that_does_not_parse_earns_nothing():
    for mode in ("ours", "released"):
        assert row(score(None, mode=mode)) == [0, 0, 0, 0]


def test_no_weights_and_no_solutions_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="weights are 0"):
        score(MetaPrediction((), 4, 0), pass_rate_weight=0.0, length_weight=0.0, notion_weight=0.0)
    with pytest.raises(ValueError, match="without solution rollouts"):
        score(MetaPrediction((), 4, 0), [])


RELEASED_PROMPT = "Predict math_notion. Problem: add with a carry"
RELEASED_GROUP = [Solution("borrow from the identity, box", 20, True), Solution("identity and box again", 40, True),
                  Solution("matrices", 30, False)]


@pytest.mark.parametrize(("text", "expected"), [
    ('{"math_notion": ["identities", "boxes", "matrices", "carries"], "pass_rate": 5, "solution_length": 30}',
     (0.8306902839782285, 0.8254041852680186, 1, 0.6666666666666666)),
    ('{"math_notion":["borrow"], "pass_rate": 8, "solution_length": 20}',
     (0.4051478230010628, 0.21544346900318834, 0, 1.0)),
    ('{"math_notion": "borrow, [box]", "pass_rate": 0, "solution_length": 39}',
     (0.682138629445376, 0.046415888336127795, 1, 1.0)),
    ('{"math_notion": ["borrow"], "pass_rate": 0.5, "solution_length": "30"}', (0.3333333333333333, 0, 0, 1.0)),
    ('{"math_notion": ["borrow", 5], "pass_rate": true, "solution_length": 30}',
     (0.36084680617560067, 0.08254041852680186, 1, 0)),
    ('{"math_notion": ["Borrow"], "pass_rate": 50, "solution_length": 30}',
     (0.33333333333560433, 6.812920690579623e-12, 1, 0.0)),
    ('{"math_notion": ["set {1}"], "pass_rate": 5, "solution_length": 30}', (0, 0, 0, 0)),
    ('math_notion: ["borrow", "nothing"], pass_rate: 5, solution_length: 30', (0.16666666666666666, 0, 0, 0.5)),
    ('{"math_notion": ["borrow"], "pass_rate": 5, "solution_length": 30} {"math_notion": broken}', (0, 0, 0, 0))])
def test_released_mode_pays_what_the_authors_code_pays_for_the_same_text(text, expected):
    prediction = parse_prediction(text, released=True).prediction
    config = RewardConfig(mode="released", difficulty_base=0.5, notion_weight=9.0, length_slack=1.0)
    reward = meta_rewards(RELEASED_GROUP, [prediction], "", config, RELEASED_PROMPT)[0]
    assert row(reward) == pytest.approx(expected, rel=1e-14)


WORDS = st.sampled_from(["carry", "Carry", "borrow", "boxes", "box", "series", r"\frac{1}{2}", "a b", "é", ""])
TEXTS = st.lists(WORDS, max_size=4).map(" ".join)
SOLUTIONS = st.lists(st.builds(Solution, TEXTS, st.integers(1, 60), st.booleans()), min_size=1, max_size=5)
VALUES = st.integers(-1, 70) | st.sampled_from([0.5, True, None, 10**30])
PREDICTIONS = st.builds(
    lambda notions, rate, length, cut: json.dumps(
        {"math_notion": notions, "pass_rate": rate, "solution_length": length})[:cut],
    st.lists(WORDS, max_size=4), st.integers(0, 8) | VALUES, VALUES, st.sampled_from([None, None, None, -1]))
GROUPS = st.lists(st.tuples(SOLUTIONS, st.lists(PREDICTIONS, max_size=4), TEXTS), min_size=1, max_size=4)
CONFIGS = st.builds(
    RewardConfig, mode=st.sampled_from(["ours", "released"]), pass_rate_weight=st.floats(0.1, 5),
    length_weight=st.floats(0, 5), notion_weight=st.floats(0, 5), difficulty_mode=st.sampled_from(["kernel", "brier"]),
    difficulty_base=st.floats(0.001, 1), strict_length=st.booleans(), length_slack=st.floats(0, 1),
    notion_mode=st.sampled_from(["count", "rate"]), exclude_problem_notions=st.booleans())


def as_prompt(problem):
    return f"Predict. Problem: {problem}"


def as_rollouts(groups):
    rows = []
    for number, (solutions, predictions, problem) in enumerate(groups):
        place = {"step": number // 2, "group": number % 2, "problem": problem}
        rows += [{**place, "stream": "meta", "text": text, "length": 9, "correct": None} for text in predictions]
        rows += [{**place, "stream": "solution", **dataclasses.asdict(solution)} for solution in solutions]
    columns = ["step", "group", "problem", "stream", "text", "length", "correct"]
    return pd.DataFrame(rows, columns=columns).sample(frac=1.0, random_state=0)


@given(GROUPS, CONFIGS)
def test_the_vectorised_scoring_equals_the_plain_one(groups, config):
    rollouts = as_rollouts(groups)
    scored = score_table(reward_table(rollouts, as_prompt), config)
    released = config.mode == "released"
    for number, (solutions, _, problem) in enumerate(groups):
        rows = rollouts.query(f"step == {number // 2} and group == {number % 2} and stream == 'meta'")
        predictions = [parse_prediction(text, released=released).prediction for text in rows["text"]]
        plain = meta_rewards(solutions, predictions, problem, config, as_prompt(problem))
        expected = np.array([row(reward) for reward in plain]).reshape(-1, 4)
        np.testing.assert_allclose(scored.loc[rows.index].to_numpy(), expected, rtol=1e-12, atol=1e-300)


def test_a_table_of_recorded_types_is_scored_and_a_group_without_solutions_has_no_reward():
    rollouts = as_rollouts([(GROUP, ['{"math_notion":["carry"],"pass_rate":4,"solution_length":30}'] * 2, "Add.")])
    gated = rollouts[rollouts["stream"] == "meta"].assign(group=7)
    rollouts = pd.concat([rollouts, gated], ignore_index=True).astype({"correct": "boolean"})
    scored = score_table(reward_table(rollouts), RewardConfig())
    assert list(scored.columns) == ["reward", "reward_difficulty", "reward_length", "reward_notion"]
    assert list(scored["reward"].dropna()) == [1.0, 1.0]
    assert scored.loc[rollouts["group"] == 7].isna().to_numpy().all()


def test_a_table_without_meta_rollouts_gives_an_empty_score():
    for groups in ([], [(GROUP, [], "Add.")]):
        assert score_table(reward_table(as_rollouts(groups)), RewardConfig()).empty
