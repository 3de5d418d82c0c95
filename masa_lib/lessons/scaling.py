"""The tables of docs/scaling.md: what a step costs on several GPUs, and how well its formulas tell recorded steps.

`python -m masa_lib.lessons.scaling` prints them; the formulas are those of `masa_lib.models.step_cost`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib import DATA
from masa_lib.analysis import text_tables
from masa_lib.models import tiers
from masa_lib.models.memory import GB
from masa_lib.models.step_cost import Hardware, Load, phases, update
from masa_lib.models.tiers import Architecture
from masa_lib.runs.folder import Run, runs_in

#: bytes a trained parameter: float32 weights, gradient and two moments
TRAINED = 16
#: the recorded study that the formulas are checked against
BASELINE = DATA / "runs" / "baseline"
#: bytes of a GPU for activations (computed twice, one micro-batch of 8k tokens), logits of a chunk and CUDA itself
ACTIVATIONS = 10 * GB


def memory(sizes: Architecture, hardware: Hardware) -> dict[str, float]:
    """Bytes a GPU: the sharded training state, a whole copy of the weights for the sampler (bfloat16), activations."""
    return {"training": TRAINED * sizes.parameters / hardware.gpus, "sampler": 2 * sizes.parameters,
            "activations": ACTIVATIONS}


def sequences(sizes: Architecture, hardware: Hardware, context: float) -> int:
    """Sequences whose keys and values (bfloat16) find room beside that, in nine tenths of a GPU; negative: not even it.

    `context`: mean tokens of a sequence while it is decoded.
    """
    room = 0.9 * hardware.memory - sum(memory(sizes, hardware).values())
    return int(room // (2 * sizes.key_values * context))


METHODS = {"GRPO": Load(), "MASA": Load(predictions=16),
           "MASA, 1/3 dropped": Load(predictions=16, dropped=1 / 3, signal=1.0),
           "MASA, 1/3 dropped, a fifth cut": Load(predictions=16, dropped=1 / 3, cut=0.2)}


def method_table(sizes: Architecture, hardware: Hardware, signal: float = 2 / 3) -> pd.DataFrame:
    """Seconds of a step by phase for GRPO, MASA and the efficient variant.

    Without a gate a share `signal` of the solution tokens lies in groups with a signal and enters the update. A gate
    fills the places with problems that have one; a step as useful as GRPO's needs `signal` times the problems.

    Bounds, not forecasts: the gate drops just the groups without a signal, and the cap's cut loses no right solution.
    """
    rows = {}
    for name, load in METHODS.items():
        gated = load.dropped > 0
        load = dataclasses.replace(load, signal=1.0 if gated else signal, batch=_batch(sizes, hardware, load),
                                   problems=round(load.problems * signal) if gated else load.problems)
        rows[name] = phases(sizes, load, hardware)
    table = pd.DataFrame(rows).T
    table["step"] = table.sum(axis=1)
    table["against GRPO"] = table["step"] / table["step"].iloc[0]
    return table


def _batch(sizes: Architecture, hardware: Hardware, load: Load) -> int:
    return max(sequences(sizes, hardware, load.prompt + load.length / 2), 1)


def size_table(hardware: Hardware) -> pd.DataFrame:
    """What a GPU holds, how many sequences it decodes together, and what a training of MASA takes, by model size."""
    rows = {}
    for name, sizes in SIZES.items():
        load, parts = METHODS["MASA"], memory(sizes, hardware)
        found = sequences(sizes, hardware, load.prompt + load.length / 2)
        seconds = sum(phases(sizes, dataclasses.replace(load, batch=max(found, 1)), hardware).values())
        rows[name] = {**{f"{part} GB": size / GB for part, size in parts.items()}, "sequences": max(found, 0),
                      "hours for 314 steps": 314 * seconds / 3600 if found >= 1 else float("inf")}
    return pd.DataFrame(rows).T


#: the tiers of the paper's family, and two larger models of the same form
SIZES = {name: tier.architecture for name, tier in tiers.TIERS.items() if name in ("qwen3-4b", "qwen3-8b", "qwen3-14b")
         } | {"qwen3-32b": Architecture(64, 5120, 64, 8, 128, 25600, 151936, tied=False, head_norms=True),
              "70b": Architecture(80, 8192, 64, 8, 128, 28672, 128256, tied=False, head_norms=False)}


def check(folder: str | Path = BASELINE) -> pd.DataFrame:
    """The formulas against recorded runs of the pocket model: fitted on `grpo`, they predict every step of `masa`.

    Both phases are compute on the CPU: seconds are a rate times the operations, and for sampling a constant times the
    decoding steps. Rates are fitted to the steps of GRPO alone (least squares without an intercept).

    Returns:
        One row a phase: the median over MASA's steps of predicted over measured seconds, and of the absolute error.
    """
    sizes = tiers.TIERS["pocket"].architecture
    runs = [Run.open(path) for path in runs_in(folder)]
    steps = pd.concat([_steps(run) for run in runs], ignore_index=True)
    rows = {}
    for phase in ("generate", "update"):
        work, fit = _work(sizes, steps, phase), (steps["method"] == "grpo").to_numpy()
        seconds = steps[f"seconds_{phase}"].to_numpy()
        rates, *_ = np.linalg.lstsq(work[fit], seconds[fit], rcond=None)
        found = (work @ rates)[~fit] / seconds[~fit]
        rows[phase] = {"predicted / measured": float(np.median(found)),
                       "median error": float(np.median(np.abs(found - 1)))}
    return pd.DataFrame(rows).T


def _steps(run: Run) -> pd.DataFrame:
    sampling, meta = run.config.sampling, run.config.method == "masa"
    return run.metrics().assign(
        cap=sampling.solution_tokens, prompts=sampling.problems * (1 + meta),
        rollouts=sampling.problems * (sampling.solutions + sampling.predictions * meta))


def _work(sizes: Architecture, steps: pd.DataFrame, phase: str) -> np.ndarray:
    if phase == "update":
        return np.array([[update(sizes, tokens, 100).flops] for tokens in steps["tokens_update"]])
    tokens = steps["tokens_solution"] + steps["tokens_meta"]
    context = steps["tokens_prefill"] / steps["prompts"] + tokens / steps["rollouts"] / 2
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim
    return np.stack([2 * sizes.matrices * (tokens + steps["tokens_prefill"]) + attention * tokens * context,
                     steps["cap"]], axis=1).astype(float)


def markdown(table: pd.DataFrame, name: str, digits: int = 2) -> str:
    """A table as Markdown; infinite is what does not fit."""
    def show(value: float) -> str:
        return "does not fit" if value == float("inf") else f"{value:.{digits}f}"

    columns: Sequence[str] = [name, *table.columns]
    rows = [[str(index), *(show(value) for value in row)] for index, row in
            zip(table.index, table.itertuples(index=False), strict=True)]
    return text_tables.markdown([columns, *rows])


def tables(folder: str | Path = BASELINE) -> dict[str, str]:
    """The tables of docs/scaling.md by name."""
    hardware = Hardware()
    return {"check": markdown(check(folder), "phase"),
            "methods": markdown(method_table(SIZES["qwen3-8b"], hardware), "method", 1),
            "sizes": markdown(size_table(hardware), "model", 1)}


if __name__ == "__main__":
    for title, lines in tables().items():
        print(f"{title}\n\n{lines}\n")
