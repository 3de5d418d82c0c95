"""The format warm-up: what is taken from the model, what is drawn blindly, and what comes out."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

import pytest
import torch
from small import small

from masa_lib import config
from masa_lib import crash_safe_folders as folders
from masa_lib.engines import logprobs, make_engine
from masa_lib.models import loading
from masa_lib.recipes import warmup
from masa_lib.recipes.warmup import Recipe
from masa_lib.tasks import grading
from masa_lib.tasks.problems import ProblemPool
from masa_lib.tasks.read_prediction import parse_prediction

CONFIG = small({"problems.levels": "1-2", "record.final_model": "float32"})
RECIPE = Recipe(problems=6, solutions=2, predictions=2, temperature=1.0, epochs=2, batch=3, check=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmup") / "model"
    warmup.build(CONFIG, folder, RECIPE, "masa warmup --out model")
    return folder


@pytest.mark.parametrize(("text", "form"), [
    ("4 + 2 = 6", r"4 + 2 = \boxed{6}"),
    ("The answer is -1,200.50.", r"The answer is \boxed{-1,200.50}"),
    ("The sum is **7**.\n", r"The sum is **\boxed{7}"),
    ("It appears 3 times.", "It appears 3 times.\n\\boxed{3}"),
    ("7-2", r"7-\boxed{2}"),
    (r"The answer is \boxed{}, so 5", r"The answer is \boxed{}, so \boxed{5}"),
    (r"So \boxed{\frac{1}{2}}, and 3 more words", r"So \boxed{\frac{1}{2}}, and 3 more words"),
    ("I cannot say.", None), ("", None)])
def test_a_solution_gets_its_last_number_boxed_unless_it_has_a_box(text: str, form: str | None) -> None:
    assert warmup.in_form(text) == form
    assert form is None or grading.extract_answer(form)


def test_a_blind_prediction_parses_and_covers_the_whole_range() -> None:
    rng, notions = random.Random(0), ["carry", "sum", "step", "digit"]
    found = [parse_prediction(warmup.blind_prediction(rng, notions, 1, 96)).prediction for _ in range(3000)]
    rates, lengths = [p.pass_rate for p in found], [p.solution_length for p in found]
    assert set(rates) == set(range(9)) and set(lengths) == set(range(1, 97))
    assert abs(sum(rates) / len(rates) - 4) < 0.2  # no value is preferred
    assert {notion for p in found for notion in p.notions} == set(notions)
    assert all(1 <= len(set(p.notions)) == len(p.notions) <= 3 for p in found)
    assert parse_prediction(warmup.blind_prediction(rng, [], 1, 96)).prediction.notions == ()


def test_predictions_know_nothing_of_their_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is given no problem, and other problems with other solutions get the very same predictions."""
    assert list(inspect.signature(warmup.blind_prediction).parameters) == ["rng", "notions", "low", "high"]
    _, tokenizer = loading.load(CONFIG.model)

    def targets(levels: str, solutions: list[str]) -> list[str]:
        rng = random.Random(7)
        pool = ProblemPool(small({"problems.levels": levels}).problems, 0).take(0, 5)
        groups = [warmup._group(problem, solutions, ["carry"], tokenizer, CONFIG, RECIPE, rng) for problem in pool]
        return [tokenizer.decode(sample.completion[:-1]) for group in groups for sample in group[len(solutions):]]

    easy, hard = targets("1", [r"\boxed{3}"]), targets("12", [])
    assert easy == hard and len(easy) == 5 * RECIPE.predictions


def test_notions_are_words_of_the_solutions_that_no_problem_holds() -> None:
    pool = ProblemPool(CONFIG.problems, 0).take(0, 2)
    known = pool[0].text.split()[0].strip(":,.")
    texts = [f"{known} carry then carry the digit", "carry on, so the digit is \\boxed{3}", "carry"]
    assert warmup.frequent_words(texts, pool, 2) == ["carry", "digit"]
    assert known.casefold() not in warmup.frequent_words(texts, pool, 99)


