"""The probe: the probabilities are the model's own, the truth is graded; table, summary and picture say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from small import small

from masa_lib import DATA
from masa_lib import crash_safe_files as files
from masa_lib.analysis import awareness, figures
from masa_lib.lessons import probe
from masa_lib.method import prompts
from masa_lib.models import loading
from masa_lib.runs import parquet
from masa_lib.tasks.problems import held_out

CONFIG = small({"problems.levels": "1-4", "sampling.solutions": 3, "prompt.max_length": 60})
COUNT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    probe.build(CONFIG, COUNT, folder, "masa probe --count 6")
    return folder


@pytest.fixture(scope="module")
def table(made: Path) -> pd.DataFrame:
    return parquet.read([made / "problems.parquet"])


def naive_logps(kind: str, values: list[int]) -> torch.Tensor:
    """The same by one whole forward pass a problem and value, over all logits."""
    model, tokenizer = loading.load(CONFIG.model)
    start, end = probe.FORMS[kind]
    rows = []
    for problem in held_out(CONFIG.problems, COUNT):
        prompt = prompts.encode(tokenizer, prompts.meta_messages(problem.text, CONFIG.prompt, 64))
        written = [tokenizer(f"{start}{value}{end}", add_special_tokens=False)["input_ids"] for value in values]
        shared = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        for tokens in written:
            with torch.no_grad():
                logps = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
            places = range(len(prompt) + shared, len(prompt) + len(tokens))
            rows.append(sum(logps[place - 1, tokens[place - len(prompt)]] for place in places))
    return torch.stack(rows).view(COUNT, len(values))


@pytest.mark.parametrize("kind", ["pass_rate", "length"])
def test_the_probabilities_are_those_of_a_whole_forward_pass(kind: str, table: pd.DataFrame) -> None:
    values = probe.asked_values(CONFIG)[kind]
    logps = naive_logps(kind, values)
    found = np.stack(table[f"{kind}_probabilities"])
    assert found.shape == (COUNT, len(values))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-9)
    np.testing.assert_allclose(found, logps.softmax(1), atol=1e-4)
    np.testing.assert_allclose(table[f"{kind}_mass"], logps.exp().sum(1), atol=1e-4)
    assert (table[f"{kind}_mass"] <= 1 + 1e-6).all()


def test_lengths_are_asked_on_a_logarithmic_scale_within_the_prompts_bounds() -> None:
    assert probe.asked_values(small({"prompt.min_length": 1, "sampling.solution_tokens": 128}))["length"] == [
        1, 2, 4, 8, 16, 32, 64, 128]
    assert probe.asked_values(small({"prompt.min_length": 60, "prompt.max_length": 60}))["length"] == [60]
    assert probe.asked_values(CONFIG)["pass_rate"] == list(range(9))


def test_a_belief_is_the_mean_of_its_probabilities(table: pd.DataFrame) -> None:
    for kind, column in (("pass_rate", "predictions"), ("length", "predicted_lengths")):
        means = np.stack(table[f"{kind}_probabilities"]) @ probe.asked_values(CONFIG)[kind]
        np.testing.assert_allclose(np.concatenate(table[column]), means)


def test_an_answer_without_a_box_counts_as_the_last_number_stated() -> None:
    texts = ["it is 4", "no idea", r"\boxed{4}", r"\boxed{5} or 4", "4, no: 5"]
    rows = pd.DataFrame({"text": texts, "answer": "4", "problem": "What is 2 + 2?",
                         "finish": ["stop"] * 4 + ["length"],
                         "correct": pd.array([False, False, True, False, False], dtype="boolean")})
    assert probe.read_answers(rows) == {"boxed": 0.4, "accuracy_boxed": 0.2, "no_answer": 0.2, "truncated": 0.2}
    assert rows["correct"].tolist() == [True, False, True, False, False]


def test_the_summary_is_computed_from_the_table_and_says_where_it_comes_from(made: Path, table: pd.DataFrame) -> None:
    summary = json.loads((made / "summary.json").read_text(encoding="utf8"))
    frame = awareness.problem_measures(table)
    assert len(table) == COUNT == summary["problems"]["count"] and set(table["n"]) == {3} == {summary["samples"]}
    assert summary["accuracy"] == pytest.approx((table["c"] / table["n"]).mean())
    assert summary["pass_rate_mae"] == pytest.approx((frame["predicted_pass_rate"] - frame["pass_rate"]).abs().mean())
    assert summary["command"] == "masa probe --count 6" and {"commit", "dirty"} <= set(summary["git"])
    assert {"torch", "transformers", "masa"} <= set(summary["versions"])
    assert "parse_rate" not in summary and summary["calibration"]["bins"]


def test_the_picture_shows_belief_against_truth(made: Path, table: pd.DataFrame) -> None:
    problems = awareness.problem_measures(table)
    figure = figures.probe(problems, awareness.calibration(problems["predicted_pass_rate"], problems["pass_rate"]))
    bars = {trace.name: np.asarray(trace.y) for trace in figure.data if isinstance(trace, go.Bar)}
    assert set(bars) == {"believed", "true"}
    for shares in bars.values():
        assert len(shares) == 9 and shares.sum() == pytest.approx(1.0)
    assert len(figure.layout.annotations) == 3 and figure.layout.template == figures.TEMPLATE
    assert "plotly" in (made / "probe.html").read_text(encoding="utf8")


def test_calibration_compares_belief_and_truth_bin_by_bin() -> None:
    believed = np.repeat([0.2, 0.6, 1.0], 10)
    found = awareness.calibration(believed, np.repeat([0.2, 0.3, 1.0], 10))
    assert [(round(row["predicted"], 6), round(row["true"], 6), row["problems"]) for row in found["bins"]] == [
        (0.2, 0.2, 10), (0.6, 0.3, 10), (1.0, 1.0, 10)]
    assert found["error"] == pytest.approx(0.1)
    flat = awareness.calibration([0.5] * 4, [0.0, 1.0, 1.0, float("nan")])
    assert len(flat["bins"]) == 1 and flat["bins"][0]["problems"] == 3 and flat["error"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("folder", sorted((DATA / "probe").iterdir()), ids=lambda folder: folder.name)
def test_a_recorded_probe_is_of_a_commit_and_says_what_its_table_says(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf8"))
    table = pd.read_parquet(folder / "problems.parquet")
    assert len(table) == summary["problems"]["count"] >= 200 and table["level"].nunique() > 1
    assert summary["command"].startswith("masa probe --model") and not summary["git"]["dirty"]
    again = json.loads(files.line(probe.summarise(table)))
    bins = [recorded.pop("calibration")["bins"] for recorded in (again, summary)]
    assert bins[1] == [pytest.approx(row) for row in bins[0]]
    assert {name: summary[name] for name in again} == pytest.approx(again)
