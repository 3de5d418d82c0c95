"""The hours and the disk that a training takes on one GPU, by `step_cost`: to plan by, nothing is measured."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd

from masa_lib.config import CHOOSING, Config, reads, samples_predictions
from masa_lib.models import memory, step_cost
from masa_lib.models.tiers import Architecture

#: seconds that a decoding step takes at the least, by engine, whatever the card; an assumption
LEAST = {"transformers": 0.03, "paged": 0.05, "vllm": 0.01}
#: by the makers' data sheets: GB, dense bfloat16 operations and bytes of memory a second
CARDS = {"L4": (24, 121e12, 0.3e12), "A100": (80, 312e12, 2.04e12), "H100": (80, 989e12, 3.35e12),
         "H200": (141, 989e12, 4.8e12)}
#: bytes of a recorded token of a rollout: id, log-prob and text, compressed
RECORDED = 8


def hours(config: Config, card: str, filled: float = 0.5, signal: float = 0.6) -> pd.Series:
    """What a training may take on one GPU, by `step_cost.phases`.

    Of a method that chooses, only the places it rolls out count, and reading the beliefs of its candidates. Decoding
    is assumed to reach half of the card's memory rate and to take at least LEAST a token, the update two fifths of its
    operations. Grading is left out.

    Args:
        config: of the run; its model's sizes are read as for the memory plan.
        card: one of CARDS.
        filled: mean length of an answer as a share of its cap.
        signal: share of the solutions that lie in groups with right and wrong ones, and so enter the update.

    Returns:
        Hours: reading, solutions, predictions, update, evaluations and all.

    Raises:
        PlanError: the model's sizes are not known.
    """
    size, flops, bandwidth = CARDS[card]
    sampling, evaluation, sizes = config.sampling, config.evaluation, memory.architecture(config.model.name)
    chosen = config.belief.places if config.method in CHOOSING else 1.0
    load = step_cost.Load(
        problems=max(round(chosen * sampling.problems), 1), solutions=sampling.solutions,
        predictions=sampling.predictions if samples_predictions(config) else 0,
        length=filled * sampling.solution_tokens, meta_length=filled * sampling.meta_tokens,
        prompt=memory.PROMPT_TOKENS[config.prompt.wording], batch=decoded_together(config, size), signal=signal,
        longest=max(sampling.solution_tokens, sampling.meta_tokens))
    hardware = step_cost.Hardware(gpus=1, flops=flops, bandwidth=bandwidth, memory=size * memory.GB)
    curve = config.steps // evaluation.every if evaluation.every else 0
    seconds = _seconds(config, sizes, load, hardware)
    candidates = load.problems * (config.belief.candidates if config.method in CHOOSING else 1) * reads(config)
    read = 2 * sizes.matrices * candidates * load.prompt / (flops * hardware.update_share)
    looks = [(curve, evaluation.problems, evaluation.samples), (2, evaluation.final_problems, evaluation.final_samples)]
    shown = sum(times * _seconds(config, sizes, dataclasses.replace(load, problems=problems, solutions=samples),
                                 hardware)["solutions"] for times, problems, samples in looks)
    found = pd.Series({"reading": read, **seconds}) * config.steps
    found["evaluations"] = shown
    return pd.concat([found, pd.Series({"all": found.sum()})]) / 3600


def _seconds(config: Config, sizes: Architecture, load: step_cost.Load,
             hardware: step_cost.Hardware) -> dict[str, float]:
    """Of each phase of a step, with the least that a token takes whatever the card."""
    found = step_cost.phases(sizes, load, hardware, 2 if config.model.precision == "bfloat16" else 4)
    for stream, count, cap in (("solutions", load.solutions, config.sampling.solution_tokens),
                               ("predictions", load.predictions, config.sampling.meta_tokens)):
        passes = math.ceil(load.problems * count / load.batch) * cap
        found[stream] = max(found[stream], LEAST[config.sampling.engine] * passes)
    return {name: found[name] for name in ("solutions", "predictions", "update")}


def disk(config: Config, filled: float = 0.5) -> dict[str, float]:
    """GB that a run writes: its checkpoints, one more while it is written, the final model, recorded rollouts.

    Args:
        config: of the run.
        filled: see `hours`.
    """
    sampling, record, planned = config.sampling, config.record, memory.plan(config)
    kept = record.checkpoints_kept + record.keep_best + 1
    steps = config.steps // record.rollouts_every if record.rollouts_every else 0
    written = steps * sampling.problems * sampling.solutions * filled * sampling.solution_tokens * RECORDED
    final = {"none": 0, "bfloat16": 2, "float32": 4}[record.final_model] * planned.parameters
    sizes = {"checkpoints": kept * planned.trained * 12, "final model": final, "rollouts": written}
    return {name: size / memory.GB for name, size in sizes.items()}


def text(config: Config, filled: float = 0.5) -> str:
    """Hours on each of CARDS and the disk that a run takes, as a table with what is assumed."""
    rows = []
    for card, (size, *_) in CARDS.items():
        there = memory.fits(config, size)
        rows.append({"": card, **{name: f"{value:.2f}" if there else "-" for name, value in hours(
            config, card, filled).items()}, "fits": "yes" if there else "no"})
    space = disk(config, filled)
    return "\n".join([
        f"Hours that {config.steps} steps of {config.method} with {config.model.name} take on one GPU, answers of "
        f"{filled:.0%} of their caps:", pd.DataFrame(rows).set_index("").rename_axis(None).to_string(),
        "Assumed, not measured: half of a card's memory rate while sampling, two fifths of its operations in the "
        "update,\nthree fifths of the groups with a signal. It may be off by two.",
        f"Disk {sum(space.values()):.1f} GB: " + " + ".join(
            f"{name} {size:.1f}" for name, size in space.items() if size)])


def decoded_together(config: Config, size: float) -> int:
    """Sequences that an engine decodes at once on a GPU of so many GB: its batch, or what vLLM's share has room for."""
    if config.sampling.engine != "vllm":
        return config.sampling.batch
    found, sizes = memory.plan(config, size), memory.architecture(config.model.name)
    itemsize = 2 if config.model.precision == "bfloat16" else 4
    context = memory.PROMPT_TOKENS[config.prompt.wording] + config.sampling.solution_tokens / 2
    room = found.engine - sizes.parameters * itemsize - memory.GB
    return max(int(room // (sizes.key_values * itemsize * context)), 1)
