"""Data sets by short name: where they lie on the Hugging Face hub, and how a row becomes a problem.

The ids, splits and columns were looked up in dataset cards and in public code that loads the sets; no set was ever
downloaded while this was written, so each mapping says `fetched = "never"` until somebody has done so and says it here.
A set of the paper's evaluation has its name there, and what lm-evaluation-harness has of it; one with no `hub` is asked
and graded by that harness alone (`training/harness.py`). Nothing here reads a file: `problem_rows` does.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
#: a row and a generator (for shuffled options) -> problem text, answer, level
RowReader = Callable[[Row, random.Random], tuple[str, str, int]]


@dataclass(frozen=True)
class Harness:
    """What EleutherAI's lm-evaluation-harness has of a set.

    Attributes:
        tasks: by the harness's names, what tells there whether an answer is right: a measure and the filter in front
            of it, as `exact_match,none`. Their problems are taken together.
        unlike: in what it is not the set as the paper has it.
        runs_code: it executes code that the model has written.
    """

    tasks: Mapping[str, str]
    unlike: str = ""
    runs_code: bool = False


@dataclass(frozen=True)
class DataSet:
    """One data set and its mapping; an empty `train` means that it is only there to evaluate on.

    `hub` is empty where the set is not for our own hands. `paper` is the name of one that the paper was evaluated on,
    as `data/paper/results.csv` has it.
    """

    hub: str
    what: str
    read: RowReader | None = None
    columns: tuple[str, ...] = ()
    config: str | None = None
    train: str = ""
    evaluation: str = ""
    train_size: int | None = None
    evaluation_size: int | None = None
    fetched: str = "never"
    paper: str = ""
    harness: Harness | None = None


def answer_text(value: Any) -> str:
    """An answer as a data set stores it, as text: `27.0` is `27`, `["1", "2"]` is `1, 2`, None and nan are empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(answer_text(part) for part in value)
    return str(value).strip()


def level_number(value: Any) -> int | None:
    """A level as data sets write it: `3`, `"3"` or `"Level 3"`; 0 where it is unknown (`"Level ?"`, `"unknown"`).

    None is what cannot be a level, as `"hard"`.
    """
    text = re.sub(r"(?i)^level\b\s*", "", answer_text(value))
    if re.fullmatch(r"(?i)\W*|unknown|none|null|nan|n/?a|unrated", text):
        return 0
    found = re.fullmatch(r"(\d+)(?:\.0+)?", text)
    return int(found.group(1)) if found else None


