"""The table of rollouts: what is asked, what comes back, how it is graded and scored."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from small import small

from masa_lib.config import Config, replace
from masa_lib.engines import Completion, Engine, make_engine
from masa_lib.engines.counting import CountingEngine
from masa_lib.lessons import reward_table
from masa_lib.method import prompts, rollouts
from masa_lib.method.advantages import contrasted
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading
from masa_lib.tasks.problems import ProblemPool
from masa_lib.tasks.read_prediction import parse_prediction

CONFIG = small({"sampling.solution_tokens": 30})


@pytest.fixture(scope="module")
def parts():
    """Problems, engine and tokenizer."""
    model, tokenizer = loading.load(CONFIG.model)
    problems = ProblemPool(CONFIG.problems, 0).take(0, 8)
    return problems, make_engine("transformers", model, tokenizer, batch=512), tokenizer


def collect(parts, config: Config = CONFIG, **changes) -> pd.DataFrame:
    return rollouts.collect(*parts, config, **({"solutions": 6, "predictions": 4, "seed": [1, 2],
                                                "temperature": 1.0} | changes))


@pytest.fixture(scope="module")
def table(parts) -> pd.DataFrame:
    found = collect(parts)
    rollouts.score(found, CONFIG)
    return found


def test_the_table_holds_whole_groups_of_both_streams_solutions_first(parts, table: pd.DataFrame) -> None:
    assert list(table.columns) == list(rollouts.COLUMNS)
    assert table["stream"].tolist() == ["solution"] * 48 + ["meta"] * 32
    sizes = table.groupby(["stream", "group"])["member"].apply(list)
    assert all(sizes["solution"].map(lambda members: members == list(range(6))))
    assert all(sizes["meta"].map(lambda members: members == list(range(4))))
    for row in table.to_dict("records"):
        problem = parts[0][row["group"]]
        assert (row["problem_id"], row["problem"], row["answer"], row["level"]) == (
            problem.id, problem.text, problem.answer, problem.level)


def test_each_stream_is_asked_its_own_prompt_under_its_own_cap(parts, table: pd.DataFrame) -> None:
    problems, _, tokenizer = parts
    caps = {"solution": 30, "meta": 64}
    for row in table.to_dict("records"):
        text = problems[row["group"]].text
        messages = (prompts.solution_messages(text, CONFIG.prompt) if row["stream"] == "solution"
                    else prompts.meta_messages(text, CONFIG.prompt, 30))
        assert list(row["prompt_ids"]) == prompts.encode(tokenizer, messages)
        assert row["length"] <= caps[row["stream"]]
        assert row["finish"] == "stop" or row["length"] == caps[row["stream"]]
    assert set(table["finish"]) == {"stop", "length"}


def test_the_length_counts_the_end_token_and_the_text_leaves_it_out(parts, table: pd.DataFrame) -> None:
    tokenizer = parts[2]
    for row in table.to_dict("records"):
        assert row["length"] == len(row["tokens"]) == len(row["logps"])
        ended = row["tokens"][-1] == tokenizer.eos_token_id
        assert ended == (row["finish"] == "stop")
        assert row["text"] == tokenizer.decode(row["tokens"][:-1] if ended else row["tokens"])
        assert tokenizer.eos_token not in row["text"]


@pytest.fixture(scope="module")
def shared(parts) -> tuple[pd.DataFrame, CountingEngine]:
    """The same rollouts with shared beginnings, and what their engine counted."""
    counting = CountingEngine(parts[1])
    config = replace(CONFIG, {"sampling.shared_beginning": True})
    return collect((parts[0], counting, parts[2]), config), counting


def test_predictions_that_share_a_beginning_differ_from_the_pass_rate_on(
        parts, table: pd.DataFrame, shared: tuple) -> None:
    whole, meta = (predictions_of(found) for found in (table, shared[0]))
    first = meta["member"] == 0
    assert meta.loc[first, "text"].tolist() == whole.loc[first, "text"].tolist()
    heads = meta["text"].map(lambda text: text[:parse_prediction(text).spans[0][0]] if parse_prediction(text).spans
                             else "")
    for (_, group), (_, own) in zip(meta.groupby("group"), whole.groupby("group"), strict=True):
        head = parts[2].decode(group["prompt_ids"].iloc[0][len(own["prompt_ids"].iloc[0]):])
        assert group["beginning"].nunique() == group["prompt_ids"].nunique() == 1
        assert set(heads[group.index]) - {""} == ({head} if head else set())
        assert group["text"].str.startswith(head).all() and (group["beginning"].iloc[0] > 5) == bool(head)
    assert (meta["beginning"] > 0).sum() > 16 and meta["text"].nunique() > 24


def test_a_first_prediction_that_does_not_parse_shares_nothing(parts, table: pd.DataFrame) -> None:
    config = replace(CONFIG, {"sampling.shared_beginning": True, "sampling.meta_tokens": 8})
    cut = collect(parts, config).set_index(table.index)
    assert cut["beginning"].eq(0).all() and cut["length"].eq(cut["tokens"].map(len)).all()
    assert cut["tokens"].tolist() == [tokens[:8] if stream == "meta" else tokens
                                      for tokens, stream in zip(table["tokens"], table["stream"], strict=True)]


def test_what_is_shared_is_sampled_once_and_stands_among_the_prompts_ids(parts, table: pd.DataFrame,
                                                                         shared: tuple) -> None:
    found, counting = shared
    solved, first = found["stream"] == "solution", found["member"] == 0
    plain = [name for name in found if name != "logps"]
    pd.testing.assert_frame_equal(found.loc[solved, plain], table.loc[solved, plain], check_dtype=False)
    assert found["length"].sum() == counting.decode
    once = found["beginning"].where(~solved & first, 0)
    assert (found["length"] - found["tokens"].map(len)).tolist() == once.tolist()
    for row in found[~solved].to_dict("records"):
        start = len(row["prompt_ids"])
        assert row["beginning"] + len(row["tokens"]) <= 64
        logits = parts[1].model(torch.tensor([row["prompt_ids"] + row["tokens"]])).logits[0, start - 1:-1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]
        np.testing.assert_allclose(logps.detach(), row["logps"], atol=1e-4)


def test_solutions_are_graded_and_predictions_parsed(table: pd.DataFrame) -> None:
    solved, meta = solutions_of(table), predictions_of(table)
    pairs = zip(solved["text"], solved["answer"], strict=True)
    boxed = [text.endswith(f"\\boxed{{{answer}}}") for text, answer in pairs]
    assert solved["correct"].tolist() == boxed and 0 < sum(boxed) < len(boxed)
    assert solved[["predicted_pass_rate", "predicted_length", "notions"]].isna().all(axis=None)
    assert meta["correct"].isna().all()
    parsed = meta[meta["predicted_pass_rate"].notna()]
    assert len(parsed) > 16 and (parsed["parse_error"] == "").all()
    for row in parsed.to_dict("records"):
        named = re.findall(r'"(pass_rate|solution_length)": (\d+)', row["text"])
        assert {key: int(value) for key, value in named} == {
            "pass_rate": row["predicted_pass_rate"], "solution_length": row["predicted_length"]}
    assert all(meta.loc[meta["predicted_pass_rate"].isna(), "parse_error"])


def test_what_is_cut_at_its_cap_is_read_as_far_as_it_goes_or_counts_as_wrong(parts, table: pd.DataFrame) -> None:
    good = table[(table["finish"] == "stop") & (table["correct"].eq(True) | table["predicted_pass_rate"].notna())]
    rows = good[["stream", "group", "problem", "answer"]].to_dict("records")
    tokens, logps = good["tokens"].str[:-1], good["logps"].str[:-1]
    cut = [Completion(*sequence, "length") for sequence in zip(tokens, logps, strict=True)]
    for choice, counts in (("read", True), ("wrong", False)):
        found = rollouts.read(rows, cut, parts[2], replace(CONFIG, {"sampling.cut": choice}))
        assert found["text"].tolist() == good["text"].tolist() and set(found["stream"]) == {"solution", "meta"}
        solved = found["stream"] == "solution"
        assert found.loc[solved, "correct"].eq(counts).all()
        assert found.loc[~solved, "predicted_pass_rate"].notna().eq(counts).all()
        assert found.loc[~solved, "parse_error"].eq("").eq(counts).all()


def test_rewards_are_those_of_the_rewards_room(table: pd.DataFrame) -> None:
    solved, meta = solutions_of(table), predictions_of(table)
    assert solved["reward"].tolist() == solved["correct"].astype(float).tolist()
    assert solved[["reward_difficulty", "reward_length", "reward_notion"]].isna().all(axis=None)
    vectorised = reward_table.score_table(reward_table.reward_table(table.assign(step=1)), CONFIG.reward)
    for column in ("reward", "reward_difficulty", "reward_length", "reward_notion"):
        np.testing.assert_allclose(meta[column].to_numpy(), vectorised.loc[meta.index, column].to_numpy())
    assert meta["reward_difficulty"].nunique() > 3


def test_each_streams_groups_are_normalised_by_themselves(table: pd.DataFrame) -> None:
    for _, group in table.groupby(["stream", "group"]):
        reward = group["reward"]
        expected = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(group["advantage"], 0 if reward.nunique() == 1 else expected, atol=1e-5)
    assert (table["advantage"] != 0).any() and (table["advantage"] == 0).any()


@pytest.mark.parametrize(("setting", "value", "streams"), [
    ("normalise_std", False, ["solution", "meta"]), ("normalise_meta", "none", ["meta"])])
def test_advantages_without_normalisation_are_the_centred_rewards(
        table: pd.DataFrame, setting: str, value: object, streams: list[str]) -> None:
    again = table.drop(columns=["reward", "advantage"])
    rollouts.score(again, replace(CONFIG, {f"update.{setting}": value}))
    centred = again["reward"] - again.groupby(["stream", "group"])["reward"].transform("mean")
    expected = centred.where(again["stream"].isin(streams), table["advantage"])
    np.testing.assert_allclose(again["advantage"], expected, atol=1e-6)


def test_the_parts_of_the_meta_reward_can_be_normalised_each_by_itself(table: pd.DataFrame) -> None:
    again = table.drop(columns=["reward", "advantage"])
    rollouts.score(again, replace(CONFIG, {
        "update.normalise_meta": "parts", "reward.pass_rate_weight": 3, "reward.notion_weight": 0}))
    meta = predictions_of(again)
    def normalised(column: str) -> pd.Series:
        return meta.groupby("group")[column].transform(lambda part: (part - part.mean()) / (part.std(ddof=1) + 1e-6))
    expected = 0.75 * normalised("reward_difficulty") + 0.25 * normalised("reward_length")
    np.testing.assert_allclose(meta["advantage"], expected, atol=1e-5)
    solved = again["stream"] == "solution"
    np.testing.assert_allclose(again.loc[solved, "advantage"], table.loc[solved, "advantage"])


def test_a_contrast_takes_off_what_groups_and_values_earn_and_pays_what_is_rare(table: pd.DataFrame) -> None:
    again = table.drop(columns=["reward", "advantage"])
    rollouts.score(again, replace(CONFIG, {"update.normalise_meta": "contrast", "reward.difficulty_mode": "brier",
                                           "reward.length_weight": 0, "reward.notion_weight": 0}))
    meta = again[(again["stream"] == "meta") & again["predicted_pass_rate"].notna()]
    reward, keys = meta["reward_difficulty"], ["group", "predicted_pass_rate"]
    centred = reward - reward.groupby(meta["group"]).transform("mean")
    design = np.concatenate([pd.get_dummies(meta[key]).to_numpy(dtype=float) for key in keys], axis=1)
    left = reward - design @ np.linalg.lstsq(design, reward, rcond=None)[0]
    counts = meta.groupby("predicted_pass_rate")["group"].transform("size")
    surprise = -np.log(counts / len(meta))
    rare = 0.2 * (surprise - surprise.groupby(meta["group"]).transform("mean"))
    np.testing.assert_allclose(meta["advantage"], left / (centred.std(ddof=0) + 1e-6) + rare, atol=1e-3)
    assert meta.groupby("group")["advantage"].sum().abs().max() < 1e-3
    unparsed = again[(again["stream"] == "meta") & again["predicted_pass_rate"].isna()]
    assert len(unparsed) and (unparsed["advantage"] < 0).any() and (unparsed["advantage"] <= 0).all()


def test_a_contrast_tells_problems_apart_where_one_value_suits_all_best() -> None:
    """Nearly all problems are hopeless, so 0 earns most in the mean; the rare easy one is paid for more."""
    truth = np.repeat([0.0, 0.0, 0.0, 0.5], 6)
    values = pd.DataFrame({"group": np.repeat(np.arange(4), 6), "predicted_pass_rate": np.tile([0, 1, 2, 3, 4, 5], 4)})
    values["reward_difficulty"] = 1 - (values["predicted_pass_rate"] / 8 - truth) ** 2
    found = contrasted(values).to_numpy().reshape(4, 6)
    assert (np.diff(found[3]) > 0).all() and (np.diff(found[:3]) < 0).all()
    np.testing.assert_allclose(found.sum(axis=0), 0, atol=1e-9)


def test_a_contrast_leaves_predictions_that_all_say_the_same_without_an_advantage() -> None:
    values = pd.DataFrame({"group": [0, 0, 1, 1], "predicted_pass_rate": 3, "reward_difficulty": [0.7, 0.7, 0.9, 0.9]})
    assert contrasted(values).eq(0).all()
    assert contrasted(values[:1]).eq(0).all()  # all others could not be read


def test_the_same_numbers_give_the_same_rollouts_and_others_others(parts, table: pd.DataFrame) -> None:
    assert collect(parts)["tokens"].tolist() == table["tokens"].tolist()
    assert collect(parts, seed=[1, 3])["tokens"].tolist() != table["tokens"].tolist()


def test_solutions_do_not_depend_on_whether_predictions_are_asked_for(parts, table: pd.DataFrame) -> None:
    alone = collect(parts, predictions=0)
    assert alone["tokens"].tolist() == table.loc[table["stream"] == "solution", "tokens"].tolist()
    rollouts.score(alone, CONFIG)
    assert set(alone["stream"]) == {"solution"} and alone["reward_difficulty"].isna().all()


def test_released_mode_parses_and_pays_as_released(parts) -> None:
    config = small({"reward.mode": "released", "sampling.solution_tokens": 30})
    found = collect(parts, config)
    rollouts.score(found, config)
    meta = predictions_of(found)
    vectorised = reward_table.score_table(reward_table.reward_table(found.assign(step=1)), config.reward)
    np.testing.assert_allclose(meta["reward"].to_numpy(), vectorised.loc[meta.index, "reward"].to_numpy())


class Listening:
    """An engine that remembers what it was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.heard = engine, []

    def generate(self, requests, progress=None):
        self.heard += requests
        return self.engine.generate(requests, progress)


def test_one_call_of_the_engine_serves_both_streams_and_no_two_rollouts_share_a_seed(parts) -> None:
    problems, engine, tokenizer = parts
    listening, finished = Listening(engine), []
    collect((problems, listening, tokenizer), temperature=0.7, progress=lambda count, _: finished.append(count))
    assert len({request.seed for request in listening.heard}) == len(listening.heard) == sum(finished) == 80
    assert {request.temperature for request in listening.heard} == {0.7}
    assert {request.max_tokens for request in listening.heard} == {30, 64}


def test_request_seeds_are_distinct_and_a_function_of_the_numbers() -> None:
    assert rollouts.seeds([3, 4], 100) == rollouts.seeds([3, 4], 100)
    assert len({*rollouts.seeds([3, 4], 100), *rollouts.seeds([4, 3], 100), *rollouts.seeds([3, 4, 0, 1], 100)}) == 300
