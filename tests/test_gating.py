"""MASA's gate and cap: the rules, what is measured of them, and the guards, on numbers made by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small

from masa_lib.config import Config
from masa_lib.gates import registry
from masa_lib.gates.masa import MasaGate, admits, beta_signal_chance, measure, rule_scores
from masa_lib.method import rewards
from masa_lib.method.beliefs import signal_chance
from masa_lib.method.gating import Candidate, cap
from masa_lib.tasks.problem_rows import Problem

RATES = st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=8)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def config(**changes: Any) -> Config:
    """Method masa-efficient with 8 solutions; section and name joined by two underscores."""
    return small({"method": "masa-efficient", "sampling.solutions": 8, "sampling.solution_tokens": 100,
                  **{key.replace("__", "."): value for key, value in changes.items()}})


def candidate(number: int, predictions: Sequence[float] = (), lengths: Sequence[int] = ()) -> Candidate:
    return Candidate(Problem(f"p-{number}", f"problem {number}", "1", 1, "test"), tuple(predictions), tuple(lengths))


# Rules.

@given(st.floats(0, 1), st.integers(2, 5))
def test_the_chance_of_a_signal_is_that_of_all_groups_with_right_and_wrong_solutions(rate: float, size: int) -> None:
    groups = [group for group in itertools.product((0, 1), repeat=size) if 0 < sum(group) < size]
    expected = sum(rate ** sum(group) * (1 - rate) ** (size - sum(group)) for group in groups)
    assert signal_chance(rate, size) == pytest.approx(expected, abs=1e-12)


def test_the_chance_of_a_signal_is_taken_element_by_element() -> None:
    np.testing.assert_allclose(signal_chance([0, 0.5, 1], 8), [0, 1 - 2 / 2**8, 0])


@pytest.mark.parametrize(("rule", "dropped", "admitted"), [
    ("signal", [[0.0] * 4, [1.0] * 4, [0, 1, 0, 1], [1, 1, 1, 0.5]], [[0.5] * 4, [1, 1, 0.5, 0.5], [0.125] * 4]),
    ("v1", [[0.0] * 4, [0.5] * 4, [0.5, 0.5, 0.5, 0.625]], [[0.0, 0.5, 0.0, 0.5], [0.25, 0.5, 0.25, 0.5]]),
    ("v2", [[0.0] * 4, [1.0] * 4, [0.0, 0.0, 0.0, 0.125]], [[0.5] * 4, [0.125] * 4, [0.0, 1.0, 0.0, 1.0]])])
def test_each_rule_drops_what_it_says(rule: str, dropped: list, admitted: list) -> None:
    settings = config(gate__rule=rule)
    assert [admits(predictions, settings) for predictions in dropped] == [False] * len(dropped)
    assert [admits(predictions, settings) for predictions in admitted] == [True] * len(admitted)


POSTERIOR = {"gate__rule": "posterior", "gate__threshold": 0.1, "gate__start": 1, "gate__lost": 1.0,
             "cap__multiplier": 0.0, "gate__candidates": 3.0}


def historian(**changes: Any) -> MasaGate:
    """A gate that has met three problems of which the same was predicted: never right, half right, always right."""
    gate = MasaGate(config(**POSTERIOR | changes))
    for _ in range(9):
        gate.observe(step([0, 0.5, 1]), [candidate(number, DOUBTS) for number in range(3)])
    gate.begin(50)
    return gate


def test_the_rule_posterior_asks_of_new_problems_alone_and_remembers_how_the_others_went() -> None:
    gate = historian()
    assert [gate.asks(candidate(number).problem) for number in range(4)] == [False, False, False, True]
    again = MasaGate(gate.config)
    again.restore(json.loads(json.dumps(gate.state())))
    again.begin(50)
    for judge in (gate, again):
        judge.rng.seed(1)
        assert judge.admit([candidate(number) for number in range(3)], 1) == [None, True, None]
        assert judge.draw(2) == 6
    again.begin(1)  # it does not act yet
    assert again.asks(candidate(0).problem)
    again.hint_on = again.gate_on = True
    assert again.asks(candidate(0).problem)  # there is no hint without a prediction


def test_of_a_new_problem_the_posterior_is_the_pass_rate_that_came_of_such_predictions() -> None:
    gate = MasaGate(config(**POSTERIOR))
    gate.observe(step([0.25] * 40), [candidate(number, (0.75, 0.75)) for number in range(40)])
    new = gate._posterior(candidate(99, (0.75,)))
    assert new == pytest.approx((0.5 + 1, 0.5 + 3), abs=0.1)  # what is said is 3/4, what comes true 1/4
    assert gate._posterior(candidate(99)) == (0.5, 0.5)
    assert gate._posterior(candidate(0)) == pytest.approx((new[0] + 2, new[1] + 6), abs=0.1)  # and its own group
    gate.observe(step([0.25]), [candidate(0, (0.75,))])
    assert gate._posterior(candidate(0)) == pytest.approx((new[0] + 2 + 1, new[1] + 6 + 3), abs=0.1)  # half fades
    gate.observe(step([0.25]), [candidate(0)])  # not asked again: its groups alone speak
    assert gate._posterior(candidate(0)) == (0.5 + 1.5 + 2, 0.5 + 4.5 + 6)


@given(st.floats(0.05, 50), st.floats(0.05, 50), st.integers(2, 16))
def test_the_chance_of_a_signal_under_a_belief_is_the_mean_over_it(right: float, wrong: float, solutions: int) -> None:
    drawn = np.random.default_rng(0).beta(right, wrong, 20_000)
    chances = signal_chance(drawn, solutions)
    assert beta_signal_chance(right, wrong, solutions) == pytest.approx(chances.mean(), abs=0.02)


def test_the_rule_posterior_drops_only_what_has_hardly_a_chance_and_leaves_the_others_to_the_next_pass() -> None:
    gate = historian(gate__threshold=0.7)
    assert gate.admit([candidate(number, DOUBTS) for number in (0, 1, 2, 3)], 1).count(False) == 2
    assert gate.admit([candidate(1), candidate(3, DOUBTS)], 1).count(None) == 1


@pytest.mark.parametrize("rule", ["signal", "v1", "v2", "posterior"])
def test_a_problem_without_a_prediction_is_admitted_under_the_full_cap(rule: str) -> None:
    settings = config(gate__rule=rule, gate__threshold=1.0)
    assert admits((), settings) and cap((), settings) == 100


@given(RATES, st.sampled_from(["signal", "v1", "v2"]), st.integers(0, 3))
def test_predictions_that_did_not_parse_do_not_count(rates: list[float], rule: str, unparsed: int) -> None:
    assert rule_scores(rates + [math.nan] * unparsed, rule, 8) == pytest.approx(rule_scores(rates, rule, 8))


@given(RATES)
def test_the_rule_signal_takes_the_mean_of_the_chances_and_never_hopes_for_more_than_the_mean_allows(
        rates: list[float]) -> None:
    score = rule_scores(rates, "signal", 8)
    assert score == pytest.approx(np.mean([signal_chance(rate, 8) for rate in rates]))
    assert score <= signal_chance(np.mean(rates), 8) + 1e-12  # the chance is concave


@pytest.mark.parametrize(("aggregate", "multiplier", "expected"), [
    ("max", 2.0, 60), ("mean", 2.0, 32), ("median", 2.0, 26), ("mean", 0.5, 8), ("max", 4.0, 100), ("max", 0.0, 100),
    ("mean", 0.01, 1)])
def test_the_cap_is_a_multiple_of_the_predicted_length_within_the_full_cap(
        aggregate: str, multiplier: float, expected: int) -> None:
    assert cap((5, 13, 30), config(cap__aggregate=aggregate, cap__multiplier=multiplier)) == expected


@given(st.lists(st.integers(1, 150), min_size=1, max_size=8), LENGTHS)
def test_a_cap_hides_from_the_length_window_only_what_is_longer_than_a_prediction_that_goes_unpaid(
        lengths: list[int], predicted: list[int]) -> None:
    """Why the window of the length reward takes the lengths of capped solutions as they are."""
    settings = config()
    seen = [length for length in lengths if length <= cap(predicted, settings)]
    for prediction in predicted:
        paid, true = (rewards.length_reward(prediction, found, settings.reward) for found in (seen, lengths))
        assert paid == true or (paid < true and prediction > max(seen, default=0))


# What is measured.

def step(shares: Sequence[float], *, weights: Sequence[float] = (), length: int = 20, capped: bool = False,
         size: int = 8) -> pd.DataFrame:
    """A step's solutions: for each group its share of right ones."""
    rows = [{"stream": "solution", "group": group, "reward": float(member < share * size), "capped": capped,
             "weight": weights[group] if weights else 1.0, "length": length}
            for group, share in enumerate(shares) for member in range(size)]
    return pd.DataFrame(rows)


