"""What it costs to read beliefs, beside the sampled predictions that they replace and the solutions that they choose.

With one model and one engine in one process, in turn: read the belief of each candidate behind its solution prompt,
sample M predictions of each candidate, sample G solutions of those that are admitted, and read all, then sample those
solutions, whose prompts the reading has computed. Prints tokens (computed for prompts and sampled, added up) and
seconds of each, and the ratios that matter: of a reading to the predictions, and of what a reading adds to a step's
solutions. Each part is measured `--repeats` times in turn, after one that warms up, and the fastest counts. `--json`
prints one object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from masa_lib.engines import Engine, Request, make_engine
from masa_lib.method import beliefs, prompts
from masa_lib.models import loading, tiers
from masa_lib.runs.provenance import environment
from masa_lib.tasks.problems import ProblemPool


def sample(engine: Engine, asked: Sequence[tuple[int, ...]], members: int, cap: int) -> int:
    """Sample a group for each prompt; tokens computed and sampled."""
    requests = [Request(prompt, cap, number) for number, prompt in enumerate(asked * members)]
    written = sum(len(answer.tokens) for answer in engine.generate(requests))
    return engine.prefill_tokens + written


def read(engine: Engine, asked: Sequence[tuple[int, ...]], question: beliefs.Question) -> int:
    """Read each belief; tokens computed."""
    engine.read(asked, question.suffix, question.choices)
    return engine.prefill_tokens


def measure(parts: dict[str, Callable[[], int]], engine: Engine, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens and seconds of each part, the fastest turn's; no turn finds anything computed by another."""
    found: dict[str, dict[str, float]] = {}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            engine.sync()
            start = time.perf_counter()
            tokens = part()
            seconds = time.perf_counter() - start
            if turn and seconds < found.get(name, {}).get("seconds", float("inf")):
                found[name] = {"tokens": tokens, "seconds": seconds}
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything as one table: options, versions, tokens and seconds of each part, ratios."""
    config = tiers.config({"model.name": options.model, "model.precision": options.precision,
                           "model.threads": options.threads})
    loading.prepare(config)
    model, tokenizer = loading.load(config.model)
    settings, drawn = config.sampling, ProblemPool(config.problems, 0).take(0, options.candidates)
    engine = make_engine(options.engine, model, tokenizer, batch=settings.batch, precision=options.precision)
    question = beliefs.question(tokenizer, config.prompt)
    solve = [tuple(prompts.encode(tokenizer, prompts.solution_messages(problem.text, config.prompt)))
             for problem in drawn]
    predict = [tuple(prompts.encode(tokenizer, prompts.meta_messages(problem.text, config.prompt,
                                                                     settings.solution_tokens))) for problem in drawn]

    def solutions() -> int:
        return sample(engine, solve[:options.admitted], settings.solutions, settings.solution_tokens)

    parts = {"reading": lambda: read(engine, solve, question),
             "predictions": lambda: sample(engine, predict, settings.predictions, settings.meta_tokens),
             "solutions": solutions,
             "reading and solutions": lambda: read(engine, solve, question) + solutions()}
    with loading.precision(config.model, model.device):
        found = measure(parts, engine, options.repeats)
    told = environment(config, "python benchmarks/reading.py " + " ".join(sys.argv[1:]))
    result = {**vars(options), "solutions": settings.solutions, "predictions": settings.predictions,
              "threads": torch.get_num_threads(), "environment": told, "parts": found}
    for kind in ("tokens", "seconds"):
        cost = {name: part[kind] for name, part in found.items()}
        result |= {f"{kind}_reading_to_predictions": cost["reading"] / cost["predictions"],
                   f"{kind}_added_to_solutions": cost["reading and solutions"] / cost["solutions"] - 1}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="tier, hub id or folder")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "paged", "vllm"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--candidates", type=int, default=30, help="problems whose belief is read")
    parser.add_argument("--admitted", type=int, default=10, help="how many of them are solved")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
        return
    for name, part in result["parts"].items():
        print(f"{name:22} {part['tokens']:9.0f} tokens {part['seconds']:9.3f} s")
    for key, value in result.items():
        if key.startswith(("tokens_", "seconds_")):
            print(f"{key:32} {value:.4f}")


if __name__ == "__main__":
    main()
