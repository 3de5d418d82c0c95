r"""A format warm-up for a model that has never seen the two prompts: it learns the form, not the task.

Solutions are the model's own, sampled at a low temperature, with the answer that they state put into `\boxed{}`; right
or wrong does not matter, but one that does not end by itself or states no number is left out. Predictions are blind:
their values are drawn without the problem at hand, so nothing about difficulty can leak into them. Deliberately no
reward and no selection: what the model can do, and what it knows of itself, is left to training.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib import engines
from masa_lib.config import Config, UpdateConfig
from masa_lib.engines import logprobs
from masa_lib.errors import MasaError
from masa_lib.method import prompts, rollouts
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading, tensors
from masa_lib.recipes import pocket
from masa_lib.runs.provenance import environment, shared
from masa_lib.tasks import grading, problems
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem
from masa_lib.training import safeguards
from masa_lib.training.rollout_bar import RolloutBar
from masa_lib.training.safeguards import TokenBudget

#: keeps the seeds of the own solutions and of the check apart from those of training steps
SEED_TAG = 15485863
_NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)")


class WarmupError(MasaError, RuntimeError):
    """A warm-up cannot be made; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a warm-up, beside the config.

    `problems`: of the training pool. `solutions`: sampled of each; every other one is asked with the problem alone, as
    the instruction lengthens what an untrained model writes. `predictions`: blind ones of each. `temperature`: of the
    solutions. `notions`: words to draw notions from. `epochs`, `batch`: passes, and problems of an optimiser step.
    `check`: held-out problems on which the result is measured.
    """

    problems: int = 128
    solutions: int = 4
    predictions: int = 4
    temperature: float = 0.3
    notions: int = 24
    epochs: int = 2
    batch: int = 8
    learning_rate: float = 1e-4
    check: int = 32


def build(config: Config, out: Path, recipe: Recipe, command: str) -> dict[str, Any]:
    """Warm a model up and write it to a folder that `from_pretrained` loads, with a manifest of how it was made.

    Args:
        config: model, problems, wording, caps and seed; `record.final_model` is the precision of the folder.
        out: folder for weights, tokenizer, chat template, `manifest.json` and `settings.toml`, the config of a training
            that starts here.
        recipe: what to teach, and how long.
        command: recorded.

    Returns:
        The manifest.

    Raises:
        WarmupError: no problems are asked for, or no solution could be brought into the form.
        ModelError, ProblemError: model or problems cannot be loaded.
    """
    if recipe.problems < 1:
        raise WarmupError(f"A warm-up needs problems to solve; --count is {recipe.problems} and must be at least 1.")
    start, rng = time.perf_counter(), random.Random(config.seed)
    source = problems.ProblemPool(config.problems, config.seed)
    held_out = problems.held_out(config.problems, recipe.check)
    model, tokenizer, sampler = engines.load_policy(config)
    held_out = problems.make_room(source, held_out, prompts.room(tokenizer, engines.context_of(sampler, model), config))
    pool = source.take(0, recipe.problems)
    with loading.precision(config.model, model.device):
        solutions, facts = own_solutions(pool, sampler, tokenizer, config, recipe)
        notions = frequent_words([text for texts in solutions for text in texts], pool, recipe.notions)
        groups = [_group(problem, texts, notions, tokenizer, config, recipe, rng)
                  for problem, texts in zip(pool, solutions, strict=True)]
        losses = teach(model, groups, config, recipe, rng)
        sampler.sync()
        facts |= {"loss_first": losses[0], "loss_last": losses[-1], "updates": len(losses), "notions": notions,
                  "check": check(held_out, sampler, tokenizer, config)}
    told = shared(config)
    manifest = {**environment(config, command), "model": Path(told.model.name).name, "recipe": asdict(recipe),
                "problems": asdict(told.problems), "prompt": asdict(config.prompt), **facts,
                "minutes": (time.perf_counter() - start) / 60}

    def write(folder: Path) -> None:
        low = tensors.final_precision(config) == "bfloat16"
        tensors.save(model, tokenizer, folder, "bfloat16" if low else "float32")
        configs.save(configs.replace(config, {"model.weights": str(out)}), folder / "settings.toml")
        manifest["sha256"] = pocket.digests(folder)
        (folder / folders.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")

    with files.writing(out, "warm up again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folders.replace_folder(out, write)
    return manifest


def own_solutions(pool: Sequence[Problem], sampler: engines.Engine, tokenizer: Any, config: Config,
                  recipe: Recipe) -> tuple[list[list[str]], dict[str, Any]]:
    """The model's own solutions in the form, for each problem, and how many of how many there are.

    Raises:
        WarmupError: there is none.
    """
    owners = [problem for problem in pool for _ in range(recipe.solutions)]
    asked = [prompts.solution_messages(problem.text, config.prompt) if number % 2 == 0
             else [{"role": "user", "content": problem.text}] for number, problem in enumerate(owners)]
    seeds = rollouts.seeds([config.seed, SEED_TAG], len(asked))
    requests = [engines.Request(tuple(prompts.encode(tokenizer, messages)), config.sampling.solution_tokens, seed,
                               recipe.temperature) for messages, seed in zip(asked, seeds, strict=True)]
    with RolloutBar(len(requests), "own solutions") as bar:
        completions = sampler.generate(requests, bar)
    texts = [in_form(tokenizer.decode(done.tokens[:-1])) if done.finish == "stop" else None for done in completions]
    kept = [(problem, text) for problem, text in zip(owners, texts, strict=True) if text]
    if not kept:
        raise WarmupError(f"None of {len(texts)} solutions ended within {config.sampling.solution_tokens} tokens with "
                          "a number; raise sampling.solution_tokens, or choose easier problems (problems.source).")
    right = grading.grade_many([text for _, text in kept], [problem.answer for problem, _ in kept],
                               problems=[problem.text for problem, _ in kept])
    table: list[list[str]] = [[] for _ in pool]
    for number, text in enumerate(texts):
        if text:
            table[number // recipe.solutions].append(text)
    return table, {"solutions_sampled": len(texts), "solutions_kept": len(kept),
                   "accuracy_kept": sum(right) / len(kept)}


def in_form(text: str) -> str | None:
    r"""A solution that ends in `\boxed{}`: as it is if it has a box, else with the last number that it states in one.

    None where there is neither. Whether the answer is right plays no part.
    """
    if grading.extract_answer(text):
        return text
    stated = list(_NUMBER.finditer(text))
    if not stated:
        return None
    last = stated[-1]
    if text[last.end():].strip(" .!*$\n"):  # the sentence goes on: say the answer once more
        return f"{text.rstrip()}\n\\boxed{{{last[0]}}}"
    return f"{text[:last.start()]}\\boxed{{{last[0]}}}"


def frequent_words(texts: Sequence[str], pool: Sequence[Problem], count: int) -> list[str]:
    """The words of four letters and more that most solutions use and no problem does; notions are drawn from them."""
    asked = {word for problem in pool for word in re.findall("[a-z]+", problem.text.casefold())}
    used = Counter(word for text in texts for word in sorted(set(re.findall("[a-z]{4,}", text.casefold()))))
    return [word for word, _ in used.most_common() if word not in asked and word != "boxed"][:count]


def blind_prediction(rng: random.Random, notions: Sequence[str], low: int, high: int) -> str:
    """A prediction in form only: every value is drawn evenly and without a look at a problem.

    The pass rate is one of all that there are, the length lies between `low` and `high` tokens.
    """
    return json.dumps({"math_notion": rng.sample(notions, min(rng.randint(1, 3), len(notions))),
                       "pass_rate": rng.randint(0, PASS_RATE_STEPS),
                       "solution_length": rng.randint(low, high)})


def teach(model: Any, groups: Sequence[Sequence[logprobs.Sample]], config: Config, recipe: Recipe,
          rng: random.Random) -> list[float]:
    """Cross-entropy on the completions, all of a problem in one optimiser step; the learning rate falls to 0.

    Args:
        model: is trained in place.
        groups: the samples of each problem.
        config: token budget, log-prob chunk, gradient clip.
        recipe: epochs, batch, learning rate.
        rng: of the order.

    Returns:
        The mean loss of each step, nats a token.
    """
    optimizer = torch.optim.AdamW(tensors.trainable(model), lr=recipe.learning_rate, weight_decay=0.0,
                                  betas=(0.9, 0.95))
    batches = [[sample for group in order[i:i + recipe.batch] for sample in group]
               for order in (rng.sample(groups, len(groups)) for _ in range(recipe.epochs))
               for i in range(0, len(groups), recipe.batch)]
    losses, budget = [], TokenBudget()
    for number, batch in enumerate(bar := tqdm(batches, desc="warm-up", unit="step")):
        rise = min(1.0, (number + 1) / max(1, len(batches) // 10))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rise * (1 - number / len(batches))
        losses.append(imitate(model, optimizer, batch, config.update, budget)[0])
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def imitate(model: Any, optimizer: torch.optim.Optimizer, samples: Sequence[logprobs.Sample], config: UpdateConfig,
            budget: TokenBudget) -> tuple[float, int]:
    """One optimiser update on the cross-entropy of the samples' completions, a mean over their tokens.

    Args:
        model: in evaluation mode.
        optimizer: of its trained parameters.
        samples: at least one; advantages and weights play no part.
        config: token budget, log-prob chunk, gradient clip.
        budget: of the micro-batches, halved where memory runs out.

    Returns:
        The loss before the update, nats a token, and the tokens that went through the model.

    Raises:
        UpdateError: loss or gradient is not finite, or one sequence is too much for the memory.
    """
    total = sum(len(sample.completion) for sample in samples)

    def passes(tokens: int) -> tuple[float, int]:
        """Loss and tokens of all samples at a budget, their gradient in the parameters."""
        optimizer.zero_grad()
        losses, computed = 0.0, 0
        for batch in logprobs.micro_batches(samples, tokens):
            loss = -logprobs.completion_logps(model, batch, 1.0, config.logprob_chunk)[0].sum() / total
            loss.backward()
            losses += loss.item()
            computed += logprobs.computed_tokens(model, batch)
        return losses, computed

    losses, computed = budget.spend(passes, samples, config.token_budget)
    safeguards.clip_gradients(tensors.trainable(model), config.gradient_clip, losses)
    safeguards.move(optimizer)
    torch.clear_autocast_cache()  # it holds the old weights in bfloat16 until the context ends
    return losses, computed


def check(held_out: Sequence[Problem], sampler: engines.Engine, tokenizer: Any, config: Config) -> dict[str, Any]:
    """What the model does on held-out problems: accuracy, pass rates met, and how often each stream keeps its form."""
    table = rollouts.collect(held_out, sampler, tokenizer, config, solutions=config.sampling.solutions,
                             predictions=config.sampling.predictions, seed=[config.seed, SEED_TAG, 1],
                             temperature=config.sampling.temperature)
    solved, meta = solutions_of(table), predictions_of(table)
    boxed = solved["finish"].eq("stop") & solved["text"].map(lambda text: bool(grading.extract_answer(text)))
    rates = solved.groupby("group")["correct"].sum().value_counts().sort_index()
    return {"problems": len(held_out), "solutions": len(solved), "predictions": len(meta),
            "accuracy": float(solved["correct"].mean()), "boxed": float(boxed.mean()),
            "parse_rate": float(meta["predicted_pass_rate"].notna().mean()),
            "solution_length": float(solved["length"].mean()), "meta_length": float(meta["length"].mean()),
            "problems_by_right_solutions": {str(key): int(value) for key, value in rates.items()}}


def _group(problem: Problem, solutions: Sequence[str], notions: Sequence[str], tokenizer: Any, config: Config,
           recipe: Recipe, rng: random.Random) -> list[logprobs.Sample]:
    """The samples of a problem: its own solutions, and blind predictions of what the meta prompt asks for."""
    limits = config.sampling
    high = config.prompt.max_length or limits.solution_tokens
    predictions = [blind_prediction(rng, notions, config.prompt.min_length, high) for _ in range(recipe.predictions)]
    streams = ((prompts.solution_messages(problem.text, config.prompt), solutions),
               (prompts.meta_messages(problem.text, config.prompt, limits.solution_tokens), predictions))
    end = loading.answer_end(tokenizer)
    return [logprobs.Sample(tuple(prompts.encode(tokenizer, messages)),
                        (*tokenizer(text, add_special_tokens=False)["input_ids"], end), (), 0.0, 0.0)
            for messages, texts in streams for text in texts]
