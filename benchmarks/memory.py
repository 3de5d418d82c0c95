"""How far the memory plan is from what a training takes: peak growth of the resident memory on the CPU.

`python benchmarks/memory.py --json` measures one sampling phase and one update of the pocket model and of SmolLM2, each
in a process of its own, in the plan's worst case: every prompt of the length the plan takes, every rollout at its cap.
Sizes are small enough for a laptop; `--tier` and `--set` measure others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

PHASES = ("sampling", "update")
#: sizes at which the measured phase takes seconds
SMALL = {"pocket": ["sampling.batch=128", "update.token_budget=8192"],
         "smollm2": ["sampling.batch=24", "sampling.solution_tokens=96", "update.token_budget=1536",
                     "update.logprob_chunk=512"]}


def main() -> None:
    """Measure every tier and phase, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", action="append", help="default: pocket and smollm2")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--phase", choices=PHASES, help="measure this one alone, in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for tier in options.tier or SMALL:
        settings = SMALL.get(tier, []) + options.set
        for phase in [options.phase] if options.phase else PHASES:
            if options.phase:
                rows.append(measure(tier, phase, settings))
            else:
                done = subprocess.run([sys.executable, __file__, "--tier", tier, "--phase", phase, "--json", "--set",
                                       *options.set, "seed=0"], check=True, stdout=subprocess.PIPE)
                rows += json.loads(done.stdout)
    if options.json:
        print(json.dumps(rows))
        return
    print("tier      phase     planned MB  measured MB  planned/measured")
    for row in rows:
        print(f"{row['tier']:<10}{row['phase']:<10}{row['planned_mb']:>10.0f}{row['measured_mb']:>13.0f}"
              f"{row['planned_mb'] / row['measured_mb']:>18.2f}")


def measure(tier: str, phase: str, settings: list[str]) -> dict[str, Any]:
    """Planned and measured peak, MB above what the process had before the model was loaded."""
    import torch

    from masa_lib.models import loading, memory, tensors, tiers

    changes = {"model.name": tier, "model.device": "cpu", "model.threads": 1}
    config = tiers.config(changes | dict(entry.split("=", 1) for entry in settings))
    loading.prepare(config)
    warm_up()
    before = resident("VmRSS")
    model, tokenizer = loading.load(config.model)
    optimizer = torch.optim.AdamW(tensors.trainable(model), lr=1e-9)
    for parameter in tensors.trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with open("/proc/self/clear_refs", "w", encoding="utf8") as file:
        file.write("5")  # the peak starts anew
    with loading.precision(config.model, model.device):
        (sample if phase == "sampling" else update)(model, config)
    expected = memory.plan(config)
    planned = sum(expected.always.values()) + sum((expected.sampling if phase == "sampling" else expected.update
                                                   ).values())
    del tokenizer
    return {"tier": tier, "phase": phase, "settings": settings, "planned_mb": planned / 2**20,
            "measured_mb": (resident("VmHWM") - before) / 2**10}


def warm_up() -> None:
    """Load what a first training step of any model loads: code and threads are not the model's memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from masa_lib.engines.in_process import TransformersEngine
    from masa_lib.method import objective

    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))
    from masa_lib.config import Config

    samples = make_samples(2, 1, 4, 4, 64)
    objective.accumulate_gradients(model, samples, Config().update, 1.0)
    torch.optim.AdamW(model.parameters()).step()
    TransformersEngine(model, [], batch=2).generate(make_requests(2, 4, 4, 64))


def make_samples(problems: int, group: int, prompt: int, longest: int, vocab: int) -> list[Any]:
    """Samples of the worst case; lengths differ a little, so that groups mix in a micro-batch as in training."""
    import random

    from masa_lib.engines.logprobs import Sample

    rng = random.Random(0)
    prompts = [tuple(rng.randrange(vocab) for _ in range(prompt)) for _ in range(problems)]
    lengths = [longest - rng.randrange(2) for _ in range(problems * group)]
    return [Sample(prompts[index % problems], tuple(rng.randrange(vocab) for _ in range(length)), (0.0,) * length,
                   1.0, 1.0 / longest) for index, length in enumerate(lengths)]


def make_requests(count: int, prompt: int, longest: int, vocab: int) -> list[Any]:
    """Requests of the worst case."""
    import random

    from masa_lib.engines import Request

    rng = random.Random(0)
    return [Request(tuple(rng.randrange(vocab) for _ in range(prompt)), longest, seed) for seed in range(count)]


def sample(model: Any, config: Any) -> None:
    """One full batch that no end token shortens."""
    from masa_lib.engines.in_process import TransformersEngine
    from masa_lib.models import memory

    batch = config.sampling.batch
    requests = make_requests(batch, memory.PROMPT_TOKENS[config.prompt.wording], config.sampling.solution_tokens,
                             model.config.vocab_size)
    TransformersEngine(model, [], batch=batch).generate(requests)


def update(model: Any, config: Any) -> None:
    """One full micro-batch."""
    from masa_lib.method import objective
    from masa_lib.models import memory

    prompt, longest = memory.PROMPT_TOKENS[config.prompt.wording], config.sampling.solution_tokens
    count = max(config.update.token_budget // (prompt + longest), 1)
    problems = min(count, config.sampling.problems)
    samples = make_samples(problems, -(-count // problems), prompt, longest, model.config.vocab_size)[:count]
    objective.accumulate_gradients(model, samples, config.update, 1.0)


def resident(name: str) -> float:
    """A line of /proc/self/status, kB."""
    with open("/proc/self/status", encoding="utf8") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(name))


if __name__ == "__main__":
    main()
