"""The arithmetic that the pocket model learns, how it is made, and the model that the repository carries."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import MODEL, small
from transformers import AutoModelForCausalLM, AutoTokenizer

from masa_lib.cli import parsing
from masa_lib.engines import make_engine
from masa_lib.method import rollouts
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading, tiers
from masa_lib.recipes import pocket
from masa_lib.recipes.pocket import Recipe
from masa_lib.tasks import arithmetic, grading, problems
from masa_lib.tasks.arithmetic import LEVELS, NOTIONS, Chain, Habits
from masa_lib.tasks.read_prediction import parse_prediction

FOLDER = Path(tiers.resolve(MODEL))
HABITS = [Recipe().habits, Habits(shortcut=0, worked=1, restate=1, ramble=0.5), Habits(shortcut=0, worked=0)]
levels, seeds = st.sampled_from(LEVELS), st.integers(0, 2**32)


def value_of(text: str) -> int:
    """The answer of a problem, read from its words alone."""
    first, *rest = re.finditer(r"(?:(\+|-|\bx|add|subtract|multiply by) )?(\d+)", text.lower())
    value = int(first[2])
    for step in rest:
        n = int(step[2])
        value = {"+": value + n, "add": value + n, "x": value * n, "multiply by": value * n}.get(step[1], value - n)
    return value


def sides_differ(text: str) -> list[str]:
    """The equations `a op b (op c)=d` of a text that are not true."""
    wrong = []
    for left, right in re.findall(r"(-?\d+(?:[-+x]\d+)+)=(-?\d+)", text):
        first, *rest = re.findall(r"[-+x]?\d+", left.lstrip("-"))
        value = int(first) * (-1 if left.startswith("-") else 1)
        for part in rest:  # products stand first, so left to right is the order of arithmetic
            value = value * int(part[1:]) if part[0] == "x" else value + int(part)
        if value != int(right):
            wrong.append(f"{left}={right}")
    return wrong


def draw(level: int, count: int) -> list[tuple[Chain, str]]:
    """Chains of a level, each with its problem in a random wording."""
    rng = random.Random(level)
    chains = [arithmetic.make_chain(rng, level) for _ in range(count)]
    return [(chain, arithmetic.problem_text(chain, rng.randrange(3))) for chain in chains]


def traps(chain: Chain) -> int:
    return sum(bool(arithmetic.notions_of(value, *operation))
               for value, operation in zip(chain.values(), chain.operations, strict=False))


# The generator.

def test_there_are_at_least_12_levels_from_one_small_step_to_long_chains_of_large_numbers() -> None:
    assert len(LEVELS) >= 12
    sizes = [np.mean([len(chain.operations) * len(str(chain.start)) for chain, _ in draw(level, 50)])
             for level in (LEVELS[0], LEVELS[-1])]
    assert sizes[0] == 1 and sizes[1] >= 10


@given(levels, seeds)
def test_answers_are_right(level: int, seed: int) -> None:
    text, answer = arithmetic.make_problem(random.Random(seed), level)
    assert str(value_of(text)) == answer


@given(levels, seeds)
def test_all_wordings_of_a_chain_ask_the_same_and_fall_on_the_same_side_of_the_split(level: int, seed: int) -> None:
    chain = arithmetic.make_chain(random.Random(seed), level)
    texts = [arithmetic.problem_text(chain, wording) for wording in range(3)]
    assert len(set(texts)) == 3
    assert [value_of(text) for text in texts] == [chain.values()[-1]] * 3
    assert len({arithmetic.is_held_out(text) for text in texts}) == 1


def test_one_problem_in_eight_is_held_out_whatever_the_level() -> None:
    for level in (4, 8, 12):
        share = np.mean([arithmetic.is_held_out(text) for _, text in draw(level, 2000)])
        assert 0.095 < share < 0.155


def test_the_generator_repeats_itself_from_a_seed() -> None:
    def draws(seed: int) -> list[tuple[str, str]]:
        rng = random.Random(seed)
        return [arithmetic.make_problem(rng, level) for level in LEVELS]

    assert draws(1) == draws(1) != draws(2)


@given(levels, seeds, st.sampled_from(HABITS))
def test_solutions_hold_only_true_arithmetic_and_end_in_the_answer(level: int, seed: int, habits: Habits) -> None:
    rng = random.Random(seed)
    chain = arithmetic.make_chain(rng, level)
    solution = arithmetic.write_solution(chain, rng, habits)
    answer = str(chain.values()[-1])
    assert solution.endswith(f"\\boxed{{{answer}}}") and solution.count("\\boxed") == 1
    assert grading.grade(solution, answer)
    assert sides_differ(solution) == []


@given(levels, seeds)
def test_each_line_of_a_solution_works_out_one_operation_of_the_problem(level: int, seed: int) -> None:
    rng = random.Random(seed)
    chain = arithmetic.make_chain(rng, level)
    solution = arithmetic.write_solution(chain, rng, Habits(shortcut=0, worked=0.5, restate=0, ramble=0))
    lines = solution.split(". ")[:-1]
    for line, value, (symbol, operand), result in zip(
            lines, chain.values()[:-1], chain.operations, chain.values()[1:], strict=True):
        assert re.match(rf"{value}{re.escape(symbol)}{operand}[=:]", line)
        assert re.search(r"-?\d+$", line)[0] == str(result)


def test_the_check_for_true_arithmetic_finds_errors() -> None:
    assert sides_differ("7x3+2=23 12-5=8 3+9+1=13; -12+5=-7, 13-7-1=5") == ["12-5=8"]
    assert sides_differ("-12x3=36") == ["-12x3=36"]


def test_every_notion_but_checking_is_named_in_worked_solutions_and_names_what_happens_there() -> None:
    def named(value: int, symbol: str, operand: int) -> set[str]:
        found = arithmetic.notions_of(value, symbol, operand)
        line = arithmetic.work(value, symbol, operand, worked=True)
        assert found == {notion for notion in NOTIONS if re.search(rf"\b{notion}\b", line)}
        return found

    assert named(47, "+", 38) == {"carry"}
    assert named(52, "-", 38) == {"borrow"}
    assert named(502, "-", 38) >= {"borrow", "zeros"}
    assert "sign" in named(5, "-", 38) and "sign" in named(-5, "+", 38)
    assert "product" in named(14, "x", 7)
    assert named(41, "+", 38) == named(58, "-", 21) == set()
    rambling = arithmetic.write_solution(Chain(3, (("+", 4),)), random.Random(0), Habits(0, 0, 0, ramble=0.95))
    assert "check" in rambling


def test_the_share_of_traps_varies_widely_within_every_level() -> None:
    for level in LEVELS:
        shares = [traps(chain) / len(chain.operations) for chain, _ in draw(level, 400)]
        assert 0.3 < np.mean(shares) < 0.7
        assert np.std(shares) > 0.3


def test_within_a_level_the_length_of_the_prompt_does_not_tell_the_traps_or_the_work() -> None:
    for level in LEVELS:
        drawn = draw(level, 1000)
        lengths = [len(text) for _, text in drawn]
        work = [sum(len(arithmetic.work(value, *operation, worked=True)) for value, operation in zip(
            chain.values(), chain.operations, strict=False)) for chain, _ in drawn]
        assert abs(np.corrcoef(lengths, [traps(chain) for chain, _ in drawn])[0, 1]) < 0.2
        assert abs(np.corrcoef(lengths, work)[0, 1]) < 0.2
        assert np.std(lengths) > 8  # the wording moves it


def test_over_all_levels_the_length_of_the_prompt_explains_little_of_the_level() -> None:
    lengths, numbers = zip(*[(len(text), level) for level in LEVELS for _, text in draw(level, 200)], strict=True)
    assert np.corrcoef(lengths, numbers)[0, 1] ** 2 < 0.5


@given(levels, seeds)
def test_the_shape_of_a_chain_is_what_the_eye_sees_in_its_problem(level: int, seed: int) -> None:
    chain = arithmetic.make_chain(random.Random(seed), level)
    numbers = re.findall(r"\d+", arithmetic.problem_text(chain, 0))
    steps, digits, *verbs = arithmetic.shape(chain).split(", ")
    assert (steps, digits) == (f"{len(numbers) - 1} steps", f"{max(map(len, numbers))} digits")
    assert {verb[0] for verb in verbs} == {{"+": "a", "-": "s", "x": "m"}[symbol] for symbol, _ in chain.operations}


# Habits.

def solutions(habits: Habits, count: int = 300) -> list[str]:
    rng = random.Random(0)
    chain = Chain(47, (("+", 38), ("-", 19)))
    return [arithmetic.write_solution(chain, rng, habits) for _ in range(count)]


def test_habits_decide_how_a_solution_is_written() -> None:
    assert set(solutions(Habits(shortcut=1))) == {"\\boxed{66}"}
    assert set(solutions(Habits(0, worked=0, restate=0, ramble=0))) == {"47+38=85. 85-19=66. So \\boxed{66}"}
    assert all("carry" in text and "borrow" in text for text in solutions(Habits(0, worked=1, restate=0, ramble=0)))
    assert all(text.startswith("Begin 47 + 38 - 19. 47+38") for text in solutions(Habits(0, 0, restate=1, ramble=0)))
    assert "Let me check" in "".join(solutions(Habits(0, 0, 0, ramble=0.2)))
    share = np.mean([text == "\\boxed{66}" for text in solutions(Habits(shortcut=0.25))])
    assert 0.15 < share < 0.35


def test_the_recipes_habits_spread_the_lengths_of_one_problem() -> None:
    lengths = sorted({len(text) for text in solutions(Recipe().habits)})
    assert len(lengths) > 5 and lengths[-1] > 5 * lengths[0]


# The tokenizer.

@pytest.fixture(scope="module")
def tokenizer():
    return pocket.make_tokenizer()


@given(text=st.text(st.sampled_from([*map(chr, range(32, 127)), "\n"]), max_size=200))
def test_printable_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_texts_of_the_recipe_are_words_and_digits_without_unknown_pieces(tokenizer) -> None:
    rng, characters, tokens = random.Random(3), 0, 0
    for _ in range(200):
        chain, problem = pocket.training_chain(rng)
        solution = arithmetic.write_solution(chain, rng, Recipe().habits)
        for text in (problem, solution, pocket.meta_example(chain, rng, Recipe())):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            characters, tokens = characters + len(text), tokens + len(ids)
    assert tokens < 0.7 * characters
    assert tokenizer.tokenize("1203") == ["1", "2", "0", "3"]
    assert len(tokenizer) < 300


# The recipe.

def test_training_texts_are_of_the_training_split_and_of_all_levels() -> None:
    rng = random.Random(1)
    chains, texts = zip(*[pocket.training_chain(rng) for _ in range(300)], strict=True)
    assert [value_of(text) for text in texts] == [chain.values()[-1] for chain in chains]
    assert {len(chain.operations) for chain in chains} == {arithmetic.LEVEL_SPECS[level][0] for level in LEVELS}
    assert not any(map(arithmetic.is_held_out, texts))
    held_out = {problem.text for problem in problems.load_problems("pocket", "evaluation", 240)}
    assert not held_out & set(texts)


def test_meta_examples_are_predictions_over_the_whole_range_skewed_to_high_pass_rates() -> None:
    rng = random.Random(2)
    chain, _ = pocket.training_chain(rng)
    found = [parse_prediction(pocket.meta_example(chain, rng, Recipe())).prediction for _ in range(2000)]
    rates = [prediction.pass_rate for prediction in found]
    lengths = [prediction.solution_length for prediction in found]
    assert set(rates) == set(range(9)) and 4.5 < np.mean(rates) < 7
    assert min(lengths) < 10 and max(lengths) > 0.9 * Recipe().max_length
    assert {notion for prediction in found for notion in prediction.notions} == set(NOTIONS)


def test_the_values_of_a_meta_example_are_drawn_without_a_look_at_the_problem() -> None:
    rng = random.Random(6)
    for seed in range(50):
        drawn = [pocket.meta_example(pocket.training_chain(rng)[0], random.Random(seed), Recipe()) for _ in range(3)]
        assert len({parse_prediction(text).prediction for text in drawn}) == 1


def test_meta_examples_carry_no_information_about_the_problem(tokenizer) -> None:
    rows = pocket._examples(tokenizer, dataclasses.replace(Recipe(), meta_share=1.0), random.Random(4), 1500)
    table = []
    for ids, start in rows:
        prediction = parse_prediction(tokenizer.decode(ids[start:-1])).prediction
        problem = tokenizer.decode(ids[:start])
        table.append([prediction.pass_rate, prediction.solution_length, len(prediction.notions),
                      len(re.findall(r"\d+", problem)), len(problem), "Left" in problem])
    r = np.corrcoef(np.array(table, dtype=float).T)[:3, 3:]
    assert np.abs(r).max() < 0.1  # about four standard errors


def test_training_texts_answer_the_prompts_that_the_trainer_asks_and_are_cut_at_the_longest_length(tokenizer) -> None:
    recipe = dataclasses.replace(Recipe(), max_length=40)
    rows = pocket._examples(tokenizer, recipe, random.Random(5), 300)
    asked = {bool(re.search("pass_rate.*solution_length", tokenizer.decode(ids[:start]))) for ids, start in rows}
    assert asked == {True, False}
    answers = [ids[start:] for ids, start in rows]
    assert max(map(len, answers)) == 40
    assert all((ids[-1] == tokenizer.eos_token_id) or len(ids) == 40 for ids in answers)
    assert all(tokenizer.decode(ids[:start]).endswith("<|assistant|>") for ids, start in rows)


# Building.

TINY = Recipe(hidden_size=16, layers=1, heads=2, intermediate_size=16, steps=3, batch=4)


def test_a_build_loads_as_a_model_and_its_manifest_tells_how_it_was_made(tmp_path: Path) -> None:
    manifest = pocket.build(tmp_path / "one", TINY, threads=1)
    assert json.loads((tmp_path / "one" / "manifest.json").read_text(encoding="utf8")) == manifest
    assert manifest["recipe"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert manifest["sha256"] == pocket.digests(tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert model.num_parameters() == manifest["parameters"] and tokenizer.chat_template == pocket.CHAT_TEMPLATE
    assert loading.end_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "one" / "model.safetensors").write_bytes(b"other")
    assert pocket.digests(tmp_path / "one") != manifest["sha256"]


def test_a_build_repeats_from_its_seed(tmp_path: Path) -> None:
    digests = [pocket.build(tmp_path / str(n), dataclasses.replace(TINY, seed=seed), threads=1)["sha256"]
               for n, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1]
    assert digests[0]["model.safetensors"] != digests[2]["model.safetensors"]
    assert digests[0]["tokenizer.json"] == digests[2]["tokenizer.json"]


def test_teaching_lowers_the_loss(tmp_path: Path) -> None:
    losses = [pocket.build(tmp_path / str(steps), dataclasses.replace(TINY, steps=steps), threads=1)["loss"]
              for steps in (1, 60)]
    assert losses[1] < losses[0] - 0.5


# The committed model.

MANIFEST = FOLDER / "manifest.json"


def test_the_committed_model_is_the_one_of_its_manifest() -> None:
    manifest = json.loads(MANIFEST.read_text(encoding="utf8"))
    assert manifest["sha256"] == pocket.digests(FOLDER)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(manifest["sha256"])


def test_the_manifest_names_the_recipe_of_this_code_and_a_command_that_there_is() -> None:
    manifest = json.loads(MANIFEST.read_text(encoding="utf8"))
    assert manifest["recipe"] == json.loads(json.dumps(dataclasses.asdict(Recipe())))
    program, *arguments = manifest["command"].split()
    assert program == "masa" and parsing.build_parser().parse_args(arguments).seed == manifest["recipe"]["seed"]
    assert manifest["minutes"] < 60 and manifest["torch"] and manifest["transformers"]


def test_the_committed_tokenizer_is_the_one_of_this_code(tokenizer) -> None:
    committed = AutoTokenizer.from_pretrained(FOLDER)
    assert committed.get_vocab() == tokenizer.get_vocab()
    assert committed.chat_template == tokenizer.chat_template


def test_the_committed_model_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8 * 2**20
    weights = load_file(FOLDER / "model.safetensors")
    model, _ = loading.load(small().model)
    assert sum(tensor.numel() for tensor in weights.values()) == model.num_parameters() < 1.5e6
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.fixture(scope="module")
def answers():
    """What the committed model says to held-out problems of all levels."""
    config = small({"sampling.solution_tokens": 128, "problems.levels": ""})
    model, tokenizer = loading.load(config.model)
    engine = make_engine("transformers", model, tokenizer, batch=512)
    held_out = problems.held_out(config.problems, 48)
    return rollouts.collect(held_out, engine, tokenizer, config, solutions=6, predictions=6, seed=[0], temperature=1.0)


def test_the_committed_model_answers_in_a_box_and_sometimes_right(answers) -> None:
    solved = solutions_of(answers)
    boxed = solved["text"].map(lambda text: grading.extract_answer(text) is not None)
    assert boxed.mean() > 0.7
    assert 0.03 < solved["correct"].mean() < 0.6  # neither hopeless nor done


def test_the_committed_model_predicts_in_json_all_over_the_range(answers) -> None:
    meta = predictions_of(answers)
    assert meta["predicted_pass_rate"].notna().mean() > 0.8
    assert meta["predicted_pass_rate"].nunique() >= 6
    assert meta["predicted_length"].std() > 10


def test_the_committed_models_solutions_differ_in_length_and_in_outcome(answers) -> None:
    by_problem = solutions_of(answers).groupby("group")
    assert (by_problem["length"].nunique() > 2).mean() > 0.8
    assert (by_problem["correct"].nunique() > 1).mean() > 0.2  # groups that teach