def multiple_choice(question: str, options: Sequence[str], right: int) -> tuple[str, str]:
    """A question with its options as lines `A) ...`, and the letter of option number `right`."""
    lines = [f"{letter}) {option.strip()}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines]), string.ascii_uppercase[right]


def read_columns(problem: str, answer: str, level: str = "") -> RowReader:
    """A reader of sets that store problem, final answer and perhaps level in columns of these names."""
    def read(row: Row, rng: random.Random) -> tuple[str, str, int]:
        return row[problem], answer_text(row[answer]), level_number(row[level]) or 0 if level else 1
    return read


def read_math(row: Row, rng: random.Random) -> tuple[str, str, int]:
    r"""MATH: the answer is what the solution puts into its last `\boxed{}`."""
    from masa_lib.tasks.grading import extract_answer

    return row["problem"], extract_answer(row["solution"]) or "", level_number(row["level"]) or 0


def read_gsm8k(row: Row, rng: random.Random) -> tuple[str, str, int]:
    """GSM8K: the answer stands after `####`, with commas between thousands."""
    return row["question"], row["answer"].rpartition("####")[2].strip().replace(",", ""), 1


def read_olympiadbench(row: Row, rng: random.Random) -> tuple[str, str, int]:
    """OlympiadBench: a list of final answers, in dollar signs; several are one answer with commas."""
    return row["question"], answer_text([part.strip().strip("$") for part in row["final_answer"]]), 1


def read_gpqa(row: Row, rng: random.Random) -> tuple[str, str, int]:
    """GPQA: the right answer has a column of its own, so the options are shuffled."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {n}"] for n in (1, 2, 3))]
    order = rng.sample(range(4), 4)
    return *multiple_choice(row["Question"], [options[n] for n in order], order.index(0)), 1


def read_arc(row: Row, rng: random.Random) -> tuple[str, str, int]:
    """ARC: three to five options, labelled by letters or by digits."""
    choices = row["choices"]
    return *multiple_choice(row["question"], choices["text"], list(choices["label"]).index(row["answerKey"])), 1


DATA_SETS: dict[str, DataSet] = {
    "deepscaler": DataSet("agentica-org/DeepScaleR-Preview-Dataset", "the paper's training set (competitions)",
                          read_columns("problem", "answer"), ("problem", "answer"), train="train", train_size=40315),
    "math": DataSet("DigitalLearningGmbH/MATH-lighteval", "MATH, competition problems of levels 1 to 5",
                    read_math, ("problem", "solution", "level"), "default", "train", "test", 7500, 5000),
    "math-500": DataSet("HuggingFaceH4/MATH-500", "500 of MATH's test problems",
                        read_columns("problem", "answer", "level"), ("problem", "answer", "level"),
                        evaluation="test", evaluation_size=500, paper="MATH500"),
    "gsm8k": DataSet("openai/gsm8k", "grade-school word problems",
                     read_gsm8k, ("question", "answer"), "main", "train", "test", 7473, 1319),
    "aime-2024": DataSet("HuggingFaceH4/aime_2024", "AIME 2024, I and II",
                         read_columns("problem", "answer"), ("problem", "answer"),
                         evaluation="train", evaluation_size=30,
                         paper="AIME24", harness=Harness({"aime24": "exact_match,none"})),
    "aime-2025": DataSet("math-ai/aime25", "AIME 2025, I and II",
                         read_columns("problem", "answer"), ("problem", "answer"),
                         evaluation="test", evaluation_size=30,
                         paper="AIME25", harness=Harness({"aime25": "exact_match,none"})),
    "amc23": DataSet("math-ai/amc23", "AMC 12 of 2023 with whole-number answers",
                     read_columns("question", "answer"), ("question", "answer"),
                     evaluation="test", evaluation_size=40, paper="AMC23"),
    "minerva": DataSet("math-ai/minervamath", "undergraduate science and mathematics",
                       read_columns("question", "answer"), ("question", "answer"),
                       evaluation="test", evaluation_size=272, paper="Minerva"),
    "olympiadbench": DataSet("math-ai/olympiadbench", "olympiad mathematics in English, text only",
                             read_olympiadbench, ("question", "final_answer"), evaluation="test",
                             paper="Olympiad"),
    "gpqa-diamond": DataSet("Idavidrein/gpqa", "graduate science, multiple choice (the hub asks for an agreement)",
                            read_gpqa, ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
                                        "Incorrect Answer 3"), "gpqa_diamond", evaluation="train", evaluation_size=198,
                            paper="GPQA-Diamond", harness=Harness(
                                {"gpqa_diamond_cot_zeroshot": "exact_match,flexible-extract"})),
    "arc-challenge": DataSet("allenai/ai2_arc", "grade-school science, multiple choice",
                             read_arc, ("question", "choices", "answerKey"), "ARC-Challenge", "train", "test",
                             1119, 1172, paper="ARC-Challenge", harness=Harness(
                                 {"arc_challenge_chat": "exact_match,remove_whitespace"},
                                 "the answer is asked for at once, without reasoning")),
    "prontoqa": DataSet("", "deduction in made-up worlds", paper="ProntoQA"),
    "proofwriter": DataSet("", "deduction from written rules", paper="ProofWriter"),
    "folio": DataSet("", "first-order logic in natural language", paper="FOLIO"),
    "logical-deduction": DataSet("", "the order of three, five or seven things", paper="LogicalDeduction",
                                 harness=Harness({
                                     f"bbh_cot_zeroshot_logical_deduction_{count}_objects":
                                     "exact_match,flexible-extract" for count in ("three", "five", "seven")},
                                     "all 750 of BIG-Bench Hard; which problems of BIG-Bench the paper took it does "
                                     "not say")),
    "ar-lsat": DataSet("", "analytical reasoning of the law school test", paper="AR-LSAT", harness=Harness(
        {"agieval_lsat_ar": "acc,none"}, "nothing is written: the likeliest of five options counts, once")),
    "r-bench": DataSet("", "graduate questions of many subjects", paper="R-Bench"),
    "scibench": DataSet("", "college physics, chemistry and mathematics", paper="SciBench"),
    "evalplus": DataSet("", "HumanEval+ and MBPP+, Python functions with more tests", paper="EvalPlus"),
    "crux-o": DataSet("", "what a Python function returns", paper="CRUX-O", harness=Harness(
        {"cruxeval_output_cot": "pass@1,create_test"}, "one solved example stands in front of each", runs_code=True)),
    "mbpp": DataSet("", "short Python functions", paper="MBPP", harness=Harness(
        {"mbpp_instruct": "pass_at_1,extract_code"}, "three solved examples stand in front of each",
        runs_code=True)),
    "livecodebench": DataSet("", "competition programming", paper="LiveCodeBench"),
}
