"""What a step of MASA costs, on paper: operations and bytes of each phase as a function of sizes, G, M, lengths, GPUs.

A phase takes as long as its operations at the hardware's rate of matrix products, or its bytes at the rate of its
memory, whichever is longer. Left out: kernels' own overhead, imbalance between GPUs, reading data, grading (which is
CPU work in milliseconds a solution). `python -m masa_lib.lessons.step_cost` prints the tables of docs/scaling.md.

W: numbers in the matrices of a forward pass. L: mean solution length, tokens. M, G: predictions, solutions a problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib import DATA
from masa_lib.models import tiers
from masa_lib.models.tiers import Architecture
from masa_lib.runs.folder import Run, runs_in

#: bytes a trained parameter: float32 weights, gradient and two moments
TRAINED = 16
GB = 2**30
#: the recorded study that the formulas are checked against
BASELINE = DATA / "runs" / "baseline"
#: bytes of a GPU for activations (computed twice, one micro-batch of 8k tokens), logits of a chunk and CUDA itself
ACTIVATIONS = 10 * GB


@dataclass(frozen=True)
class Work:
    """Operations and bytes of memory traffic of a phase."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """At so many operations and bytes a second."""
        return max(self.flops / flops, self.bytes / bandwidth)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Load:
    """One step: `problems` with `solutions` of mean `length` and `predictions` of mean `meta_length`.

    `prompt`: tokens of a prompt. `batch`: sequences decoded together on one GPU. `longest`: cap of a rollout, tokens;
    the decoding waits for the longest, at most twice the mean length. `signal`: share of the tokens of solution groups
    that carry a gradient; `meta_signal`: of meta groups. `dropped`: share of candidates that a gate drops. `cut`:
    share of the solution tokens that a cap saves.
    """

    problems: int = 128
    solutions: int = 16
    predictions: int = 0
    length: float = 6251
    meta_length: float = 2293
    prompt: float = 256
    batch: int = 64
    longest: float = 8192
    signal: float = 1.0
    meta_signal: float = 1.0
    dropped: float = 0.0
    cut: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """GPUs of one machine: operations, bytes of memory, bytes between GPUs a second, each of one GPU.

    `update_share`, `decode_share`: of the two rates, what a training reaches in practice; assumptions.
    """

    gpus: int = 8
    flops: float = 989e12
    bandwidth: float = 3.35e12
    link: float = 450e9
    memory: float = 80 * GB
    update_share: float = 0.4
    decode_share: float = 0.5


def sampling(sizes: Architecture, load: Load, itemsize: int, stream: str = "solution") -> Work:
    """Prompts and decoding of one stream on one GPU.

    Operations: `2 W` a token, `4 layers heads head_dim` a token and position attended. Bytes: all weights once a
    decoding step of a batch, and a sequence's keys and values once a token.
    """
    meta = stream == "meta"
    count = load.problems * (load.predictions if meta else load.solutions)
    length = load.meta_length if meta else load.length * (1 - load.cut)
    tokens, prompts = count * length, load.problems * load.prompt
    context = load.prompt + length / 2
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim
    tail = min(load.longest, 2 * length)
    steps = tail if count <= load.batch else tokens / load.batch + tail
    attended = tokens * context + prompts * load.prompt / 2
    return Work(flops=2 * sizes.matrices * (tokens + prompts) + attention * attended,
                bytes=itemsize * (sizes.matrices * steps + sizes.key_values * tokens * context))


def update(sizes: Architecture, tokens: float, sequence: float, checkpointed: bool = False) -> Work:
    """Forward and backward pass over so many tokens in sequences of mean length `sequence`.

    Operations: `6 W` a token (`8 W` where activations are computed twice), and three (four) times the attention's.
    """
    passes = 4 if checkpointed else 3
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * sequence / 2
    return Work(flops=passes * tokens * (2 * sizes.matrices + attention), bytes=0.0)


def phases(sizes: Architecture, load: Load, hardware: Hardware, itemsize: int = 2) -> dict[str, float]:
    """Seconds of each phase of a step in which the GPUs share the problems and weights are sharded between them.

    A gate that drops a share d of the candidates asks for predictions of P / (1 - d) problems to fill P places.
    Messages: in each of the update's two passes every GPU gets all weights once a micro-batch, here 32 a step, and
    gives all gradients (float32) once; the sampler gets all weights once.
    """
    share = dataclasses.replace(load, problems=load.problems / hardware.gpus)
    candidates = dataclasses.replace(share, problems=share.problems / (1 - load.dropped))
    decode = hardware.flops * hardware.decode_share, hardware.bandwidth * hardware.decode_share
    kept = load.length * (1 - load.cut)
    solved = share.problems * load.solutions * kept * load.signal
    predicted = candidates.problems * load.predictions * load.meta_length * load.meta_signal
    learned = update(sizes, solved, load.prompt + kept, True) + update(sizes, predicted, load.prompt + load.meta_length,
                                                                       True)
    whole, other = sizes.parameters, (hardware.gpus - 1) / hardware.gpus
    moved = other * whole * (2 * 32 * itemsize + 4 + itemsize)
    return {"solutions": sampling(sizes, share, itemsize).seconds(*decode),
            "predictions": sampling(sizes, candidates, itemsize, "meta").seconds(*decode) if load.predictions else 0.0,
            "update": learned.flops / (hardware.flops * hardware.update_share),
            "messages": moved / hardware.link}


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
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def tables(folder: str | Path = BASELINE) -> dict[str, str]:
    """The tables of docs/scaling.md by name."""
    hardware = Hardware()
    return {"check": markdown(check(folder), "phase"),
            "methods": markdown(method_table(SIZES["qwen3-8b"], hardware), "method", 1),
            "sizes": markdown(size_table(hardware), "model", 1)}


if __name__ == "__main__":
    for title, lines in tables().items():
        print(f"{title}\n\n{lines}\n")