def test_solutions_are_kept_whether_right_or_wrong_if_they_end_with_an_answer() -> None:
    model, tokenizer = loading.load(CONFIG.model)
    engine = make_engine("transformers", model, tokenizer, batch=64)
    pool = ProblemPool(small({"problems.levels": "6-9"}).problems, 0).take(0, 8)
    table, facts = warmup.own_solutions(pool, engine, tokenizer, CONFIG, RECIPE)
    assert [len(texts) <= RECIPE.solutions for texts in table] == [True] * 8
    assert facts["solutions_sampled"] == 16 and facts["solutions_kept"] == sum(map(len, table))
    right = [grading.grade(text, problem.answer) for problem, texts in zip(pool, table, strict=True) for text in texts]
    assert facts["accuracy_kept"] == sum(right) / len(right) < 1
    with pytest.raises(warmup.WarmupError, match="raise sampling"):
        warmup.own_solutions(pool, engine, tokenizer, small({"sampling.solution_tokens": 1}), RECIPE)


def test_optimiser_steps_bring_the_loss_down() -> None:
    model, tokenizer = loading.load(CONFIG.model)
    pool = ProblemPool(CONFIG.problems, 0).take(0, 4)
    groups = [warmup._group(problem, [r"What a surprise: \boxed{1}"], ["carry"], tokenizer, CONFIG, RECIPE,
                            random.Random(0)) for problem in pool]
    losses = warmup.teach(model, groups, CONFIG, Recipe(epochs=3, batch=4, learning_rate=1e-3), random.Random(0))
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_a_model_that_has_lost_the_form_learns_it_again() -> None:
    model, tokenizer = loading.load(CONFIG.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.35 * parameter.std() * torch.randn_like(parameter)
    engine = make_engine("transformers", model, tokenizer, batch=64)
    pool, held_out = ProblemPool(CONFIG.problems, 0).take(0, 24), ProblemPool(CONFIG.problems, 1).take(0, 8)
    before = warmup.check(held_out, engine, tokenizer, CONFIG)
    groups = [warmup._group(problem, [r"So \boxed{3}"], ["carry"], tokenizer, CONFIG, RECIPE, random.Random(0))
              for problem in pool]
    warmup.teach(model, groups, CONFIG, Recipe(epochs=12, batch=12, learning_rate=2e-3), random.Random(0))
    after = warmup.check(held_out, engine, tokenizer, CONFIG)
    assert before["parse_rate"] < 0.5 < 0.9 <= after["parse_rate"]
    assert before["boxed"] < after["boxed"] and after["boxed"] >= 0.9


def test_the_folder_loads_and_says_how_it_was_made(made: Path) -> None:
    manifest = json.loads((made / folders.MANIFEST).read_text(encoding="utf8"))
    assert manifest["recipe"]["problems"] == 6 and manifest["seed"] == 0 and manifest["updates"] == 4
    assert manifest["check"]["solutions"] == 4 * CONFIG.sampling.solutions
    assert 0 < manifest["solutions_kept"] <= manifest["solutions_sampled"] == 12
    assert {"commit", "dirty"} <= set(manifest["git"]) and "model.safetensors" in manifest["sha256"]
    settings = config.load(made / "settings.toml")
    assert settings.model.weights == str(made) and settings.model.name == CONFIG.model.name
    assert settings.problems == CONFIG.problems
    model, tokenizer = loading.load(settings.model)
    original, _ = loading.load(CONFIG.model)
    assert tokenizer.chat_template
    assert not torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    ids = tuple(tokenizer("1 + 1")["input_ids"])
    sample = logprobs.Sample(ids[:-1], ids[-1:], (), 0.0, 0.0)
    assert logprobs.completion_logps(model, [sample], 1.0, 8)[0].isfinite().all()


def test_a_warm_up_repeats_itself(made: Path, tmp_path: Path) -> None:
    manifest = warmup.build(CONFIG, tmp_path / "again", RECIPE, "masa warmup")
    first = json.loads((made / folders.MANIFEST).read_text(encoding="utf8"))
    assert manifest["sha256"]["model.safetensors"] == first["sha256"]["model.safetensors"]
    assert manifest["check"] == first["check"]
