"""How a step's rollouts are gathered: calls of the engine, caps, re-checks, hints, and an account of every token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import small

from masa_lib import config as configs
from masa_lib.engines import Completion, Engine, make_engine
from masa_lib.engines.counting import CountingEngine
from masa_lib.gates import baselines, masa, registry
from masa_lib.method import gather, gating, prompts, rollouts
from masa_lib.method.gather import Selection
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training import evaluation, metrics
from masa_lib.training.trainer import Trainer

#: gate and cap act from step 2 on, whatever they cost
ACTS = {"method": "masa-efficient", "gate.start": 1, "gate.lost": 1.0, "cap.cut": 1.0, "gate.threshold": 0.6,
        "sampling.solution_tokens": 40}
#: everything is dropped, and solutions cost next to nothing
DROPS = ACTS | {"gate.threshold": 1.0, "sampling.predictions": 2, "sampling.solutions": 2,
                "sampling.solution_tokens": 1}
ANSWER = r"boxed\{.*\}"


class Listening:
    """An engine that remembers its calls: requests and completions."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.calls, self.sync, self.read = engine, [], engine.sync, engine.read

    @property
    def prefill_tokens(self) -> int:
        return self.engine.prefill_tokens

    def generate(self, requests, progress=None) -> list[Completion]:
        found = self.engine.generate(requests, progress)
        self.calls.append(list(zip(requests, found, strict=True)))
        return found


@dataclass
class Parts:
    """What a step needs, on the untrained model."""

    pool: ProblemPool
    engine: Engine
    tokenizer: Any

    def gather(self, changes: Mapping[str, Any], step: int = 2,
               memory: Mapping[str, Any] | None = None) -> tuple[Selection, Listening, pd.DataFrame]:
        """One step's rollouts, scored; the engine that sampled them; the table; `memory` is the gate's."""
        config, engine = small(changes), Listening(self.engine)
        sample = partial(rollouts.sample, engine=engine, tokenizer=self.tokenizer, config=config, seed=[0, step],
                         temperature=1.0)
        gate = registry.make_gate(config, self.pool, None, memory and {config.method: memory})
        found = gather.collect(gate, self.pool, 0, sample, config, step)
        rollouts.score(found.table, config)
        return found, engine, found.table


@pytest.fixture(scope="module")
def parts() -> Parts:
    model, tokenizer = loading.load(small().model)
    return Parts(ProblemPool(small().problems, 0), make_engine("transformers", model, tokenizer, batch=512), tokenizer)


# Calls of the engine.

def test_before_the_gate_acts_a_step_is_one_call_and_the_one_of_masa(parts: Parts) -> None:
    _, first, early = parts.gather(ACTS, step=1)
    _, second, masa = parts.gather(ACTS | {"method": "masa"}, step=1)
    assert len(first.calls) == len(second.calls) == 1
    pd.testing.assert_frame_equal(early, masa)


def test_once_it_acts_predictions_come_first_and_one_call_solves_what_was_chosen(parts: Parts) -> None:
    found, engine, table = parts.gather(ACTS)
    assert len(engine.calls) >= 2
    meta, last = [len(call) for call in engine.calls[:-1]], engine.calls[-1]
    assert sum(meta) == 4 * len(found.candidates) == len(predictions_of(table))
    assert len(last) == 4 * solutions_of(table)["group"].nunique() == len(solutions_of(table))
    asked = [tuple(prompts.encode(parts.tokenizer, prompts.meta_messages(c.problem.text, small().prompt, 40)))
             for c in found.candidates]
    assert [request.prompt for call in engine.calls[:-1] for request, _ in call][::4] == asked
    assert [c.problem for c in found.candidates] == parts.pool.take(0, len(found.candidates))
    assert len({request.seed for call in engine.calls for request, _ in call}) == len(table)


def test_the_number_of_predictions_can_be_another_one_once_the_gate_acts(parts: Parts) -> None:
    for step, size in ((1, 4), (2, 3)):
        table = parts.gather(ACTS | {"gate.predictions": 3}, step)[2]
        assert set(predictions_of(table).groupby("group").size()) == {size}