KNOWS, DOUBTS = (0.0,) * 4, (0.5,) * 4


def test_a_step_is_measured_as_sums_by_weight() -> None:
    table = step([0, 0.5, 1, 0.5], weights=[10, 1, 1, 10])
    candidates = [candidate(0, KNOWS), candidate(1, DOUBTS), candidate(2, DOUBTS), candidate(3, KNOWS),
                  candidate(4, KNOWS)]  # the last one was dropped and not rolled out
    found = measure(table, candidates, config(), capping=False)
    assert found == {"asked": 5, "rejected": 3, "flat": 11.0, "signal": 11.0, "drops": 20.0, "hits": 10.0,
                     "right": 16.0, "truncated": 0.0, "spread": pytest.approx(np.std([0, 0.5, 0.5, 0, 0]))}


def test_solutions_that_are_left_out_decide_nothing() -> None:
    table = step([0.5])
    table.loc[table["reward"] == 0, "reward"] = math.nan
    found = measure(table, [candidate(0, KNOWS)], config(), capping=False)
    assert (found["flat"], found["signal"], found["hits"]) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("capping", [False, True])
def test_an_uncapped_right_solution_counts_as_often_as_it_was_rarely_left_uncapped(capping: bool) -> None:
    table = pd.concat([step([1.0], length=30, size=2), step([1.0], length=10, capped=True, size=6)])
    beyond = measure(table, [candidate(0, DOUBTS, (5,))], config(), capping)  # a cap of 10
    within = measure(table, [candidate(0, DOUBTS, (60,))], config(), capping)  # the full cap: nothing is by chance
    assert (beyond["truncated"], beyond["right"]) == pytest.approx((20, 20) if capping else (2, 2))
    assert (within["truncated"], within["right"]) == (0, 2)


