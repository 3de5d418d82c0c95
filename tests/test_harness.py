"""Sets that are handed to lm-evaluation-harness: which, what is kept of its answers, and one local task all the way."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import small

from masa_lib import cli
from masa_lib import config as configs
from masa_lib.analysis import intervals, paper_sets
from masa_lib.analysis.compare import PAPER
from masa_lib.analysis.paper_sets import PUBLISHED
from masa_lib.cli import parsing
from masa_lib.tasks.data_sets import Harness
from masa_lib.tasks.problems import load_problems
from masa_lib.training import drive, harness
from masa_lib.training.harness import HarnessError

ROOT = Path(__file__).resolve().parent.parent
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `harness` is missing")
CONFIG = small({"evaluation.final_samples": 3, "evaluation.temperature": 0.6})


def test_every_set_that_the_paper_prints_is_in_the_table() -> None:
    rows = pd.read_csv(PAPER / "results.csv").query("table in ('Table 1', 'Table 2') and version == 'v1'")
    printed = {name for name in rows["benchmark"] if not name.startswith("Average")}
    assert {entry.paper for entry in PUBLISHED.values()} == printed and len(printed) == 19


def test_the_documentation_has_a_row_for_every_set_with_its_task_or_that_there_is_none() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf8")
    told = dict(re.findall(r"^\| ([\w-]+) \| (.*?) \|", text, re.MULTILINE))
    for name, entry in PUBLISHED.items():
        if entry.harness:
            assert set(re.findall(r"`(\w+)`", told[entry.paper])) == set(entry.harness.tasks)
        elif name != "evalplus":
            assert told[entry.paper] == "none"
        assert not entry.hub or f"`{name}`" in text


@needs_harness
@pytest.mark.slow
def test_every_task_of_the_table_is_one_of_the_installed_harness() -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_subtasks
    assert {task for entry in PUBLISHED.values() if entry.harness for task in entry.harness.tasks} <= set(known)


@needs_harness
def test_no_task_of_the_table_asks_to_trust_remote_code_and_those_that_run_code_are_marked() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    texts = {path: path.read_text(encoding="utf8")
             for name in ("aime", "gpqa", "arc", "bbh", "agieval", "cruxeval", "mbpp")
             for path in (folder / name).rglob("*") if path.name.endswith(("_yaml", ".yaml"))}
    assert texts and not any("trust_remote_code" in text for text in texts.values())
    unsafe = {path.parent.name for path, text in texts.items() if "unsafe_code: true" in text}
    assert unsafe == {"cruxeval", "mbpp"}
    marked = {name for name, entry in PUBLISHED.items() if entry.harness and entry.harness.runs_code}
    assert marked == {"crux-o", "mbpp"}


def test_sets_are_named_as_here_or_as_in_the_paper_and_without_names_none_that_runs_code() -> None:
    assert list(harness.chosen(["AIME24", "ar-lsat", "hellaswag"])) == ["aime-2024", "ar-lsat", "hellaswag"]
    assert harness.chosen(["hellaswag"])["hellaswag"].tasks == {"hellaswag": ""}
    assert set(harness.chosen([])) == {"aime-2024", "aime-2025", "gpqa-diamond", "arc-challenge", "logical-deduction",
                                       "ar-lsat"}
    assert set(harness.chosen([], run_code=True)) - set(harness.chosen([])) == {"crux-o", "mbpp"}


@pytest.mark.parametrize(("name", "said"), [
    ("MATH500", "masa eval --problems math-500"), ("FOLIO", "nothing here measures it"), ("EvalPlus", "--evalplus"),
    ("mbpp", "executes code .* --run-code"), ("cruxeval_output_cot", "executes code .* --run-code")])
def test_a_set_that_is_not_had_here_or_runs_code_is_refused_with_the_way_to_go(name: str, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        harness.chosen([name])


def samples(values: list[Any], kept: str = "none") -> list[dict[str, Any]]:
    return [{"doc_id": number, "filter": kept, "metrics": ["exact_match"], "exact_match": value}
            for number, value in enumerate(values)]


def test_of_what_the_harness_reports_one_number_an_answer_is_kept_in_the_order_of_the_problems() -> None:
    reported = [*reversed(samples([1, 0.5, True])), *samples([0, 0, 0], "strict")]
    assert harness.answers(reported, "exact_match,none", "t") == ("exact_match,none", [1.0, 0.5, 1.0])
    assert harness.answers(reported, "exact_match,strict", "t")[1] == [0.0, 0.0, 0.0]
    assert harness.answers(samples([1]), "", "t") == ("exact_match,none", [1.0])


@pytest.mark.parametrize("reported", [
    None, [], {"a": 1}, ["text"], [{}], samples(["__import__('os')"]), samples([float("nan")]), samples([2]),
    samples([-1]), samples([[1]]), samples([1], "other"), [{"doc_id": "x", "filter": "none", "exact_match": 1}]])
def test_what_else_the_harness_may_report_is_an_error_in_one_sentence(reported: Any) -> None:
    with pytest.raises(HarnessError, match="of tiny cannot be read as exact_match,none"):
        harness.answers(reported, "exact_match,none", "tiny")


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[int]]]:
    """Stands in for the harness: what it is asked for, and answers that are recorded."""
    asked_for: list[dict[str, list[int]]] = []

    def ask(config: Any, folder: str, out: Path, missing: Any, asked: Any, *rest: Any) -> None:
        asked_for.append(missing)
        for task, left in missing.items():
            for number in left[:1] if task == "ranked" else left:
                row = {"task": task, "pass": number, "once": task == "ranked", "right": [1.0, float(number % 2)]}
                harness.files.append_line(out / f"{task}.jsonl", row | {"asked": asked})

    monkeypatch.setattr(harness, "_ask", ask)
    monkeypatch.setattr(harness, "_version", lambda: "0")
    return asked_for


def test_passes_that_are_recorded_are_not_asked_again_and_other_settings_are(tmp_path: Path, asking: list) -> None:
    sets = {"tiny": Harness({"tiny": ""}), "ranked": Harness({"ranked": ""})}
    rows = harness.measure(CONFIG, tmp_path, sets)
    assert asking == [{"tiny": [0, 1, 2], "ranked": [0, 1, 2]}]
    assert [(row["set"], row["problems"], row["samples"]) for row in rows] == [("tiny", 2, 3), ("ranked", 2, 1)]
    found = rows[0]["accuracy"], rows[0]["accuracy_low"], rows[0]["accuracy_high"]
    assert found == intervals.share_interval([1, 1 / 3])
    assert harness.measure(CONFIG, tmp_path, sets) == rows and len(asking) == 1
    more = configs.replace(CONFIG, {"evaluation.final_samples": 5})
    assert harness.measure(more, tmp_path, {"tiny": sets["tiny"]})[0]["samples"] == 5
    assert asking[1:] == [{"tiny": [3, 4]}]
    assert harness.measure(CONFIG, tmp_path, sets) == rows  # the first passes alone
    harness.measure(configs.replace(CONFIG, {"evaluation.temperature": 1.0}), tmp_path, {"tiny": sets["tiny"]})
    assert asking[2:] == [{"tiny": [0, 1, 2]}]


def test_a_record_that_is_torn_or_changed_is_asked_again(tmp_path: Path, asking: list) -> None:
    sets = {"tiny": Harness({"tiny": ""})}
    harness.measure(CONFIG, tmp_path, sets)
    first, second, third = (tmp_path / "tiny.jsonl").read_text(encoding="utf8").splitlines()
    (tmp_path / "tiny.jsonl").write_text("\n".join([first, second.replace("1.0", "7.0"), third[:30]]), encoding="utf8")
    harness.measure(CONFIG, tmp_path, sets)
    assert asking[1:] == [{"tiny": [1, 2]}]


def test_a_tasks_name_never_leads_out_of_the_folder() -> None:
    for name in ("../../x", "/etc/passwd", "..", "a\\b", "x" * 500):
        assert Path(harness._file(name)).name == harness._file(name) and len(harness._file(name)) <= 120


def test_published_numbers_are_those_of_the_model_or_else_of_the_largest() -> None:
    eight, other = paper_sets.published("AIME24", "Qwen3-8B-Base"), paper_sets.published("AIME24", "pocket")
    assert (eight["published"], other["published"]) == ("Qwen3-8B-Base", "Qwen3-14B-Base")
    assert (other["grpo"], other["masa"]) == (pytest.approx(0.3854), pytest.approx(0.4010))
    assert paper_sets.published("GPQA-Diamond", "Qwen3-8B-Base")["masa"] == pytest.approx(0.5372)
    assert paper_sets.published("hellaswag", "pocket")["published"] is None
    assert paper_sets.published("AIME24", "pocket", Path("nowhere"))["published"] is None


def test_the_table_says_where_few_problems_settle_little() -> None:
    few = [{"right": [1.0] * 12 + [0.0] * 18}]
    text = paper_sets.text([paper_sets.score("aime-2024", PUBLISHED["aime-2024"].harness, [few], CONFIG)])
    assert "| AIME24 | 30 x 1 | 40.0 | " in text and "| 38.5 | 40.1 | Qwen3-14B-Base |" in text
    assert "Few problems settle little" in text
    assert re.search(r"AIME24 \(30 problems, \d\d\.\d points wide; they differ by 1\.6\)", text)
    assert "EvalPlus" not in text and "FOLIO" in paper_sets.text([], named=False)


def evalplus_file(path: Path, statuses: list[list[tuple[Any, Any]]]) -> Path:
    """Laid out as EvalPlus 0.3.1 writes it."""
    found = {f"HumanEval/{number}": [
        {"task_id": f"HumanEval/{number}", "solution": "raise SystemExit", "base_status": base, "plus_status": plus,
         "base_fail_tests": [], "plus_fail_tests": []} for base, plus in answers]
        for number, answers in enumerate(statuses)}
    path.write_text(json.dumps({"date": "2026-12-01 16:32", "hash": "0", "eval": found}), encoding="utf8")
    return path


def test_what_evalplus_has_found_is_read_and_stands_beside_the_published(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = evalplus_file(tmp_path / "a.json", [[("pass", "pass"), ("pass", "fail")],
                                                [("fail", "fail"), ("timeout", "fail")]])
    second = evalplus_file(tmp_path / "b.json", [[("pass", "pass")] * 2])
    assert cli.main(["eval", "--evalplus", str(first), str(second), "--out", str(tmp_path / "out"), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["sets"]
    assert (row["set"], row["problems"], row["samples"], row["accuracy"]) == ("EvalPlus", 3, 2, 0.5)
    assert row["masa"] == pytest.approx(0.7766)
    assert json.loads((tmp_path / "out" / "evalplus.jsonl").read_text(encoding="utf8"))["right"] == [
        [[1.0, 0.0], [0.0, 0.0]], [[1.0], [1.0]]]


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"eval": []}', '{"eval": {}}', '{"eval": {"a": []}}', '{"eval": {"a": [{"base_status": "pass"}]}}',
    '{"eval": {"a": [{"base_status": "pass", "plus_status": null}]}}', "[" * 100_000, b"\xff\xfe",
    '{"eval": {"a": [{"base_status": "pass", "plus_status": "pass"}], "b": []}}'])
def test_another_file_than_that_of_evalplus_is_refused_in_one_sentence(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HarnessError, match=r"x\.json cannot be read as results of EvalPlus"):
        harness.evalplus(CONFIG, tmp_path / "out", [file])


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HarnessError, match=r"\[harness\]"):
        harness.measure(CONFIG, tmp_path, harness.chosen(["AIME24"]))


def test_the_papers_settings_are_laid_over_those_of_a_run() -> None:
    options = parsing.build_parser().parse_args(["eval", "--config", str(ROOT / "configs" / "paper-evaluation.toml")])
    found = parsing.config_from(options, CONFIG)
    assert (found.evaluation.final_samples, found.evaluation.temperature) == (32, 0.6)
    assert found.sampling.solution_tokens == 16384
    assert found.model == CONFIG.model and found.method == CONFIG.method


TASK = r"""
task: tiny_arithmetic
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: generate_until
test_split: test
doc_to_text: "{{problem}}\nSolve step by step, answer in \\boxed{}."
doc_to_target: "{{answer}}"
generation_kwargs: {until: []}
filter_list:
  - name: boxed
    filter: [{function: regex, regex_pattern: "\\\\boxed\\{([^}]*)\\}"}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@needs_harness
@pytest.mark.slow
def test_a_runs_model_answers_a_local_task_of_the_installed_harness(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run = drive.train(small({"steps": 1, "model.lora_rank": 4}), tmp_path / "run", "masa train")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"problem": problem.text, "answer": problem.answer}
            for problem in load_problems("pocket", "evaluation", 8, levels="1-2")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    (folder / "tiny.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")), encoding="utf8")
    arguments = ["eval", "--run", str(run.path), "--harness", "tiny_arithmetic", "--tasks", str(folder), "--json",
                 "--set", "evaluation.temperature=0.6", "evaluation.final_problems=6"]
    assert cli.main([*arguments, "evaluation.final_samples=2"]) == 0
    [row] = json.loads(capsys.readouterr().out)["sets"]
    assert (row["problems"], row["samples"]) == (6, 2) and 0.3 < row["accuracy"] <= 1
    kept = (run.path / "harness" / "tiny_arithmetic.jsonl").read_text(encoding="utf8")
    assert [json.loads(line)["measure"] for line in kept.splitlines()] == ["exact_match,boxed"] * 2
    assert [path.name for path in (run.path / "harness").iterdir()] == ["tiny_arithmetic.jsonl"]
    assert str(tmp_path) not in kept
    assert cli.main([*arguments, "evaluation.final_samples=2"]) == 0  # nothing is asked again
    assert json.loads(capsys.readouterr().out)["sets"] == [row]
    assert cli.main(["eval", "--run", str(run.path), "--harness", "no_such", "--tasks", str(folder)]) == 1
    assert "lm-evaluation-harness has no task 'no_such'" in capsys.readouterr().err