def test_who_is_judged_by_how_it_went_before_is_predicted_with_its_solutions_if_it_has_any(parts: Parts) -> None:
    changes = ACTS | {"gate.rule": "posterior", "gate.threshold": 0.4, "gate.recheck": 0.0, "cap.multiplier": 0.0,
                      "gate.candidates": 2.0}
    history = {problem.id: [-1, 4 - 4 * (number % 2), 12] for number, problem in enumerate(parts.pool.take(0, 10))}
    found, engine, table = parts.gather(changes, memory={"started": True, "window": [], "calibration": {},
                                                         "history": history})
    first, last = engine.calls
    assert len(found.candidates) == 12 and found.admitted == 6 and len(first) == 4 * 2  # two are new
    meta, rolled = predictions_of(table), set(solutions_of(table)["group"])
    assert not rolled & {1, 3, 5, 7, 9} and set(meta["group"]) == rolled | {10, 11}
    assert len(meta) == 4 * len(rolled | {10, 11}) and len(last) == 4 * len(rolled) + len(meta) - len(first)
    assert all(found.candidates[group].predictions for group in set(meta["group"]))
    assert meta["reward"].notna().sum() == 4 * len(rolled)


def test_a_step_repeats_exactly_and_the_lots_are_those_of_seed_and_step(parts: Parts) -> None:
    changes = DROPS | {"gate.recheck": 0.5}
    first, again = (parts.gather(changes)[2] for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    rolled = [set(solutions_of(parts.gather(changes, step)[2])["group"]) for step in (2, 3, 4)]
    assert rolled[0] != rolled[1] or rolled[1] != rolled[2]


# Who is rolled out.

def test_a_dropped_problem_keeps_its_predictions_which_take_no_part_in_the_update(parts: Parts) -> None:
    found, _, table = parts.gather(ACTS | {"gate.recheck": 0.0})
    left = table[table["weight"] == 0]
    assert 0 < left["group"].nunique() == len(found.candidates) - found.admitted
    assert set(left["stream"]) == {"meta"} and not left["admitted"].any() and left["length"].gt(0).all()
    assert left["reward"].isna().all() and (left["advantage"] == 0).all()
    rest = table.drop(left.index)
    assert rest["admitted"].all() and (rest["weight"] == 1).all() and rest["reward"].notna().all()
    assert set(rest.groupby("group")["stream"].nunique()) == {2}


def test_what_the_rule_drops_is_dropped_and_the_batch_is_filled_within_the_budget(parts: Parts) -> None:
    config = small(ACTS)
    for step in (2, 3, 4):
        found, _, table = parts.gather(ACTS, step)
        verdicts = [masa.admits(candidate.predictions, config) for candidate in found.candidates]
        admitted = set(table.loc[table["admitted"], "group"])
        assert admitted == {number for number, verdict in enumerate(verdicts[:found.judged]) if verdict}
        assert len(admitted) == found.admitted <= 6
        assert found.admitted == 6 or found.judged == len(found.candidates) == 18


def test_a_gate_that_acts_can_roll_out_fewer_problems(parts: Parts) -> None:
    few = {"gate.places": 0.5, "gate.recheck": 0.0}
    found, _, table = parts.gather(ACTS | {"gate.threshold": 0.0} | few)
    assert found.admitted == solutions_of(table)["group"].nunique() == 3
    assert parts.gather({"method": "mopps"} | few)[0].admitted == 3
    assert parts.gather({"method": "masa-efficient", "gate.start": 9} | few, step=2)[0].admitted == 6


def test_a_step_rolls_out_one_problem_at_least(parts: Parts) -> None:
    found, _, table = parts.gather(DROPS | {"gate.recheck": 0.0, "gate.threshold": 1.0, "gate.candidates": 2.0})
    assert len(found.candidates) == 12 and (found.admitted, solutions_of(table)["group"].nunique()) == (1, 1)


def test_with_a_share_of_1_all_that_was_judged_is_rolled_out_and_nothing_behind_the_last_place(parts: Parts) -> None:
    for step in (2, 3, 4):
        found, _, table = parts.gather(ACTS | {"gate.recheck": 1.0, "gate.threshold": 0.3}, step)
        assert set(solutions_of(table)["group"]) == set(range(found.judged))
        assert (table.loc[table["group"] < found.judged, "weight"] == 1).all()
    assert found.admitted == 6


def test_a_share_of_the_dropped_problems_is_rechecked_and_weighs_accordingly(parts: Parts) -> None:
    dropped, rechecked = 0, 0
    for step in range(2, 14):
        found, _, table = parts.gather(DROPS | {"gate.recheck": 0.25}, step)
        again = solutions_of(table)[~solutions_of(table)["admitted"]]
        assert (again["weight"] == 4).all()
        dropped += found.judged - found.admitted
        rechecked += again["group"].nunique()
    assert dropped > 180 and rechecked / dropped == pytest.approx(0.25, abs=3 * np.sqrt(0.25 * 0.75 / dropped))


def test_groups_without_a_signal_do_not_fill_the_batch_of_dynamic_sampling(parts: Parts) -> None:
    changes = {"method": "dapo", "sampling.solution_tokens": 40, "gate.candidates": 2.0}
    found, engine, table = parts.gather(changes)
    share = table.groupby("group")["correct"].mean()
    signals = int(((share > 0) & (share < 1)).sum())
    assert len(engine.calls) > 1 and set(table["stream"]) == {"solution"}
    assert signals == 6 or (signals < 6 and len(found.candidates) == 12)
    assert found.admitted == found.judged == len(found.candidates) == table["group"].nunique()


# Caps and hints.

def test_every_solution_keeps_to_its_cap_and_the_caps_are_those_of_the_predictions(
        parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ACTS | {"cap.multiplier": 0.7, "cap.aggregate": "mean", "gate.recheck": 0.5}
    monkeypatch.setattr(gating, "UNCAPPED", 0.0)
    found, _, table = parts.gather(changes)
    rows, config = solutions_of(table), small(changes)
    expected = rows["group"].map(lambda group: gating.cap(found.candidates[group].lengths, config))
    expected = expected.where(rows["admitted"], 40)  # a re-checked group has none
    assert rows["cap"].tolist() == expected.tolist() and (rows["length"] <= rows["cap"]).all()
    assert ((rows["finish"] == "stop") | (rows["length"] == rows["cap"])).all()
    assert (rows["capped"] == (rows["cap"] < 40)).all() and rows["capped"].any() and not rows["admitted"].all()
    found = metrics.batch_metrics(table)
    assert found["stopped"] == ((rows["cap"] < 40) & (rows["finish"] == "length")).mean() > 0
    meta = predictions_of(table)
    assert (meta["cap"] == 64).all() and not meta["capped"].any()


def test_a_share_of_the_solutions_is_left_uncapped(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ACTS | {"gate.threshold": 0.0, "cap.multiplier": 0.1, "sampling.solutions": 40}
    monkeypatch.setattr(gating, "UNCAPPED", 0.25)
    rows = solutions_of(parts.gather(changes)[2])
    limited = rows[rows.groupby("group")["capped"].transform("any")]
    assert len(limited) > 150 and (limited.loc[~limited["capped"], "cap"] == 40).all()
    assert limited["capped"].mean() == pytest.approx(0.75, abs=3 * np.sqrt(0.25 * 0.75 / len(limited)))


def test_a_solution_that_a_cap_stopped_is_wrong_unless_it_has_an_answer_and_cut_ones_are_read(parts: Parts) -> None:
    changes = ACTS | {"gate.threshold": 0.0, "cap.multiplier": 0.5, "cap.aggregate": "mean", "sampling.solutions": 8}
    found, _, table = parts.gather(changes)
    rows = solutions_of(table)
    stopped = rows["capped"] & (rows["finish"] == "length")
    answered = rows["text"].str.contains(ANSWER)
    assert 0 < (stopped & ~answered).sum() < len(rows) and (rows.loc[stopped & ~answered, "reward"] == 0).all()
    assert rows["reward"].notna().all() and found.admitted == 6
    assert (rows["reward"] == rows["correct"].astype(float)).all() and rows.loc[answered, "correct"].any()
    cut = solutions_of(parts.gather(changes | {"sampling.cut": "wrong"})[2])
    assert (cut.loc[stopped, "reward"] == 0).all()
    assert cut.loc[~stopped, "reward"].equals(rows.loc[~stopped, "reward"])


def test_notions_that_half_of_the_predictions_name_stand_behind_the_problem(parts: Parts) -> None:
    for hint, acts in (("training", True), ("evaluation", False)):
        found, _, table = parts.gather(ACTS | {"cap.hint": hint, "gate.threshold": 0.0})
        named = [candidate.notions for candidate in found.candidates]
        assert any(named)
        for row in solutions_of(table).to_dict("records"):
            wanted = prompts.solution_messages(row["problem"], small().prompt, named[row["group"]] if acts else ())
            assert list(row["prompt_ids"]) == prompts.encode(parts.tokenizer, wanted)
    meta = table[(table["stream"] == "meta") & table["predicted_pass_rate"].notna()]
    for group, rows in meta.groupby("group"):
        counts = pd.Series([notion for notions in rows["notions"] for notion in set(notions)]).value_counts()
        assert set(named[group]) == set(counts.index[2 * counts >= len(rows)])


def test_an_evaluation_with_hints_predicts_first_and_counts_those_tokens(parts: Parts) -> None:
    problems, found = parts.pool.take(0, 4), {}
    for hint in ("none", "evaluation"):
        engine = Listening(parts.engine)
        found[hint] = evaluation.evaluate(problems, engine, parts.tokenizer, small({"cap.hint": hint}), samples=2,
                                          predictions=0)[0]
        assert found[hint]["tokens"] == sum(len(made.tokens) for call in engine.calls for _, made in call)
        assert [len(call) for call in engine.calls] == ([8] if hint == "none" else [16, 8])
    texts = {parts.tokenizer.decode(request.prompt) for request, _ in engine.calls[-1]}
    assert any("math notions" in text for text in texts)


# The account of tokens, in training.

METHODS = {method: {} for method in configs.METHODS} | {
    "masa-efficient": ACTS | {"gate.recheck": 0.4},
    "posterior": ACTS | {"gate.rule": "posterior", "gate.threshold": 0.3, "gate.candidates": 2.0, "cap.multiplier": 0.0,
                         "sampling.shared_beginning": True, "problems.pool": 20}}


@pytest.mark.parametrize("name", METHODS)
def test_every_token_is_counted_in_the_stream_that_it_belongs_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("SAMPLES", "REFRESH"):
        monkeypatch.setattr(baselines, constant, 2)
    trainer = Trainer(small({"evaluation.final_problems": 1, "evaluation.final_samples": 1, "method": name,
                             **METHODS[name]}))
    method = trainer.config.method
    trainer.engine = Listening(trainer.engine)
    trainer.evaluate()
    cursor = 0
    while trainer.step < 3:
        trainer.engine.calls.clear()
        table, row = trainer.train_step()
        decoded = sum(len(made.tokens) for call in trainer.engine.calls for _, made in call)
        assert decoded == row["tokens_decode"] + row["tokens_oracle"] + row["tokens_anchor"]
        assert (row["tokens_read"] > 0) == (method in ("masa-read", "probe"))
        assert row["tokens_decode"] == row["tokens_solution"] + row["tokens_recheck"] + row["tokens_meta"]
        assert row["tokens_decode"] == table["length"].sum()
        assert (row["tokens_meta"] > 0) == configs.samples_predictions(trainer.config)
        assert (row["tokens_recheck"] > 0) == (row["rechecked"] > 0)
        cursor += row["candidates"]
        assert trainer.cursor == cursor >= 4 * trainer.step and 0 <= row["dropped"] < 1
        state = trainer._memory.get(method)
        assert json.loads(json.dumps(state)) == state
    assert (row["gate_on"], row["cap_on"]) == (
        method not in ("grpo", "masa"), name == "masa-efficient")
    if name == "masa-efficient":
        assert row["rechecked"] > 0
    if method == "oracle":
        assert row["tokens_oracle"] > 0  # in the third step the pool is measured again


# Guards, in training.

HARMFUL = {"method": "masa-efficient", "gate.start": 1, "gate.threshold": 1.0, "gate.recheck": 0.3,
           "cap.multiplier": 0.2, "steps": 4, "evaluation.final_problems": 1, "evaluation.final_samples": 1}


def test_a_harmful_gate_and_a_harmful_cap_act_only_without_their_guards() -> None:
    guarded = pd.DataFrame([result.metrics for result in Trainer(small(HARMFUL))])
    assert (guarded[["gate_on", "cap_on", "dropped", "stopped"]] == 0).all(axis=None)
    assert (guarded[["signal_lost", "right_cut"]] > 0.5).all(axis=None)  # on paper
    gate, cap = (pd.DataFrame([result.metrics for result in Trainer(small(HARMFUL | changes))]) for changes in (
        {"gate.lost": 1.0}, {"cap.cut": 1.0, "gate.threshold": 0.0}))
    assert gate["gate_on"].tolist() == cap["cap_on"].tolist() == [0, 1, 1, 1]
    assert (gate["dropped"][1:] > 0.5).all() and (gate["signal_lost"] > 0.5).all()
    assert (cap["stopped"][1:] > 0.3).all() and cap["accuracy"][1:].max() < guarded["accuracy"].min()


def test_a_cap_does_not_make_a_harmful_gate_look_right() -> None:
    """Everything is dropped, so that all groups are re-checks: a cap would take their signal away."""
    rows = pd.DataFrame([result.metrics for result in Trainer(small(
        HARMFUL | {"gate.lost": 1.0, "cap.cut": 1.0}))])
    assert rows["cap_on"].tolist() == [0, 1, 1, 1] and (rows["stopped"] == 0).all()
    assert (rows["signal_lost"] > 0.5).all() and (rows["gate_precision"] < 0.6).all()


def test_gate_and_cap_obey_changes_made_live() -> None:
    trainer = Trainer(small(HARMFUL | {"gate.lost": 1.0, "cap.cut": 1.0, "steps": 8}))
    found = [next(trainer).metrics for _ in range(2)]
    for changes in ({"gate.threshold": 0.0}, {"cap.multiplier": 0.0}, {"gate.lost": 0.2, "gate.threshold": 1.0},
                    {"gate.candidates": 1.5, "gate.lost": 1.0}):
        trainer.config = configs.replace(trainer.config, changes)
        found.append(next(trainer).metrics)
    rows = pd.DataFrame(found)
    assert rows["gate_on"].tolist() == [0, 1, 1, 1, 0, 1] and rows["cap_on"].tolist() == [0, 1, 1, 0, 0, 0]
    assert (rows["dropped"] > 0).tolist() == [False, True, False, False, False, True]
    assert (rows["stopped"] > 0).tolist() == [False, False, True, False, False, False]  # re-checks have no cap
    assert rows["candidates"].tolist()[-1] == 9


def test_a_counting_engine_adds_up_its_calls(parts: Parts) -> None:
    engine, heard = CountingEngine(Listening(parts.engine)), 0
    for step in range(2):
        table = rollouts.collect(parts.pool.take(step, 2), engine, parts.tokenizer, small(), solutions=2, predictions=0,
                                 seed=[step], temperature=1.0)
        heard += parts.engine.prefill_tokens
        assert heard == engine.prefill > 0
    assert engine.decode == sum(len(made.tokens) for call in engine.engine.calls for _, made in call)
    assert table["length"].sum() < engine.decode