def test_right_solutions_of_a_recheck_are_not_left_uncapped_by_chance_and_count_once() -> None:
    table = step([1.0], length=30, size=2).assign(admitted=False)
    found = measure(table, [candidate(0, KNOWS, (5,))], config(), capping=True)
    assert (found["truncated"], found["right"]) == (2, 2)


def test_measured_by_rechecks_precision_and_recall_are_on_average_those_of_all_problems() -> None:
    rng, share = np.random.default_rng(0), 0.2
    predicted = [KNOWS if number % 3 else DOUBTS for number in range(60)]
    truth = rng.choice([0, 0.5, 1], 60, p=[0.3, 0.4, 0.3])
    candidates = [candidate(number, said) for number, said in enumerate(predicted)]
    everything = measure(step(truth), candidates, config(), capping=False)
    found = []
    for _ in range(150):
        weights = [1.0 if said == DOUBTS else (rng.random() < share) / share for said in predicted]
        table = step(truth, weights=weights)
        found.append(measure(table[table["weight"] > 0], candidates, config(), capping=False))
    for name in ("signal", "flat", "drops", "hits"):
        assert np.mean([row[name] for row in found]) == pytest.approx(everything[name], rel=0.06)


def test_measures_are_those_of_the_window() -> None:
    gate = MasaGate(config(gate__window=2))
    candidates = [candidate(0, KNOWS, (5,)), candidate(1, DOUBTS, (40,)), candidate(2, KNOWS, (5,))]
    gate.observe(step([0.5, 0.5, 0.5]), candidates)  # leaves the window
    gate.observe(step([0, 0, 0.5]), candidates)
    gate.observe(step([1, 1, 0.5]), candidates)
    assert gate.measures() == pytest.approx({
        "gate_precision": 2 / 4, "gate_recall": 2 / 4, "gate_f1": 0.5, "signal_lost": 1.0,
        "right_cut": (8 + 4 + 4) / (16 + 4 + 4), "predictions_collapsed": 0.0})


def test_nothing_measured_is_nan() -> None:
    assert all(math.isnan(value) for value in MasaGate(config()).measures().values())


def test_predictions_that_are_the_same_for_all_problems_are_collapsed() -> None:
    for said, collapsed in (([(0.5, 0.625), (0.625, 0.5), (0.5, 0.5)], 1.0), ([(0.25,), (0.5,), (0.625,)], 0.0)):
        gate = MasaGate(config())
        gate.observe(step([0.5] * 3), [candidate(number, rates) for number, rates in enumerate(said)])
        assert gate.measures()["predictions_collapsed"] == collapsed


# Guards.

def after(gate: MasaGate, shares: Sequence[float], steps: int, predictions: Sequence[float] = KNOWS,
          lengths: Sequence[int] = (30,)) -> MasaGate:
    """The gate once it has seen some steps of the same four problems."""
    for _ in range(steps):
        gate.observe(step(shares), [candidate(0, predictions, lengths), candidate(1, predictions, lengths),
                                    candidate(2, DOUBTS, lengths), candidate(3, DOUBTS, lengths)])
    gate.begin(50)
    return gate


GOOD, BAD = [0, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]


def test_a_gate_that_loses_signal_is_switched_off_and_a_good_one_stays_on() -> None:
    gate = MasaGate(config(gate__start=1, gate__window=6))
    assert not after(gate, GOOD, 1).gate_on  # too little evidence
    assert after(gate, GOOD, 5).gate_on
    assert not after(gate, BAD, 5).gate_on
    assert after(gate, GOOD, 6).gate_on


def test_a_cap_that_cuts_right_solutions_is_switched_off_and_a_good_one_stays_on() -> None:
    gate = MasaGate(config(gate__start=1, gate__window=4))
    assert not after(gate, GOOD, 1).cap_on
    assert after(gate, GOOD, 4).cap_on
    assert not after(gate, GOOD, 1, lengths=(5,)).cap_on and gate.gate_on
    assert after(gate, GOOD, 4).cap_on


def test_without_guards_both_act_whatever_they_cost_and_a_multiplier_of_0_is_no_cap() -> None:
    gate = after(MasaGate(config(gate__start=1, gate__lost=1.0, cap__cut=1.0)), BAD, 5, lengths=(5,))
    assert gate.gate_on and gate.cap_on
    assert not after(MasaGate(config(gate__start=1, cap__cut=1.0, cap__multiplier=0.0)), GOOD, 5).cap_on


@pytest.mark.parametrize(("hint", "acts"), [("none", False), ("training", True), ("evaluation", False), ("both", True)])
def test_gate_cap_and_hint_act_after_step_k(hint: str, acts: bool) -> None:
    gate = MasaGate(config(gate__start=7, gate__lost=1.0, cap__cut=1.0, cap__hint=hint))
    gate.begin(7)
    assert not (gate.gate_on or gate.cap_on or gate.hint_on)
    gate.begin(8)
    assert gate.gate_on and gate.cap_on and gate.hint_on == acts


def test_k_can_be_the_step_at_which_the_measured_precision_is_reached_and_then_it_stays() -> None:
    gate = MasaGate(config(gate__lost=1.0, cap__cut=1.0, gate__window=5))
    assert not after(gate, GOOD, 4).gate_on  # 8 of 8 right, and one failure imagined: 8 / 9
    assert after(gate, GOOD, 1).gate_on and gate.cap_on
    assert after(gate, BAD, 5).gate_on and gate.measures()["gate_precision"] == 0


def test_the_settings_of_a_gate_are_those_it_was_made_with_and_its_memory_outlives_them() -> None:
    loose = after(MasaGate(config(gate__start=1, gate__lost=1.0)), BAD, 5)
    assert loose.gate_on
    strict = MasaGate(config(gate__start=1))
    strict.restore(json.loads(json.dumps(loose.state())))
    strict.begin(50)
    assert not strict.gate_on and strict.state() == loose.state()
    assert strict.measures() == loose.measures()


# Drawing and admitting.

def test_no_more_are_admitted_than_there_are_places() -> None:
    gate = MasaGate(config(gate__start=1, gate__lost=1.0))
    gate.begin(2)
    said = [KNOWS, DOUBTS, DOUBTS, KNOWS, DOUBTS, DOUBTS]
    candidates = [candidate(number, rates) for number, rates in enumerate(said)]
    assert gate.admit(candidates, 3) == [False, True, True, False, True, None]  # behind the last place
    gate.gate_on = False
    assert gate.admit(candidates, 6) == [True] * 6


def test_as_many_are_drawn_as_the_share_dropped_lately_asks_for() -> None:
    gate = MasaGate(config(gate__start=1))
    assert after(gate, BAD, 20).draw(16) == 16  # off
    gate.gate_on = True
    assert gate.draw(16) == math.ceil(16 * 17 / 9)
    hopeless = MasaGate(config(gate__start=1, gate__lost=1.0, gate__threshold=1.0))
    assert after(hopeless, BAD, 20).draw(16) == 16 * 17


def test_methods_without_a_gate_have_none_and_all_others_have_their_own() -> None:
    def made(method: str) -> str:
        return type(registry.make_gate(small({"method": method}), None, None)).__name__

    assert [made(method) for method in ("grpo", "masa", "masa-efficient")] == ["NoneType", "NoneType", "MasaGate"]
    assert len({made(method) for method in ("dapo", "mopps", "greso", "level-table", "oracle")}) == 5
